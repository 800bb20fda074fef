"""Schemas of the service's requests and answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import Path, Query
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from metarec.data.side import ABOUT
from metarec.errors import ConfigError
from metarec.serve.records import MAX_ID_CHARACTERS, Beside

MOST_RECOMMENDED = 1000
MOST_EXPLAINED = 50
MOST_INFORMATIVE = 50
MOST_EXPORTED = 10_000
_MOST_AT_ONCE = 100
_MOST_FIELDS = 100
_MOST_FRIENDS = 1000
_MOST_CHARACTERS = 4000
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARACTERS)]
UserId = Annotated[
    str,
    BeforeValidator(unquote),  # of slashes and percent signs, see `guard.Guard`
    Path(min_length=1, max_length=MAX_ID_CHARACTERS, description="Any text, percent-encoded: '/' as %2F."),
]


ItemId = Annotated[str, BeforeValidator(unquote), Path(min_length=1, max_length=MAX_ID_CHARACTERS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _text(value: object) -> object:
    """Returns numbers as texts, and texts without halves of surrogate pairs."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _fields(value: object) -> object:
    """Returns a sentence about a person as a field of its own."""
    return {ABOUT: value} if isinstance(value, str) else value


_JSON_FIELDS = {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
Text = Annotated[str, BeforeValidator(_text), Field(max_length=_MOST_CHARACTERS)]
Fields = Annotated[dict[Id, Text], Field(max_length=_MOST_FIELDS), WithJsonSchema(_JSON_FIELDS)]
About = Annotated[Fields, BeforeValidator(_fields), WithJsonSchema({"anyOf": [{"type": "string"}, _JSON_FIELDS]})]
Friends = Annotated[list[Id], Field(max_length=_MOST_FRIENDS)]


class _Known(_Strict):
    about: About | None = Field(None, description="A sentence about the user, or fields of users to their values.")
    friends: Friends | None = Field(None, description="Ids of friends of the user.")


class Rating(_Strict):
    """One rating or review, and what came with it."""

    item: Id
    context: Fields | None = Field(None, description="The moment of the rating: columns of the data to their values.")
    review: Text = Field("", description="What the user wrote about the item.")
    rating: float | None = Field(
        None,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        description="On the scale of the recommender's task; left out, it is what the review is read as.",
    )

    @field_validator("rating")
    @classmethod
    def _something_is_said(cls, rating: float | None, info: ValidationInfo) -> float | None:
        if rating is None and not str(info.data.get("review", "-")).strip():
            raise PydanticCustomError("missing", "There is neither a rating nor a review")
        return rating

    @property
    def beside(self) -> Beside:
        """What came with the rating."""
        return Beside(self.context or {}, self.review, self.rating is None)


class OneRating(Rating, _Known):
    """One rating, and what is known of the user from now on."""


class RatingsBody(_Known):
    """Several ratings, oldest first, and what is known of the user from now on."""

    ratings: list[Rating] = Field(min_length=1, max_length=_MOST_AT_ONCE)


class KnownBody(_Known):
    """What is known of the user from now on."""


def _which(key: str, several: type[BaseModel]) -> Discriminator:
    """Tells one thing from several by the key that holds the several, so that a fault is one of what was meant."""

    def which(body: Any) -> str:
        if isinstance(body, KnownBody) or (isinstance(body, dict) and body.keys() and body.keys() <= _KNOWN):
            return "known"
        return "several" if isinstance(body, several) or (isinstance(body, dict) and key in body) else "one"

    return Discriminator(which)


_KNOWN = frozenset(_Known.model_fields)
FeedbackBody = Annotated[
    Annotated[RatingsBody, Tag("several")] | Annotated[OneRating, Tag("one")] | Annotated[KnownBody, Tag("known")],
    _which("ratings", RatingsBody),
]


@dataclass(frozen=True)
class Asked:
    """What one question says of the user and of the moment, beside what was said before."""

    about: dict[str, str] = field(default_factory=dict)
    friends: tuple[str, ...] = ()
    context: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.about or self.friends or self.context)


_Repeated = Annotated[str, Field(max_length=_MOST_CHARACTERS)]


def asked(
    context: Annotated[
        list[_Repeated] | None,
        Query(max_length=_MOST_FIELDS, description="COLUMN=VALUE of the moment, as device=phone; repeatable."),
    ] = None,
    about: Annotated[
        list[_Repeated] | None,
        Query(max_length=_MOST_FIELDS, description="A sentence about the user, or FIELD=VALUE; repeatable. Not kept."),
    ] = None,
    friend: Annotated[
        list[Id] | None, Query(max_length=_MOST_FRIENDS, description="Id of a friend; repeatable. Not kept.")
    ] = None,
) -> Asked:
    """Returns what the query of an address says of the user and of the moment."""
    moment = {}
    for entry in context or []:
        name, equals, value = entry.partition("=")
        if not equals:
            raise ConfigError("'context' of the query has no '='", "Write context=device=phone")
        moment[name] = value
    fields = [entry.partition("=") for entry in about or []]
    known = {name if equals else ABOUT: value if equals else name for name, equals, value in fields}
    return Asked(known, tuple(friend or ()), moment)


