"""Reads delimited text as columns of text.

Arrow reads a sound file fast; one that it refuses is read again line by line, strictly, to name the row and the cure.
Ids are never numbers: ``007`` and ``NA`` stay what they are. Knows nothing of users, items.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv as arrow_csv

from metarec.data.source_options import BadRows
from metarec.data.sources.files import File
from metarec.data.sources.lines import MAX_LINE, NUMERIC, bounded, encoding_of, not_decoded
from metarec.errors import DataError, suggest

_SEPARATORS = {",": "','", ";": "';'", "\t": "a tab", "|": "'|'", "::": "'::'"}


def delimited(
    file: File,
    wanted: Mapping[str, str],
    *,
    separator: str = ",",
    header: Sequence[str] | None = None,
    encoding: str = "utf-8",
    quotes: bool = True,
    escape: str | None = None,
    line_breaks: bool = False,
    optional: Sequence[str] = (),
    bad_rows: BadRows = "error",
) -> pd.DataFrame:
    """Reads columns of a delimited file as text.

    Args:
        file: The file.
        wanted: The file's column to the name it gets here. Empty takes all under their own names.
        separator: One character, or ``::``.
        header: Column names where the file has none of its own.
        encoding: The file's encoding.
        quotes: Whether ``"`` quotes fields.
        escape: What escapes a quote inside a field.
        line_breaks: Whether a quoted field may hold one; if not, an open quote is noticed.
        optional: Columns that may be missing.
        bad_rows: ``quarantine`` leaves rows with another number of fields out and lists them in
            ``frame.attrs["malformed"]``.

    Returns:
        Categorical columns of text, one row for each of the file's. Where lines of the file are no rows of it,
        ``frame.attrs["lines"]`` has the line of each row.

    Raises:
        DataError: A column is missing, a row is malformed or a quote stays open, or the encoding is another one.
    """
    encoding = encoding_of(file, encoding)
    names = list(header) if header is not None else _header(file, separator, encoding, quotes)
    chosen = dict(wanted) or {name: name for name in names}
    missing = [name for name in chosen if name not in names and name not in optional]
    if missing:
        raise DataError(f"{file} has no column '{missing[0]}'", header_cure(missing[0], names, separator))
    chosen = {name: here for name, here in chosen.items() if name in names}
    if len(set(names)) == len(names) and not line_breaks and encoding != "utf-16":
        numeric = [name for name, here in chosen.items() if here in NUMERIC]
        # Numbers are tried as numbers first: a column of ten million different times makes a poor dictionary.
        for as_numbers in [numeric, []] if numeric else [[]]:
            frame = _arrow_delimited(
                file, names, list(chosen), as_numbers, separator, header is None, encoding, quotes, escape
            )
            if frame is not None:
                return frame.rename(columns=chosen)
    rows, lines, malformed = _strict_rows(
        file, names, separator, header is None, encoding, quotes, escape, line_breaks, bad_rows
    )
    frame = pd.DataFrame(rows, columns=names, dtype=str)[list(chosen)].rename(columns=chosen)
    frame.attrs |= {"malformed": malformed, "lines": lines}
    return frame


def header(file: File, separator: str, encoding: str) -> list[str]:
    """Returns the names in the first row of a file, none where it is empty."""
    return _header(file, separator, encoding_of(file, encoding), quotes=True)


def _header(file: File, separator: str, encoding: str, quotes: bool) -> list[str]:
    return next((row for _, row in _numbered(file, separator, encoding, quotes, None)), [])


def header_cure(column: str, names: Sequence[str], separator: str) -> str:
    """Returns what to do about a column that is not there."""
    if not any(names):
        return "The file is empty"
    if len(names) == 1:
        other = [text for mark, text in _SEPARATORS.items() if mark != separator and mark in names[0]]
        if other:
            return f"Its columns look separated by {other[-1]}: set 'separator'"
    return suggest(column, names)


def _arrow_delimited(
    file: File,
    names: Sequence[str],
    chosen: Sequence[str],
    as_numbers: Sequence[str],
    separator: str,
    has_header: bool,
    encoding: str,
    quotes: bool,
    escape: str | None,
) -> pd.DataFrame | None:
    """Returns the columns, or None where the file needs a closer look."""
    columns = list(names)
    if separator == "::":
        # Arrow splits at one character: every second column is the nothing between two colons.
        columns = [part for name in names for part in (f"{name}", f"\0{name}")][:-1]
    category = pa.dictionary(pa.int32(), pa.string())
    with file.open() as stream:
        counted = _Counted(stream)
        try:
            table = arrow_csv.read_csv(
                pa.PythonFile(counted, mode="r"),
                read_options=arrow_csv.ReadOptions(
                    column_names=columns,
                    skip_rows=int(has_header),
                    encoding=encoding.removesuffix("-sig"),
                    block_size=4 << 20,
                ),
                parse_options=arrow_csv.ParseOptions(
                    delimiter=separator[0], quote_char='"' if quotes else False, escape_char=escape or False
                ),
                convert_options=arrow_csv.ConvertOptions(
                    column_types={**dict.fromkeys(columns, category), **dict.fromkeys(as_numbers, pa.float64())},
                    include_columns=list(chosen),
                    null_values=[],
                ),
            )
        except (pa.ArrowException, UnicodeDecodeError, LookupError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            return None
    if len(table) != counted.lines - int(has_header):
        return None
    frame: pd.DataFrame = table.unify_dictionaries().to_pandas()
    # What is not finite is wanted as it was written: NaN, 1e999.
    return frame if all(np.isfinite(frame[name]).all() for name in as_numbers) else None


class _Counted(io.RawIOBase):
    """Counts lines on the way, so that a quote that swallows some is noticed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._newlines = 0
        self._last = b"\n"

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        if block:
            self._newlines += block.count(b"\n")
            self._last = block[-1:]
        return block

    @property
    def lines(self) -> int:
        return self._newlines + (self._last != b"\n")


