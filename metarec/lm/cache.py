"""Fills directories of arrays with one row or more per item, share by share, so that a stopped process can go on.

Processes that fill the same cache at the same time read different shares of it. A process holds a lock on the share
that it reads; the lock ends with the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from metarec.artifacts import MANIFEST, verify_dir, write_manifest
from metarec.errors import ArtifactError
from metarec.progress import progress

BLOCK_ITEMS = 64
# A share is as much as is read again at most after a crash, and as others wait for at the end.
_SHARE_BLOCKS = 4
_WAIT_SECONDS = 0.1
_DONE = "done.npy"
Arrays = Mapping[str, np.ndarray]


def fill_cache(
    path: Path,
    kind: str,
    lengths: np.ndarray,
    arrays: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    read: Callable[[np.ndarray, Arrays], None],
    finish: Callable[[Arrays], None] = lambda _: None,
) -> None:
    """Fills a cache unless it is there and whole.

    Args:
        path: The cache's directory.
        kind: What it is, see `verify_dir`.
        lengths: Tokens of every item, shape (items,); items of like length are read together.
        arrays: Names of its arrays and their shapes; each becomes ``NAME.npy``.
        dtype: Theirs; float64 or float32.
        read: Called with item codes, a block of them, and the arrays on disk, writes what is read of these items.
        finish: Called once with the filled arrays, may write more files into the directory.
    """
    if _is_whole(path, kind):
        return
    order = np.argsort(lengths, kind="stable")
    blocks = np.array_split(order, range(BLOCK_ITEMS, len(order), BLOCK_ITEMS))
    shares = [blocks[start : start + _SHARE_BLOCKS] for start in range(0, len(blocks), _SHARE_BLOCKS)]
    locks = path / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "start"):
        if _is_whole(path, kind):
            return
        if (path / MANIFEST).exists():  # it was complete once, and is damaged
            (path / _DONE).unlink(missing_ok=True)
            (path / MANIFEST).unlink()
        precision = np.float64 if dtype == torch.float64 else np.float32
        into = {name: _open(path / f"{name}.npy", shape, precision) for name, shape in arrays.items()}
        done = _open(path / _DONE, (len(shares),), np.bool_)
    work = np.array([sum(int(lengths[block].sum()) for block in share) for share in shares])
    with progress(f"reading {len(order):,} items once", int(work.sum())) as advance:
        while not done.all():
            taken = _take(done, locks)
            if taken is None:
                time.sleep(_WAIT_SECONDS)
                continue
            share, held = taken
            with held:
                tokens = int(work[done].sum())
                for block in shares[share]:
                    read(block, into)
                    tokens += int(lengths[block].sum())
                    advance(tokens)
                for array in into.values():
                    array.flush()
                done[share] = True
                done.flush()
    with FileLock(locks / "finish"):
        if not (path / MANIFEST).exists():
            finish(into)
            write_manifest(path, kind)


def _is_whole(path: Path, kind: str) -> bool:
    try:
        verify_dir(path, kind)
    except ArtifactError:
        return False
    return True


def _open(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.memmap:
    """Opens an array on disk, or makes one of zeros, which appears with its whole length or not at all."""
    if not path.exists():
        fresh = path.with_name(f"{path.name}.new")
        np.lib.format.open_memmap(fresh, "w+", dtype, shape)
        fresh.replace(path)
    return np.load(path, mmap_mode="r+", allow_pickle=False)  # type: ignore[no-any-return]


def _take(done: np.memmap, locks: Path) -> tuple[int, AbstractContextManager[object]] | None:
    """Returns a share that is neither done nor taken, and the hold on it, or None where all others are taken."""
    for share in np.flatnonzero(~done).tolist():
        lock = FileLock(locks / str(share))
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            continue
        if not done[share]:
            return share, held
        lock.release()
    return None
