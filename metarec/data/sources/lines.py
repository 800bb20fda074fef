"""Lines of a text file, of bounded length. Knows nothing of what they hold."""

from __future__ import annotations

import io
from collections.abc import Iterator

from metarec.data.sources.files import File
from metarec.errors import DataError

MAX_LINE = 1 << 24
NUMERIC = ("rating", "timestamp")


def not_decoded(file: File, encoding: str, error: Exception) -> DataError:
    """Returns the error for a file in another encoding."""
    return DataError(
        f"{file} is not {encoding.upper()}: {error}", "Set 'encoding', e.g. to 'latin-1', or convert the file"
    )


def bounded(text: io.TextIOWrapper, file: File) -> Iterator[str]:
    """Yields the lines of a text; one that never ends is an error."""
    number = 0
    while line := text.readline(MAX_LINE):
        number += 1
        if len(line) >= MAX_LINE:
            raise DataError(f"{file} row {number} has more than {MAX_LINE:,} characters", "Check the file's format")
        yield line
