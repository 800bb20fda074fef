"""Tables as they stand in files: fast where the file is sound, exact about the row where it is not.

Delimited text and JSON lines are read by Arrow first. Whatever Arrow refuses is read again, slowly and strictly, to
name the row and the cure. Ids are never numbers: ``007`` and ``NA`` stay what they are. Knows nothing of users, items.
"""

from __future__ import annotations

import ast
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import json as arrow_json

from metarec.artifacts import parse_json
from metarec.data.sources.files import File
from metarec.errors import DataError, suggest

BadRows = Literal["error", "quarantine"]
_MAX_LINE = 1 << 24
_NUMERIC = ("rating", "timestamp")
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
        Categorical columns of text, one row for each of the file's.

    Raises:
        DataError: A column is missing, a row is malformed or a quote stays open, or the encoding is another one.
    """
    names = list(header) if header is not None else _header(file, separator, encoding, quotes)
    chosen = dict(wanted) or {name: name for name in names}
    missing = [name for name in chosen if name not in names and name not in optional]
    if missing:
        raise DataError(f"{file} has no column '{missing[0]}'", _header_cure(missing[0], names, separator))
    chosen = {name: here for name, here in chosen.items() if name in names}
    if len(set(names)) == len(names) and not line_breaks:
        numeric = [name for name, here in chosen.items() if here in _NUMERIC]
        # Numbers are tried as numbers first: a column of ten million different times makes a poor dictionary.
        for as_numbers in [numeric, []] if numeric else [[]]:
            frame = _arrow_delimited(
                file, names, list(chosen), as_numbers, separator, header is None, encoding, quotes, escape
            )
            if frame is not None:
                return frame.rename(columns=chosen)
    rows, malformed = _strict_rows(
        file, names, separator, header is None, encoding, quotes, escape, line_breaks, bad_rows
    )
    frame = pd.DataFrame(rows, columns=names, dtype=str)[list(chosen)].rename(columns=chosen)
    frame.attrs["malformed"] = malformed
    return frame


def _header(file: File, separator: str, encoding: str, quotes: bool) -> list[str]:
    return next((row for _, row in _numbered(file, separator, encoding, quotes, None)), [])


def _header_cure(column: str, names: Sequence[str], separator: str) -> str:
    if not any(names):
        return "The file is empty"
    if len(names) == 1:
        other = [text for mark, text in _SEPARATORS.items() if mark != separator and mark in names[0]]
        if other:
            return f"Its columns look separated by {other[-1]}: set 'separator'"
    return suggest(column, names)


def _not_decoded(file: File, encoding: str, error: Exception) -> DataError:
    return DataError(
        f"{file} is not {encoding.upper()}: {error}", "Set 'encoding', e.g. to 'latin-1', or convert the file"
    )


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
                    column_names=columns, skip_rows=int(has_header), encoding=encoding, block_size=4 << 20
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
) -> tuple[list[list[str]], list[int]]:
    csv.field_size_limit(_MAX_LINE)
    rows: list[list[str]] = []
    malformed: list[int] = []
    for number, row in _numbered(file, separator, encoding, quotes, escape):
        blank = not row or (row == [""] and len(names) > 1)
        if (number == 1 and has_header) or blank:
            continue
        broken = not line_breaks and any("\n" in field for field in row)
        if broken:
            raise DataError(
                f"{file} row {number}: a quoted field goes on over the line's end; a quote is open",
                "Close the quote, or set 'line_breaks' if fields may hold line breaks",
            )
        if len(row) == len(names):
            rows.append(row)
        elif bad_rows == "quarantine":
            malformed.append(number)
        else:
            raise DataError(
                f"{file} row {number} has {len(row)} fields, the header {len(names)}",
                "Repair the row, or set 'bad_rows' to 'quarantine'",
            )
    return rows, malformed


def _numbered(
    file: File, separator: str, encoding: str, quotes: bool, escape: str | None
) -> Iterator[tuple[int, list[str]]]:
    """Yields line numbers and fields; a row that spans lines has the number of its first."""
    try:
        with file.open() as stream:
            text = io.TextIOWrapper(stream, "utf-8-sig" if encoding == "utf-8" else encoding, newline="")
            lines = _bounded(text, file)
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
        raise _not_decoded(file, encoding, error) from None
    except csv.Error as error:
        raise DataError(
            f"{file} row {before + 1} is not valid delimited text: {error}", "Close the quote, or repair the row"
        ) from None


def _bounded(text: io.TextIOWrapper, file: File) -> Iterator[str]:
    number = 0
    while line := text.readline(_MAX_LINE):
        number += 1
        if len(line) >= _MAX_LINE:
            raise DataError(f"{file} row {number} has more than {_MAX_LINE:,} characters", "Check the file's format")
        yield line


def json_lines(
    file: File, wanted: Mapping[str, str], *, literals: bool = False, bad_rows: BadRows = "error"
) -> pd.DataFrame:
    """Reads keys of a file of one JSON object a line, as text.

    Args:
        file: The file.
        wanted: Key to the name it gets here; a missing key or null gives an empty text.
        literals: Lines may be Python literals, as in some published sets.
        bad_rows: ``quarantine`` leaves lines out that are no objects, listed in ``frame.attrs["malformed"]``.

    Raises:
        DataError: A line is not an object.
    """
    if not literals and (quick := _arrow_json(file, wanted)) is not None:
        return quick
    columns: dict[str, list[str]] = {name: [] for name in wanted.values()}
    malformed: list[int] = []
    for number, record in objects(file, literals=literals, quarantine=bad_rows == "quarantine"):
        if record is None:
            malformed.append(number)
            continue
        for key, name in wanted.items():
            columns[name].append(as_text(record.get(key)))
    frame = pd.DataFrame(columns, dtype=str)
    frame.attrs["malformed"] = malformed
    return frame


def _arrow_json(file: File, wanted: Mapping[str, str]) -> pd.DataFrame | None:
    """Returns flat columns of a sound file, or None where it needs a closer look."""
    first = first_object(file)
    kinds = {str: pa.string(), bool: pa.bool_(), int: pa.int64()}
    types = {
        key: pa.float64()
        if name in _NUMERIC and not isinstance(first.get(key), str)
        else kinds.get(type(first.get(key)))
        for key, name in wanted.items()
    }
    if None in types.values() or not first:
        return None
    options = arrow_json.ParseOptions(
        explicit_schema=pa.schema(list(types.items())), unexpected_field_behavior="ignore"
    )
    with file.open() as stream:
        try:
            table = arrow_json.read_json(
                pa.PythonFile(stream, mode="r"), arrow_json.ReadOptions(block_size=_MAX_LINE), options
            )
        except (pa.ArrowException, ValueError) as error:
            if isinstance(error, DataError):
                raise
            return None
    return arrow_columns(table, wanted, str(file))


def objects(
    file: File, *, literals: bool = False, quarantine: bool = False
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields the row and the object of every line, or None for a malformed line that is set aside.

    Raises:
        DataError: A line is not an object and is not to be set aside.
    """
    try:
        with file.open() as stream:
            text = io.TextIOWrapper(stream, "utf-8-sig", newline="\n")
            for number, line in enumerate(_bounded(text, file), start=1):
                if not line.strip():
                    continue
                try:
                    record = _parsed(line, literals)
                except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
                    if quarantine:
                        yield number, None
                        continue
                    raise DataError(
                        f"{file} row {number} is not an object: {error}",
                        "Repair the row, or set 'bad_rows' to 'quarantine'",
                    ) from None
                yield number, record
    except UnicodeDecodeError as error:
        raise _not_decoded(file, "utf-8", error) from None


