"""Turns side information into numbers: categories, numbers, words and friends, each as one block of features.

A block is centred over what it was fitted on, so that an unknown value is 0 and says nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from metarec.data.item_fields import MIN_ITEMS, field_kind, numbers_in, tokens_in
from metarec.data.side import ABOUT, Side, Texts
from metarec.scorers.collaborative.residuals import Floats

_MAX_TOKENS = 200
_MAX_WORDS = 500
_KNOTS = 7
_WORD = re.compile(r"\w+")


class Reader(Protocol):
    """Reads one field: texts to features."""

    def read(self, texts: Texts) -> Floats:
        """Returns the features of texts, shape (texts, width); 0 where a text is empty."""
        ...


@dataclass(frozen=True)
class Categories:
    """Indicators of categories, around their means.

    Args:
        tokens: The categories.
        mean: Share of known values that carry each, shape (tokens,).
        words: Whether categories are single words of a longer text.
    """

    tokens: tuple[str, ...]
    mean: Floats
    words: bool = False

    def read(self, texts: Texts) -> Floats:
        """See `Reader.read`."""
        return by_value(texts, len(self.tokens), self._indicators)

    def knows(self, text: str) -> bool:
        """Says whether a text has one of the categories."""
        return bool(_tokens([text], self.words)[0] & set(self.tokens))

    def _indicators(self, values: Sequence[str]) -> Floats:
        place = {token: at for at, token in enumerate(self.tokens)}
        found = np.zeros((len(values), len(place)))
        for row, tokens in enumerate(_tokens(values, self.words)):
            if known := [place[token] for token in tokens & place.keys()]:
                found[row] = -self.mean
                found[row, known] += 1.0
        return found


@dataclass(frozen=True)
class Numbers:
    """Ramps around quantiles of numbers, around their means.

    Args:
        knots: Where the ramps are, shape (knots,).
        width: Width of a ramp.
        mean: Mean of each ramp, shape (knots,).
    """

    knots: Floats
    width: float
    mean: Floats

    def read(self, texts: Texts) -> Floats:
        """See `Reader.read`."""
        return by_value(texts, len(self.knots), self._ramps)

    def _ramps(self, values: Sequence[str]) -> Floats:
        numbers = numbers_in(values)
        ramps = np.clip((numbers[:, None] - self.knots) / self.width, -1, 1) - self.mean
        found: Floats = np.where(np.isnan(numbers)[:, None], 0.0, ramps)
        return found


def by_value(texts: Texts, width: int, read: Callable[[list[str]], Floats]) -> Floats:
    """Returns the features of texts, each different one read once; those of an empty one are 0.

    Args:
        texts: The texts.
        width: How many features there are.
        read: Texts to features, shape (texts, width).
    """
    values, place = np.unique(np.asarray(texts, object).astype(str), return_inverse=True)
    found = np.zeros((len(values), width))
    filled = np.array([bool(value.strip()) for value in values], bool)
    if filled.any():
        found[filled] = read(values[filled].tolist())
    rows: Floats = found[place.ravel()]
    return rows


def _tokens(values: Sequence[str], words: bool) -> list[set[str]]:
    return [set(_WORD.findall(text.casefold())) for text in values] if words else tokens_in(list(values))


def side_kind(name: str, filled: Sequence[str]) -> str:
    """Returns what a field of users or moments is, see `field_kind`; `about` is text."""
    return "text" if name == ABOUT else field_kind(name, filled)


def reader_of(name: str, texts: Texts) -> Reader | str:
    """Returns what reads a field, fitted on its values, or why nothing does.

    Args:
        name: The field.
        texts: Its values, of users or of rows.
    """
    filled = [str(text) for text in texts if str(text).strip()]
    kind = side_kind(name, filled)
    if kind == "number":
        numbers = numbers_in(filled)
        numbers = numbers[~np.isnan(numbers)]
        if len(np.unique(numbers)) <= _KNOTS:
            return _categories(filled, words=False)
        knots = np.unique(np.quantile(numbers, np.linspace(0.05, 0.95, _KNOTS)))
        width = float(max((knots[-1] - knots[0]) / 4, 1e-9))
        return Numbers(knots, width, np.clip((numbers[:, None] - knots) / width, -1, 1).mean(0))
    if kind == "category":
        return _categories(filled, words=False)
    return _categories(filled, words=True) if kind == "text" else kind


def _categories(filled: Sequence[str], *, words: bool) -> Reader | str:
    rows = _tokens(filled, words)
    count = Counter(token for row in rows for token in sorted(row))
    most = count.most_common(_MAX_WORDS if words else _MAX_TOKENS)
    kept = tuple(sorted(token for token, number in most if MIN_ITEMS <= number < len(filled)))
    if not kept:
        return "no value that several have"
    return Categories(kept, np.array([count[token] / len(filled) for token in kept]), words)


@dataclass(frozen=True)
class Friends:
    """The mean taste of a user's friends, shrunk towards 0 where they are few.

    Args:
        digests: Digest of each meta-training user's id, ascending, shape (users,).
        tastes: Their tastes, shape (users, width).
    """

    digests: NDArray[np.int64]
    tastes: Floats

    def read(self, sides: Sequence[Side]) -> Floats:
        """Returns the friends' mean taste of several users, shape (users, width)."""
        found = np.zeros((len(sides), self.tastes.shape[1]))
        for row, side in enumerate(sides):
            known = self.known(side)
            if len(known):
                found[row] = self.tastes[known].sum(0) / (len(known) + 1.0)
        return found

    def known(self, side: Side) -> NDArray[np.int64]:
        """Returns the rows of a user's friends that are among the meta-training users."""
        wanted = np.array([digest(friend) for friend in side.friends], np.int64)
        place = np.minimum(np.searchsorted(self.digests, wanted), max(len(self.digests) - 1, 0))
        return place[self.digests[place] == wanted] if len(self.digests) else place[:0]


def friends_of(users: Sequence[str], tastes: Floats) -> Friends:
    """Returns what reads the tastes of friends among some users.

    Args:
        users: Ids of the users.
        tastes: Their tastes, shape (users, width).
    """
    digests = np.array([digest(user) for user in users], np.int64)
    order = np.argsort(digests)
    return Friends(digests[order], tastes[order])


def digest(user: str) -> int:
    """Returns a number that stands for a user's id, which is not kept."""
    found = hashlib.sha256(f"friend\0{user}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(found[:8], "big", signed=True)
