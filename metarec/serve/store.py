"""Adapters and feedback on disk: a durable log of who rated what, and every user's versioned PEFT directories.

The feedback log is the source of truth. A user's version is the number of ratings they have given, so an adapter that
is lost or damaged is computed again from the log under the same name. The index and the log live in SQLite (WAL,
``synchronous=FULL``) or in PostgreSQL, adapters in directories that appear complete or not at all and are read only
while every byte of them is as it was written. User ids stay inside the index: directories carry a random name.

Knows nothing of models, prompts or HTTP: how an adapter is written is the caller's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import sqlite3
import threading
import time
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarec.artifacts import MANIFEST, sha256_file, verify_dir
from metarec.errors import ArtifactError, ConfigError, ConflictError, StoreError
from metarec.serve.database import TABLES, Postgres, Sqlite

SCHEMA_VERSION = "1"
MAX_ID_CHARACTERS = 256
_INDEX = "index.sqlite"
_ADAPTERS = "adapters"
# A directory that no index row names may still be on its way into the index; after an hour it is not.
_GRACE_SECONDS = 3600.0


@dataclass(frozen=True)
class Feedback:
    """What one request says of one user.

    Args:
        user: The user's id.
        ratings: ``(item id, rating)`` pairs, oldest first.
        idempotency_key: Names the request; the same one again changes nothing. None names nothing.
    """

    user: str
    ratings: tuple[tuple[str, float], ...]
    idempotency_key: str | None = None


@dataclass(frozen=True)
class Accepted:
    """The user's version after some feedback, and whether that feedback had been accepted before."""

    version: int
    replayed: bool


@dataclass(frozen=True)
class Profile:
    """A user's random key, the number of their ratings, and when they were first seen (seconds since the epoch)."""

    key: str
    version: int
    created: float


