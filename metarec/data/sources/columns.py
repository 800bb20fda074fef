"""Columns of raw tables as texts, ids, numbers and times.

A number may have a decimal comma, and True and False are 1 and 0. A time may be a number since 1970, in seconds,
milli-, micro- or nanoseconds, or a date. What can be meant in two ways is neither: ``1,234`` and ``03/04/2024`` alone.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pandas as pd
import pyarrow as pa


def coded(column: pd.Series) -> tuple[list[str], np.ndarray]:
    """Returns the distinct texts of a column and each row's place among them."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        texts = [str(text) for text in column.cat.categories.to_numpy(object)]
        codes = column.cat.codes.to_numpy().astype(np.int64)
        return [*texts, ""], np.where(codes < 0, len(texts), codes)
    codes, distinct = pd.factorize(column.fillna("").astype(str))
    return [str(text) for text in distinct], codes.astype(np.int64)


def ids(column: pd.Series) -> tuple[list[str], np.ndarray]:
    """Returns the distinct ids of a column and each row's place among them; ids are the same in every Unicode form."""
    texts, codes = coded(column)
    composed = [text if text.isascii() else unicodedata.normalize("NFC", text) for text in texts]
    if composed == texts:
        return texts, codes
    place, distinct = pd.factorize(np.array(composed, object))
    return [str(text) for text in distinct], place.astype(np.int64)[codes]


def text_column(column: pd.Series) -> pd.Series:
    """Returns a column as plain text, missing values as nothing."""
    texts, codes = coded(column)
    return pd.Series(np.array(texts, object)[codes], dtype=object).reset_index(drop=True).astype("object")


def blanks(column: pd.Series) -> int:
    """Returns how many cells of a column hold nothing."""
    if pd.api.types.is_numeric_dtype(column):
        return int(column.isna().sum())
    texts, codes = coded(column)
    return int(np.array([not text.strip() for text in texts], bool)[codes].sum())


def rating_numbers(column: pd.Series) -> np.ndarray:
    """Returns ratings as floats, infinite where single precision, in which they are kept, cannot hold them."""
    number = numbers(column)
    with np.errstate(over="ignore"):
        return np.where(np.isinf(number.astype(np.float32)), np.inf, number)


def scale_without_zero(ratings: np.ndarray) -> tuple[float, float] | None:
    """Returns the scale of ratings whose zeros may mean "not rated", as of 1 to 5 stars; None where nothing says so."""
    values = np.unique(ratings[np.isfinite(ratings)])
    stars = values[values > 0]
    if values.min(initial=1) != 0 or len(stars) < 3 or not 3 <= stars[-1] <= 10 or (stars * 2 % 1).any():
        return None
    return float(min(stars[0], 1.0)), float(stars[-1])


