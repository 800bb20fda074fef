"""The feedback log: users, their ratings, and the items that were added after training."""

from __future__ import annotations

import hashlib
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence

from metarec.errors import ConflictError
from metarec.serve.index import Index
from metarec.serve.records import Accepted, Feedback, FeedbackEvent, Profile, UserFacts

_EVENTS = (
    "SELECT feedback.version, item, rating, at, context, review, alone.version FROM feedback"
    " JOIN users ON users.id = feedback.user_id"
    " LEFT JOIN beside_ratings AS beside ON beside.user_id = users.id AND beside.version = feedback.version"
    " LEFT JOIN read_ratings AS alone ON alone.user_id = users.id AND alone.version = feedback.version"
)
_ALL = 2**62


class FeedbackLog:
    """Users, what they rated, what is said of them, and added items, in an index.

    A user's version is the number of ratings they have given, and of times that something else was said of them.
    """

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
        digest = _digest(feedback)
        if feedback.idempotency_key is not None:
            known = self._index.execute(
                "SELECT digest, version FROM requests WHERE user_id = ? AND idempotency_key = ?",
                (user_id, feedback.idempotency_key),
            )
            if known and known[0][0] != digest:
                return ConflictError("the idempotency key was used for other ratings", "Use a new key")
            if known:
                return Accepted(int(known[0][1]), replayed=True)
        version = self._say(user_id, feedback, self._version(user_id))
        rows = [
            (user_id, version + place, item, rating, now)
            for place, (item, rating) in enumerate(feedback.ratings, start=1)
        ]
        self._index.execute_many(
            "INSERT INTO feedback (user_id, version, item, rating, at) VALUES (?, ?, ?, ?, ?)", rows
        )
        self._index.execute_many(
            "INSERT INTO latest (user_id, item, version) VALUES (?, ?, ?)"
            " ON CONFLICT (user_id, item) DO UPDATE SET version = excluded.version",
            [(user_id, item, version) for _, version, item, *_ in rows],
        )
        self._index.execute_many(
            "INSERT INTO beside_ratings (user_id, version, context, review) VALUES (?, ?, ?, ?)",
            [
                (user_id, version + place, json.dumps(dict(beside.context)), json.dumps(beside.review))
                for place, beside in enumerate(feedback.beside, start=1)
                if beside.context or beside.review
            ],
        )
        self._index.execute_many(
            "INSERT INTO read_ratings (user_id, version) VALUES (?, ?)",
            [(user_id, version + place) for place, beside in enumerate(feedback.beside, start=1) if beside.read],
        )
        version += len(rows)
        if feedback.idempotency_key is not None:
            self._index.execute(
                "INSERT INTO requests (user_id, idempotency_key, digest, version) VALUES (?, ?, ?, ?)",
                (user_id, feedback.idempotency_key, digest, version),
            )
        return Accepted(version, replayed=False)

    def _say(self, user_id: int, feedback: Feedback, version: int) -> int:
        """Keeps what feedback says of a user; returns the version after it, a new one if that changed anything."""
        if feedback.about is None and feedback.friends is None:
            return version
        before = self._facts(user_id)
        about = before.about if feedback.about is None else dict(feedback.about)
        friends = before.friends if feedback.friends is None else tuple(sorted(set(feedback.friends)))
        if (about, friends) == (before.about, before.friends):
            return version
        self._index.execute("DELETE FROM friends WHERE user_id = ?", (user_id,))
        self._index.execute_many(
            "INSERT INTO friends (user_id, friend) VALUES (?, ?)", [(user_id, friend) for friend in friends]
        )
        self._index.execute(
            "INSERT INTO user_facts (user_id, version, about) VALUES (?, ?, ?)"
            " ON CONFLICT (user_id) DO UPDATE SET version = excluded.version, about = excluded.about",
            (user_id, version + 1, json.dumps(about)),
        )
        return version + 1

    def _facts(self, user_id: int) -> UserFacts:
        rows = self._index.execute("SELECT about FROM user_facts WHERE user_id = ?", (user_id,))
        friends = self._index.execute("SELECT friend FROM friends WHERE user_id = ?", (user_id,))
        return UserFacts(json.loads(rows[0][0]) if rows else {}, tuple(sorted(friend for friend, *_ in friends)))

    def facts(self, user: str) -> UserFacts:
        """Returns what was said of a user; nothing of one who is not there."""
        rows = self._index.execute("SELECT id FROM users WHERE name = ?", (user,))
        return self._facts(int(rows[0][0])) if rows else UserFacts()

    def forget_friend(self, friend: str) -> dict[str, int]:
        """Takes somebody out of all friends, inside a transaction; returns keys and new versions of whose they were."""
        rows = self._index.execute("DELETE FROM friends WHERE friend = ? RETURNING user_id", (friend,))
        versions: dict[str, int] = {}
        for user_id in sorted(int(row[0]) for row in rows):
            # This locks the user, as feedback does, so that no other server takes the same version.
            locked = self._index.execute("UPDATE users SET name = name WHERE id = ? RETURNING key", (user_id,))
            version = self._version(user_id) + 1
            self._index.execute("UPDATE user_facts SET version = ? WHERE user_id = ?", (version, user_id))
            versions |= {key: version for key, *_ in locked}
        return versions

    def _version(self, user_id: int) -> int:
        rows = self._index.execute(
            "SELECT version FROM feedback WHERE user_id = ? UNION ALL SELECT version FROM user_facts WHERE user_id = ?"
            " ORDER BY version DESC LIMIT 1",
            (user_id, user_id),
        )
        return int(rows[0][0]) if rows else 0

    def profile(self, user: str) -> Profile | None:
        """Returns a user's key and version, or None where there is no such user."""
        rows = self._index.execute(
            "SELECT key, created, (SELECT COALESCE(MAX(version), 0) FROM feedback WHERE user_id = users.id),"
            " (SELECT COALESCE(MAX(version), 0) FROM user_facts WHERE user_id = users.id) FROM users WHERE name = ?",
            (user,),
        )
        return Profile(rows[0][0], max(map(int, rows[0][2:])), float(rows[0][1])) if rows else None

    def events(self, user: str, after: int = 0, limit: int | None = None) -> list[FeedbackEvent]:
        """Returns a user's feedback, oldest first.

        Args:
            user: The user's id.
            after: Leaves out versions up to this one.
            limit: How many events; None for all.
        """
        few = "" if limit is None else f" LIMIT {int(limit)}"
        return self._read(
            f"{_EVENTS} WHERE name = ? AND feedback.version > ? ORDER BY feedback.version{few}", user, after
        )

    def support(self, user: str, limit: int) -> list[FeedbackEvent]:
        """Returns the last rating of each of the `limit` items rated last, in order of item id.

        Logs that end in the same ratings give the same ratings, and so the same adapter. What it takes does not grow
        with the log.
        """
        chosen = (
            " WHERE name = ? AND feedback.version IN ("
            "SELECT latest.version FROM latest JOIN users ON users.id = latest.user_id WHERE name = ?"
            " ORDER BY latest.version DESC LIMIT ?)"
        )
        found = self._read(_EVENTS + chosen, user, user, limit)
        assert all(math.isfinite(event.rating) for event in found)
        return sorted(found, key=lambda event: event.item)

    def _read(self, sql: str, *values: str | int) -> list[FeedbackEvent]:
        return [
            FeedbackEvent(
                int(version),
                item,
                float(rating),
                float(at),
                json.loads(context or "{}"),
                json.loads(review or '""'),
                alone is not None,
            )
            for version, item, rating, at, context, review, alone in self._index.execute(sql, values)
        ]

    def idempotency_keys(self, user: str, after: int, until: int) -> dict[str, int]:
        """Returns the keys that a user's requests named, each with the version after it.

        Args:
            user: The user's id.
            after: Leaves out versions up to this one.
            until: The last version to return.
        """
        rows = self._index.execute(
            "SELECT idempotency_key, version FROM requests JOIN users ON users.id = user_id"
            " WHERE name = ? AND version > ? AND version <= ? ORDER BY version",
            (user, after, until),
        )
        return {key: int(version) for key, version in rows}

    def users(self) -> Iterator[tuple[str, Profile]]:
        """Yields every user by name, a thousand at a time."""
        after = 0
        while True:
            rows = self._index.execute(
                "SELECT id, name, key, created,"
                " (SELECT COALESCE(MAX(version), 0) FROM feedback WHERE user_id = users.id),"
                " (SELECT COALESCE(MAX(version), 0) FROM user_facts WHERE user_id = users.id)"
                " FROM users WHERE id > ? ORDER BY id LIMIT 1000",
                (after,),
            )
            if not rows:
                return
            for _, name, key, created, *versions in rows:
                yield name, Profile(key, max(map(int, versions)), float(created))
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

    def change_fact(self, name: str, change: Callable[[str | None], str]) -> None:
        """Puts a fact about the store in the place of another one; servers that do the same wait for each other.

        Args:
            name: The fact's name.
            change: Returns the new text for the old one, which is None where there is none.
        """
        with self._index.transaction():
            self._index.alone("metarec facts")
            self._index.state(name, change(self._index.fact(name)))

    def set_fact(self, name: str, text: str) -> None:
        """Writes a fact about the store."""
        self._index.state(name, text)

    def fact(self, name: str) -> str | None:
        """Returns a fact about the store, or None."""
        return self._index.fact(name)

    def facts_named(self, beginning: str) -> dict[str, str]:
        """Returns facts about the store whose names begin so, by name."""
        return self._index.facts_named(beginning)

    def test_write(self) -> None:
        """Checks that feedback can be stored, by a write that survives a crash.

        Raises:
            StoreError: It cannot.
        """
        self._index.state("tested", f"{time.time()}")


def _digest(feedback: Feedback) -> str:
    """Names what feedback says by its content; what reviews were read as is not said."""
    read = {place for place, one in enumerate(feedback.beside) if one.read}
    rated = [(item, None if place in read else rating) for place, (item, rating) in enumerate(feedback.ratings)]
    said: list[object] = [rated]
    if feedback.beside or feedback.about is not None or feedback.friends is not None:
        beside = [[dict(one.context), one.review] for one in feedback.beside]
        said += [beside, None if feedback.about is None else dict(feedback.about), feedback.friends]
    text = json.dumps(said if len(said) > 1 else rated, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
