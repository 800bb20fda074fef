"""The directory of a store's adapters: which index it belongs to, and which adapters lie in it.

A directory below it is named by a user's random key and a version, never by an id. ``store.json`` names the index, so
that an index that is empty or another one's is not taken for one whose users were all erased.
"""

from __future__ import annotations

import shutil
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from metarec.errors import StoreError
from metarec.files.artifacts import load_json, write_json

_OWNER, _UNKNOWN = "store.json", "unknown.json"
# How many of a directory's keys are looked up in an index before it is said to know none.
_LOOKED_UP = 1000


@dataclass(frozen=True)
class Entry:
    """A directory of an adapter, finished or not."""

    path: Path

    @property
    def key(self) -> str:
        """The user's random key."""
        return self.path.name.lstrip(".").partition("-")[0]

    @property
    def version(self) -> int:
        """The adapter's version; 0 where the name says none."""
        digits = self.path.name.lstrip(".").partition("-")[2].partition(".")[0]
        return int(digits) if digits.isdecimal() else 0

    @property
    def age(self) -> float:
        """Seconds since it was last changed; 0 where it has just gone."""
        try:
            return time.time() - self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0


class AdapterFolder:
    """Adapters in a directory, ``KEY[:2]/KEY-VERSION``.

    Args:
        path: The directory; made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def claim(self, store: str, knows: Callable[[str], bool]) -> str:
        """Returns the directory's own id, after a check that it belongs to an index.

        Args:
            store: The index's id.
            knows: Says whether the index has a user's key.

        Raises:
            StoreError: It belongs to another index, or the index knows no user of it.
        """
        file = self.path / _OWNER
        facts = load_json(file) if file.exists() else {}
        if facts.get("store") == store:
            return str(facts["place"])
        keys = [entry.key for entry in islice(self.entries(), _LOOKED_UP)]
        if not keys or (not facts and any(map(knows, keys))):
            place = uuid.uuid4().hex
            write_json(file, {"store": store, "place": place})
            return place
        raise StoreError(
            f"'{self.path}' holds adapters of another index than this store's",
            "Put the index back from a copy. If it is lost, move the adapters away: they can be made again from a log",
        )

    def entries(self) -> Iterator[Entry]:
        """Returns every directory of an adapter, those that are being written among them."""
        return map(Entry, self.path.glob("*/*"))

    def adapter(self, key: str, version: int) -> Path:
        """Returns where an adapter lies."""
        return self.path / key[:2] / f"{key}-{version}"

    def remove(self, below: Mapping[str, int | None]) -> None:
        """Removes adapters of some users, half-written ones too.

        Args:
            below: Users' keys to the version whose predecessors go; None stands for all.
        """
        found = self.entries() if len(below) > _LOOKED_UP else self._of(below)
        for entry in found:
            if entry.key in below and entry.version < (below[entry.key] or sys.maxsize):
                shutil.rmtree(entry.path, ignore_errors=True)

    def _of(self, keys: Collection[str]) -> list[Entry]:
        patterns = [(key, pattern) for key in keys for pattern in (f"{key}-*", f".{key}-*")]
        return [Entry(path) for key, pattern in patterns for path in (self.path / key[:2]).glob(pattern)]

    def seen_unknown(self, names: Collection[str], *, note: bool) -> dict[str, float]:
        """Returns for how many seconds directories have been there that the index knows nothing of.

        Args:
            names: Their names.
            note: Remembers those that are new, and forgets others.
        """
        file, now = self.path / _UNKNOWN, time.time()
        known: dict[str, float] = load_json(file) if file.exists() else {}
        since = {name: min(float(known.get(name, now)), now) for name in names}
        if note and since != known:
            write_json(file, since)
        return {name: now - first for name, first in since.items()}
