"""Plain types for who rated what: `Catalog`, `Interactions`, `Ratings`.

Identifiers are strings at the edge and row numbers (codes) inside, so that ``"007"`` stays ``"007"`` and arrays
stay small. Knows nothing of files, splits or models.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from metarec.data.side import Side, SideColumns
from metarec.data.titles import TitleIndex
from metarec.errors import DataError, RatingError, UnknownItemError, shown

Codes = NDArray[np.int64]
Values = NDArray[np.float32]
Flags = NDArray[np.bool_]
Times = NDArray[np.int64] | NDArray[np.float64]
# The parts of a split; `Interactions.part` holds positions in here.
SplitPart = Literal["train", "validation", "test"]
PART_NAMES: tuple[SplitPart, ...] = ("train", "validation", "test")
# Parts of a field's name that say when an item appeared, the surest first.
_DAY = 86_400
_YEAR_FIELDS = ("year", "released", "published", "date")


@dataclass(frozen=True)
class Catalog:
    """The items there are and the text fields that describe them.

    Args:
        ids: One string per item; the position is the item's code.
        fields: Field name to one string per item; missing values are empty strings. ``title`` is required.
    """

    ids: tuple[str, ...]
    fields: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if "title" not in self.fields:
            raise DataError("the catalog has no 'title' field", "Name the column that holds the item's title")
        for name, column in self.fields.items():
            if len(column) != len(self.ids):
                raise DataError(f"catalog field '{name}' has {len(column)} values for {len(self.ids)} items")
        if len(self._code_of_id) != len(self.ids):
            raise DataError("the catalog holds an item id twice", "Give every item one row")

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Catalog(items={len(self)}, fields={list(self.fields)})"

    @cached_property
    def _code_of_id(self) -> dict[str, int]:
        return {item: code for code, item in enumerate(self.ids)}

    @cached_property
    def titles(self) -> TitleIndex:
        """The titles, ready to be looked up; made when it is first asked for."""
        dated = (name for part in _YEAR_FIELDS for name in self.fields if part in name.casefold())
        return TitleIndex(self.fields["title"], self.fields.get(next(dated, "")))

    @cached_property
    def digest(self) -> str:
        """Names the catalog by its content."""
        columns = [self.ids, sorted(self.fields), *(column for _, column in sorted(self.fields.items()))]
        text = "\1".join("\0".join(column) for column in columns)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def row(self, code: int) -> dict[str, str]:
        """Returns the text fields of one item, plus its ``id``."""
        return {"id": self.ids[code], **{name: column[code] for name, column in self.fields.items()}}

    def title(self, code: int) -> str:
        """Returns the title of one item with its year, where there is one."""
        row = self.row(code)
        year = row.get("year", "")
        return f"{row['title']} ({year})" if year and f"({year})" not in row["title"] else row["title"]

    def find(self, name: str) -> int:
        """Finds an item by id, by title or by ``title (year)``.

        Args:
            name: An item id (tried first, exactly) or a title. Case, accents and punctuation do not matter; ``The
                Matrix`` finds ``Matrix, The``, a title is found without what it carries in brackets, and with its year
                without its subtitle.

        Returns:
            The item's code.

        Raises:
            UnknownItemError: No item has that id or title, or several items share the title.
        """
        if not isinstance(name, str):
            raise UnknownItemError(f"item {name!r} is a {type(name).__name__}", "Ids and titles are strings")
        for form in (name, unicodedata.normalize("NFC", name)):
            if form in self._code_of_id:
                return self._code_of_id[form]
        codes = self.titles.find(name)
        if len(codes) == 1:
            return codes[0]
        if codes:
            found = ", ".join(f"'{self.title(code)}' (id {self.ids[code]})" for code in codes[:5])
            raise UnknownItemError(f"{len(codes)} items are titled '{name}': {found}", "Name one by its id")
        near = " or ".join(f"'{self.title(code)}'" for code in self.titles.nearest(name))
        cure = f"Did you mean {near}?" if near else "No title is like it; give a title of the catalog, or an id"
        raise UnknownItemError(f"no item has the id or title '{name}'", cure)


@dataclass(frozen=True)
class Ratings:
    """Some items and the ratings that one user gave them.

    Args:
        items: Item codes, shape (ratings,).
        values: Ratings on the dataset's scale, shape (ratings,).
        liked: What the task's label rule says of each, shape (ratings,); None where no rule was applied.
        side: What is known beside the ratings, of the user and of the moments; None where nothing is.
        times: Seconds since 1970 of each, shape (ratings,); None where there is no time.
    """

    items: Codes
    values: Values
    liked: Flags | None = None
    side: Side | None = None
    times: Times | None = None

    def __post_init__(self) -> None:
        if self.items.shape != self.values.shape or self.items.ndim != 1:
            raise DataError(f"{self.items.shape} items do not match {self.values.shape} ratings")
        if self.liked is not None and self.liked.shape != self.items.shape:
            raise DataError(f"{self.liked.shape} labels do not match {self.items.shape} ratings")

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        labelled = "" if self.liked is None else f", liked={int(self.liked.sum())}"
        return f"Ratings(ratings={len(self)}{labelled})"

    def rows(self, chosen: Codes | slice) -> Ratings:
        """Returns the ratings in some positions."""
        return Ratings(
            self.items[chosen],
            self.values[chosen],
            None if self.liked is None else self.liked[chosen],
            None if self.side is None else self.side.rows(chosen),
            None if self.times is None else self.times[chosen],
        )

    @property
    def ages(self) -> Values:
        """Days before the latest of these ratings, shape (ratings,); 0 where there is no time."""
        if self.times is None or not len(self):
            return np.zeros(len(self), np.float32)
        ages: Values = ((self.times.max() - self.times) / _DAY).astype(np.float32)
        return ages

    def head(self, count: int) -> Ratings:
        """Returns the first `count` ratings."""
        return self.rows(slice(count))

    def likes(self, threshold: float) -> Flags:
        """Says which ratings are likes: by the task's label rule, or where none was applied by a threshold.

        Args:
            threshold: Ratings from here on are likes; NaN where likes are ratings above the mean of these.
        """
        if self.liked is not None:
            return self.liked
        if np.isnan(threshold):
            return self.values > self.values.mean() if len(self) else np.zeros(0, bool)
        return self.values >= threshold

    def unlabelled(self) -> Ratings:
        """Returns the same ratings as a person would give them: a rule may have looked at held-out ratings."""
        return Ratings(self.items, self.values, side=self.side, times=self.times)

    def asking(self, query: Ratings) -> Ratings:
        """Returns the same ratings, of a user who is asked about a query at its moments."""
        if query.side is None:
            return self
        side = self.side or Side(query.side.about, query.side.friends)  # no ratings have none
        return replace(self, side=side.asking(query.side.rated))

    def asking_once(self) -> Ratings:
        """Returns the same ratings, of a user who asks about all items in the moment of the first."""
        if self.side is None:
            return self
        return replace(self, side=self.side.asking({name: column[:1] for name, column in self.side.asked.items()}))

    @classmethod
    def empty(cls) -> Ratings:
        """Returns no ratings at all: what is known of a brand-new user."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.float32))


