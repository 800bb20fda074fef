"""Datasets become `Interactions`: one function per format, found by name in `SOURCES`.

Ids are read as strings, never as numbers; a row that cannot be read is an error with its file, row and cure, or is set
aside and counted where the task asks for that; a repeated (user, item) pair keeps the latest rating and is counted.
Nothing is ever fetched from a network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from metarec.data.interactions import Interactions, RatingScale, SplitPart
from metarec.data.source_options import CONVERTED, SourceOptions, options_scale
from metarec.data.sources.assembly import PART, Note, Tables, assemble, assemble_tables
from metarec.data.sources.split_files import split_tables
from metarec.errors import DataError
from metarec.files.artifacts import load_json, recover_dir, replace_dir, verify_dir, write_json
from metarec.registry import Registry

__all__ = ["SOURCES", "Note", "SourceOptions", "Tables", "assemble", "read_source", "read_tables", "write_tables"]
Source = Callable[[Path | None, SourceOptions], Tables]
SOURCES: Registry[Source] = Registry(
    "dataset source",
    "metarec.sources",
    {
        "embedded-movielens": "metarec.data.sources.movielens:embedded_movielens",
        "movielens": "metarec.data.sources.movielens:movielens",
        "recbole": "metarec.data.sources.recbole:recbole",
        "amazon": "metarec.data.sources.reviews:amazon",
        "book-crossing": "metarec.data.sources.books:book_crossing",
        "goodbooks": "metarec.data.sources.books:goodbooks",
        "mind": "metarec.data.sources.clicks:mind",
        "dkn": "metarec.data.sources.clicks:dkn",
        "steam": "metarec.data.sources.reviews:steam",
        "yelp": "metarec.data.sources.reviews:yelp",
        "lastfm": "metarec.data.sources.clicks:lastfm",
        "table": "metarec.data.sources.table:table",
        "store": "metarec.data.sources.store:store",
        "hf-datasets": "metarec.data.sources.hf_datasets:hf_datasets",
    },
)
_LOG = logging.getLogger(__name__)


def read_source(
    name: str,
    path: Path | None = None,
    options: SourceOptions | None = None,
    files: Mapping[SplitPart, str] | None = None,
) -> Interactions:
    """Reads a dataset.

    Args:
        name: One of `SOURCES`, or ``module:attribute`` of a function like them.
        path: The dataset's folder or zip, for sources that are not embedded. What `write_tables` wrote there is read
            whatever the source.
        options: The source's options.
        files: The file of each part of a given split; the source is ``table`` then.

    Raises:
        ConfigError: There is no such source.
        DataError: Its files are missing or malformed.
    """
    options = options or SourceOptions()
    tables = read_tables(name, path, options, files)
    for note in tables.notes:
        _LOG.warning("%s", note)
    return assemble_tables(tables, quarantine=options.bad_rows == "quarantine", of_rows=options.of_rows)


def read_tables(
    name: str,
    path: Path | None = None,
    options: SourceOptions | None = None,
    files: Mapping[SplitPart, str] | None = None,
) -> Tables:
    """Reads a dataset's raw tables, unchecked but for their format; see `read_source`."""
    SOURCES.check(name)
    options = options or SourceOptions()
    if path is not None and recover_dir(path) and (path / CONVERTED).is_file():
        tables = _read_converted(path)
    else:
        tables = split_tables(path, options, files) if files else SOURCES.get(name)(path, options)
    if not isinstance(tables, Tables):
        raise DataError(
            f"the dataset source '{name}' returned a {type(tables).__name__}",
            "Return metarec.data.sources.Tables(ratings, items, where)",
        )
    scale = options_scale(options)
    return replace(tables, scale=scale) if scale else tables


def write_tables(tables: Tables, path: Path) -> None:
    """Writes raw tables as Parquet beside a description; `read_source` reads the folder in place of the original.

    Raises:
        ArtifactError: The folder exists and holds something else.
    """
    scale = [tables.scale.low, tables.scale.high] if tables.scale else None
    with replace_dir(path, "dataset") as folder:
        _texts(tables.ratings, ("rating", "timestamp", PART)).to_parquet(folder / "ratings.parquet", index=False)
        _texts(tables.items, ()).to_parquet(folder / "items.parquet", index=False)
        write_json(folder / CONVERTED, {"source": tables.where, "scale": scale, "dropped": dict(tables.dropped)})


def dropped_before(path: Path) -> Mapping[str, int]:
    """Returns by reason the rows that were dropped before `write_tables` wrote a folder; none of another one."""
    return dict(load_json(path / CONVERTED)["dropped"]) if (path / CONVERTED).is_file() else {}


def _texts(frame: pd.DataFrame, as_they_are: tuple[str, ...]) -> pd.DataFrame:
    columns = {}
    for name in frame.columns:
        numeric = name in as_they_are and pd.api.types.is_numeric_dtype(frame[name])
        columns[name] = frame[name] if numeric else frame[name].astype(str)
    return pd.DataFrame(columns)


def _read_converted(path: Path) -> Tables:
    verify_dir(path, "dataset")
    facts = load_json(path / CONVERTED)
    return Tables(
        pd.read_parquet(path / "ratings.parquet"),
        pd.read_parquet(path / "items.parquet"),
        f"'{path}'",
        RatingScale(*facts["scale"]) if facts["scale"] else None,
        dropped=facts["dropped"],
    )
