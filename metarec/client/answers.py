"""What is sent to the service and what it answers, as dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rating:
    """One rating that is sent.

    Args:
        item: The item's id.
        rating: On the scale of the recommender's task; None where the review alone says it.
        context: The moment of the rating: columns of the data to their values.
        review: What the user wrote about the item.
    """

    item: str
    rating: float | None = None
    context: Mapping[str, str | float] = field(default_factory=dict)
    review: str = ""


@dataclass(frozen=True)
class Adapter:
    """The adapter that an answer was computed with.

    Args:
        version: How often the user had said something when it was adapted; 0 is the meta-initialization.
        ratings: How many items it was adapted to.
        diverged: Adapting met a number that is not finite; the ranking before adaptation is served.
        stale: A newer one could not be computed; this is the last good one.
    """

    version: int
    ratings: int
    diverged: bool
    stale: bool


@dataclass(frozen=True)
class FeedbackAnswer:
    """The result of feedback, which is durable.

    Args:
        accepted: How many ratings were kept.
        replayed: The idempotency key had been accepted before; nothing changed.
        adapter: The user's adapter, which uses the ratings.
        losses: The loss on the user's ratings before each step of adaptation.
        unknown: What was said and has no effect, and why.
        read: Items with a review and no rating, to what it was read as.
    """

    accepted: int
    replayed: bool
    adapter: Adapter
    losses: tuple[float, ...]
    unknown: tuple[str, ...] = ()
    read: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ReasonAnswer:
    """A rated item, and how much lower the recommended item's score is without that rating."""

    item: str
    title: str
    rating: float
    moved: float


@dataclass(frozen=True)
class Recommended:
    """One recommended item; `predicted_rating` is None where the task has likes only."""

    item: str
    title: str
    score: float
    predicted_rating: float | None = None
    because: tuple[ReasonAnswer, ...] = ()


@dataclass(frozen=True)
class Recommendations:
    """A ranking of the whole catalog, best first."""

    adapter: Adapter
    items: tuple[Recommended, ...]
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreferenceAnswer:
    """How much more a user is expected to like a category's items than others do, against the average item.

    Args:
        field: The field of items.
        category: One of its values.
        items: How many items carry it.
        mean: What is expected, in units of the rating scale.
        low: Between `low` and `high` lie 80% of what the model believes.
        high: See `low`.
        spread: Half that interval's width for somebody who has rated nothing.
    """

    field: str
    category: str
    items: int
    mean: float
    low: float
    high: float
    spread: float


@dataclass(frozen=True)
class Preferences:
    """What is believed of a user, and how surely.

    Args:
        adapter: The user's adapter.
        known: Share of the variance of users' differences between items that the user's ratings explain.
        preferences: One for each category; none where the score has no Gaussian process.
    """

    adapter: Adapter
    known: float
    preferences: tuple[PreferenceAnswer, ...]


@dataclass(frozen=True)
class InformativeItem:
    """An item whose rating would tell much; `gain` is the share of the uncertainty that it takes away."""

    item: str
    title: str
    gain: float


@dataclass(frozen=True)
class InformativeItems:
    """Items to rate first, each chosen as if those before it were rated."""

    adapter: Adapter
    items: tuple[InformativeItem, ...]


@dataclass(frozen=True)
class ScoresAnswer:
    """Scores in the order of the items; `predicted_ratings` is None where the task has likes only."""

    adapter: Adapter
    scores: tuple[float, ...]
    predicted_ratings: tuple[float, ...] | None = None
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class SearchHit:
    """An item found by text; `score` is None where no user is named."""

    item: str
    title: str
    similarity: float
    score: float | None


@dataclass(frozen=True)
class SearchAnswer:
    """Items found by text, best first; `adapter` is None where no user is named."""

    adapter: Adapter | None
    items: tuple[SearchHit, ...]
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class EventAnswer:
    """One rating as the service holds it; `at` is seconds since the epoch.

    None was given where `read` is true: it is what the review was read as.
    """

    version: int
    item: str
    rating: float
    at: float
    context: Mapping[str, str]
    review: str
    read: bool = False


@dataclass(frozen=True)
class UserAnswer:
    """What is stored about a user, with a page of their ratings.

    Args:
        user: The user's id.
        created: When they were first heard of, in seconds since the epoch.
        version: How often they said something.
        about: What is known of them.
        friends: Ids of their friends.
        ratings: Ratings, oldest first.
        idempotency_keys: Keys of requests, each with the version after it.
        adapters: The adapters that are kept.
        next: What to ask for later ratings after; None where there are none.
    """

    user: str
    created: float
    version: int
    about: Mapping[str, str]
    friends: tuple[str, ...]
    ratings: tuple[EventAnswer, ...]
    idempotency_keys: Mapping[str, int]
    adapters: tuple[Mapping[str, int | str], ...]
    next: int | None = None


@dataclass(frozen=True)
class Added:
    """How many items were new, and how many can be recommended now."""

    added: int
    items: int


@dataclass(frozen=True)
class Removed:
    """The item was removed, and how many can be recommended now."""

    removed: bool
    items: int


@dataclass(frozen=True)
class Erased:
    """The user was erased."""

    erased: bool