@dataclass(frozen=True)
class RatingScale:
    """The lowest and highest rating that a dataset allows."""

    low: float
    high: float

    def check(self, value: float, where: str) -> float:
        """Returns `value` as a float.

        Raises:
            RatingError: `value` is not a finite number on the scale.
        """
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise RatingError(f"rating {shown(value)} of {where} is not a number", f"Rate {self}") from None
        if not np.isfinite(number):
            raise RatingError(f"rating {number} of {where} is not finite", f"Rate {self}")
        if not self.low <= number <= self.high:
            raise RatingError(f"rating {number:g} of {where} is off the scale", f"Rate {self}")
        return number

    def tenths(self, ratings: NDArray[np.floating]) -> NDArray[np.int64]:
        """Returns the tenth of the scale that each rating is in, 0 to 9, shape (ratings,)."""
        span = self.high - self.low
        place = (np.asarray(ratings, np.float64) - self.low) / (span or 1.0) * 10
        return np.clip(place.astype(np.int64), 0, 9)

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}"


def read_ratings(pairs: Sequence[tuple[str, float]], catalog: Catalog, scale: RatingScale) -> Ratings:
    """Turns what a user said into `Ratings`, refusing what cannot be meant.

    Args:
        pairs: ``(title or id, rating)`` pairs; none at all is fine.
        catalog: Where items are looked up.
        scale: What ratings are allowed.

    Returns:
        The ratings in the given order.

    Raises:
        UnknownItemError: An item is not in the catalog.
        RatingError: A rating is not finite, is off the scale, or an item is rated twice.
    """
    seen: dict[int, str] = {}
    values: list[float] = []
    for position, pair in enumerate(pairs, start=1):
        try:
            name, value = pair
        except (TypeError, ValueError):
            raise RatingError(
                f"rating number {position} is {shown(pair)}", "Give (title or id, rating) pairs"
            ) from None
        code = catalog.find(name)
        if code in seen:
            raise RatingError(
                f"'{catalog.title(code)}' is rated twice (as '{seen[code]}' and as '{name}')", "Keep one of the two"
            )
        seen[code] = name
        values.append(scale.check(value, f"'{name}'"))
    return Ratings(np.array(list(seen), np.int64), np.array(values, np.float32))


