"""Feedback and adapters on disk: a durable log of ratings, and every user's versioned PEFT directories.

The feedback log is the source of truth. A user's version counts what they have said, so an adapter that is lost or
damaged is computed again from the log under the same name. The index and the log live in SQLite (WAL,
``synchronous=FULL``) or in PostgreSQL, adapters in directories that appear complete or not at all and are read only
while every byte of them is as it was written. User ids stay inside the index: directories carry a random name.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from metarec.artifacts import MANIFEST, sha256_file, verify_dir
from metarec.errors import ArtifactError, ConfigError, StoreError
from metarec.serve.feedback_log import FeedbackLog
from metarec.serve.index import INDEX_FILE, Index, is_remote
from metarec.serve.records import AdapterRecord, NewAdapter

_ADAPTERS = "adapters"
# A directory that no index row names may belong to an adapter that is being written; after an hour it does not.
_GRACE_SECONDS = 3600.0


class AdapterStore(FeedbackLog):
    """A feedback log with every user's adapter directories beside it.

    Args:
        location: A directory, or ``postgresql://...``.
        files: Directory of the adapters; None takes ``adapters`` in `location`, and must be given with PostgreSQL.
        create: Makes a store that is not there.

    Raises:
        StoreError: There is no store, or it cannot be opened.
        ConfigError: `files` is missing.
    """

    def __init__(self, location: str | Path, files: Path | None = None, *, create: bool = True) -> None:
        remote = is_remote(location)
        if remote and files is None:
            raise ConfigError("a PostgreSQL store has no directory for adapters", "Give one with --adapters DIR")
        self._adapters = files or Path(location) / _ADAPTERS
        if not remote and not create and not (Path(location) / INDEX_FILE).exists():
            raise StoreError(f"'{location}' holds no store", "Run: metarec adapt --users FILE --store DIR, or serve")
        # A directory that was there may hold other people's files: it keeps its mode, what is made in it does not.
        folder = self._adapters if remote else Path(location)
        with suppress(FileExistsError):
            folder.mkdir(parents=True, mode=0o700)
        self._adapters.mkdir(parents=True, exist_ok=True, mode=0o700)
        super().__init__(Index(location))
        self.location = self._index.location

    def export(self, user: str) -> dict[str, Any] | None:
        """Returns everything the store holds of a user as JSON-able facts, or None where there is no such user."""
        profile = self.profile(user)
        if profile is None:
            return None
        return {
            "user": user,
            "created": profile.created,
            "version": profile.version,
            **vars(self.facts(user)),
            "ratings": [vars(event) for event in self.events(user)],
            "adapters": [
                {"version": record.version, "recommender": record.recommender, "bytes": record.bytes}
                for record in self.records(profile.key)
            ],
        }

    def erase(self, user: str) -> bool:
        """Removes everything of a user: rows of the log and the index, adapters, half-written directories.

        Users who named them as a friend do so no longer, and are adapted again when they are next served.

        Returns:
            Whether there was such a user.

        Raises:
            StoreError: Another process keeps deleted bytes readable; what is deleted stays deleted.
        """
        with self._index.locked():
            with self._index.transaction():
                rows = self._index.execute("DELETE FROM users WHERE name = ? RETURNING key", (user,))
                named = self.forget_friend(user) if rows else []
                for key in named:
                    self._index.execute(
                        "DELETE FROM adapters WHERE user_id = (SELECT id FROM users WHERE key = ?)", (key,)
                    )
            for key in [*(key for key, *_ in rows), *named]:
                self._remove(key)
            self._index.forget()
        return bool(rows)

    def _remove(self, key: str) -> None:
        shard = self._shard(key)
        for path in [*shard.glob(f"{key}-*"), *shard.glob(f".{key}-*")]:
            shutil.rmtree(path, ignore_errors=True)

    # Adapters.

    def _shard(self, key: str) -> Path:
        return self._adapters / key[:2]

    def path(self, record: AdapterRecord) -> Path:
        """Returns an adapter's directory; `verify` it before it is read."""
        return self._shard(record.key) / f"{record.key}-{record.version}"

    def put(self, adapters: Sequence[NewAdapter], *, keep: int = 2) -> int:
        """Stores adapters, each complete or not at all, and removes their users' older ones.

        Args:
            adapters: The new ones; the user of one may have been erased in the meantime.
            keep: How many of a user's newest versions stay.

        Returns:
            How many were stored; the users of the others have been erased.
        """
        written = []
        for adapter in adapters:
            path = self._shard(adapter.key) / f"{adapter.key}-{adapter.version}"
            adapter.write(path)
            size = sum(file.stat().st_size for file in path.iterdir())
            written.append((adapter, path, sha256_file(path / MANIFEST), size))
        kept = 0
        # Erasing and indexing exclude each other: the adapter of an erased user has no row, and its directory goes.
        with self._index.locked():
            with self._index.transaction():
                for adapter, path, digest, size in written:
                    rows = self._index.execute(
                        "INSERT INTO adapters (user_id, version, recommender, manifest, bytes, created)"
                        " SELECT id, ?, ?, ?, ?, ? FROM users WHERE key = ?"
                        " ON CONFLICT (user_id, version) DO UPDATE SET recommender = excluded.recommender,"
                        " manifest = excluded.manifest, bytes = excluded.bytes, created = excluded.created"
                        " RETURNING user_id",
                        (adapter.version, adapter.recommender, digest, size, time.time(), adapter.key),
                    )
                    kept += len(rows)
                    if not rows:
                        shutil.rmtree(path, ignore_errors=True)
            for adapter, *_ in written:
                self._prune(adapter.key, keep)
        return kept

    def _prune(self, key: str, keep: int) -> int:
        old = self.records(key)[keep:]
        for record in old:
            self._index.execute(
                "DELETE FROM adapters WHERE version = ? AND user_id = (SELECT id FROM users WHERE key = ?)",
                (record.version, key),
            )
            shutil.rmtree(self.path(record), ignore_errors=True)
        return len(old)

    def records(self, key: str) -> list[AdapterRecord]:
        """Returns a user's adapters, newest first."""
        rows = self._index.execute(
            "SELECT adapters.version, recommender, manifest, bytes, adapters.created FROM adapters"
            " JOIN users ON users.id = user_id WHERE key = ? ORDER BY adapters.version DESC",
            (key,),
        )
        return [
            AdapterRecord(key, int(version), recommender, manifest, int(size), float(created))
            for version, recommender, manifest, size, created in rows
        ]

    def verify(self, record: AdapterRecord) -> None:
        """Checks every byte of an adapter, its manifest's included.

        Raises:
            ArtifactError: A byte is missing or altered.
        """
        path = self.path(record)
        manifest = path / MANIFEST
        if not manifest.is_file() or sha256_file(manifest) != record.manifest:
            raise ArtifactError(
                f"'{manifest}' is missing or altered", "The adapter is computed again when it is needed"
            )
        verify_dir(path, "adapter")
        listed = {*json.loads(manifest.read_text(encoding="utf-8"))["sha256"], MANIFEST}
        if stray := sorted({file.name for file in path.iterdir()} - listed):
            raise ArtifactError(f"'{path / stray[0]}' does not belong there", "Remove it")

    def newest(self, key: str, recommender: str) -> tuple[AdapterRecord | None, list[AdapterRecord]]:
        """Returns the newest undamaged version of a user's adapter.

        Args:
            key: The user's key.
            recommender: Digest of the recommender that made it; adapters of others are ignored.

        Returns:
            The newest undamaged adapter or None, and the damaged ones that are newer.
        """
        damaged: list[AdapterRecord] = []
        for record in self.records(key):
            if record.recommender != recommender:
                continue
            if self.is_good(record):
                return record, damaged
            damaged.append(record)
        return None, damaged

    def verify_all(self) -> Iterator[tuple[str, AdapterRecord | None]]:
        """Checks every adapter of every user; yields the user's name, and the adapter where it is damaged."""
        for name, profile in self.users():
            for record in self.records(profile.key):
                yield name, None if self.is_good(record) else record

    def is_good(self, record: AdapterRecord) -> bool:
        """Says whether every byte of an adapter is as it was written."""
        try:
            self.verify(record)
        except (ArtifactError, OSError):
            return False
        return True

    def gc(self, *, keep: int = 2, grace: float = _GRACE_SECONDS) -> int:
        """Removes old versions, directories of erased users, and directories that a crash left half-written.

        Args:
            keep: How many of a user's newest versions stay.
            grace: Seconds for which a directory that the index does not name is left alone.

        Returns:
            How many directories were removed.
        """
        removed = 0
        known: dict[str, set[str]] = {}
        for _, profile in self.users():
            with self._index.locked():
                removed += self._prune(profile.key, keep)
            known[profile.key] = {self.path(record).name for record in self.records(profile.key)}
        now = time.time()
        for path in self._adapters.glob("*/*"):
            key = path.name.lstrip(".").partition("-")[0]
            try:
                age = now - path.stat().st_mtime
            except FileNotFoundError:
                continue
            stray = path.name not in known.get(key, set())
            # A user may have come after the index was read, so the key is looked up again.
            if stray and (age >= grace or not self._knows(key)):
                shutil.rmtree(path, ignore_errors=True)
                removed += 1
        return removed

    def _knows(self, key: str) -> bool:
        return bool(self._index.execute("SELECT 1 FROM users WHERE key = ?", (key,)))

    def sizes(self) -> dict[str, int]:
        """Returns how many users, ratings, adapters, adapter bytes and added items there are."""
        row = self._index.execute(
            "SELECT (SELECT COUNT(*) FROM users), (SELECT COUNT(*) FROM feedback), (SELECT COUNT(*) FROM adapters),"
            " (SELECT COALESCE(SUM(bytes), 0) FROM adapters), (SELECT COUNT(*) FROM items)"
        )[0]
        return dict(zip(("users", "ratings", "adapters", "bytes", "items"), map(int, row), strict=True))

    def ping(self) -> None:
        """Checks that the index answers.

        Raises:
            StoreError: It does not.
        """
        self._index.execute("SELECT 1")

    def close(self) -> None:
        """Closes the index."""
        self._index.close()
