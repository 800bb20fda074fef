"""Reads a table beside the ratings, whatever separates it: CSV, TSV, RecBole's atomic files."""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd

from metarec.data.sources.columns import text_column
from metarec.data.sources.delimited import delimited, header
from metarec.data.sources.files import File
from metarec.errors import DataError

_LOG = logging.getLogger(__name__)
_SEPARATORS = (",", "\t", ";", "|")
# RecBole writes a column's type behind its name.
_TYPE = re.compile(r":(?:token|token_seq|float|float_seq)$")


def side_table(
    path: Path, columns: Sequence[str] = (), *, encoding: str = "utf-8", ids: Collection[str] = ()
) -> pd.DataFrame:
    """Returns a table's columns as texts, and names those that nothing reads in the log; see `read_side_table`."""
    frame, unread = read_side_table(path, columns, encoding=encoding, ids=ids)
    if unread:
        _LOG.warning("columns of '%s' that nothing reads: %s", path, ", ".join(map(repr, unread)))
    return frame


def read_side_table(
    path: Path, columns: Sequence[str] = (), *, encoding: str = "utf-8", ids: Collection[str] = ()
) -> tuple[pd.DataFrame, list[str]]:
    """Returns a table's columns as texts without blanks around them, and the names of columns that are left out.

    Args:
        path: The file.
        columns: Names that its first columns get where they have others. Further ones are left out, with a warning.
        encoding: The file's encoding where it is not UTF-8.
        ids: Ids that stand in the first column: a header that is one of them is a row.

    Returns:
        The table, its index the row of the file, and names.

    Raises:
        DataError: The file is missing or malformed, holds no row, or fewer columns than are named.
    """
    if not path.is_file():
        raise DataError(f"'{path}' does not exist", "Check the path; it starts at the data's folder")
    file = File(path)
    encoding = encoding if not _is_utf8(path) else "utf-8"
    separator = max(_SEPARATORS, key=lambda mark: len(header(file, mark, encoding)))
    _check_header(file, header(file, separator, encoding), frozenset(ids) - {"user", "item", *columns})
    quotes = separator != "\t"
    try:
        read = delimited(file, {}, separator=separator, encoding=encoding, line_breaks=quotes, quotes=quotes)
    except DataError as error:
        raise DataError(error.problem, "Repair the row; in a file beside ratings none is left out") from None
    named = {str(name): _TYPE.sub("", str(name)).strip() for name in read.columns}
    frame = pd.DataFrame({here: text_column(read[name]).str.strip() for name, here in named.items() if here})
    frame.index = pd.Index(read.attrs.get("lines") or range(2, len(read) + 2))
    if frame.empty:
        raise DataError(f"{file} holds no row", "Write one row for each")
    if len(frame.columns) < len(columns):
        raise DataError(f"{file} has {len(frame.columns)} columns", f"Write these: {', '.join(columns)}")
    if columns and not set(columns) <= set(frame.columns):
        frame = frame.rename(columns=dict(zip(frame.columns, columns, strict=False)))
    unread = [name for name in frame.columns if name not in columns] if columns else []
    unread += [f"column {at}, without a name" for at, here in enumerate(named.values(), start=1) if not here]
    return frame[list(columns)] if columns else frame, unread


def _check_header(file: File, names: Sequence[str], ids: Collection[str]) -> None:
    """Refuses a header that is no header, or names a column twice."""
    found = [_TYPE.sub("", name).strip() for name in names]
    if found and found[0] in ids:
        raise DataError(f"the first row of {file} is data: '{found[0]}' is an id", "Write a header above it")
    twice = next((name for at, name in enumerate(found) if name and name in found[:at]), None)
    if twice is not None:
        raise DataError(f"{file} has two columns '{twice}'", "Rename one of them")


def _is_utf8(path: Path) -> bool:
    """Says whether a file is UTF-8, or begins with a mark that says what it is."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as stream:
        start = stream.read(2)
        stream.seek(0)
        if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return True
        try:
            while block := stream.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True
