"""Reads people's ratings to adapt to from one delimited file, as spreadsheets write it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metarec.data.sources.columns import numbers
from metarec.data.sources.delimited import delimited, header, header_cure
from metarec.data.sources.files import File
from metarec.data.sources.names import recognise
from metarec.errors import DataError

_SEPARATORS = (",", ";", "\t", "|")


def rated_rows(path: Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Reads some columns of a delimited file: UTF-8 or UTF-16, separated by commas, semicolons, tabs or bars.

    Args:
        path: The file; its first row names the columns, by these or other usual names.
        columns: What is wanted, ``rating`` last; the others are text.

    Returns:
        The rows, at least one; a rating that is no number stays as it was written.

    Raises:
        DataError: The file cannot be read, has no such column, or holds no rating.
    """
    file = File(path)
    start = f"Start the file with: {','.join(columns)}"
    for separator in _SEPARATORS:
        names = header(file, separator, "utf-8")
        found = recognise(names, columns)
        if len(found) == len(columns):
            break
    else:
        names = header(file, ",", "utf-8")
        if not any(names):
            raise DataError(f"{file} is empty", f"{start}, then one row for each rating")
        missing = next(name for name in columns if name not in recognise(names, columns))
        raise DataError(f"{file} has no column '{missing}'", f"{header_cure(missing, names, ',').rstrip('.')}. {start}")
    frame = delimited(file, {theirs: ours for ours, theirs in found.items()}, separator=separator)
    if frame.empty:
        raise DataError(f"{file} holds no rating", "Write one row for each rating, or leave the file out")
    *texts, rating = (frame[name] for name in columns)
    read: list[Any] = [
        written if math.isnan(number) else float(number)
        for written, number in zip(rating.astype(object), numbers(rating), strict=True)
    ]
    return list(zip(*(column.astype(str) for column in texts), read, strict=True))
