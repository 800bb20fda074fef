"""Decides how a catalog's fields become features of items: as categories, as numbers, or not at all.

What a field is, its values decide; a field's name matters for ``title`` alone, which is text. Knows nothing of users,
tasks or models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from metarec.data.interactions import Catalog
from metarec.errors import ConfigError, suggest

FieldKind = Literal["category", "number"]
Unread = Literal["empty", "one value", "an id", "text"]

# A category is read if so many items carry it.
MIN_ITEMS = 5
# Why a field that repeats others is not read.
MADE = "made from other fields"
# Fields beyond these cost time in every fit; a task names those that it wants.
MAX_FIELDS = 12
_CARRIED_SHARE = 0.25
_NUMBER_SHARE = 0.9
# Words that are categories of their own, as RecBole writes genres; text has more of them.
_MAX_WORDS = 300
# Commas and semicolons of Latin, Chinese, Japanese and Arabic scripts, and bars.
_SEPARATORS = re.compile(r"[,|;、，；｜،؛]")  # noqa: RUF001
_ID_NAME = re.compile(r"(?:.*[_\W])?(?:id|isbn\d*|ean|gtin|upc|asin|sku|url|index)|.*[a-z]Id|.*ID", re.DOTALL)
_DATE = re.compile(r"(-?\d{4})-(\d\d)(?:-\d\d)?(?:[T ].*)?", re.DOTALL)
_CJK_DATE = re.compile(r"(\d{4})\s*年(?:\s*(\d{1,2})\s*月(?:\s*\d{1,2}\s*日)?)?")
# Dates whose order of day and month the whole column tells, and such with the name of a month.
_WRITTEN_DATE = re.compile(
    r"(?:\d{1,2}([./-])\d{1,2}\1|[a-z]{3,9}\.? \d{1,2}, |\d{1,2} [a-z]{3,9}\.? )(\d{4})", re.IGNORECASE
)
_NUMBER = re.compile(
    r"[^\w.,+-]{0,2}\s*([+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?:\.\d{3})+,\d+|\d+(?:[.,]\d+)?))"
    r"\s*(?:[^\w\s]|[A-Z]{3})?"
)
_POINTS = re.compile(r"\.(?=\d{3}[.,])")
_THOUSANDS = re.compile(r",(?=\d{3}(?:\D|$))")


def field_kind(name: str, column: Sequence[str]) -> FieldKind | Unread:
    """Returns what a field is: ``category`` or ``number``, or why it is not read.

    Args:
        name: The field's name; only ids are known by it.
        column: Its value of every item; blanks are unknown.
    """
    filled = [text for text in column if text.strip()]
    if not filled:
        return "empty"
    numbers = numbers_in(filled)
    known = numbers[~np.isnan(numbers)]
    if len(known) >= _NUMBER_SHARE * len(filled):
        if _ID_NAME.fullmatch(name) or _counts_rows(known):
            return "an id"
        return "number" if len(np.unique(known)) > 1 else "one value"
    if len(set(filled)) == 1:
        return "one value"
    tokens = tokens_in(filled)
    count = Counter(token for row in tokens for token in row)
    carried = sum(number for number in count.values() if number >= MIN_ITEMS)
    if carried >= _CARRIED_SHARE * sum(count.values()):
        return "category"
    return "an id" if _ID_NAME.fullmatch(name) else "text"


def tokens_in(column: Sequence[str]) -> list[set[str]]:
    """Returns the categories of each value.

    They end at commas, bars and semicolons of any script. A column without these holds one category a value; or, where
    there are fewer words than values, as in RecBole's ``Comedy Drama``, one a word.
    """
    if any(_SEPARATORS.search(text) for text in column):
        return [{token.strip() for token in _SEPARATORS.split(text)} - {""} for text in column]
    values = {text.strip() for text in column} - {""}
    words: set[str] = set()
    for value in values:
        words.update(value.split())
        if len(words) > _MAX_WORDS:
            break
    if len(words) < min(len(values), _MAX_WORDS + 1):
        return [set(text.split()) for text in column]
    return [{text.strip()} - {""} for text in column]


def numbers_in(column: Sequence[str]) -> NDArray[np.float64]:
    """Returns the number that each value is, a date as its year with a fraction; NaN where it is neither."""
    found = np.array([_number(text.strip()) for text in column], np.float64)
    dated = [
        place for place in np.flatnonzero(np.isnan(found)).tolist() if _WRITTEN_DATE.fullmatch(column[place].strip())
    ]
    if dated:
        found[dated] = _years([column[place].strip() for place in dated])
    return found


def _number(text: str) -> float:
    if date := _DATE.fullmatch(text) or _CJK_DATE.fullmatch(text):
        return int(date[1]) + (int(date[2] or 1) - 1) / 12
    if found := _NUMBER.fullmatch(text):
        plain = _POINTS.sub("", found[1]) if "," in found[1] and "." in found[1].partition(",")[0] else found[1]
        return float(_THOUSANDS.sub("", plain).replace(",", "."))
    return np.nan


def _years(texts: Sequence[str]) -> NDArray[np.float64]:
    """Returns dates as years with a fraction; where day and month cannot be distinguished, as the year alone."""
    import pandas as pd

    from metarec.data.sources.columns import times

    seconds = times(pd.Series(texts, dtype=object))
    known = np.isfinite(seconds)
    months = np.where(known, seconds, 0).astype("datetime64[s]").astype("datetime64[M]").astype(np.int64)
    return np.where(known, 1970 + months / 12, [float(text[-4:]) for text in texts])


def _counts_rows(numbers: NDArray[np.float64]) -> bool:
    """Says whether numbers are those of rows: 0 or 1, and one more from row to row."""
    return len(numbers) > MIN_ITEMS and numbers[0] in (0, 1) and bool((np.diff(numbers) == 1).all())


# Sources of metarec's own write these; their kinds are certain, and they come first.
_USUAL: Mapping[str, FieldKind] = {"genres": "category", "authors": "category", "year": "number"}


@dataclass(frozen=True)
class FieldChoice:
    """Which fields of a catalog become features.

    Args:
        read: Field to its kind, in a fixed order.
        unread: Field to why it is not read.
    """

    read: Mapping[str, FieldKind]
    unread: Mapping[str, str]


def choose_fields(
    catalog: Catalog, named: Sequence[str] | Mapping[str, FieldKind] | None = None, made: Sequence[str] = ()
) -> FieldChoice:
    """Chooses the fields that become features.

    Args:
        catalog: The items.
        named: The fields to read, with or without their kinds; None chooses by what the fields hold.
        made: Fields that repeat others, which are read where they are named alone.

    Raises:
        ConfigError: A named field is not there, or holds nothing that could be read as its kind.
    """
    if named is not None:
        return FieldChoice(*_as_named(catalog, named))
    read: dict[str, FieldKind] = {}
    unread: dict[str, str] = {}
    for name in dict.fromkeys((*_USUAL, *catalog.fields)):
        if name == "title" or name not in catalog.fields:
            continue
        kind = _USUAL.get(name) or field_kind(name, catalog.fields[name])
        if name in made:
            unread[name] = MADE
        elif kind != "category" and kind != "number":
            unread[name] = kind
        elif len(read) == MAX_FIELDS:
            unread[name] = f"more than {MAX_FIELDS} fields"
        else:
            read[name] = kind
    return FieldChoice(read, unread)


def _as_named(
    catalog: Catalog, named: Sequence[str] | Mapping[str, FieldKind]
) -> tuple[dict[str, FieldKind], dict[str, str]]:
    read: dict[str, FieldKind] = {}
    for name in named:
        if name not in catalog.fields:
            raise ConfigError(
                f"'features.fields' names '{name}', which is no field of an item", suggest(name, catalog.fields)
            )
        column = catalog.fields[name]
        kind = named[name] if isinstance(named, Mapping) else _USUAL.get(name) or field_kind(name, column)
        read[name] = "number" if kind == "number" else "category"
        if read[name] == "number":
            if np.isnan(numbers_in(column)).all():
                raise ConfigError(f"'features.fields' calls '{name}' a number, and no item has one", "Leave it out")
        elif max(Counter(token for row in tokens_in(column) for token in row).values(), default=0) < MIN_ITEMS:
            raise ConfigError(
                f"'features.fields' names '{name}', of which no value is carried by {MIN_ITEMS} items",
                "Leave it out, or name it in 'features.text'",
            )
    return read, {name: "not named" for name in catalog.fields if name != "title" and name not in read}
