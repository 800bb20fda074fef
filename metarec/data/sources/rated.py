"""Reads people's ratings to adapt to from one delimited file, as spreadsheets and one person's exports have them."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from metarec.data.interactions import Catalog, RatingScale
from metarec.data.moments import moments_of
from metarec.data.source_options import OF_TIME
from metarec.data.sources.columns import numbers, times
from metarec.data.sources.delimited import delimited, header, header_cure
from metarec.data.sources.files import File
from metarec.data.sources.names import recognise
from metarec.errors import DataError, shown

_LOG = logging.getLogger(__name__)
_TIME = "timestamp"
_SEPARATORS = (",", ";", "\t", "|")


def rated_rows(
    path: Path, columns: Sequence[str], *, line_breaks: bool = False, may_be_empty: bool = False
) -> list[tuple[str, ...]]:
    """Reads some columns of a delimited file: UTF-8 or UTF-16, separated by commas, semicolons, tabs or bars.

    Hour, weekday and month are read off the file's timestamps where it has no such columns.

    Args:
        path: The file; its first row names the columns, by these or other usual names.
        columns: What is wanted, ``rating`` last; the others are text. Further columns are named in the log.
        line_breaks: Whether quoted fields may hold them.
        may_be_empty: Whether the file may hold no row.

    Returns:
        The rows, in the file's order; a rating that is no number stays as it was written.

    Raises:
        DataError: The file cannot be read, has no such column, holds no rating, or a timestamp that is none.
    """
    file = File(path)
    start = f"Start the file with: {','.join(columns)}"
    of_time = [name for name in columns if name in OF_TIME]
    separator, found = _layout(file, [*columns, *([_TIME] if of_time else [])])
    names = header(file, separator, "utf-8")
    derived = [name for name in of_time if name not in found] if _TIME in found else []
    missing = next((name for name in columns if name not in found and name not in derived), None)
    if missing is not None:
        if not any(names):
            raise DataError(f"{file} is empty", f"{start}, then one row for each rating")
        also = f". '{missing}' may be read off a column '{_TIME}'" if missing in OF_TIME else ""
        cure = f"{header_cure(missing, names, separator).rstrip('.')}. {start}{also}"
        raise DataError(f"{file} has no column '{missing}'", cure)
    read = [*(name for name in columns if name not in derived and name != "rating"), *([_TIME] if derived else [])]
    rows = _rows(file, separator, found, [*read, "rating"], line_breaks=line_breaks, may_be_empty=may_be_empty)
    if not derived:
        return rows
    *texts, rating = zip(*rows, strict=True) if rows else [()] * (len(read) + 1)
    by_name = dict(zip(read, texts, strict=True))
    times = _times(file, by_name[_TIME])
    by_name |= {name: tuple(moments_of(times, name)) for name in derived}
    return list(zip(*(by_name[name] for name in columns if name != "rating"), rating, strict=True))


def _times(file: File, written: Sequence[str]) -> np.ndarray:
    """Returns timestamps as seconds since 1970, NaN where none is written."""
    found = times(pd.Series(written, dtype=object))
    for row, (text, time) in enumerate(zip(written, found, strict=True), start=2):
        if text.strip() and not np.isfinite(time):
            raise DataError(
                f"{file} row {row}: timestamp {shown(text)} is neither a number nor a date",
                "Write dates as 2024-08-07, or leave it empty",
            )
    return found


def own_ratings(path: Path, catalog: Catalog, scale: RatingScale) -> list[tuple[str, Any]]:
    """Reads one person's ratings: a file of items and ratings, or an export with titles, as of Goodreads or Letterboxd.

    Of an export, an item is the one with its id, or with its title and year; of two rows about one item the later
    counts. What the catalog does not hold is left out with a count, and so are ratings of 0 where the scale begins
    above.

    Args:
        path: The file.
        catalog: Where items are looked up.
        scale: The scale of the ratings.

    Returns:
        Items by id or title, and their ratings.

    Raises:
        DataError: The file cannot be read, has no such column, or nothing of it is in the catalog.
    """
    file = File(path)
    separator, found = _layout(file, ("rating", "title", "item", "year"))
    if not {"rating", "title"} <= set(found):
        return [(item, rating) for item, rating in rated_rows(path, ("item", "rating"))]
    columns: list[str] = [name for name in ("item", "title", "year", "rating") if name in found]
    kept: dict[str, Any] = {}
    unrated, unknown, ids = 0, [], set(catalog.ids)
    for row in _rows(file, separator, found, columns, line_breaks=True):
        named = dict(zip(columns, row, strict=True))
        rating: Any = named["rating"]
        if rating in (0, "") and scale.low > 0:
            unrated += 1
        elif (item := named.get("item") if named.get("item") in ids else _titled(catalog, named)) is None:
            unknown.append(named["title"])
        else:
            kept[item] = rating
    if unrated:
        _LOG.warning("%s: %d rows without a rating are left out", file, unrated)
    if unknown:
        said = ", ".join(repr(title) for title in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        if not kept:
            raise DataError(
                f"none of {len(unknown)} rated titles of {file} is found: {said}", "Give titles that it has"
            )
        _LOG.warning(
            "%s: %d rated titles are left out: the catalog has none, or several, of %s", file, len(unknown), said
        )
    return list(kept.items())


def _titled(catalog: Catalog, named: dict[str, str]) -> str | None:
    """Returns the id of the one item with the title, and the year if there is one, of a row of an export."""
    dated = f"{named['title']} ({named['year']})" if named.get("year") else named["title"]
    # Goodreads writes the series behind a title: The Lost Garden (Tales, #1).
    for name in (dated, named["title"], re.sub(r"\s*\([^()]*\)\s*$", "", named["title"])):
        codes = catalog.titles.find(name)
        if len(codes) == 1:
            return catalog.ids[codes[0]]
    return None


def _layout(file: File, columns: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Returns the separator by which most of some columns are found, and these: our name to the file's."""
    found = {separator: recognise(header(file, separator, "utf-8"), columns) for separator in _SEPARATORS}
    best = max(_SEPARATORS, key=lambda separator: len(found[separator]))
    return best, found[best]


def _rows(
    file: File,
    separator: str,
    found: dict[str, str],
    columns: Sequence[str],
    *,
    line_breaks: bool = False,
    may_be_empty: bool = False,
) -> list[tuple[str, ...]]:
    """Returns some columns, ``rating`` last, as rows; a rating that is no number stays as it was written."""
    wanted = {theirs: ours for ours, theirs in found.items() if ours in columns}
    frame = delimited(file, wanted, separator=separator, line_breaks=line_breaks)
    unread = [name for name in header(file, separator, "utf-8") if name not in wanted]
    if unread:
        _LOG.warning("columns of %s that nothing reads: %s", file, ", ".join(map(repr, unread)))
    if frame.empty and not may_be_empty:
        raise DataError(f"{file} holds no rating", "Write one row for each rating, or leave the file out")
    *texts, rating = (frame[name] for name in columns)
    read: list[Any] = [
        written if math.isnan(number) else float(number)
        for written, number in zip(rating.astype(object), numbers(rating), strict=True)
    ]
    return list(zip(*(column.astype(str) for column in texts), read, strict=True))
