"""Files of a dataset, wherever they are: in a folder, in a zip, or gzipped; with a guard against compression bombs.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from metarec.errors import DataError
from metarec.system.progress import Advance, progress

# Rating files compress 3 to 10 times, text up to about 20 times. Above both limits, a file is not a dataset.
_MAX_RATIO = 100
_SMALL_BYTES = 64 << 20
_MB = 1 << 20


@dataclass(frozen=True)
class File:
    """One file, perhaps inside a zip.

    Args:
        path: The file, or the zip that holds it.
        member: Its name inside the zip.
    """

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        """The file's own name, without its folder."""
        return PurePosixPath(self.member).name if self.member else self.path.name

    def __str__(self) -> str:
        return f"'{self.path}'" if self.member is None else f"'{self.member}' in '{self.path}'"

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Opens the content, decompressed where the name ends in ``.gz``.

        Raises:
            DataError: The file cannot be read, is damaged, or expands beyond what data does.
        """
        try:
            with (
                self._raw() as (stream, size, length),
                progress(f"reading {self.name}, MB", length / _MB, after=2.0) as advance,
            ):
                stream = io.BufferedReader(_metered(stream, advance), _MB)
                if self.name.endswith(".gz"):
                    stream = gzip.GzipFile(fileobj=stream)  # type: ignore[assignment]
                packed = self.member is not None or self.name.endswith(".gz")
                yield io.BufferedReader(_guarded(stream, size, str(self)), _MB) if packed else stream
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            # zipfile says RuntimeError of members that are encrypted or packed in a way it does not know.
            raise DataError(f"{self} cannot be read: {error}", "Fetch the file again") from None

    @contextmanager
    def _raw(self) -> Iterator[tuple[BinaryIO, int, int]]:
        """Yields the content, its size on the disk, and how much can be read from it."""
        if self.member is None:
            with self.path.open("rb") as stream:
                size = self.path.stat().st_size
                yield stream, size, size
        else:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as inner:
                info = archive.getinfo(self.member)
                yield inner, info.compress_size, info.file_size  # type: ignore[misc]


class _Watched(io.RawIOBase):
    """Passes a stream on, and tells how many bytes it has given so far."""

    def __init__(self, stream: BinaryIO, seen: Callable[[int], None]) -> None:
        self._stream, self._seen, self._read = stream, seen, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        block = self._stream.read(len(buffer))
        buffer[: len(block)] = block
        self._read += len(block)
        self._seen(self._read)
        return len(block)


def _metered(stream: BinaryIO, advance: Advance) -> _Watched:
    """Returns a stream that tells a progress bar how much of it has been read."""
    return _Watched(stream, lambda read: advance(read / _MB))


def _guarded(stream: BinaryIO, size: int, where: str) -> _Watched:
    """Returns a decompressed stream that raises once it has grown beyond what its compressed size allows."""
    limit = max(size * _MAX_RATIO, _SMALL_BYTES)

    def check(read: int) -> None:
        if read > limit:
            raise DataError(
                f"{where} expands to more than {_MAX_RATIO} times its size", "Unpack it yourself if it is genuine"
            )

    return _Watched(stream, check)


def find(path: Path | None, *patterns: str, needed: bool = True) -> File | None:
    """Finds a dataset's file by the first pattern that matches, in a folder or a zip; ``.gz`` may follow.

    Args:
        path: The folder or the zip.
        patterns: File names with wildcards, in order of preference.
        needed: Whether the file has to be there.

    Raises:
        DataError: `path` is missing, or a needed file is not there or there twice.
    """
    names = members(path)
    for pattern in patterns:
        found = [file for file in names if fnmatch(file.name, pattern) or fnmatch(file.name, f"{pattern}.gz")]
        if len(found) > 1:
            raise DataError(f"'{path}' holds {len(found)} files like '{pattern}', not one", "Keep one dataset there")
        if found:
            return found[0]
    if not needed:
        return None
    raise DataError(f"'{path}' holds no file '{patterns[0]}'", "Check that 'path' is the dataset's folder or zip")


def need(path: Path | None, *patterns: str) -> File:
    """Finds a file as `find` does, and never returns None."""
    file = find(path, *patterns)
    assert file is not None
    return file


def members(path: Path | None) -> list[File]:
    """Lists the files of a folder or a zip, by name.

    Raises:
        DataError: There is no such folder or zip, or the zip is damaged.
    """
    if path is None or not path.exists():
        raise DataError(
            f"dataset folder '{path}' does not exist", "Set 'path' to where the dataset lies, or put it there"
        )
    if path.is_dir():
        return sorted((File(file) for file in path.iterdir() if file.is_file()), key=str)
    try:
        with zipfile.ZipFile(path) as archive:
            return [File(path, info.filename) for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise DataError(
            f"'{path}' is neither a folder nor a zip: {error}", "Set 'path' to the dataset's folder"
        ) from None
