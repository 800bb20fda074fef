"""Columns of raw tables as texts, ids and numbers."""

from __future__ import annotations

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


def text_column(column: pd.Series) -> pd.Series:
    """Returns a column as plain text, missing values as nothing."""
    texts, codes = coded(column)
    return pd.Series(np.array(texts, object)[codes], dtype=object).reset_index(drop=True).astype("object")


def rating_numbers(column: pd.Series) -> np.ndarray:
    """Returns ratings as floats, infinite where single precision, in which they are kept, cannot hold them."""
    number = numbers(column)
    with np.errstate(over="ignore"):
        return np.where(np.isinf(number.astype(np.float32)), np.inf, number)


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


def _number(value: object) -> float:
    text = str(value).strip()
    if not text.isascii() or "_" in text:
        return float("nan")
    try:
        return float(text)
    except ValueError:
        return float("nan")