def _strict_rows(
    file: File,
    names: Sequence[str],
    separator: str,
    has_header: bool,
    encoding: str,
    quotes: bool,
    escape: str | None,
    line_breaks: bool,
    bad_rows: BadRows,
) -> tuple[list[list[str]], list[int], list[int]]:
    """Returns rows, the line of each, and the lines of those that are none."""
    csv.field_size_limit(MAX_LINE)
    rows: list[list[str]] = []
    lines: list[int] = []
    malformed: list[int] = []
    for number, row in _numbered(file, separator, encoding, quotes, escape):
        blank = not row or (row == [""] and len(names) > 1)
        if (number == 1 and has_header) or blank:
            continue
        broken = not line_breaks and any("\n" in field for field in row)
        if broken:
            raise DataError(
                f"{file} row {number}: a quoted field goes on over the line's end; a quote is open",
                "Close the quote, or set 'line_breaks' (--line-breaks) if fields may hold line breaks",
            )
        if len(row) == len(names):
            rows.append(row)
            lines.append(number)
        elif bad_rows == "quarantine":
            malformed.append(number)
        else:
            raise DataError(
                f"{file} row {number} has {len(row)} fields, the header {len(names)}",
                "Repair the row, or set 'bad_rows' to 'quarantine'",
            )
    return rows, lines, malformed


def _numbered(
    file: File, separator: str, encoding: str, quotes: bool, escape: str | None
) -> Iterator[tuple[int, list[str]]]:
    """Yields line numbers and fields; a row that spans lines has the number of its first."""
    try:
        with file.open() as stream:
            text = io.TextIOWrapper(stream, encoding, newline="")
            lines = bounded(text, file)
            if separator == "::" or not quotes:
                for number, line in enumerate(lines, start=1):
                    yield number, line.rstrip("\r\n").split(separator)
                return
            reader = csv.reader(lines, delimiter=separator, strict=True, escapechar=escape)
            before = 0
            for row in reader:
                yield before + 1, row
                before = reader.line_num
    except (UnicodeError, LookupError) as error:
        raise not_decoded(file, encoding, error) from None
    except csv.Error as error:
        raise DataError(
            f"{file} row {before + 1} is not valid delimited text: {error}", "Close the quote, or repair the row"
        ) from None
