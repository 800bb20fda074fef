"""Checks and describes what is named beside ratings: files of users, friends, vectors and edges, columns of moments.

A finding names the file and its rows, counted as an editor counts lines.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from metarec.data.checks.findings import SHOWN, Checked, DataFinding, Severity
from metarec.data.item_fields import field_kind
from metarec.data.item_vectors import named_vectors
from metarec.data.moments import without_times
from metarec.data.side import ABOUT
from metarec.data.side_table import read_side_table
from metarec.data.source_options import OF_TIME, SourceOptions
from metarec.data.sources.columns import text_column
from metarec.data.sources.names import recognise
from metarec.errors import DataError, suggest

CODES = (
    "side-file",
    "unread-field",
    "user-not-in-ratings",
    "user-without-row",
    "repeated-user",
    "friend-not-in-ratings",
    "repeated-edge",
    "item-not-in-catalog",
    "item-without-vector",
    "item-without-edge",
    "repeated-vector",
    "vector-not-a-number",
    "empty-moment",
)
_EDGE = ("item", "relation", "other")


def check_side(data: Checked, folder: Path, options: SourceOptions) -> list[DataFinding]:
    """Says what is wrong with the side information of a dataset.

    Args:
        data: The dataset.
        folder: Where names of files start.
        options: What names the side information.
    """
    found = _item_fields(data)
    for path, check in _parts(folder, options):
        found += _checked(check, data, path, options.encoding)
    return [*found, *_moments(data, options)]


def _item_fields(data: Checked) -> list[DataFinding]:
    """Names fields of items that tell items not apart."""
    columns = {str(name): data.catalog[name] for name in data.catalog.columns.drop(["item", "title"], errors="ignore")}
    cure = "Take them out, or name them in the task's 'features.fields' or prompt"
    where = Path(data.tables.where)
    return _kept([_unread(where, _idle(columns), "tell items not apart", cure, max(len(columns), 1))])


def _checked(
    check: Callable[[Checked, Path, str], list[DataFinding]], data: Checked, path: Path, encoding: str
) -> list[DataFinding]:
    try:
        return check(data, path, encoding)
    except DataError as error:
        return [_finding("side-file", "error", [path.name], "files", 1, error.problem, error.cure)]


def _parts(
    folder: Path, options: SourceOptions
) -> Iterator[tuple[Path, Callable[[Checked, Path, str], list[DataFinding]]]]:
    if options.users:
        yield folder / options.users, _users
    if options.friends:
        yield folder / options.friends, _friends
    if options.item_graph:
        yield folder / options.item_graph, _graph
    for file in options.vectors.values():
        yield folder / file, _vectors


def _finding(
    code: str, severity: Severity, rows: Sequence[str], of: str, total: int, message: str, cure: str
) -> DataFinding:
    return DataFinding(code, severity, len(rows), of, total, message, cure, tuple(rows[:SHOWN]), False)


def _rows(path: Path, frame: pd.DataFrame, name: str, flags: np.ndarray) -> list[str]:
    """Names the flagged rows of a file, and what they have in a column."""
    named = frame[name][np.asarray(flags, bool)]
    return [f"{path.name} {row} ({value[:80]})" for row, value in zip(named.index, named, strict=True)]


def _kept(found: Sequence[DataFinding]) -> list[DataFinding]:
    return [finding for finding in found if finding.count]


def _unread(path: Path, names: Collection[str], why: str, cure: str, total: int) -> DataFinding:
    rows = [f"'{name}'" for name in names]
    return _finding("unread-field", "note", rows, "columns", total, f"columns of '{path}' that {why}", cure)


def _users_table(data: Checked, path: Path, encoding: str) -> tuple[pd.DataFrame, str, list[str]]:
    frame, unread = read_side_table(path, encoding=encoding, ids=frozenset(data.users))
    key = recognise(list(map(str, frame.columns)), ["user"]).get("user")
    if key is None:
        raise DataError(f"'{path}' has no column 'user'", "Name the column of the users' ids 'user'")
    return frame, key, unread


def _users(data: Checked, path: Path, encoding: str) -> list[DataFinding]:
    frame, key, unread = _users_table(data, path, encoding)
    users = sorted({data.users[code] for code in data.user})
    known = frame[key].isin(users).to_numpy()
    if not known.any():
        raise DataError(f"'{path}' names no user of the ratings, e.g. '{users[0]}'", "Name users by their ids")
    if len(frame.columns) == 1:
        raise DataError(f"'{path}' has no column beside '{key}'", "Add columns of what is known of users")
    without = sorted(set(users) - set(frame[key]))
    idle = _idle({str(name): frame[name][known] for name in frame.columns.drop(key)})
    twice = frame[key].duplicated().to_numpy()
    return _kept(
        [
            _unread(path, unread, "nothing reads", "Give them a name, or take them out", len(frame.columns)),
            _unread(path, idle, "tell users not apart", "Take them out", len(frame.columns)),
            _finding(
                "repeated-user", "error", _rows(path, frame, key, twice), "rows", len(frame),
                "users that the file names again", "Give every user one row",
            ),
            _finding(
                "user-not-in-ratings", "note", _rows(path, frame, key, ~known), "rows", len(frame),
                "users who rated nothing", "They are passed over; name users by the ids of the ratings",
            ),
            _finding(
                "user-without-row", "note", without, "users", len(users),
                f"users of whom '{path}' says nothing", "Nothing is known of them; add rows",
            ),
        ]
    )  # fmt: skip


def _friends(data: Checked, path: Path, encoding: str) -> list[DataFinding]:
    frame, unread = read_side_table(path, ("user", "friend"), encoding=encoding, ids=frozenset(data.users))
    users = {data.users[code] for code in data.user}
    unlisted = ~(frame["user"].isin(users) & frame["friend"].isin(users)).to_numpy()
    if unlisted.all():
        raise DataError(
            f"no edge of '{path}' joins two users of the ratings, e.g. '{min(users)}'", "Name users by their ids"
        )
    edges = frame["user"] + " to " + frame["friend"]
    both = pd.Series([frozenset(edge) for edge in zip(frame["user"], frame["friend"], strict=True)], frame.index)
    again = (both.duplicated() | (frame["user"] == frame["friend"])).to_numpy()
    named = frame.assign(edge=edges)
    return _kept(
        [
            _unread(path, unread, "nothing reads", "An edge is two users", 2 + len(unread)),
            _finding(
                "friend-not-in-ratings", "warning", _rows(path, named, "edge", unlisted), "rows", len(frame),
                "edges that join no two users of the ratings", "They are passed over; name users by their ids",
            ),
            _finding(
                "repeated-edge", "note", _rows(path, named, "edge", again & ~unlisted), "rows", len(frame),
                "edges that are there already, the other way round too, or from a user to themselves",
                "They count once, or not at all",
            ),
        ]
    )  # fmt: skip


def _graph(data: Checked, path: Path, encoding: str) -> list[DataFinding]:
    items = data.catalog["item"]
    frame, unread = read_side_table(path, _EDGE, encoding=encoding, ids=frozenset(items))
    nothing = (frame["other"] == "").to_numpy()
    unlisted = ~frame["item"].isin(set(items)).to_numpy()
    if (unlisted | nothing).all():
        raise DataError(f"no edge of '{path}' names an item and an 'other'", "Name items by their ids")
    again = frame.duplicated().to_numpy()
    without = sorted(set(items) - {*frame["item"], *frame["other"]})
    return _kept(
        [
            _unread(path, unread, "nothing reads", "An edge is an item, a relation, another", 3 + len(unread)),
            _finding(
                "item-not-in-catalog", "warning", _rows(path, frame, "item", unlisted), "rows", len(frame),
                "edges of no item", "They are passed over; name items by their ids",
            ),
            _finding(
                "repeated-edge", "note", _rows(path, frame, "item", (again | nothing) & ~unlisted), "rows", len(frame),
                "edges that are there already, or lead to nothing", "They count once, or not at all",
            ),
            _finding(
                "item-without-edge", "note", without, "items", len(items),
                f"items of which '{path}' says nothing", "Nothing is known of them; add edges",
            ),
        ]
    )  # fmt: skip


def _vectors(data: Checked, path: Path, encoding: str) -> list[DataFinding]:
    named, vectors = named_vectors(path)
    names, items = pd.Series(named), data.catalog["item"]
    known = names.isin(set(items)).to_numpy()
    if not known.any():
        raise DataError(f"'{path}' holds no vector of any item, e.g. of '{items.iloc[0]}'", "Name them by items' ids")
    without = sorted(set(items) - set(named))

    def rows(flags: Any) -> list[str]:
        return [f"{path.name} {row + 1} ({named[row][:80]})" for row in np.flatnonzero(flags)]

    return _kept(
        [
            _finding(
                "vector-not-a-number", "error", rows(~np.isfinite(vectors).all(1)), "rows", len(named),
                "vectors with a number that is not finite", "Leave them out",
            ),
            _finding(
                "repeated-vector", "error", rows(names.duplicated().to_numpy()), "rows", len(named),
                "vectors of items that have one already", "Keep one vector for each item",
            ),
            _finding(
                "item-not-in-catalog", "note", rows(~known), "rows", len(named),
                "vectors of no item", "They are passed over; name vectors by the items' ids",
            ),
            _finding(
                "item-without-vector", "note", without, "items", len(items),
                f"items of which '{path}' holds no vector", "They get the mean of the others; add vectors",
            ),
        ]
    )  # fmt: skip


def _idle(columns: Mapping[str, pd.Series]) -> list[str]:
    """Names columns that tell nothing apart, each with the reason."""
    kinds = {name: _kind(name, column) for name, column in columns.items()}
    return [f"{name} ({kind})" for name, kind in kinds.items() if kind not in ("category", "number", "text")]


def _kind(name: str, column: pd.Series) -> str:
    return "text" if name == ABOUT else field_kind(name, column.tolist())


def _moments(data: Checked, options: SourceOptions) -> list[DataFinding]:
    ratings, found = data.tables.ratings, []
    for name in options.of_rows:
        if name in ratings:
            empty = (text_column(ratings[name]).str.strip() == "").to_numpy()
            if empty.any() and name != options.review:
                rows = [str(row) for row in data.where[empty]]
                message = f"ratings without a '{name}'"
                cure = "Nothing is known of their moment"
                found.append(_finding("empty-moment", "note", rows, "ratings", len(empty), message, cure))
        elif name not in OF_TIME or name == options.review:
            option = "review" if name == options.review else "context"
            message = f"the ratings have no column '{name}', which '{option}' names"
            columns = [str(column) for column in ratings.columns]
            found.append(_finding("side-file", "error", [f"'{name}'"], "columns", 1, message, suggest(name, columns)))
        elif data.time is None:
            message, cure = without_times(name)
            found.append(_finding("side-file", "error", [f"'{name}'"], "columns", 1, message, cure))
    there = {name: text_column(ratings[name]).str.strip() for name in options.context if name in ratings}
    idle = _idle(there)
    cure = "Take them out of 'context'"
    unread = _unread(Path(data.tables.where), idle, "tell moments not apart", cure, max(len(there), 1))
    return _kept([*found, unread])


def describe_side(data: Checked, folder: Path, options: SourceOptions) -> dict[str, Any]:
    """Returns what is known beside ratings, and of how many users, items and ratings; see `check_side`.

    Raises:
        DataError: A file is missing or malformed.
    """
    facts: dict[str, Any] = {}
    ratings, users = data.tables.ratings, {data.users[code] for code in data.user}
    items = set(data.catalog["item"])
    if options.users:
        frame, key, _ = _users_table(data, folder / options.users, options.encoding)
        own = frame[frame[key].isin(users)]
        facts["users_fields"] = {
            str(name): _column(own[name], _kind(str(name), own[name])) for name in own.columns.drop(key)
        }
    if options.friends:
        path = folder / options.friends
        frame, _ = read_side_table(path, ("user", "friend"), encoding=options.encoding, ids=users)
        own = frame[frame["user"].isin(users) & frame["friend"].isin(users)]
        facts["friends"] = {"edges": len(own), "users": len({*own["user"], *own["friend"]})}
    if options.item_graph:
        path = folder / options.item_graph
        frame, _ = read_side_table(path, _EDGE, encoding=options.encoding, ids=items)
        own = frame[frame["item"].isin(items)]
        facts["item_graph"] = {
            "edges": len(own), "relations": own["relation"].nunique(), "items": own["item"].nunique()
        }  # fmt: skip
    if options.vectors:
        read = {name: named_vectors(folder / file) for name, file in options.vectors.items()}
        facts["vectors"] = {
            name: {"items": len(items & set(named)), "numbers": vectors.shape[1]}
            for name, (named, vectors) in read.items()
        }
    moments = {name: text_column(ratings[name]).str.strip() if name in ratings else None for name in options.context}
    if moments:
        facts["moments"] = {
            name: {"read off timestamps": data.time is not None}
            if column is None
            else _column(column, _kind(name, column))
            for name, column in moments.items()
        }
    if options.review in ratings:
        facts["reviews"] = _column(text_column(ratings[options.review]).str.strip(), "text")
    return facts


def _column(column: pd.Series, kind: str) -> dict[str, Any]:
    filled = column[column != ""]
    return {"is": kind, "filled": len(filled) / max(len(column), 1), "distinct": int(filled.nunique())}
