"""What a service has collected: the ratings of its store, as the next training set.

Erased users are not in a store any more, so that a recommender that is trained again has not seen them either.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd

from metarec.data.interactions import RatingScale
from metarec.data.moments import moments_of
from metarec.data.source_options import OF_TIME, SourceOptions, options_scale
from metarec.data.sources.assembly import Tables
from metarec.errors import ArtifactError, DataError
from metarec.files.artifacts import load_json
from metarec.files.run_directory import FACTS, recommender_dir

_INDEX = "index.sqlite"
# What came with ratings is joined where a store has the tables: older ones have not.
_RATINGS = (
    "SELECT users.name, feedback.item, feedback.rating, feedback.at, {columns} FROM feedback"
    " JOIN users ON users.id = feedback.user_id{joins} ORDER BY feedback.user_id, feedback.version"
)
_JOIN = " LEFT JOIN {0} ON {0}.user_id = feedback.user_id AND {0}.version = feedback.version"
_LOG = logging.getLogger(__name__)


def store(path: Path | None, options: SourceOptions) -> Tables:
    """Reads the store of a service: every rating with its time, items of the trained catalog and those added since.

    Reviews that came without a rating are left out: what they were read as is no rating.

    Args:
        path: The store's directory.
        options: ``items`` is the run that the service served; left out, the one whose directory the store is in.
            ``context`` names what the moments of ratings have, ``review: review`` reads what was written.

    Raises:
        DataError: There is no store, or no run that knows its items.
    """
    if path is None or not (path / _INDEX).is_file():
        raise DataError(f"'{path}' holds no store", "Set 'path' to the directory that metarec serve --store was given")
    ratings, added = _read(path / _INDEX)
    run = Path(options.items) if isinstance(options.items, str) else path.parent
    known, scale = _trained(run)
    frame = pd.DataFrame(ratings, columns=["user", "item", "rating", "timestamp", "moment", "review", "read"])
    if read := int(frame["read"].sum()):
        _LOG.warning("%d reviews of '%s' that came without a rating are left out", read, path)
    frame = frame[frame["read"] == 0].reset_index(drop=True)
    moments = [json.loads(moment) for moment in frame["moment"]]
    said = {name: [str(moment.get(name, "")) for moment in moments] for name in options.context}
    said = {name: _filled(name, column, frame["timestamp"]) for name, column in said.items() if any(column)}
    if options.review == "review":
        said["review"] = [json.loads(text) for text in frame["review"]]
    frame = frame[["user", "item", "rating", "timestamp"]].assign(**said)
    frame["rating"] = frame["rating"].map(repr)
    items = {**known, **{item: fields for item, fields in added.items() if item not in known}}
    unknown = sorted(set(frame["item"]) - set(items))
    if unknown:
        raise DataError(
            f"'{path}' holds ratings of {len(unknown)} items that '{run}' does not know, '{unknown[0]}' among them",
            "Set options.items to the run that the service serves",
        )
    table = pd.DataFrame([{"item": item, **fields} for item, fields in items.items()]).fillna("")
    return Tables(frame, table, f"store '{path}'", options_scale(options) or scale)


def _filled(name: str, column: list[str], received: pd.Series) -> list[str]:
    """Returns a column of moments; hour, weekday and month are when a rating was received, where none came with it."""
    if name not in OF_TIME:
        return column
    return [given or read for given, read in zip(column, moments_of(received.to_numpy(), name), strict=True)]


def _read(file: Path) -> tuple[list[tuple[Any, ...]], dict[str, Mapping[str, str]]]:
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            tables = {name for name, *_ in connection.execute("SELECT name FROM sqlite_master")}
            beside, alone = "beside_ratings" in tables, "read_ratings" in tables
            columns = (
                "COALESCE(context, '{}'), COALESCE(review, '\"\"')" if beside else "'{}', '\"\"'",
                "read_ratings.version IS NOT NULL" if alone else "0",
            )
            joins = _JOIN.format("beside_ratings") * beside + _JOIN.format("read_ratings") * alone
            ratings = connection.execute(_RATINGS.format(columns=", ".join(columns), joins=joins)).fetchall()
            added = connection.execute("SELECT id, fields FROM items ORDER BY ordinal").fetchall()
    except sqlite3.Error as error:
        raise DataError(f"'{file}' cannot be read: {error}", "Check that it is a store's index") from None
    return ratings, {item: json.loads(fields) for item, fields in added}


def _trained(run: Path) -> tuple[dict[str, Mapping[str, str]], RatingScale]:
    """Returns the fields of the items that a run's recommender knows, by id, and its rating scale."""
    found = recommender_dir(run)
    if found is None:
        raise DataError(
            f"'{run}' holds no recommender, which knows the items", "Set options.items to a run's directory"
        )
    try:
        listed, facts = load_json(found / "catalog.json"), load_json(found / FACTS)
    except ArtifactError as error:
        raise DataError(str(error)) from None
    ids = listed["ids"]
    columns = listed["fields"].items()
    rows: dict[str, Mapping[str, str]] = {
        item: {name: column[place] for name, column in columns} for place, item in enumerate(ids)
    }
    return rows, RatingScale(*facts["scale"])
