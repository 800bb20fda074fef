"""Reads a table beside the ratings, whatever separates it: CSV, TSV, RecBole's atomic files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from metarec.data.sources.columns import text_column
from metarec.data.sources.delimited import delimited, header
from metarec.data.sources.files import File
from metarec.errors import DataError

_SEPARATORS = (",", "\t", ";", "|")
# RecBole writes a column's type behind its name.
_TYPE = re.compile(r":(?:token|token_seq|float|float_seq)$")


def side_table(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Returns a table's columns as texts without blanks around them.

    Args:
        path: The file.
        columns: Names that its first columns get where they have others.

    Raises:
        DataError: The file is missing or malformed, holds no row, or fewer columns than are named.
    """
    if not path.is_file():
        raise DataError(f"'{path}' does not exist", "Check the path; it starts at the data's folder")
    file = File(path)
    separator = max(_SEPARATORS, key=lambda mark: len(header(file, mark, "utf-8")))
    read = delimited(file, {}, separator=separator, line_breaks=separator != "\t", quotes=separator != "\t")
    frame = pd.DataFrame({_TYPE.sub("", str(name)): text_column(read[name]).str.strip() for name in read.columns})
    if frame.empty:
        raise DataError(f"{file} holds no row", "Write one row for each")
    if len(frame.columns) < len(columns):
        raise DataError(f"{file} has {len(frame.columns)} columns", f"Write these: {', '.join(columns)}")
    if columns and not set(columns) <= set(frame.columns):
        frame = frame.rename(columns=dict(zip(frame.columns, columns, strict=False)))
    return frame
