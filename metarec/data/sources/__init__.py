"""Datasets become `Interactions`: one function per format, listed in the plain dict `SOURCES`.

Ids are read as strings, never as numbers; a row that cannot be read is an error with its file, row and cure, or is set
aside and counted where the task asks for that; a repeated (user, item) pair keeps the latest rating and is counted.
Nothing is ever fetched from a network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd

from metarec.artifacts import load_json, replace_dir, verify_dir, write_json
from metarec.data.interactions import Interactions, RatingScale
from metarec.data.sources import formats
from metarec.data.sources.assembly import Tables, assemble, assemble_tables
from metarec.data.sources.formats import SourceOptions
from metarec.errors import DataError, suggest

__all__ = ["SOURCES", "SourceOptions", "Tables", "assemble", "read_source", "read_tables", "write_tables"]
SOURCES: dict[str, Callable[[Path | None, SourceOptions], Tables]] = {
    "embedded-movielens": formats.embedded_movielens,
    "movielens": formats.movielens,
    "recbole": formats.recbole,
    "amazon": formats.amazon,
    "book-crossing": formats.book_crossing,
    "goodbooks": formats.goodbooks,
    "mind": formats.mind,
    "steam": formats.steam,
    "yelp": formats.yelp,
    "lastfm": formats.lastfm,
    "table": formats.table,
    "hf-datasets": formats.hf_datasets,
}
_CONVERTED = "dataset.json"


def read_source(name: str, path: Path | None = None, options: SourceOptions | None = None) -> Interactions:
    """Reads a dataset.

    Args:
        name: A key of `SOURCES`.
        path: The dataset's folder or zip, for sources that are not embedded. What `write_tables` wrote there is read
            whatever the source.
        options: What the source needs to be told.

    Raises:
        DataError: The source is unknown, or its files are missing or malformed.
    """
    options = options or SourceOptions()
    return assemble_tables(read_tables(name, path, options), quarantine=options.bad_rows == "quarantine")


def read_tables(name: str, path: Path | None = None, options: SourceOptions | None = None) -> Tables:
    """Reads a dataset's raw tables, unchecked but for their format; see `read_source`."""
    if name not in SOURCES:
        raise DataError(f"no source is called '{name}'", suggest(name, SOURCES))
    options = options or SourceOptions()
    if path is not None and (path / _CONVERTED).is_file():
        return _read_converted(path)
    tables = SOURCES[name](path, options)
    scale = formats.options_scale(options)
    return replace(tables, scale=scale) if scale else tables


def write_tables(tables: Tables, path: Path) -> None:
    """Writes raw tables as Parquet beside a description; `read_source` reads the folder in place of the original.

    Raises:
        ArtifactError: The folder exists and holds something else.
    """
    scale = [tables.scale.low, tables.scale.high] if tables.scale else None
    with replace_dir(path, "dataset") as folder:
        _texts(tables.ratings, ("rating", "timestamp")).to_parquet(folder / "ratings.parquet", index=False)
        _texts(tables.items, ()).to_parquet(folder / "items.parquet", index=False)
        write_json(folder / _CONVERTED, {"source": tables.where, "scale": scale, "dropped": dict(tables.dropped)})


def _texts(frame: pd.DataFrame, as_they_are: tuple[str, ...]) -> pd.DataFrame:
    columns = {}
    for name in frame.columns:
        numeric = name in as_they_are and pd.api.types.is_numeric_dtype(frame[name])
        columns[name] = frame[name] if numeric else frame[name].astype(str)
    return pd.DataFrame(columns)


def _read_converted(path: Path) -> Tables:
    verify_dir(path, "dataset")
    facts = load_json(path / _CONVERTED)
    return Tables(
        pd.read_parquet(path / "ratings.parquet"),
        pd.read_parquet(path / "items.parquet"),
        f"'{path}'",
        RatingScale(*facts["scale"]) if facts["scale"] else None,
        dropped=facts["dropped"],
    )
