"""Adapts many users from one file of ratings, and files of what else is known of them.

It can be interrupted anywhere: feedback that is in the log is not written again, and adapters that are in the store are
not computed again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from metarec.data.interactions import Catalog, RatingScale
from metarec.data.side import Side
from metarec.data.side_files import friends_of_users, people_named, side_folder, users_table
from metarec.data.source_options import SourceOptions
from metarec.data.sources.rated import rated_rows
from metarec.errors import ConfigError, DataError, MetarecError
from metarec.serve.engine import Engine
from metarec.serve.records import Beside, Feedback, NewAdapter, check_id
from metarec.system.progress import progress
from metarec.training.given_side import is_review, known_names, knows_a_friend, read_review, unread_fields

_LOG = logging.getLogger(__name__)
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


@dataclass
class _Row:
    """What one user's rows of a file say."""

    ratings: list[tuple[str, float]] = field(default_factory=list)
    beside: list[Beside] = field(default_factory=list)


def read_feedback(path: Path, engine: Engine, options: SourceOptions | None = None) -> dict[str, Feedback]:
    """Reads a file with the columns ``user,item,rating``, see `rated_rows`; rows in any order.

    Args:
        path: The file.
        engine: Over the recommender that is to read it.
        options: What else is known: ``context`` and ``review`` name columns of the file, ``users`` and ``friends``
            files beside it. Hour, weekday and month are read off timestamps where there are no such columns. Where
            reviews are read, a rating may be left out, or be the review itself.

    Returns:
        What each user's rows say, ratings in the file's order. Whom the files beside it tell something of, and the
        recommender was not fitted on, is there without ratings too.

    Raises:
        DataError: A file or a row is not of that form; the message names the row.
        ConfigError: The recommender does not read what is named.
    """
    options = options or SourceOptions()
    _check_options(engine, options)
    columns = ("user", "item", *options.of_rows, "rating")
    catalog, scale = engine.catalog, engine.trained.fitted.scale
    users: dict[str, _Row] = {}
    rows = rated_rows(
        path,
        columns,
        line_breaks=options.review is not None,
        may_be_empty=bool(options.users or options.friends),
    )
    for number, (user, item, *said, rating) in enumerate(rows, start=2):
        named = dict(zip(options.of_rows, said, strict=True))
        review, where = named.pop(options.review or "", ""), f"'{path}' row {number}"
        alone = options.review is not None and (is_review(rating) or (rating == "" and bool(review.strip())))
        if alone:
            review = str(rating or review)
            rating = cast("str", read_review(engine.trained.fitted, review))
        user, found, value = _read((user, item, rating), catalog, scale, where)
        row = users.setdefault(user, _Row())
        row.ratings.append((found, value))
        row.beside.append(Beside({name: text for name, text in named.items() if text.strip()}, review.strip(), alone))
    about, friends = _known(path, list(users), engine, options)
    fields = dict.fromkeys((name for said in about.values() for name in said), "")
    moments = {name: np.array([""], object) for name in options.context}
    for sentence in unread_fields(engine.trained.fitted, Side(fields, ("",) if friends else (), asked=moments)):
        _LOG.warning("%s", sentence)
    unrated = [user for user in dict.fromkeys([*about, *friends]) if user not in users]
    users |= {check_id(user, "user id"): _Row() for user in unrated}
    if not users:
        raise DataError(f"'{path}' and the files beside it tell nothing of anybody", "Write one row for each rating")
    return {
        user: bulk_feedback(user, row.ratings, row.beside, about.get(user), friends.get(user))
        for user, row in users.items()
    }


def bulk_feedback(
    user: str,
    ratings: Sequence[tuple[str, float]],
    beside: Sequence[Beside] = (),
    about: Mapping[str, str] | None = None,
    friends: Sequence[str] | None = None,
) -> Feedback:
    """Returns what is said of one user, named by its content, so that the same again writes nothing."""
    some = tuple(beside) if any(one != Beside() for one in beside) else ()
    said = [list(ratings), *([some, about, friends] if some or about or friends else [])]
    text = repr(said if len(said) > 1 else said[0])
    key = f"bulk {hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return Feedback(user, tuple(ratings), key, some, about, None if friends is None else tuple(friends))


