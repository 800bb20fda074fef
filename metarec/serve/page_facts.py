"""What the page shows, as its templates read it: items by their titles, what moved, pictures of preferences, fields."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metarec.data.interactions import Catalog, RatingScale
from metarec.data.side import ABOUT
from metarec.data.titles import read_title
from metarec.recommending.preferences import Preference
from metarec.scorers.collaborative.side_readers import Categories, Numbers

_MOST_CHOICES, _FEW_CHOICES = 10, 5
# Width of the picture of a preference, where 0 is in it, and the share of each half that the first band takes.
_WIDTH, _ZERO, _BAND = 200.0, 100.0, 0.7


@dataclass(frozen=True)
class Named:
    """An item as people name it: its title with the article in front, or its id where it has none."""

    item: str
    title: str
    year: str

    @classmethod
    def of(cls, catalog: Catalog, item: str, code: int) -> Named:
        """Returns an item of a catalog."""
        title, year = read_title(catalog.fields["title"][code])
        return cls(item, title or f"item {item}", year or catalog.fields.get("year", [""] * len(catalog))[code])


@dataclass(frozen=True)
class RankedItem(Named):
    """A line of the ranking; `was` is the item's place before the last rating, None where it was not near the top."""

    score: float
    rating: float | None
    was: int | None
    because: Sequence[Because]


@dataclass(frozen=True)
class RatedItem(Named):
    """A line of what the visitor rated."""

    value: float


@dataclass(frozen=True)
class Because:
    """A rating that moved an item, by how much."""

    title: str
    rating: float
    moved: float


@dataclass(frozen=True)
class Moved:
    """What a ranking is compared with.

    Args:
        version: The ranking's version of the adapter.
        places: Its items' places.
        before: Those of the ranking that was shown before.
        since: The rating that came between the two; None where it is not known, or they are several.
    """

    version: int
    places: Mapping[str, int]
    before: Mapping[str, int]
    since: RatedItem | None


@dataclass(frozen=True)
class Bar:
    """The picture of a preference: left end and width of each of its parts, of `_WIDTH`."""

    category: str
    mean: float
    width: float
    before: tuple[float, float]
    bar: tuple[float, float]
    whisker: tuple[float, float]


@dataclass(frozen=True)
class Field:
    """Something to say about oneself; `choices` are its values, where it has few."""

    name: str
    label: str
    value: str
    choices: Sequence[str]
    number: bool


def choices(scale: RatingScale) -> list[int]:
    """Returns the ratings to choose from: the whole numbers of a scale, or a few of many."""
    low, high = math.ceil(scale.low), math.floor(scale.high)
    if high - low < _MOST_CHOICES:
        return list(range(low, high + 1))
    return [round(low + (high - low) * step / (_FEW_CHOICES - 1)) for step in range(_FEW_CHOICES)]


def moves(rows: Sequence[RankedItem]) -> str:
    """Says how many items of a ranking are new, went up and went down."""
    new = sum(row.was is None for row in rows)
    up = sum(row.was is not None and row.was > place for place, row in enumerate(rows, start=1))
    down = sum(row.was is not None and row.was < place for place, row in enumerate(rows, start=1))
    parts = [f"{count} {what}" for count, what in ((new, "new"), (up, "up"), (down, "down")) if count]
    return ", ".join(parts) or "nothing moved"


def ranking_said(facts: Mapping[str, Any]) -> str:
    """Says a ranking in a sentence, for those who hear it."""
    first = facts["rows"][0].title if facts["rows"] else "nothing"
    return f"Your ranking: {facts['moves']}; first is {first}."


def bars(preferences: Sequence[Preference]) -> list[Bar]:
    """Returns the pictures of preferences, on one scale that no rating changes."""
    widest = max((one.spread for one in preferences), default=0.0) or 1.0

    def at(value: float) -> float:
        return min(max(_ZERO + value / widest * _ZERO * _BAND, 0.0), _WIDTH)

    def between(low: float, high: float) -> tuple[float, float]:
        return round(at(low), 1), round(at(high) - at(low), 1)

    return [
        Bar(
            one.category,
            round(one.mean, 2) + 0.0,  # no negative zero
            (one.high - one.low) / 2,
            between(-one.spread, one.spread),
            between(min(one.mean, 0.0), max(one.mean, 0.0)),
            between(one.low, one.high),
        )
        for one in preferences
    ]


def about_fields(readers: Mapping[str, Any], about: Mapping[str, str]) -> list[Field]:
    """Returns what visitors may say about themselves, with what they have said.

    Args:
        readers: Field of users to what reads it.
        about: Field to what is known.
    """
    return [
        Field(
            name,
            "In a sentence" if name == ABOUT else name.replace("_", " ").capitalize(),
            about.get(name, ""),
            reader.tokens if isinstance(reader, Categories) and not reader.words else (),
            isinstance(reader, Numbers),
        )
        for name, reader in readers.items()
    ]
