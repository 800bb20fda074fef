"""Fills directories of arrays with rows for every item, share by share, so that a stopped process can go on.

Processes that fill the same cache at the same time read different shares of it. A process holds a lock on the share
that it reads; the lock ends with the process. A finished share carries its digest until the whole directory has one.
Arrays have their room on the disk before they are mapped: on a full one, a write through a mapping kills the process.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout

from metarec.artifacts import MANIFEST, is_whole, verify_dir, write_manifest
from metarec.errors import ArtifactError
from metarec.exchange import room_for
from metarec.progress import progress

BLOCK_ITEMS = 64
# A share is as much as is read again at most after a crash, and as others wait for at the end.
_SHARE_BLOCKS = 4
_WAIT_SECONDS = 0.1
_SHARES = "shares.npy"
_DIGEST_BYTES = hashlib.sha256().digest_size
_ZEROS = bytes(1 << 20)
_LOG = logging.getLogger(__name__)
Arrays = Mapping[str, np.ndarray]


def fill_cache(
    path: Path,
    kind: str,
    lengths: np.ndarray,
    arrays: Mapping[str, tuple[np.ndarray, tuple[int, ...]]],
    dtype: torch.dtype,
    read: Callable[[np.ndarray, Arrays], None],
    finish: Callable[[Arrays], None] = lambda _: None,
) -> None:
    """Fills a cache unless it is there and whole.

    Args:
        path: The cache's directory.
        kind: What it is, see `metarec.artifacts.verify_dir`.
        lengths: Tokens of every item, shape (items,); items of like length are read together.
        arrays: By name, how many rows every item has, and the shape of a row; each becomes ``NAME.npy``.
        dtype: Theirs; float64 or float32.
        read: Called with item codes, a block of them, and the arrays on disk, writes what is read of these items.
        finish: Called once with the filled arrays, may write more files into the directory.

    Raises:
        ArtifactError: The disk has no room for it.
    """
    if is_whole(path, kind):
        return
    order = np.argsort(lengths, kind="stable")
    blocks = np.array_split(order, range(BLOCK_ITEMS, len(order), BLOCK_ITEMS))
    shares = [blocks[start : start + _SHARE_BLOCKS] for start in range(0, len(blocks), _SHARE_BLOCKS)]
    offsets = {name: np.concatenate([[0], np.cumsum(counts)]) for name, (counts, _) in arrays.items()}
    precision = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
    shapes = {name: (int(offsets[name][-1]), *row) for name, (_, row) in arrays.items()}
    size = sum(int(np.prod(shape)) for shape in shapes.values()) * precision.itemsize
    locks = path / "locks"
    with room_for(path, size):
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / "start"):
            if (path / MANIFEST).exists():
                with suppress(ArtifactError):
                    verify_dir(path, kind)
                    return  # another process was first
                (path / _SHARES).unlink(missing_ok=True)
                (path / MANIFEST).unlink()
            with _nothing_left(path, [*(f"{name}.npy" for name in shapes), _SHARES]):
                into = {name: _open(path / f"{name}.npy", shape, precision) for name, shape in shapes.items()}
                record = _open(path / _SHARES, (len(shares), _DIGEST_BYTES + 1), np.dtype(np.uint8))

            def digest(share: int) -> np.ndarray:
                return _digest(into, offsets, np.concatenate(shares[share]))

            _check_finished(record, digest, path)
    work = np.array([sum(int(lengths[block].sum()) for block in share) for share in shares])
    with progress(f"reading {len(order):,} items once", int(work.sum())) as advance:
        while not _finished(record).all():
            taken = _take(record, locks)
            if taken is None:
                time.sleep(_WAIT_SECONDS)
                continue
            share, held = taken
            with held:
                tokens = int(work[_finished(record)].sum())
                for block in shares[share]:
                    read(block, into)
                    tokens += int(lengths[block].sum())
                    advance(tokens)
                for array in into.values():
                    array.flush()
                record[share, :-1] = digest(share)
                record.flush()
                record[share, -1] = 1
                record.flush()
    with room_for(path, size), FileLock(locks / "finish"):
        if not (path / MANIFEST).exists():
            finish(into)
            write_manifest(path, kind)


def _finished(record: np.ndarray) -> np.ndarray:
    finished: np.ndarray = record[:, -1] == 1
    return finished


def _digest(arrays: Arrays, offsets: Mapping[str, np.ndarray], items: np.ndarray) -> np.ndarray:
    """Returns the SHA-256 of some items' rows as bytes."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        for item in items:
            found.update(array[offsets[name][item] : offsets[name][item + 1]].tobytes())
    return np.frombuffer(found.digest(), np.uint8)


def _check_finished(record: np.memmap, digest: Callable[[int], np.ndarray], path: Path) -> None:
    """Takes back shares whose rows are not what their digest says."""
    finished = np.flatnonzero(_finished(record)).tolist()
    damaged = [share for share in finished if not np.array_equal(record[share, :-1], digest(share))]
    if damaged:
        record[damaged] = 0
        _LOG.warning(
            "'%s' is damaged in %d of its %d finished shares; they are read again", path, len(damaged), len(finished)
        )


def _open(path: Path, shape: Sequence[int], dtype: np.dtype[np.generic]) -> np.memmap:
    """Opens an array on disk, or makes one of zeros, which appears with its whole length or not at all."""
    head = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(head, facts)
    start = head.getvalue()
    size = len(start) + int(np.prod(shape)) * dtype.itemsize
    if not _begins(path, start, size):
        fresh = path.with_name(f"{path.name}.new")
        try:
            with fresh.open("wb") as stream:
                stream.write(start)
                stream.flush()
                _allocate(stream, size)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    return np.memmap(path, dtype, "r+", len(start), tuple(shape))


@contextmanager
def _nothing_left(path: Path, names: Sequence[str]) -> Iterator[None]:
    """Removes those files of a directory that are new when the disk is full before all of them are there."""
    new = [path / name for name in names if not (path / name).exists()]
    try:
        yield
    except OSError:
        for file in new:
            file.unlink(missing_ok=True)
        raise


def _begins(path: Path, start: bytes, size: int) -> bool:
    """Says whether a file is there and has the header and the length that it should have."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(start)) == start and os.fstat(stream.fileno()).st_size == size
    except FileNotFoundError:
        return False


def _allocate(stream: BinaryIO, size: int) -> None:
    """Gives a file its room on the disk up to a length."""
    try:
        os.posix_fallocate(stream.fileno(), 0, size)
    except (AttributeError, OSError) as error:  # macOS has no such call, some file systems neither
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        while (left := size - stream.tell()) > 0:
            stream.write(_ZEROS[:left])


def _take(record: np.ndarray, locks: Path) -> tuple[int, AbstractContextManager[object]] | None:
    """Returns a share that is neither finished nor taken, and the hold on it, or None where all others are taken."""
    for share in np.flatnonzero(~_finished(record)).tolist():
        lock = FileLock(locks / str(share))
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            continue
        if record[share, -1] != 1:
            return share, held
        lock.release()
    return None
