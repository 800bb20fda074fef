"""Datasets of books: Book-Crossing and goodbooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metarec.data.interactions import RatingScale
from metarec.data.source_options import SourceOptions
from metarec.data.sources.assembly import Tables
from metarec.data.sources.columns import numbers
from metarec.data.sources.delimited import delimited
from metarec.data.sources.files import need
from metarec.data.sources.shared import STARS, malformed


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
    dropped = {**malformed(ratings, books), "implicit rating (0)": int(implicit.sum())}
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
    return Tables(ratings, books, str(file), STARS, 2, malformed(ratings, books))
