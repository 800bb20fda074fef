"""The feedback log: users, their ratings, and the items that were added after training."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence

from metarec.errors import ConflictError
from metarec.serve.index import Index
from metarec.serve.records import Accepted, Feedback, FeedbackEvent, Profile


class FeedbackLog:
    """Users, ratings and added items in an index; a user's version is the number of ratings they have given."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def append(self, batch: Sequence[Feedback]) -> list[Accepted | ConflictError]:
        """Writes feedback to the log, all of it in one transaction; on return it survives a crash.

        Args:
            batch: Requests, oldest first.

        Returns:
            One entry per request: the user's version after it, or the error that refused it alone.

        Raises:
            StoreError: Nothing was written.
        """
        now = time.time()
        with self._index.transaction():
            # All servers lock users in the same order, so that two never wait for each other.
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
        """Returns a user's key and version, or None where there is no such user."""
        rows = self._index.execute(
            "SELECT key, created, (SELECT COALESCE(MAX(version), 0) FROM feedback WHERE user_id = users.id)"
            " FROM users WHERE name = ?",
            (user,),
        )
        return Profile(rows[0][0], int(rows[0][2]), float(rows[0][1])) if rows else None

    def events(self, user: str) -> list[FeedbackEvent]:
        """Returns a user's feedback, oldest first."""
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

    # Items that the recommender was not trained with.

    def add_items(self, items: Sequence[tuple[str, Mapping[str, str]]]) -> int:
        """Stores new items; those that are there with the same fields stay as they are.

        Returns:
            How many were new.

        Raises:
            ConflictError: An id is there with other fields; nothing was written.
        """
        new = 0
        with self._index.transaction():
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
        rows = self._index.execute("SELECT id, fields FROM items ORDER BY ordinal")
        return [(item, json.loads(fields)) for item, fields in rows]

    def count_items(self) -> int:
        """Returns how many items were added."""
        return int(self._index.execute("SELECT COUNT(*) FROM items")[0][0])

    def remove_item(self, item: str) -> None:
        """Remembers that an item is never ranked again, whether it was added or trained with."""
        self._index.execute(
            "INSERT INTO removed_items (id, created) VALUES (?, ?) ON CONFLICT (id) DO NOTHING", (item, time.time())
        )

    def removed_items(self) -> set[str]:
        """Returns the ids of the items that were removed."""
        return {item for item, *_ in self._index.execute("SELECT id FROM removed_items")}

    def count_removed(self) -> int:
        """Returns how many items were removed."""
        return int(self._index.execute("SELECT COUNT(*) FROM removed_items")[0][0])
