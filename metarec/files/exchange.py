"""Puts a finished directory or file in the place of another, so that a kill at any moment leaves one of them whole.

Linux exchanges two directories in one step. Where a system or file system cannot, the old directory steps aside first;
if the process is killed right then, the next one that opens the path puts the newest whole directory back.
What killed processes leave beside a path goes with the next write. Knows nothing of what the files mean.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from metarec.errors import ArtifactError

_ASIDE = ".old"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Errors of renameat2 where the kernel or the file system does not know it.
_UNKNOWN = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EXDEV}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def beside(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """Makes a file or directory beside a path, for its new content; whatever is left there at the end is removed.

    The process holds a lock on it, by which others see that its writer lives. What killed processes left beside the
    same path is removed.

    Args:
        path: What will be replaced; its parent directory exists.
        make: Makes an empty file or directory at the path it is called with.

    Yields:
        The new path. Made without `tempfile`, whose files nobody but their owner may read.
    """
    replaces = os.path.lexists(path)
    _clean(path)
    while True:
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        make(fresh)
        with _claim(fresh, wait=True) as claimed:
            if not claimed:  # another process took it for a stray before it was locked
                continue
            try:
                yield fresh
            finally:
                _remove(fresh)
                if not replaces:
                    _clean(path)
            return


def exchange(new: Path, path: Path) -> None:
    """Puts a directory in the place of another; the old content, if any, is at `new` or gone afterwards."""
    while not _swap(new, path):
        aside = new.with_name(new.name + _ASIDE)
        if os.path.lexists(path):
            path.rename(aside)
        try:
            new.rename(path)
        except OSError as error:
            # Another process wrote the same path, or put back what this one had put aside.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _remove(aside)
            continue
        _remove(aside)
        return


def put_back(path: Path, whole: Callable[[Path], bool]) -> Path | None:
    """Puts the newest whole directory that a killed process left beside a missing path in its place.

    Args:
        path: Where it belongs; nothing happens where something is there.
        whole: Says whether a directory is complete.

    Returns:
        The directory that was put there, by its former name, or None.
    """
    if os.path.lexists(path):
        return None
    left = [stray for stray in _strays(path) if stray.is_dir() and not stray.is_symlink()]
    for stray in sorted(left, key=lambda stray: stray.stat().st_mtime, reverse=True):
        with _claim(stray) as claimed:
            if claimed and whole(stray):
                try:
                    stray.rename(path)
                except OSError:  # it came back by itself, or nothing may be changed here
                    return None
                return stray
    return None


def is_temporary(path: Path) -> bool:
    """Says whether a name is one that `beside` gives."""
    return belongs_at(path) is not None


def belongs_at(path: Path) -> Path | None:
    """Returns the path beside which `beside` made a temporary one, or None for any other name."""
    found = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}(\.old)?", path.name)
    return path.with_name(found[1]) if found else None


@contextmanager
def room_for(path: Path, size: int | None = None) -> Iterator[None]:
    """Turns the system's word for a full disk into an error that names what was written.

    Args:
        path: What is written.
        size: The bytes it needs, where they are known.

    Raises:
        ArtifactError: There is no room.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        needed = "" if size is None else f", which needs {size:,} bytes"
        raise ArtifactError(
            f"there is no room for '{path}'{needed}: {error.strerror}",
            "Free space, or choose another place (METAREC_CACHE for caches)",
        ) from None


def _clean(path: Path) -> None:
    """Removes what killed processes left beside a path, unless the path is missing: then it may be all there is."""
    for stray in _strays(path):
        with _claim(stray) as claimed:
            if claimed and os.path.lexists(path):
                _remove(stray)


def _strays(path: Path) -> list[Path]:
    """Returns what was made beside a path, by this process or others, and has not been put in its place."""
    if not path.parent.is_dir():
        return []
    start = f".{path.name}."
    with os.scandir(path.parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(start)]
    return [path.with_name(name) for name in names if re.fullmatch(r"[0-9a-f]{16}(\.old)?", name[len(start) :])]


@contextmanager
def _claim(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Locks a file or directory against other processes; says whether it is this process's.

    On a file system without locks nothing that exists is claimed, except by whom has just made it.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield wait
            return
        yield _is_at(path, handle)
    finally:
        os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _swap(new: Path, path: Path) -> bool:
    """Exchanges two paths in one step, or moves the first where the second is missing; says whether it could."""
    if _renameat2 is None:
        return False
    while True:
        code = _renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE)
        if code == 0:
            return True
        number = ctypes.get_errno()
        if number in _UNKNOWN:
            return False
        if number != errno.ENOENT:
            raise OSError(number, os.strerror(number), str(path))
        try:
            new.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue  # another process was first
        return True


def _system_call() -> Callable[..., int] | None:
    """Returns Linux's `renameat2` from the C library, or None."""
    found = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if found is not None:
        found.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return found


_renameat2 = _system_call()
