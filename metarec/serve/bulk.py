"""Adapts many users from one file.

It can be interrupted anywhere: feedback that is in the log is not written again, and adapters that are in the store are
not computed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from metarec.data.interactions import Catalog, RatingScale
from metarec.data.sources.rated import rated_rows
from metarec.errors import DataError, MetarecError
from metarec.progress import progress
from metarec.serve.engine import Engine
from metarec.serve.records import Feedback, NewAdapter, check_id

USERS_AT_ONCE = 256
_WRITERS = 4


@dataclass(frozen=True)
class Bulk:
    """Counts for a file.

    Args:
        users: Its users.
        ratings: Ratings that are new to the log.
        adapted: Adapters that were computed.
        diverged: Inner loops that diverged.
        failed: Users whose adapter could not be computed, for want of memory for example.
    """

    users: int = 0
    ratings: int = 0
    adapted: int = 0
    diverged: int = 0
    failed: int = 0

    def __add__(self, other: Bulk) -> Bulk:
        return Bulk(
            self.users + other.users,
            self.ratings + other.ratings,
            self.adapted + other.adapted,
            self.diverged + other.diverged,
            self.failed + other.failed,
        )


def read_feedback(path: Path, engine: Engine) -> dict[str, list[tuple[str, float]]]:
    """Reads a file with the columns ``user,item,rating``, see `rated_rows`; rows in any order.

    Returns:
        Each user's ``(item id, rating)`` pairs in the file's order.

    Raises:
        DataError: The file or a row is not of that form; the message names the row.
    """
    users: dict[str, list[tuple[str, float]]] = {}
    catalog, scale = engine.catalog, engine.trained.fitted.scale
    for number, row in enumerate(rated_rows(path, ("user", "item", "rating")), start=2):
        user, item, rating = _read(row, catalog, scale, f"'{path}' row {number}")
        users.setdefault(user, []).append((item, rating))
    return users


def _read(row: Sequence[str], catalog: Catalog, scale: RatingScale, where: str) -> tuple[str, str, float]:
    user, item, rating = row
    try:
        found = catalog.ids[catalog.find(item)]
        return check_id(user, "user id"), found, scale.check(cast("float", rating), f"'{item}'")
    except MetarecError as error:
        raise DataError(f"{where}: {error.problem}", error.cure) from None


def adapt_users(engine: Engine, users: Mapping[str, Sequence[tuple[str, float]]]) -> Bulk:
    """Writes users' ratings to the log and keeps an adapter for each of them.

    Args:
        engine: Over the store to write to.
        users: See `read_feedback`. The same ratings of a user again change nothing.
    """
    found = Bulk(len(users))
    done = 0
    with progress("adapting users", len(users)) as advance:
        for block in blocks(sorted(users), USERS_AT_ONCE):
            found += write_ratings(engine, users, block)
            found += adapt_stored(engine, block)
            done += len(block)
            advance(done)
    return found


def write_ratings(engine: Engine, users: Mapping[str, Sequence[tuple[str, float]]], block: Sequence[str]) -> Bulk:
    """Writes some users' ratings to the log, and counts those that were not there."""
    ratings = 0
    said = [Feedback(user, tuple(users[user]), _request(users[user])) for user in block]
    for outcome, feedback in zip(engine.store.append(said), said, strict=True):
        if isinstance(outcome, MetarecError):
            raise outcome
        ratings += 0 if outcome.replayed else len(feedback.ratings)
    return Bulk(ratings=ratings)


def adapt_stored(engine: Engine, block: Sequence[str]) -> Bulk:
    """Keeps an adapter for each of some users of the store, and counts those that were not there."""
    written: list[NewAdapter] = []
    engine.save_with(written.append)
    diverged, failed = engine.counters.diverged, engine.counters.failed
    engine.people(block)
    parts = [written[start::_WRITERS] for start in range(_WRITERS)]
    with ThreadPoolExecutor(_WRITERS) as writers:
        list(writers.map(engine.store.put, [part for part in parts if part]))
    return Bulk(
        adapted=len(written),
        diverged=engine.counters.diverged - diverged,
        failed=engine.counters.failed - failed,
    )


def _request(ratings: Sequence[tuple[str, float]]) -> str:
    """Returns an idempotency key made from a user's ratings, so that the same file again writes nothing."""
    return "bulk " + hashlib.sha256(repr(list(ratings)).encode()).hexdigest()


def blocks(users: Sequence[str], size: int) -> Iterator[list[str]]:
    """Yields users in lists of at most `size`."""
    for start in range(0, len(users), size):
        yield list(users[start : start + size])