def first_object(file: File) -> dict[str, Any]:
    """Returns the object of the first line, empty where there is none."""
    return next((record for _, record in objects(file, quarantine=True)), None) or {}


def _parsed(line: str, literals: bool) -> dict[str, Any]:
    record = ast.literal_eval(line.strip()) if literals and not line.lstrip().startswith('{"') else parse_json(line)
    if not isinstance(record, dict):
        raise ValueError(f"found a {type(record).__name__}")
    return record


def as_text(value: Any) -> str:
    """Returns a JSON value as one text: lists joined by commas, null as nothing."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(text for text in map(as_text, value) if text)
    if isinstance(value, bool):
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, dict) else repr(value)


def arrow_columns(table: pa.Table, wanted: Mapping[str, str], where: str, optional: Sequence[str] = ()) -> pd.DataFrame:
    """Takes columns of an Arrow table as text; nulls become empty texts.

    Raises:
        DataError: A column is missing.
    """
    missing = [name for name in wanted if name not in table.column_names and name not in optional]
    if missing:
        raise DataError(f"{where} has no column '{missing[0]}'", suggest(missing[0], table.column_names))
    return pd.DataFrame(
        {here: _text_column(table.column(name)) for name, here in wanted.items() if name in table.column_names}
    )


def _text_column(column: pa.ChunkedArray) -> pd.Series:
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_struct(column.type):
        return pd.Series([as_text(value) for value in column.to_pylist()], dtype=str)
    if pa.types.is_floating(column.type):
        return pd.Series(column.to_numpy())
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
    text = column.cast(pa.string()).fill_null("").dictionary_encode().unify_dictionaries()
    frame: pd.DataFrame = pa.table({"text": text}).to_pandas()
    return frame["text"]