def numbers(column: pd.Series) -> np.ndarray:
    """Returns a column as floats, NaN where it is no number. Underscores and other alphabets' digits are no numbers."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes = column.cat.codes.to_numpy()
        parsed = np.append(_parsed(column.cat.categories), np.nan)  # code -1 is a missing value
        return np.asarray(parsed[codes])
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return np.asarray(column.to_numpy(np.float64, na_value=np.nan))
    return _parsed(column)


def _parsed(texts: pd.Index | pd.Series) -> np.ndarray:
    try:
        values = pa.array(texts, pa.string()).cast(pa.float64())
        return np.asarray(values.to_numpy(zero_copy_only=False))
    except (pa.ArrowException, TypeError, UnicodeError):
        return np.array([_number(value) for value in texts], np.float64)


_COMMA = re.compile(r"[-+]?[0-9]+,(?:[0-9]{1,2}|[0-9]{4,})")
_TRUTH = {"true": 1.0, "false": 0.0}


def _number(value: object) -> float:
    text = str(value).strip()
    if not text.isascii() or "_" in text:
        return float("nan")
    if _COMMA.fullmatch(text):
        text = text.replace(",", ".")
    try:
        return _TRUTH[text.lower()] if text.lower() in _TRUTH else float(text)
    except ValueError:
        return float("nan")


def times(column: pd.Series) -> np.ndarray:
    """Returns a column as seconds since 1970 with their fractions, NaN where it is no time.

    The unit of numbers is read off their size: seconds until the year 5138, then milli-, micro- and nanoseconds. Dates
    without a zone are UTC. Of days and months in figures, the order is read off the whole column.
    """
    if pd.api.types.is_numeric_dtype(column) and not isinstance(column.dtype, pd.CategoricalDtype):
        return _in_seconds(numbers(column))
    texts, codes = coded(column)
    number = _parsed(pd.Series(texts, dtype=object))
    text = ~np.isfinite(number)
    seconds = _in_seconds(number)
    if text.any():
        seconds[text] = _dates([texts[place] for place in np.flatnonzero(text)])
    return np.asarray(seconds[codes])


def _in_seconds(number: np.ndarray) -> np.ndarray:
    finite = np.abs(number[np.isfinite(number)])
    if not len(finite):
        return np.array(number, np.float64)
    if _are_compact_dates(finite):
        written = ["" if np.isnan(value) else f"{value:.0f}" for value in number]
        return _dates([f"{text[:4]}-{text[4:6]}-{text[6:]}" for text in written])
    # One of the numbers: the mean of two huge ones would be infinite.
    size = float(np.quantile(finite, 0.5, method="lower"))
    unit = next((unit for unit in (1e9, 1e6, 1e3) if size >= 1e8 * unit), 1.0)
    return np.array(number / unit, np.float64)


def _are_compact_dates(numbers_: np.ndarray) -> bool:
    month, day = numbers_ // 100 % 100, numbers_ % 100
    inside = (numbers_ >= 19_700_101) & (numbers_ < 21_000_000) & (numbers_ % 1 == 0)
    return bool((inside & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)).all())


_FIGURES = re.compile(r"([0-9]{1,2})([./-])([0-9]{1,2})\2([0-9]{4})(?:,?[ T]+(.+))?")
# Dates with the name of a month, as in exports: Fri Nov 10 09:53:41 -0800 2017, Nov 10, 2017, 10 November 2017.
_NAMED_MONTHS = (
    "%a %b %d %H:%M:%S %z %Y",
    "%a, %d %b %Y %H:%M:%S %z",
    "%b %d, %Y",
    "%B %d, %Y",
    "%d %b %Y",
    "%d %B %Y",
)
_FRACTION = re.compile(r"(:[0-9]{2}),(?=[0-9])")
_ZONE = re.compile(r" ?(?:UTC|GMT|Z)$")


def _dates(texts: list[str]) -> np.ndarray:
    figures = [_FIGURES.fullmatch(text.strip()) for text in texts]
    pairs = [(int(found[1]), int(found[3])) for found in figures if found and found[2] != "."]
    day_first = any(first > 12 for first, _ in pairs)
    month_first = any(second > 12 for _, second in pairs)
    written = []
    for text, found in zip(texts, figures, strict=True):
        plain = text.strip()
        if found:
            if found[2] != "." and day_first == month_first:
                plain = ""
            else:
                day, month = (found[1], found[3]) if found[2] == "." or day_first else (found[3], found[1])
                plain = f"{found[4]}-{month:0>2}-{day:0>2} {found[5] or '00:00'}"
        written.append(_ZONE.sub("Z", _FRACTION.sub(r"\1.", plain)) if plain.isascii() else "")
    stamps = pd.to_datetime(pd.Series(written, dtype=object), format="ISO8601", utc=True, errors="coerce")
    for form in _NAMED_MONTHS if any(re.search("[A-Za-z]{3}", text) for text in written) else ():
        stamps = stamps.fillna(pd.to_datetime(pd.Series(written, dtype=object), format=form, utc=True, errors="coerce"))
    return np.array((stamps - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1), np.float64)
