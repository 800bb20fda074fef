"""Feedback and adapters on disk: a durable log of ratings, and every user's versioned PEFT directories.

The feedback log is the source of truth. A user's version counts what they have said, so an adapter that is lost or
damaged is computed again from the log under the same name. The index and the log live in SQLite (WAL,
``synchronous=FULL``) or in PostgreSQL, adapters in directories that appear complete or not at all and are read only
while every byte of them is as it was written. User ids stay inside the index: directories carry a random name.
"""

from __future__ import annotations

import hmac
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from metarec.errors import ArtifactError, ConfigError, StoreError
from metarec.files.artifacts import MANIFEST, sha256_file, verify_dir
from metarec.serve.feedback_log import FeedbackLog
from metarec.serve.folder import AdapterFolder
from metarec.serve.index import INDEX_FILE, Index, is_remote
from metarec.serve.records import AdapterRecord, NewAdapter

_ADAPTERS = "adapters"
# A directory that no index row names may belong to an adapter that is being written; after an hour it does not.
_GRACE_SECONDS = 3600.0
# Users who are erased leave a record of it, so an index that lacks a user without one may be an old copy.
UNKNOWN_SECONDS = 7 * 86400.0
# Set while erased rows may still be in the index's file, so that whoever opens it next goes on.
_ERASING = "erasing"


@dataclass(frozen=True)
class Collected:
    """How many directories a collection removed, or would remove.

    Args:
        old: Versions older than those that stay.
        unfinished: Left by a crash before the index named them.
        erased: Of users who were erased.
        unknown: Of users that the index has not known for the time of grace.
        waiting: Of such users, which stay for now.
    """

    old: int = 0
    unfinished: int = 0
    erased: int = 0
    unknown: int = 0
    waiting: int = 0

    @property
    def removed(self) -> int:
        """How many in all."""
        return self.old + self.unfinished + self.erased + self.unknown


