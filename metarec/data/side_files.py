"""Reads what a task names beside ratings and items: vectors, graphs, users, friends, moments; joins it to the data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from metarec.data.interactions import Interactions
from metarec.data.item_graph import graph_digest, graph_vectors, read_item_graph
from metarec.data.item_vectors import read_item_vectors
from metarec.data.moments import moments_of, without_times
from metarec.data.side import SideColumns, Texts
from metarec.data.side_table import read_side_table, side_table
from metarec.data.source_options import OF_TIME, SourceOptions
from metarec.data.sources.names import recognise
from metarec.errors import DataError, suggest

_LOG = logging.getLogger(__name__)
# Name of the block of vectors that a graph of items becomes.
GRAPH = "graph"
# Name of the block that edges between users become.
FRIENDS = "friends"


def with_side(data: Interactions, path: Path | None, options: SourceOptions) -> Interactions:
    """Returns a dataset with the side information that a source's options name.

    Args:
        data: The dataset.
        path: Where it lies; file names start at its folder.
        options: The options.

    Raises:
        DataError: A file is missing or malformed, or names no user or item of the data; or a column is not there.
    """
    folder = side_folder(path)
    ids = data.catalog.ids
    vectors = {name: read_item_vectors(folder / file, ids) for name, file in options.vectors.items()}
    sources = {**data.vector_sources}
    if options.item_graph:
        if GRAPH in vectors:
            raise DataError(f"'vectors' and 'item_graph' are both called '{GRAPH}'", "Name the vectors otherwise")
        edges = read_item_graph(folder / options.item_graph, ids, options.encoding)
        vectors[GRAPH], sources[GRAPH] = graph_vectors(edges, ids), graph_digest(edges)
    side = data.side
    columns = {**side.moments}
    reviews = columns.pop(options.review, side.reviews) if options.review else side.reviews
    if options.review and reviews is None:
        raise DataError(f"the ratings have no column '{options.review}' of reviews", "Name it in 'review'")
    moments = {name: columns[name] if name in columns else _of_time(data, name, columns) for name in options.context}
    about = side.about if not options.users else users_table(folder / options.users, data.users, options.encoding)
    friends = side.friends if not options.friends else _friends(folder / options.friends, data.users, options.encoding)
    for name in moments:
        if name in about:
            raise DataError(f"'{name}' is a field of users and a column of 'context'", "Rename one of the two")
    if FRIENDS in {*about, *moments}:
        raise DataError(f"a field of users or moments is called '{FRIENDS}'", "Rename it")
    found = SideColumns(about, friends, moments, reviews)
    return replace(data, item_vectors={**data.item_vectors, **vectors}, vector_sources=sources, side=found)


def side_folder(path: Path | None) -> Path:
    """Returns where names of files beside a dataset start."""
    return Path() if path is None else path if path.is_dir() else path.parent


def _of_time(data: Interactions, name: str, columns: Sequence[str] | dict[str, Texts]) -> Texts:
    """Returns what the timestamps say of each row's moment."""
    if name not in OF_TIME:
        cure = suggest(name, [*columns, *OF_TIME])
        raise DataError(f"the ratings have no column '{name}', which 'context' names", cure)
    if data.timestamp is None:
        raise DataError(*without_times(name))
    return moments_of(data.timestamp, name)