@dataclass(frozen=True)
class FeedbackEvent:
    """One line of the feedback log."""

    version: int
    item: str
    rating: float
    at: float


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter that the index knows.

    Args:
        key: The user's random key.
        version: How many of the user's ratings it was adapted to.
        recommender: Digest of the recommender that made it.
        manifest: SHA-256 of its manifest file.
        bytes: Size of its files.
        created: Seconds since the epoch.
    """

    key: str
    version: int
    recommender: str
    manifest: str
    bytes: int
    created: float


@dataclass(frozen=True)
class NewAdapter:
    """An adapter to keep: whose, of which version and recommender, and what writes it into a directory."""

    key: str
    version: int
    recommender: str
    write: Callable[[Path], object]


def check_id(name: str, what: str) -> str:
    """Returns an id as it is, if it can be kept and said again.

    Raises:
        ConfigError: It is empty, too long, or holds control characters or half a character.
    """
    if not 1 <= len(name) <= MAX_ID_CHARACTERS:
        raise ConfigError(f"the {what} has {len(name)} characters", f"Use 1 to {MAX_ID_CHARACTERS}")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
        raise ConfigError(f"the {what} holds control characters", "Use printable characters")
    return name


class AdapterStore:
    """Feedback log, index and adapter directories of one service.

    Args:
        location: A directory, or ``postgresql://...``.
        files: Where adapters lie; None takes ``adapters`` in `location`, and must be given with PostgreSQL.
        create: Makes a store that is not there.

    Raises:
        StoreError: There is no store, or it cannot be opened.
        ConfigError: `files` is missing.
    """

    def __init__(self, location: str | Path, files: Path | None = None, *, create: bool = True) -> None:
        self._lock = threading.RLock()
        remote = str(location).startswith(("postgresql://", "postgres://"))
        if remote and files is None:
            raise ConfigError("a PostgreSQL store has no directory for adapters", "Give one with --adapters DIR")
        self.location = "postgresql" if remote else str(location)
        self._adapters = files or Path(location) / _ADAPTERS
        if not remote and not create and not (Path(location) / _INDEX).exists():
            raise StoreError(f"'{location}' holds no store", "Run: metarec adapt --users FILE --store DIR, or serve")
        self._adapters.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not remote:
            Path(location).chmod(0o700)
        self._index: Sqlite | Postgres
        with self._reported():
            self._index = Postgres(str(location)) if remote else Sqlite(Path(location) / _INDEX)
            with self._index.transaction():
                self._index.execute(self._index.set_up_alone)
                for table in TABLES:
                    self._index.execute(table.format(serial=self._index.serial))
                self._index.execute(
                    "INSERT INTO facts (name, value) VALUES ('schema_version', ?) ON CONFLICT (name) DO NOTHING",
                    (SCHEMA_VERSION,),
                )
            found = self._index.execute("SELECT value FROM facts WHERE name = 'schema_version'")[0][0]
        if found != SCHEMA_VERSION:
            raise StoreError(
                f"the store has schema version {found}, this metarec reads {SCHEMA_VERSION}", "Use the one that made it"
            )

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Holds the store for one thread, and names what the database says without the values it was given."""
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise StoreError(f"the index of '{self.location}' fails: {error}", "Check its disk") from error
            except Exception as error:
                if type(error).__module__.partition(".")[0] != "psycopg":
                    raise
                raise StoreError(f"the PostgreSQL store fails ({type(error).__name__})", "Check the server") from None

    # The feedback log.

    def append(self, batch: Sequence[Feedback]) -> list[Accepted | ConflictError]:
        """Writes feedback to the log, all of it in one transaction; on return it survives a crash.

        Args:
            batch: Requests, in the order in which they count.

        Returns:
            One entry per request: the user's version after it, or why it alone was refused.

        Raises:
            StoreError: Nothing was written.
        """
        now = time.time()
        with self._reported(), self._index.transaction():
            # Everybody locks users in one order, so that two servers never wait for each other.
            ids = {name: self._user_id(name, now) for name in sorted({feedback.user for feedback in batch})}
            return [self._append(ids[feedback.user], feedback, now) for feedback in batch]

    def _user_id(self, name: str, now: float) -> int:
        rows = self._index.execute(
            "INSERT INTO users (name, key, created) VALUES (?, ?, ?)"
            " ON CONFLICT (name) DO UPDATE SET name = excluded.name RETURNING id",
            (name, uuid.uuid4().hex, now),
        )
        return int(rows[0][0])

    def _append(self, user_id: int, feedback: Feedback, now: float) -> Accepted | ConflictError:
        digest = hashlib.sha256(json.dumps(feedback.ratings).encode()).hexdigest()
        if feedback.idempotency_key is not None:
            known = self._index.execute(
                "SELECT digest, version FROM requests WHERE user_id = ? AND idempotency_key = ?",
                (user_id, feedback.idempotency_key),
            )
            if known and known[0][0] != digest:
                return ConflictError("the idempotency key was used for other ratings", "Use a new key")
            if known:
                return Accepted(int(known[0][1]), replayed=True)
        version = self._version(user_id)
        rows = [
            (user_id, version + place, item, rating, now)
            for place, (item, rating) in enumerate(feedback.ratings, start=1)
        ]
        self._index.execute_many(
            "INSERT INTO feedback (user_id, version, item, rating, at) VALUES (?, ?, ?, ?, ?)", rows
        )
        version += len(rows)
        if feedback.idempotency_key is not None:
            self._index.execute(
                "INSERT INTO requests (user_id, idempotency_key, digest, version) VALUES (?, ?, ?, ?)",
                (user_id, feedback.idempotency_key, digest, version),
            )
        return Accepted(version, replayed=False)

    def _version(self, user_id: int) -> int:
        rows = self._index.execute("SELECT COALESCE(MAX(version), 0) FROM feedback WHERE user_id = ?", (user_id,))
        return int(rows[0][0])

    def profile(self, user: str) -> Profile | None:
        """Returns what is known of a user, or None."""
        with self._reported():
            rows = self._index.execute(
                "SELECT key, created, (SELECT COALESCE(MAX(version), 0) FROM feedback WHERE user_id = users.id)"
                " FROM users WHERE name = ?",
                (user,),
            )
        return Profile(rows[0][0], int(rows[0][2]), float(rows[0][1])) if rows else None

    def events(self, user: str) -> list[FeedbackEvent]:
        """Returns a user's feedback, oldest first."""
        with self._reported():
            rows = self._index.execute(
                "SELECT version, item, rating, at FROM feedback JOIN users ON users.id = user_id"
                " WHERE name = ? ORDER BY version",
                (user,),
            )
        return [FeedbackEvent(int(version), item, float(rating), float(at)) for version, item, rating, at in rows]

    def users(self) -> Iterator[tuple[str, Profile]]:
        """Yields every user by name, a thousand at a time."""
        after = 0
        while True:
            with self._reported():
                rows = self._index.execute(
                    "SELECT id, name, key, created,"
                    " (SELECT COALESCE(MAX(version), 0) FROM feedback WHERE user_id = users.id)"
                    " FROM users WHERE id > ? ORDER BY id LIMIT 1000",
                    (after,),
                )
            if not rows:
                return
            for row in rows:
                yield row[1], Profile(row[2], int(row[4]), float(row[3]))
            after = rows[-1][0]

    def export(self, user: str) -> dict[str, Any] | None:
        """Returns everything the store holds of a user as JSON-able facts, or None."""
        profile = self.profile(user)
        if profile is None:
            return None
        return {
            "user": user,
            "created": profile.created,
            "version": profile.version,
            "ratings": [vars(event) for event in self.events(user)],
            "adapters": [
                {"version": record.version, "recommender": record.recommender, "bytes": record.bytes}
                for record in self.records(profile.key)
            ],
        }

    def erase(self, user: str) -> bool:
        """Removes every byte of a user: log, index, adapters, half-written directories.

        Returns:
            Whether there was such a user.

        Raises:
            StoreError: Another process keeps deleted bytes readable; what is deleted stays deleted.
        """
        with self._reported():
            with self._index.transaction():
                rows = self._index.execute("DELETE FROM users WHERE name = ? RETURNING key", (user,))
            for key, *_ in rows:
                self._remove(key)
            self._index.forget()
        return bool(rows)

    def _remove(self, key: str) -> None:
        shard = self._shard(key)
        for path in [*shard.glob(f"{key}-*"), *shard.glob(f".{key}-*")]:
            shutil.rmtree(path, ignore_errors=True)

    # Items that the recommender was not trained with.

    def add_items(self, items: Sequence[tuple[str, Mapping[str, str]]]) -> int:
        """Keeps new items; those that are there with the same fields are left as they are.

        Returns:
            How many were new.

        Raises:
            ConflictError: An id is there with other fields; nothing was written.
        """
        new = 0
        with self._reported(), self._index.transaction():
            for item, fields in items:
                text = json.dumps(dict(fields), sort_keys=True, ensure_ascii=False)
                known = self._index.execute("SELECT fields FROM items WHERE id = ?", (item,))
                if known and known[0][0] != text:
                    raise ConflictError("an item of that id is there with other fields", "Choose another id")
                if not known:
                    self._index.execute(
                        "INSERT INTO items (id, fields, created) VALUES (?, ?, ?)", (item, text, time.time())
                    )
                    new += 1
        return new

    def items(self) -> list[tuple[str, dict[str, str]]]:
        """Returns the added items, oldest first."""
        with self._reported():
            rows = self._index.execute("SELECT id, fields FROM items ORDER BY ordinal")
        return [(item, json.loads(fields)) for item, fields in rows]

    def count_items(self) -> int:
        """Returns how many items were added."""
        with self._reported():
            return int(self._index.execute("SELECT COUNT(*) FROM items")[0][0])

    # Adapters.

    def _shard(self, key: str) -> Path:
        return self._adapters / key[:2]

    def path(self, record: AdapterRecord) -> Path:
        """Returns an adapter's directory; `verify` it before it is read."""
        return self._shard(record.key) / f"{record.key}-{record.version}"

    def put(self, adapters: Sequence[NewAdapter], *, keep: int = 2) -> int:
        """Keeps adapters, each complete or not at all, and removes a user's older ones.

        Args:
            adapters: The new ones; the user of one may have been erased in the meantime.
            keep: How many of a user's newest versions stay.

        Returns:
            How many were kept; the others' users are gone.
        """
        written = []
        for adapter in adapters:
            path = self._shard(adapter.key) / f"{adapter.key}-{adapter.version}"
            adapter.write(path)
            size = sum(file.stat().st_size for file in path.iterdir())
            written.append((adapter, path, sha256_file(path / MANIFEST), size))
        kept = 0
        # Erasing and indexing exclude each other: either the row goes in and is erased, or the directory goes.
        with self._reported():
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
        with self._reported():
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
        """Finds the last good version of a user's adapter.

        Args:
            key: The user's key.
            recommender: Adapters of other recommenders do not count.

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
        """Removes what nobody needs: old versions, directories of erased users, what a crash left half-written.

        Args:
            keep: How many of a user's newest versions stay.
            grace: Seconds for which a directory that the index does not name is left alone.

        Returns:
            How many directories were removed.
        """
        removed = 0
        known: dict[str, set[str]] = {}
        for _, profile in self.users():
            with self._reported():
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
            # A user may have come after the index was read, so even a stranger's directory is looked up again.
            if stray and (age >= grace or not self._knows(key)):
                shutil.rmtree(path, ignore_errors=True)
                removed += 1
        return removed

    def _knows(self, key: str) -> bool:
        with self._reported():
            return bool(self._index.execute("SELECT 1 FROM users WHERE key = ?", (key,)))

    def sizes(self) -> dict[str, int]:
        """Returns how many users, ratings, adapters, adapter bytes and added items there are."""
        with self._reported():
            row = self._index.execute(
                "SELECT (SELECT COUNT(*) FROM users), (SELECT COUNT(*) FROM feedback), (SELECT COUNT(*) FROM adapters),"
                " (SELECT COALESCE(SUM(bytes), 0) FROM adapters), (SELECT COUNT(*) FROM items)"
            )[0]
        return dict(zip(("users", "ratings", "adapters", "bytes", "items"), map(int, row), strict=True))

    def ping(self) -> None:
        """Asks the index a question.

        Raises:
            StoreError: It does not answer.
        """
        with self._reported():
            self._index.execute("SELECT 1")

    def close(self) -> None:
        """Closes the index."""
        with self._lock:
            self._index.close()


def latest_ratings(events: Sequence[FeedbackEvent], limit: int) -> list[tuple[str, float]]:
    """Returns what a user thinks now: the last rating of each item, of the `limit` items rated last, in order of id.

    Two logs that end in the same opinions give the same list, so the same adapter.
    """
    last: dict[str, float] = {}
    for event in reversed(events):
        if len(last) == limit:
            break
        last.setdefault(event.item, event.rating)
    assert all(map(math.isfinite, last.values()))
    return sorted(last.items())
