"""Keeps the adapters of the latest users in memory: a cache with a limit in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")


class HotAdapters(Generic[V]):
    """A least-recently-used cache of adapters, limited in bytes.

    Args:
        limit: Bytes in all; an adapter that is larger than this is not kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[str, tuple[int, V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str, version: int) -> V | None:
        """Returns a user's adapter of that version, or None."""
        with self._lock:
            found = self._kept.get(key)
            if found is None or found[0] != version:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return found[1]

    def peek(self, key: str, version: int) -> V | None:
        """Returns a user's adapter of that version, or None; it counts as no use of it."""
        with self._lock:
            found = self._kept.get(key)
            return found[1] if found is not None and found[0] == version else None

    def put(self, key: str, version: int, value: V, size: int) -> None:
        """Keeps a user's adapter, and drops their former one.

        Args:
            key: The user's key.
            version: The adapter's version.
            value: The adapter.
            size: Its bytes.
        """
        with self._lock:
            self._drop(key)
            if size > self.limit:
                return
            self._kept[key] = (version, value, size)
            self.bytes += size
            while self.bytes > self.limit:
                _, (_, _, oldest) = self._kept.popitem(last=False)
                self.bytes -= oldest

    def drop(self, key: str) -> None:
        """Removes a user's adapter."""
        with self._lock:
            self._drop(key)

    def _drop(self, key: str) -> None:
        if key in self._kept:
            self.bytes -= self._kept.pop(key)[2]