def _check_options(engine: Engine, options: SourceOptions) -> None:
    """Refuses what the recommender does not read."""
    if options.vectors or options.item_graph:
        raise ConfigError("vectors and graphs are of items", "Name them with 'metarec train', and leave them out here")
    if not (options.of_rows or options.users or options.friends):
        return
    beside = Beside(dict.fromkeys(options.context, ""), "text" if options.review else "")
    engine.check(Feedback("", (), beside=(beside,), friends=("",) if options.friends else None))


def _known(
    path: Path, users: Sequence[str], engine: Engine, options: SourceOptions
) -> tuple[dict[str, dict[str, str]], dict[str, tuple[str, ...]]]:
    """Returns what files beside the ratings say of users: their fields, and their friends.

    Of people without ratings here those are left out whom the recommender was fitted on, and those of whom it reads
    nothing.
    """
    folder = side_folder(path)
    rated = frozenset(users)
    unrated = [user for user in people_named(folder, options) if user not in rated]
    seen = engine.trained.fitted.split.saw(unrated)
    others = [user for user, left_out in zip(unrated, seen, strict=True) if not left_out]
    everybody = [*users, *others]
    about: dict[str, dict[str, str]] = {}
    if options.users:
        file = folder / options.users
        found = users_table(file, users, options.encoding, others)
        fields, _ = known_names(engine.trained.fitted)
        unread = [name for name in found if name not in fields]
        if len(unread) == len(found):
            raise DataError(f"'{file}' has no field of users that the recommender knows", f"Known: {', '.join(fields)}")
        if unread:
            _LOG.warning("columns of '%s' that nothing reads: %s", file, ", ".join(map(repr, unread)))
        read = {name: column for name, column in found.items() if name not in unread}
        about = {
            user: said
            for place, user in enumerate(everybody)
            if (said := {name: column[place] for name, column in read.items() if column[place]})
        }
    friends: dict[str, tuple[str, ...]] = {}
    if options.friends:
        listed = friends_of_users(folder / options.friends, users, options.encoding, others)
        friends = {user: some for user, some in zip(everybody, listed, strict=True) if some}
        for user in others:
            if user not in about and not knows_a_friend(engine.trained.fitted, friends.get(user, ())):
                friends.pop(user, None)
    if known := sum(user in about or user in friends for user in others):
        _LOG.warning("%d users without ratings are adapted to what else is known of them", known)
    if seen.any():
        _LOG.warning("%d users without ratings here are left out: it was fitted on theirs", int(seen.sum()))
    return about, friends


def _read(row: tuple[str, str, str], catalog: Catalog, scale: RatingScale, where: str) -> tuple[str, str, float]:
    user, item, rating = row
    try:
        found = catalog.ids[catalog.find(item)]
        return check_id(user, "user id"), found, scale.check(cast("float", rating), f"'{item}'")
    except MetarecError as error:
        raise DataError(f"{where}: {error.problem}", error.cure) from None


def adapt_users(engine: Engine, users: Mapping[str, Feedback]) -> Bulk:
    """Writes users' ratings to the log and keeps an adapter for each of them.

    Args:
        engine: Over the store to write to.
        users: See `read_feedback`. The same of a user again changes nothing.
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


def write_ratings(engine: Engine, users: Mapping[str, Feedback], block: Sequence[str]) -> Bulk:
    """Writes some users' ratings to the log, and counts those that were not there."""
    ratings = 0
    said = [users[user] for user in block]
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


def blocks(users: Sequence[str], size: int) -> Iterator[list[str]]:
    """Yields users in lists of at most `size`."""
    for start in range(0, len(users), size):
        yield list(users[start : start + size])