def users_table(path: Path, users: Sequence[str], encoding: str, others: Sequence[str] = ()) -> dict[str, Texts]:
    """Reads the fields of users, each of shape (users + others,); those that the file does not name have none.

    Args:
        path: The file.
        users: Users who have rated.
        encoding: The file's encoding where it is not UTF-8.
        others: Further users, who need no row.

    Raises:
        DataError: The file is missing or malformed, or names none of the users.
    """
    frame, file = side_table(path, encoding=encoding, ids=frozenset(users)), f"'{path}'"
    key = _user_column(frame.columns, file)
    if len(frame.columns) == 1:
        raise DataError(f"{file} has no column beside '{key}'", "Add columns of what is known of users")
    ids = frame[key]
    if ids.duplicated().any():
        twice = ids[ids.duplicated()]
        raise DataError(f"{file} row {twice.index[0]} names user '{twice.iloc[0]}' twice", "Give every user one row")
    place = {name: row for row, name in enumerate(ids)}
    rows = np.array([place.get(user, -1) for user in [*users, *others]], np.int64)
    missing = int((rows[: len(users)] < 0).sum())
    if users and missing == len(users):
        raise DataError(f"{file} names no user of the ratings, e.g. '{users[0]}'", "Name users by their ids")
    if missing:
        _LOG.warning("%s: %d of %d users have no row", file, missing, len(users))
    found: dict[str, Texts] = {}
    for name in frame.columns.drop(key):
        column = np.array([*frame[name], ""], object)
        found[str(name)] = column[rows]
    return found


def _user_column(names: Iterable[str], file: str) -> str:
    key = recognise(list(map(str, names)), ["user"]).get("user")
    if key is None:
        raise DataError(f"{file} has no column 'user'", "Name the column of the users' ids 'user'")
    return key


def people_named(folder: Path, options: SourceOptions) -> list[str]:
    """Returns the ids of everyone whom the files of users and of friends name, each once.

    Raises:
        DataError: A file is missing or malformed.
    """
    found: dict[str, None] = {}
    if options.users:
        path = folder / options.users
        frame, _ = read_side_table(path, encoding=options.encoding)
        found |= dict.fromkeys(frame[_user_column(frame.columns, f"'{path}'")])
    if options.friends:
        frame, _ = read_side_table(folder / options.friends, ("user", "friend"), encoding=options.encoding)
        found |= dict.fromkeys([*frame["user"], *frame["friend"]])
    return [name for name in found if name]


def friends_of_users(
    path: Path, users: Sequence[str], encoding: str, others: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """Reads the friends of some users, whoever they are, from a file of edges, which go both ways.

    Args:
        path: The file.
        users: Users who have rated.
        encoding: The file's encoding where it is not UTF-8.
        others: Further users, whose friends come behind theirs.

    Raises:
        DataError: The file is missing or malformed, or names none of the users.
    """
    frame, file = side_table(path, ("user", "friend"), encoding=encoding, ids=frozenset(users)), f"'{path}'"
    found: dict[str, dict[str, None]] = {user: {} for user in [*users, *others]}
    one, other = (frame[name].to_numpy(object) for name in ("user", "friend"))
    for first, second in zip([*one, *other], [*other, *one], strict=True):
        if first in found and second and first != second:
            found[first][second] = None
    if users and not any(found[user] for user in users):
        raise DataError(f"no edge of {file} names a user of the ratings, e.g. '{users[0]}'", "Name users by their ids")
    return [tuple(friends) for friends in found.values()]


def _friends(path: Path, users: Sequence[str], encoding: str) -> tuple[tuple[str, ...], ...]:
    """Reads edges between users, which go both ways; those to nobody in the ratings are counted and left out."""
    place = {name: code for code, name in enumerate(users)}
    frame, file = side_table(path, ("user", "friend"), encoding=encoding, ids=place), f"'{path}'"
    one, other = (frame[name].to_numpy(object) for name in ("user", "friend"))
    friends: list[dict[str, None]] = [{} for _ in users]
    kept = 0
    for first, second in zip([*one, *other], [*other, *one], strict=True):
        if first in place and second in place and first != second:
            friends[place[first]][second] = None
            kept += 1
    if not kept:
        raise DataError(
            f"no edge of {file} joins two users of the ratings, e.g. '{users[0]}'", "Name users by their ids"
        )
    if kept < 2 * len(one):
        _LOG.warning("%s: %d of %d edges join no two users of the ratings", file, len(one) - kept // 2, len(one))
    return tuple(map(tuple, friends))
