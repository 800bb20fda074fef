"""What a check reads and returns: `Checked` tables in, a `Fault` out, a `DataFinding` for people."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from metarec.data.interactions import Flags
from metarec.data.sources.assembly import Tables, catalog_texts
from metarec.data.sources.columns import ids, rating_numbers, times

Severity = Literal["error", "warning", "note"]


SHOWN = 10


@dataclass(frozen=True)
class CheckLimits:
    """Where the checks draw their lines.

    Args:
        user_ratings: Users with fewer ratings are thin: no support and query can be cut from them.
        item_ratings: Items with fewer ratings are thin: their mean says nothing.
        one_value: Ratings after which a user who only ever gives one value is suspicious.
        per_day: Ratings on one day from which on a user looks like a program.
        share: Share of the catalog from which on a user looks like a program.
        alike: Share of ratings that two users have in common from which on they look like one.
        skew: How many times the median the highest rating is where ratings are counts or hours rather than opinions.
    """

    user_ratings: int = 5
    item_ratings: int = 2
    one_value: int = 20
    per_day: int = 1000
    share: float = 0.5
    alike: float = 0.9
    skew: float = 20.0


@dataclass(frozen=True)
class DataFinding:
    """One thing that is wrong.

    Args:
        code: Its short name.
        severity: ``error``: cannot be used as it is; ``warning``: will distort results; ``note``: good to know.
        count: How many rows, users or items.
        of: What is counted: ``ratings``, ``users``, ``items`` or ``pairs``.
        total: How many of them there are in all.
        message: What was found.
        cure: What to do about it.
        rows: The first few, by row number (ratings and items count from one) or id.
        fixable: Whether `fix` mends it.
    """

    code: str
    severity: Severity
    count: int
    of: str
    total: int
    message: str
    cure: str
    rows: tuple[str, ...]
    fixable: bool

    @property
    def share(self) -> float:
        """The share of all that is affected."""
        return self.count / max(self.total, 1)


@dataclass(frozen=True)
class Checked:
    """A dataset in the form that checks read: ids as codes, numbers as numbers.

    Args:
        tables: The raw tables.
        users: Distinct user ids.
        user: Place of each rating's user among them.
        items: Distinct item ids that were rated.
        item: Place of each rating's item among them.
        rating: Ratings, NaN where they are no numbers.
        time: Timestamps, NaN where they are no numbers; None where there are none.
        catalog: The item table, as text.
        now: Seconds since the epoch, from which on a time is in the future.
    """

    tables: Tables
    users: list[str]
    user: np.ndarray
    items: list[str]
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray | None
    catalog: pd.DataFrame
    now: float

    @property
    def where(self) -> np.ndarray:
        """Rows of the file; with the file's name where there are several."""
        if not self.tables.files:
            return np.arange(len(self.user)) + self.tables.first_row
        named = [f"{name} {row + first}" for name, first, count in self.tables.files for row in range(count)]
        return np.array(named, object)


def read_for_checks(tables: Tables, now: float | None = None) -> Checked:
    """Prepares raw tables for checking; nothing is refused here."""
    users, user = ids(tables.ratings["user"])
    items, item = ids(tables.ratings["item"])
    timed = "timestamp" in tables.ratings
    return Checked(
        tables=tables,
        users=users,
        user=user,
        items=items,
        item=item,
        rating=rating_numbers(tables.ratings["rating"]),
        time=times(tables.ratings["timestamp"]) if timed else None,
        catalog=catalog_texts(tables),
        now=time.time() if now is None else now,
    )


@dataclass(frozen=True)
class Fault:
    """Rows of one table that a check objects to, before they are put into words.

    Args:
        flags: Which rows, shape (ratings,) or (items,).
        of: Which table the flags are of: ``ratings`` or ``items``; or ``users``, where each user's rows are flagged.
    """

    flags: Flags
    of: Literal["ratings", "items", "users"]


@dataclass(frozen=True)
class Check:
    """One check: what finds the fault, how bad it is, and what to say.

    Args:
        find: Returns the faulty rows.
        severity: How bad it is.
        message: What was found, in words.
        cure: What to do.
        remedy: What `fix` does: drop the rows, or rewrite the item's text; None leaves it to a person.
    """

    find: Callable[[Checked, CheckLimits], Fault]
    severity: Severity
    message: str
    cure: str
    remedy: Literal["drop", "rewrite"] | None


def counted(data: Checked, fault: Fault) -> tuple[int, int, tuple[str, ...]]:
    """Returns how many rows and users or items a fault concerns, and examples of them."""
    rows = np.flatnonzero(fault.flags)
    if fault.of == "users":
        users = pd.unique(data.user[rows])
        return len(users), len(np.unique(data.user)), tuple(data.users[code][:80] for code in users[:SHOWN])
    if fault.of == "items":
        shown = tuple(f"{row + 1} ({data.catalog['item'].iloc[row][:80]})" for row in rows[:SHOWN])
        return len(rows), len(data.catalog), shown
    return len(rows), len(data.user), tuple(str(data.where[row]) for row in rows[:SHOWN])
