"""The store's records: feedback, users, adapters; and the checks and choices that need nothing else."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from metarec.errors import ConfigError

MAX_ID_CHARACTERS = 256


@dataclass(frozen=True)
class Beside:
    """What came with a rating: the moment, as columns and their values, and a review.

    Args:
        context: Columns to values.
        review: What the user wrote.
        read: Whether there was no rating, so that it is what the review was read as.
    """

    context: Mapping[str, str] = field(default_factory=dict)
    review: str = ""
    read: bool = False


@dataclass(frozen=True)
class Feedback:
    """One request's ratings of one user, and what it says of the user.

    Args:
        user: The user's id.
        ratings: ``(item id, rating)`` pairs, oldest first.
        idempotency_key: Names the request; a second request of that name changes nothing. None where it has no name.
        beside: What came with each rating; none where nothing came with any.
        about: Fields of the user to their values, in place of those there are; None leaves these.
        friends: Ids of the user's friends, in place of those there are; None leaves these.
    """

    user: str
    ratings: tuple[tuple[str, float], ...]
    idempotency_key: str | None = None
    beside: tuple[Beside, ...] = ()
    about: Mapping[str, str] | None = None
    friends: tuple[str, ...] | None = None


@dataclass(frozen=True)
class UserFacts:
    """What was said of a user: fields and their values, and ids of friends in order."""

    about: Mapping[str, str] = field(default_factory=dict)
    friends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Accepted:
    """The user's version after some feedback, and whether that feedback had been accepted before."""

    version: int
    replayed: bool


@dataclass(frozen=True)
class Profile:
    """A user's random key, the number of their ratings and changes, and when they were first seen (Unix seconds)."""

    key: str
    version: int
    created: float


@dataclass(frozen=True)
class FeedbackEvent:
    """One line of the feedback log; for `read` see `Beside`."""

    version: int
    item: str
    rating: float
    at: float
    context: Mapping[str, str] = field(default_factory=dict)
    review: str = ""
    read: bool = False


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter's row in the index.

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
    """An adapter to keep: the user's key, its version and recommender, and a function that writes it to a directory."""

    key: str
    version: int
    recommender: str
    write: Callable[[Path], object]


def check_id(name: str, what: str) -> str:
    """Returns an id unchanged, if it can be stored and printed.

    Raises:
        ConfigError: It is empty, too long, or holds control characters or half a surrogate pair.
    """
    if not 1 <= len(name) <= MAX_ID_CHARACTERS:
        raise ConfigError(f"the {what} has {len(name)} characters", f"Use 1 to {MAX_ID_CHARACTERS}")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
        raise ConfigError(f"the {what} holds control characters", "Use printable characters")
    return name
