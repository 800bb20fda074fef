"""Raw tables become `Interactions`: numbers checked, repeated ratings counted, bad rows named or set aside.

Knows the columns ``user, item, rating, timestamp`` and ``item, title, ...``; nothing of files or formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from metarec.data.interactions import Catalog, Flags, Interactions, RatingScale
from metarec.data.sources.columns import coded, numbers, rating_numbers, text_column
from metarec.errors import DataError

MAX_TEXT = 1 << 16


@dataclass(frozen=True)
class Tables:
    """A dataset as its source gives it, before anything is checked.

    Args:
        ratings: Columns ``user``, ``item``, ``rating`` and optionally ``timestamp``.
        items: Columns ``item``, ``title`` and any text fields.
        where: The source's name, for errors.
        scale: The rating scale; None takes the lowest and highest rating there is.
        first_row: Row of the file that the first rating stands in, for errors.
        dropped: Rows that the source itself left out, by reason.
    """

    ratings: pd.DataFrame
    items: pd.DataFrame
    where: str
    scale: RatingScale | None = None
    first_row: int = 1
    dropped: Mapping[str, int] = field(default_factory=dict)


def assemble(
    ratings: pd.DataFrame, items: pd.DataFrame, scale: RatingScale | None, where: str, *, quarantine: bool = False
) -> Interactions:
    """Checks raw columns and turns them into `Interactions`; see `assemble_tables`."""
    return assemble_tables(Tables(ratings, items, where, scale), quarantine=quarantine)


def assemble_tables(tables: Tables, *, quarantine: bool = False) -> Interactions:
    """Checks raw tables and turns them into `Interactions`.

    Args:
        tables: The tables.
        quarantine: Rows that cannot be read are left out and counted by reason, instead of being an error.

    Raises:
        DataError: A row cannot be read, a rated item is not in the catalog, or nothing is left.
    """
    ratings, where = tables.ratings, tables.where
    if ratings.empty:
        raise DataError(f"{where} holds no ratings", "Check the file and its columns")
    sieve = _Sieve(tables, quarantine)
    items = _items(tables, sieve)
    users, user_codes = coded(ratings["user"])
    item_ids, item_codes = coded(ratings["item"])
    code_of_id = {item: code for code, item in enumerate(items["item"])}
    item_codes = np.array([code_of_id.get(item, -1) for item in item_ids], np.int64)[item_codes]
    number = rating_numbers(ratings["rating"])
    blank = np.array([not user.strip() for user in users], bool)[user_codes]
    sieve.refuse(blank, lambda row: "the user id is empty", "user id empty")
    sieve.refuse(
        ~np.isfinite(number),
        lambda row: f"rating {_shown(ratings['rating'], row)} is not a finite number",
        "rating not a number",
    )
    time = None
    if "timestamp" in ratings:
        time = numbers(ratings["timestamp"])
        sieve.refuse(
            ~(np.abs(time) < 2**62),
            lambda row: f"timestamp {_shown(ratings['timestamp'], row)} is not a finite number",
            "timestamp not a number",
        )
    finite = number[np.isfinite(number)]
    scale = tables.scale or RatingScale(
        float(finite.min(initial=0.0 if not len(finite) else np.inf)),
        float(finite.max(initial=0.0 if not len(finite) else -np.inf)),
    )
    sieve.refuse(
        np.isfinite(number) & ((number < scale.low) | (number > scale.high)),
        lambda row: f"rating {number[row]:g} is off the scale",
        "rating off the scale",
        f"Rate {scale}",
    )
    sieve.refuse(
        item_codes < 0,
        lambda row: f"item '{ratings['item'].iloc[row]}' has no row in the catalog",
        "item without a catalog row",
        "Add it to the item file",
    )
    rows = np.flatnonzero(sieve.kept)
    if not len(rows):
        raise DataError(f"{where}: none of {len(ratings)} ratings can be read", "Run: metarec data check")
    clock = None if time is None else time[rows].astype(np.int64)
    latest = rows[_latest(user_codes[rows], item_codes[rows], len(items), clock)]
    # Users are numbered as they first appear, as the fast readers' dictionaries need not be.
    user, seen = pd.factorize(user_codes[rows if quarantine else slice(None)])
    position = np.full(len(ratings), -1, np.int64)
    position[rows if quarantine else np.arange(len(ratings))] = user
    repeated = len(rows) - len(latest)
    return Interactions(
        users=tuple(users[code] for code in seen),
        user=position[latest],
        item=item_codes[latest],
        rating=number[latest].astype(np.float32),
        timestamp=None if time is None else time[latest].astype(np.int64),
        catalog=Catalog(
            tuple(items["item"]), {str(name): tuple(items[name]) for name in items.columns if name != "item"}
        ),
        scale=scale,
        dropped={**tables.dropped, **sieve.dropped, **({"repeated rating": repeated} if repeated else {})},
    )


class _Sieve:
    """Names the first row that breaks a rule, or sets all of them aside and counts them."""

    def __init__(self, tables: Tables, quarantine: bool) -> None:
        self._tables, self._quarantine = tables, quarantine
        self.kept: Flags = np.ones(len(tables.ratings), bool)
        self.dropped: dict[str, int] = {}

    def refuse(self, bad: Flags, say: object, reason: str, cure: str = "") -> None:
        rows = np.flatnonzero(bad & self.kept)
        if not len(rows):
            return
        if not self._quarantine:
            row = int(rows[0])
            many = f"{cure or 'Repair it'}, or drop the {len(rows)} such rows: set 'bad_rows' to 'quarantine'"
            raise DataError(f"{self._tables.where} row {row + self._tables.first_row}: {say(row)}", many)  # type: ignore[operator]
        self.kept[rows] = False
        self.dropped[reason] = len(rows)


def _items(tables: Tables, sieve: _Sieve) -> pd.DataFrame:
    """Checks the catalog; under quarantine, faulty items go and their ratings are counted with them."""
    items = pd.DataFrame({name: text_column(tables.items[name]) for name in tables.items.columns})
    if "title" not in items:
        raise DataError(f"{tables.where}: the items have no title", "Name the column that holds it 'title'")
    faults = {
        "item id empty": items["item"].str.strip() == "",
        "item id twice": items["item"].duplicated(),
        "item text too long": np.logical_or.reduce([items[name].str.len() > MAX_TEXT for name in items.columns]),
    }
    bad = np.zeros(len(items), bool)
    for reason, flags in faults.items():
        rows = np.flatnonzero(np.asarray(flags) & ~bad)
        if len(rows) and not sieve._quarantine:
            limit = f" (the limit is {MAX_TEXT:,} characters)" if "long" in reason else ""
            raise DataError(
                f"{tables.where}: item row {rows[0] + 1}, id '{items['item'].iloc[rows[0]][:80]}': {reason}{limit}",
                f"Repair it, or drop the {len(rows)} such items: set 'bad_rows' to 'quarantine'",
            )
        if len(rows):
            bad[rows] = True
            sieve.dropped[reason] = len(rows)
    return items[~bad]


def _shown(column: pd.Series, row: int) -> str:
    return repr(str(column.iloc[row])[:80])


def _latest(user: np.ndarray, item: np.ndarray, items: int, time: np.ndarray | None) -> np.ndarray:
    pair = user * items + item
    if len(pd.unique(pair)) == len(pair):
        return np.arange(len(pair))
    order = np.arange(len(pair)) if time is None else np.argsort(time, kind="stable")
    return np.sort(order[~pd.Series(pair[order]).duplicated(keep="last").to_numpy()])