class Items(_Known):
    """Items to score, and what this question says of the user and of the moment."""

    items: list[Id] = Field(min_length=1, max_length=MOST_RECOMMENDED)
    context: Fields | None = Field(None, description="The moment: columns of the data to their values.")

    @property
    def asked(self) -> Asked:
        """What the question says of the user and of the moment."""
        return Asked(self.about or {}, tuple(self.friends or ()), self.context or {})


class NewItem(_Strict):
    """An item that the recommender was not trained with."""

    id: Id
    fields: dict[str, Annotated[str, Field(max_length=2000)]] = Field(
        description="The catalog's text fields; 'title' is needed."
    )


class NewItems(_Strict):
    """Several new items."""

    items: list[NewItem] = Field(min_length=1, max_length=_MOST_AT_ONCE)


ItemsBody = Annotated[Annotated[NewItems, Tag("several")] | Annotated[NewItem, Tag("one")], _which("items", NewItems)]


class Adapter(BaseModel):
    """The adapter that an answer was computed with."""

    version: int = Field(description="How often the user had said something when it was adapted; 0: not adapted.")
    ratings: int = Field(description="How many items it was adapted to.")
    diverged: bool = Field(description="Adapting failed numerically: the ranking before adaptation is served.")
    stale: bool = Field(description="A newer version could not be computed; this is the last good one.")


class FeedbackAnswer(BaseModel):
    """The result of feedback; the ratings are durable."""

    accepted: int
    replayed: bool = Field(description="The idempotency key had been accepted before; nothing changed.")
    adapter: Adapter
    losses: list[float] = Field(description="Loss on the user's ratings before each adaptation step.")
    read: dict[str, float] = Field({}, description="Items with a review and no rating, to what it was read as.")
    unknown: list[str] = Field([], description="What is said of the user or the moment and says nothing, and why.")


class ReasonAnswer(BaseModel):
    """A rated item, and how much lower the recommended item's score is without that rating."""

    item: str
    title: str
    rating: float
    moved: float


class Recommended(BaseModel):
    """One recommended item."""

    item: str
    title: str
    score: float
    predicted_rating: float | None = Field(
        None, description="On the scale of the recommender's task; null where it has likes only."
    )
    because: list[ReasonAnswer] = []


class Recommendations(BaseModel):
    """A ranking of the whole catalog."""

    adapter: Adapter
    items: list[Recommended]
    unknown: list[str] = Field([], description="What is said of the user or the moment and says nothing, and why.")


class PreferenceAnswer(BaseModel):
    """How much more a user is expected to like a category's items than others do, against the average item."""

    field: str
    category: str
    items: int = Field(description="How many items carry the category.")
    mean: float = Field(description="What is expected, in units of the rating scale.")
    low: float = Field(description="Between `low` and `high` lie 80% of what the model believes.")
    high: float
    spread: float = Field(description="Half that interval's width for somebody who has rated nothing.")


class Preferences(BaseModel):
    """What is believed of a user, and how surely."""

    adapter: Adapter
    known: float = Field(
        description="Share of the variance of users' differences between items that the ratings explain."
    )
    preferences: list[PreferenceAnswer] = Field(description="None where the score has no Gaussian process.")


class InformativeItem(BaseModel):
    """An item whose rating would tell much about a user."""

    item: str
    title: str
    gain: float = Field(description="Share of the uncertainty about the user's preferences that a rating takes away.")


class InformativeItems(BaseModel):
    """Items to rate first, each chosen as if those before it were rated."""

    adapter: Adapter
    items: list[InformativeItem] = Field(description="None where the score has no Gaussian process.")


class ScoresAnswer(BaseModel):
    """Scores in the order of the request's items; higher is better."""

    adapter: Adapter
    scores: list[float]
    predicted_ratings: list[float] | None = Field(
        None, description="On the scale of the recommender's task; null where it has likes only."
    )
    unknown: list[str] = Field([], description="What is said of the user or the moment and says nothing, and why.")


class SearchHit(BaseModel):
    """An item found by text."""

    item: str
    title: str
    similarity: float
    score: float | None


class SearchAnswer(BaseModel):
    """Items found by text, best first."""

    adapter: Adapter | None
    items: list[SearchHit]
    unknown: list[str] = Field([], description="What is said of the user or the moment and says nothing, and why.")


class EventAnswer(BaseModel):
    """One rating as the log holds it; `at` is seconds since the epoch."""

    version: int
    item: str
    rating: float
    at: float
    context: dict[str, str]
    review: str
    read: bool = Field(description="No rating was given: it is what the review was read as.")


class UserAnswer(BaseModel):
    """Everything that is stored about a user, a page of ratings at a time."""

    user: str
    created: float
    version: int
    about: dict[str, str]
    friends: list[str]
    ratings: list[EventAnswer]
    idempotency_keys: dict[str, int] = Field(description="Keys of requests, each with the version after it.")
    adapters: list[dict[str, int | str]]
    next: int | None = Field(description="Ask again with this as `after` for later ratings; null where there are none.")


class Added(BaseModel):
    """How many items were new, and how many can be recommended now."""

    added: int
    items: int


class Removed(BaseModel):
    """The item was removed, and how many can be recommended now."""

    removed: bool
    items: int


class Erased(BaseModel):
    """The user was erased."""

    erased: bool