@dataclass(frozen=True)
class Interactions:
    """A dataset: one row per rating, plus the catalog the items come from.

    Args:
        users: User ids; the position is the user's code.
        user: User code of each row, shape (rows,).
        item: Item code of each row, shape (rows,).
        rating: Rating of each row, shape (rows,).
        timestamp: Seconds since 1970 of each row, with fractions where there are any; None where there is no time.
        catalog: The items.
        scale: The rating scale.
        dropped: How many source rows were left out, by reason.
        liked: What the task's label rule says of each row, shape (rows,); None where no rule was applied.
        notes: What the source did that a person should know, in sentences.
        part: Which part of a given split each row belongs to, as a position in `PART_NAMES`, shape (rows,); None where
            the split is not given with the data.
        item_vectors: Name to a vector of each item that the data bring along, shape (items, width); NaN where unknown.
        vector_sources: Name of computed item vectors to a digest of what they were computed from.
        side: What else is known of users and of the moments of rows.
    """

    users: tuple[str, ...]
    user: Codes
    item: Codes
    rating: Values
    timestamp: Times | None
    catalog: Catalog
    scale: RatingScale
    dropped: Mapping[str, int]
    liked: Flags | None = None
    notes: tuple[str, ...] = ()
    part: Codes | None = None
    item_vectors: Mapping[str, Values] = field(default_factory=dict)
    vector_sources: Mapping[str, str] = field(default_factory=dict)
    side: SideColumns = field(default_factory=SideColumns)

    def __len__(self) -> int:
        return len(self.user)

    def __repr__(self) -> str:
        sizes = f"ratings={len(self)}, users={len(self.users)}, items={len(self.catalog)}"
        return f"Interactions({sizes}, scale='{self.scale}')"

    @cached_property
    def rows_of_user(self) -> tuple[Codes, ...]:
        """Row numbers of each user, in the dataset's order."""
        order = np.argsort(self.user, kind="stable")
        bounds = np.searchsorted(self.user[order], np.arange(1, len(self.users)))
        return tuple(np.split(order, bounds))

    @cached_property
    def items_of_user(self) -> Codes:
        """How many different items each user rated, shape (users,)."""
        pairs = np.unique(self.user * len(self.catalog) + self.item)
        return np.bincount(pairs // max(len(self.catalog), 1), minlength=len(self.users))

    def ratings(self, rows: Codes) -> Ratings:
        """Returns the items and ratings of some rows, which are one user's."""
        return Ratings(
            self.item[rows],
            self.rating[rows],
            None if self.liked is None else self.liked[rows],
            self.side.of(self.user[rows], rows) if self.side and len(rows) else None,
            None if self.timestamp is None else self.timestamp[rows],
        )

    def likes(self, threshold: float) -> Flags:
        """Says of each row whether it is a like, as `Ratings.likes` does for one user's ratings, shape (rows,)."""
        if self.liked is not None:
            return self.liked
        flags = np.zeros(len(self), bool)
        for rows in self.rows_of_user:
            flags[rows] = self.ratings(rows).likes(threshold)
        return flags

    def subset(self, rows: Codes | Flags) -> Interactions:
        """Returns some rows, with the same users and the same catalog."""
        return replace(
            self,
            user=self.user[rows],
            item=self.item[rows],
            rating=self.rating[rows],
            timestamp=None if self.timestamp is None else self.timestamp[rows],
            liked=None if self.liked is None else self.liked[rows],
            part=None if self.part is None else self.part[rows],
            side=self.side.rows(rows),
        )

    @cached_property
    def digest(self) -> str:
        """Names the data by its content: who rated what, how and when, and what the items are."""
        digest = hashlib.sha256()
        for ids in (self.users, self.catalog.ids, *(column for _, column in sorted(self.catalog.fields.items()))):
            digest.update("\0".join(ids).encode("utf-8", "surrogatepass") + b"\1")
        digest.update("\0".join([*sorted(self.catalog.fields), str(self.scale)]).encode())
        for numbers in (self.user, self.item, self.rating, self.timestamp):
            digest.update(b"" if numbers is None else np.ascontiguousarray(numbers).tobytes())
        if self.side:
            digest.update(self.side.digest)
        for name, vectors in sorted(self.item_vectors.items()):
            digest.update(f"{name} {vectors.shape}".encode())
            source = self.vector_sources.get(name)
            digest.update(source.encode() if source else np.ascontiguousarray(vectors).tobytes())
        return digest.hexdigest()[:16]
