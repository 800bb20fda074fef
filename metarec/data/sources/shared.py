"""What several sources share: usual scales, and checks of columns and rows."""

from __future__ import annotations

import datetime
from collections.abc import Iterable

import pandas as pd

from metarec.data.interactions import RatingScale
from metarec.data.sources.files import File
from metarec.errors import DataError, suggest

STARS = RatingScale(1.0, 5.0)
CLICKS = RatingScale(0.0, 1.0)


def has(frame: pd.DataFrame, needed: Iterable[str], file: File) -> None:
    """Raises a `DataError` if a table lacks a column."""
    for column in needed:
        if column not in frame:
            raise DataError(f"{file} has no column '{column}'", suggest(column, map(str, frame.columns)))


def malformed(ratings: pd.DataFrame, *items: pd.DataFrame) -> dict[str, int]:
    """Returns how many rows the readers set aside, by reason; those of item files are not ratings."""
    count, of_items = (sum(len(frame.attrs.get("malformed", ())) for frame in some) for some in ([ratings], items))
    return {reason: n for reason, n in (("malformed row", count), ("malformed item row", of_items)) if n}


def seconds(text: str, form: str) -> float:
    """Returns a date as seconds since 1970, NaN where it is not of the form."""
    try:
        return datetime.datetime.strptime(text, form).replace(tzinfo=datetime.timezone.utc).timestamp()
    except ValueError:
        return float("nan")