class AdapterStore(FeedbackLog):
    """A feedback log with every user's adapter directories beside it.

    Args:
        location: A directory, or ``postgresql://...``.
        files: Directory of the adapters; None takes ``adapters`` in `location`, and must be given with PostgreSQL.
        create: Makes a store that is not there.

    Raises:
        StoreError: There is no store, it cannot be opened, or the adapters belong to another index.
        ConfigError: `files` is missing.
    """

    def __init__(self, location: str | Path, files: Path | None = None, *, create: bool = True) -> None:
        remote = is_remote(location)
        if remote and files is None:
            raise ConfigError("a PostgreSQL store has no directory for adapters", "Give one with --adapters DIR")
        adapters = files or Path(location) / _ADAPTERS
        if not remote and not create and not (Path(location) / INDEX_FILE).exists():
            raise StoreError(f"'{location}' holds no store", "Run: metarec adapt --users FILE --store DIR, or serve")
        # A directory that was there may hold other people's files: it keeps its mode, what is made in it does not.
        folder = adapters if remote else Path(location)
        with suppress(FileExistsError):
            folder.mkdir(parents=True, mode=0o700)
        super().__init__(Index(location))
        self.location = self._index.location
        self.folder = AdapterFolder(adapters)
        self._erasures: int | None = None
        try:
            with self._index.transaction():
                self._index.alone("metarec folder")
                self._place = self.folder.claim(self._index.store, self._knows)
                self._index.place_adapters(self._place)
        except BaseException:
            self.close()
            raise

    def export(self, user: str, after: int = 0, limit: int | None = None) -> dict[str, Any] | None:
        """Returns everything the store holds of a user as JSON-able facts, or None where there is no such user.

        Args:
            user: The user's id.
            after: Leaves out ratings and idempotency keys of versions up to this one.
            limit: How many ratings; None for all. Where there are more, ``next`` is the version to go on after.
        """
        profile = self.profile(user)
        if profile is None:
            return None
        events = self.events(user, after, None if limit is None else limit + 1)
        more = limit is not None and len(events) > limit
        events = events[:limit]
        last = events[-1].version if more else profile.version
        return {
            "user": user,
            "created": profile.created,
            "version": profile.version,
            **vars(self.facts(user)),
            "ratings": [vars(event) for event in events],
            "idempotency_keys": self.idempotency_keys(user, after, last),
            "adapters": [
                {"version": record.version, "recommender": record.recommender, "bytes": record.bytes}
                for record in self.records(profile.key)
            ],
            "next": last if more else None,
        }

    def erase(self, *users: str) -> list[bool]:
        """Removes everything of users: rows of the log and the index with every copy in its files, and adapters.

        A record of their random keys stays, by which other servers learn of it; see `newly_erased`. Users who named
        them as a friend do so no longer, and are adapted again when they are next served.

        Args:
            *users: Their ids. The index is written anew once for all of them.

        Returns:
            Whether there was each such user.

        Raises:
            StoreError: Another process keeps deleted bytes readable, or the disk is full; what is deleted stays
                deleted, and opening the store removes the rest.
        """
        found: list[bool] = []
        below: dict[str, int | None] = {}
        with self._index.locked():
            with self._index.transaction():
                self._index.alone("metarec erasures")  # so that their numbers are committed in order
                for user in users:
                    rows = self._index.execute("DELETE FROM users WHERE name = ? RETURNING key", (user,))
                    found.append(bool(rows))
                    below |= dict.fromkeys((key for key, *_ in rows), None)
                    below |= self.forget_friend(user) if rows else {}
                for key, version in below.items():
                    self._index.execute(
                        "DELETE FROM adapters WHERE version < ? AND user_id = (SELECT id FROM users WHERE key = ?)",
                        (version, key),
                    )
                self._index.execute_many(
                    "INSERT INTO erasures (key, below, created) VALUES (?, ?, ?)",
                    [(key, version, time.time()) for key, version in below.items()],
                )
                if below:
                    self._index.state(_ERASING, "1")
            self.folder.remove(below)
            self._finish_erasing()
        return found

    def _finish_erasing(self) -> None:
        if self._index.fact(_ERASING) == "1":
            self._index.rewrite()
            self._index.state(_ERASING, "0")

    def newly_erased(self) -> list[str]:
        """Removes adapters that erasures on any server since the last call have made unfit to keep.

        They are those of erased users, and of users who had named them as a friend. The first call looks at all
        erasures there ever were, and finishes one that a crash has interrupted.

        Returns:
            The keys of these users.
        """
        if self._erasures is None:
            self._finish_erasing()
            self._erasures = 0
        rows = self._index.execute(
            "SELECT number, key, below FROM erasures WHERE number > ? ORDER BY number", (self._erasures,)
        )
        if rows:
            # A user who has lost friends may have lost themselves later: then all adapters go.
            self.folder.remove({key: below for _, key, below in rows})
            self._erasures = int(rows[-1][0])
            self._index.forget()
        return [key for _, key, _ in rows]

    # Adapters.

    def path(self, record: AdapterRecord) -> Path:
        """Returns an adapter's directory; `verify` it before it is read."""
        return self.folder.adapter(record.key, record.version)

    def put(self, adapters: Sequence[NewAdapter], *, keep: int = 2) -> int:
        """Stores adapters, each complete or not at all, and removes their users' older ones.

        Args:
            adapters: The new ones; the user of one may have been erased in the meantime.
            keep: How many of a user's newest versions stay.

        Returns:
            How many were stored; the users of the others have been erased, or friends whom they name.
        """
        written = []
        for adapter in adapters:
            path = self.folder.adapter(adapter.key, adapter.version)
            if not self._has(adapter):
                adapter.write(path)
            size = sum(file.stat().st_size for file in path.iterdir())
            written.append((adapter, path, sha256_file(path / MANIFEST), size))
        kept = 0
        # Erasing and indexing exclude each other: the adapter of an erased user has no row, and its directory goes.
        with self._index.locked():
            with self._index.transaction():
                for adapter, path, digest, size in written:
                    facts = (self._place, adapter.recommender, digest, size, time.time())
                    rows = self._index.execute(
                        "INSERT INTO adapters (user_id, version, place, recommender, manifest, bytes, created)"
                        " SELECT id, ?, ?, ?, ?, ?, ? FROM users WHERE key = ?"
                        " AND NOT EXISTS (SELECT 1 FROM erasures WHERE erasures.key = users.key AND below > ?)"
                        " ON CONFLICT (user_id, version, place) DO UPDATE SET recommender = excluded.recommender,"
                        " manifest = excluded.manifest, bytes = excluded.bytes, created = excluded.created"
                        " RETURNING user_id",
                        (adapter.version, *facts, adapter.key, adapter.version),
                    )
                    kept += len(rows)
                    if not rows:
                        shutil.rmtree(path, ignore_errors=True)
            for adapter, *_ in written:
                self._prune(adapter.key, keep)
        return kept

    def _has(self, adapter: NewAdapter) -> bool:
        """Says whether another server has kept the same adapter in the same directory; what it wrote stays."""
        return any(
            record.version == adapter.version and record.recommender == adapter.recommender and self.is_good(record)
            for record in self.records(adapter.key)
        )

    def _prune(self, key: str, keep: int) -> int:
        old = self.records(key)[keep:]
        for record in old:
            self._index.execute(
                "DELETE FROM adapters WHERE version = ? AND place = ?"
                " AND user_id = (SELECT id FROM users WHERE key = ?)",
                (record.version, self._place, key),
            )
            shutil.rmtree(self.path(record), ignore_errors=True)
        return len(old)

    def records(self, key: str) -> list[AdapterRecord]:
        """Returns a user's adapters in this directory, newest first."""
        rows = self._index.execute(
            "SELECT adapters.version, recommender, manifest, bytes, adapters.created FROM adapters"
            " JOIN users ON users.id = user_id WHERE key = ? AND place = ? ORDER BY adapters.version DESC",
            (key, self._place),
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
        records = self.records(key)
        while True:
            ours = [record for record in records if record.recommender == recommender]
            damaged = list(takewhile(lambda record: not self.is_good(record), ours))
            before, records = records, self.records(key) if damaged else records
            # What another server has replaced while this one looked is not damaged.
            if records == before:
                return next(iter(ours[len(damaged) :]), None), damaged

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

    def gc(
        self,
        *,
        keep: int = 2,
        grace: float = _GRACE_SECONDS,
        unknown: float = UNKNOWN_SECONDS,
        dry_run: bool = False,
    ) -> Collected:
        """Removes old versions, directories of erased users, and directories that a crash left half-written.

        Args:
            keep: How many of a user's newest versions stay.
            grace: Seconds for which a directory of a known user stays that the index does not name.
            unknown: Seconds for which a directory stays whose user the index neither knows nor has erased.
            dry_run: Counts and removes nothing.

        Returns:
            What was removed.
        """
        old = 0
        known: dict[str, set[str]] = {}
        for _, profile in self.users():
            with self._index.locked():
                records = self.records(profile.key)
                old += len(records[keep:])
                if not dry_run:
                    self._prune(profile.key, keep)
            known[profile.key] = {self.path(record).name for record in records}
        erased = {key for key, *_ in self._index.execute("SELECT key FROM erasures WHERE below IS NULL")}
        unfinished, gone, unlisted = [], [], []
        for entry in self.folder.entries():
            if entry.key in erased:
                gone.append(entry.path)
            # A user may have come after the index was read, so the key is looked up again.
            elif entry.key not in known and not self._knows(entry.key):
                unlisted.append(entry.path)
            elif entry.path.name not in known.get(entry.key, set()) and entry.age >= grace:
                unfinished.append(entry.path)
        since = self.folder.seen_unknown({path.name for path in unlisted}, note=not dry_run)
        lost = [path for path in unlisted if since[path.name] >= unknown]
        if not dry_run:
            for path in [*unfinished, *gone, *lost]:
                shutil.rmtree(path, ignore_errors=True)
        return Collected(old, len(unfinished), len(gone), len(lost), len(unlisted) - len(lost))

    def _knows(self, key: str) -> bool:
        return bool(self._index.execute("SELECT 1 FROM users WHERE key = ?", (key,)))

    def sizes(self) -> dict[str, int]:
        """Returns how many users, ratings, adapters and their bytes in this directory, and added items there are."""
        row = self._index.execute(
            "SELECT (SELECT COUNT(*) FROM users), (SELECT COUNT(*) FROM feedback),"
            " (SELECT COUNT(*) FROM adapters WHERE place = ?),"
            " (SELECT COALESCE(SUM(bytes), 0) FROM adapters WHERE place = ?), (SELECT COUNT(*) FROM items)",
            (self._place, self._place),
        )[0]
        return dict(zip(("users", "ratings", "adapters", "bytes", "items"), map(int, row), strict=True))

    def pseudonym(self, user: str) -> str:
        """Returns what stands for a user in audit logs: a digest that is keyed by a secret of the store."""
        return hmac.new(self._index.secret.encode(), user.encode("utf-8", "replace"), "sha256").hexdigest()[:32]

    def close(self) -> None:
        """Closes the index."""
        self._index.close()
