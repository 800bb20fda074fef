"""Keeps what is read of items on disk, item by item, in the order in which they were first asked for.

A cache is a directory with one file of rows per array and an index of fixed-size entries. Rows are appended before
their entry, so that a killed process leaves whole items or none. Every item carries a digest, which is checked when a
process first reads it; a damaged item counts as missing and is read again. Several processes may fill one cache.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from metarec.files.exchange import room_for
from metarec.system.progress import progress
from metarec.system.threads import for_each

BLOCK_ITEMS = 64
_INDEX, _LOCK = "index.bin", "lock"
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Rows:
    """An array of an item cache.

    Args:
        counts: How many rows every item has, shape (items,).
        shape: Shape of a row.
        dtype: Type of its numbers.
    """

    counts: np.ndarray
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class ItemCache:
    """Rows of arrays per item.

    Args:
        path: The cache's directory, named by everything its content depends on; made where it is missing.
        arrays: Its arrays by name.
    """

    def __init__(self, path: Path, arrays: Mapping[str, Rows]) -> None:
        self.path = path
        self._arrays = dict(arrays)
        items = len(next(iter(self._arrays.values())).counts)
        starts = [(name, "<i8") for name in self._arrays]
        self._entry = np.dtype([("item", "<i8"), *starts, ("digest", f"V{_DIGEST_BYTES}")])
        self._entries = 0
        self._digest = np.zeros(items, f"V{_DIGEST_BYTES}")
        self._present = np.zeros(items, bool)
        self._checked = np.zeros(items, bool)
        self._starts = {name: np.zeros(items, np.int64) for name in self._arrays}
        self._flat = {name: np.zeros((0, *rows.shape), rows.dtype) for name, rows in self._arrays.items()}
        self._guard = threading.RLock()
        path.mkdir(parents=True, exist_ok=True)

    def missing(self, items: np.ndarray) -> np.ndarray:
        """Returns those of some items that are not in the cache, or are damaged in it, each once, ascending."""
        wanted = np.unique(items)
        with self._guard:
            if not self._present[wanted].all():
                self._refresh()
            for item in wanted[self._present[wanted] & ~self._checked[wanted]].tolist():
                self._checked[item] = self._present[item] = self._is_whole(item)
            lacking: np.ndarray = wanted[~self._present[wanted]]
            return lacking

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays' names."""
        return tuple(self._arrays)

    def rows(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns an array's rows, and where every item's begin, shape (items,); only items that are there count."""
        return self._flat[name], self._starts[name]

    def add(self, items: Sequence[int] | np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends items.

        Args:
            items: Their codes.
            arrays: Rows of every array, those of one item after those of the item before it.

        Raises:
            ArtifactError: The disk has no room; what was there before stays.
        """
        entries = np.zeros(len(items), self._entry)
        entries["item"] = items
        bounds = {name: _bounds(rows.counts[entries["item"]]) for name, rows in self._arrays.items()}
        for place in range(len(items)):
            own = (arrays[name][begin[place] : begin[place + 1]] for name, begin in bounds.items())
            entries["digest"][place] = np.void(_digest(own))
        size = entries.nbytes + sum(array.nbytes for array in arrays.values())
        with self._guard, room_for(self.path, size), FileLock(self.path / _LOCK):
            for name, rows in self._arrays.items():
                first = _append(self._file(name), arrays[name], rows.row_bytes)
                entries[name] = first + bounds[name][:-1]
            _append(self.path / _INDEX, entries, self._entry.itemsize)
            self._refresh()

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.rows"

    def _refresh(self) -> None:
        """Reads the entries that were appended since the last time, and maps the rows that they point to."""
        index = self.path / _INDEX
        there = index.stat().st_size // self._entry.itemsize if index.exists() else 0
        if there <= self._entries:
            return
        offset = self._entries * self._entry.itemsize
        entries = np.fromfile(index, self._entry, there - self._entries, offset=offset)
        self._entries = there
        self._flat = {name: self._mapped(name) for name in self._arrays}
        entries = entries[self._fit(entries)]
        # What another process added again is read from where it was: other threads may hold where its rows begin.
        entries = entries[~self._present[entries["item"]]]
        codes = entries["item"]
        for name in self._arrays:
            self._starts[name][codes] = entries[name]
        self._digest[codes] = entries["digest"]
        self._present[codes], self._checked[codes] = True, False

    def _fit(self, entries: np.ndarray) -> np.ndarray:
        """Says which entries name an item and rows that are there; a damaged index must point to nothing else."""
        codes = entries["item"]
        fits = (codes >= 0) & (codes < len(self._present))
        for name, rows in self._arrays.items():
            counts = rows.counts[np.where(fits, codes, 0)]
            fits &= (entries[name] >= 0) & (entries[name] <= len(self._flat[name]) - counts)
        return fits

    def _mapped(self, name: str) -> np.ndarray:
        rows, file = self._arrays[name], self._file(name)
        count = file.stat().st_size // rows.row_bytes if file.exists() else 0
        if count == 0:
            return np.zeros((0, *rows.shape), rows.dtype)
        return np.memmap(file, rows.dtype, "r", shape=(count, *rows.shape))

    def _is_whole(self, item: int) -> bool:
        own = (
            self._flat[name][self._starts[name][item] : self._starts[name][item] + rows.counts[item]]
            for name, rows in self._arrays.items()
        )
        return bool(_digest(own) == self._digest[item].tobytes())


def read_missing(
    cache: ItemCache,
    items: np.ndarray,
    lengths: np.ndarray,
    read: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    workers: int = 1,
) -> None:
    """Reads what a cache lacks of some items, block by block; what a stopped process has read stays.

    Args:
        cache: The cache.
        items: Item codes.
        lengths: Tokens of every item of the catalog, shape (catalog,); items of like length are read together.
        read: Returns the rows of a block of items, see `ItemCache.add`.
        workers: How many blocks are read side by side, see `metarec.system.threads.for_each`.

    Raises:
        ArtifactError: The disk has no room.
    """
    work = _Work(cache, items, lengths, workers)
    if work.count == 0:
        return
    with progress(f"reading {work.count:,} items once", work.count, after=2.0) as advance:

        def one(block: np.ndarray) -> None:
            advance(work.keep(block, read(block)))

        for_each(work.take, one, workers)


class _Work:
    """The items that are still to be read, which several threads take block by block.

    Args:
        cache: The cache.
        items: Item codes.
        lengths: Tokens of every item of the catalog.
        workers: How many threads take blocks.
    """

    def __init__(self, cache: ItemCache, items: np.ndarray, lengths: np.ndarray, workers: int) -> None:
        self._cache, self._lengths = cache, lengths
        self._missing = cache.missing(items)
        self._taken = self._missing[:0]
        self._alone = True
        self._guard = threading.Lock()
        self.count = len(self._missing)
        self._size = int(np.clip(math.ceil(self.count / workers), 1, BLOCK_ITEMS))

    def take(self) -> np.ndarray | None:
        """Returns a block of items that no thread of this process reads, or None when none is left."""
        with self._guard:
            free = np.setdiff1d(self._missing, self._taken, assume_unique=True)
            if len(free) == 0:
                return None
            by_length = free[np.argsort(self._lengths[free], kind="stable")]
            blocks = np.array_split(by_length, range(self._size, len(by_length), self._size))
            # Where another process fills the same cache, take a block that it is unlikely to take.
            block = blocks[0 if self._alone else int(np.random.default_rng().integers(len(blocks)))]
            self._taken = np.concatenate([self._taken, block])
            return block

    def keep(self, block: np.ndarray, rows: Mapping[str, np.ndarray]) -> int:
        """Adds a block's rows to the cache; returns how many items are read by now."""
        with self._guard:
            before = self._cache.missing(self._missing)
            self._alone = self._alone and len(before) == len(self._missing)
            self._cache.add(block, rows)
            self._missing = self._cache.missing(before)
            return self.count - len(self._missing)


def _bounds(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def _digest(arrays: object) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for array in arrays:  # type: ignore[attr-defined]
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def _append(path: Path, rows: np.ndarray, row_bytes: int) -> int:
    """Appends rows to a file, behind the last whole one, and returns the number of the first."""
    with path.open("r+b" if path.exists() else "x+b") as stream:
        first = stream.seek(0, 2) // row_bytes
        stream.seek(first * row_bytes)
        stream.write(np.ascontiguousarray(rows).tobytes())
        stream.flush()
    return first
