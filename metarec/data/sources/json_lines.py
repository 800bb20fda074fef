"""Reads one JSON object a line as columns of text."""

from __future__ import annotations

import ast
import io
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import pandas as pd
import pyarrow as pa
from pyarrow import json as arrow_json

from metarec.data.source_options import BadRows
from metarec.data.sources.arrow import arrow_columns
from metarec.data.sources.files import File
from metarec.data.sources.lines import MAX_LINE, NUMERIC, bounded, encoding_of, not_decoded
from metarec.data.sources.texts import as_text
from metarec.errors import DataError
from metarec.files.artifacts import parse_json


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
        if name in NUMERIC and not isinstance(first.get(key), str)
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
                pa.PythonFile(stream, mode="r"), arrow_json.ReadOptions(block_size=MAX_LINE), options
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
            text = io.TextIOWrapper(stream, encoding_of(file, "utf-8"), newline="\n")
            for number, line in enumerate(bounded(text, file), start=1):
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
    except UnicodeError as error:
        raise not_decoded(file, encoding_of(file, "utf-8"), error) from None


def keys_of(file: File, lines: int = 100) -> list[str]:
    """Returns the keys of the first objects, in the order in which they first appear."""
    records = (record for _, record in objects(file, quarantine=True) if record)
    return list(dict.fromkeys(key for record in islice(records, lines) for key in record))


def first_object(file: File) -> dict[str, Any]:
    """Returns the object of the first line, empty where there is none."""
    return next((record for _, record in objects(file, quarantine=True)), None) or {}


def _parsed(line: str, literals: bool) -> dict[str, Any]:
    record = ast.literal_eval(line.strip()) if literals and not line.lstrip().startswith('{"') else parse_json(line)
    if not isinstance(record, dict):
        raise ValueError(f"found a {type(record).__name__}")
    return record
