"""Lines of a text file, of bounded length. Knows nothing of what they hold."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator

from metarec.data.sources.files import File
from metarec.errors import DataError

MAX_LINE = 1 << 24
NUMERIC = ("rating", "timestamp")


def not_decoded(file: File, encoding: str, error: Exception) -> DataError:
    """Returns the error for a file in another encoding."""
    return DataError(
        f"{file} is not {encoding.upper().removesuffix('-SIG')}: {error}",
        "Set 'encoding', e.g. to 'cp1252' or 'latin-1', or convert the file",
    )


def bounded(text: io.TextIOWrapper, file: File) -> Iterator[str]:
    """Yields the lines of a text; one that never ends is an error."""
    number = 0
    while line := text.readline(MAX_LINE):
        number += 1
        if len(line) >= MAX_LINE:
            raise DataError(f"{file} row {number} has more than {MAX_LINE:,} characters", "Check the file's format")
        yield line


def encoding_of(file: File, stated: str) -> str:
    """Returns how a file is read: as stated, unless it begins with a mark of UTF-8 or UTF-16, as Excel writes it."""
    with file.open() as stream:
        start = stream.read(3)
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    return "utf-8-sig" if start == codecs.BOM_UTF8 or stated.lower() in ("utf-8", "utf8") else stated
