"""What is wrong with a dataset, row by row, and what was done about it.

Every check is one function from raw tables to findings; a finding names its rows and its cure, and says whether `fix`
can mend it. Thresholds turn findings into a verdict. Knows nothing of models; of tasks only what a caller passes in.
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from metarec.data.interactions import Flags
from metarec.data.sources.assembly import MAX_TEXT, Tables
from metarec.data.sources.columns import coded, numbers, rating_numbers, text_column

Severity = Literal["error", "warning", "note"]
SHOWN = 10
_MARKUP = re.compile(r"</?[a-zA-Z][^<>]{0,200}>|&(?:[a-zA-Z]{2,8}|#\d{1,6}|#x[0-9a-fA-F]{1,6});")
_CHAT = re.compile(r"<\|[^|<>]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>")
# What UTF-8 looks like when it was read as Latin-1 or Windows-1252.
_MOJIBAKE = re.compile(
    "[\u00c2\u00c3\u00d0\u00d1\u00e2][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014"
    "\u2018-\u201e\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122]|\ufffd"
)
_EARLIEST = 631_152_000  # 1990-01-01: no recommender data is older


@dataclass(frozen=True)
class CheckLimits:
    """Where the checks draw their lines.

    Args:
        user_ratings: Users with fewer ratings are thin: no support and query can be cut from them.
        item_ratings: Items with fewer ratings are thin: their mean says nothing.
        one_value: Ratings after which a user who only ever gives one value is suspicious.
        per_day: Ratings on one day from which on a user looks like a program.
        share: Share of the catalog from which on a user looks like a program.
    """

    user_ratings: int = 5
    item_ratings: int = 2
    one_value: int = 20
    per_day: int = 1000
    share: float = 0.5


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
        """Rows of the file."""
        return np.arange(len(self.user)) + self.tables.first_row


def read_for_checks(tables: Tables, now: float | None = None) -> Checked:
    """Prepares raw tables for checking; nothing is refused here."""
    users, user = coded(tables.ratings["user"])
    items, item = coded(tables.ratings["item"])
    timed = "timestamp" in tables.ratings
    return Checked(
        tables=tables,
        users=users,
        user=user,
        items=items,
        item=item,
        rating=rating_numbers(tables.ratings["rating"]),
        time=numbers(tables.ratings["timestamp"]) if timed else None,
        catalog=pd.DataFrame({name: text_column(tables.items[name]) for name in tables.items.columns}),
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


def _empty_ids(data: Checked, _: CheckLimits) -> Fault:
    blank = [
        np.array([not name.strip() for name in names], bool)[codes]
        for names, codes in ((data.users, data.user), (data.items, data.item))
    ]
    return Fault(blank[0] | blank[1], "ratings")


def _padded_ids(data: Checked, _: CheckLimits) -> Fault:
    odd = [
        np.array([name != name.strip() and bool(name.strip()) for name in names], bool)[codes]
        for names, codes in ((data.users, data.user), (data.items, data.item))
    ]
    return Fault(odd[0] | odd[1], "ratings")


def _not_numbers(data: Checked, _: CheckLimits) -> Fault:
    return Fault(~np.isfinite(data.rating), "ratings")


def _off_scale(data: Checked, _: CheckLimits) -> Fault:
    scale = data.tables.scale
    if scale is None:
        return Fault(np.zeros(len(data.rating), bool), "ratings")
    return Fault(np.isfinite(data.rating) & ((data.rating < scale.low) | (data.rating > scale.high)), "ratings")


def _unknown_items(data: Checked, _: CheckLimits) -> Fault:
    known = set(data.catalog["item"])
    strange = np.array([bool(item.strip()) and item not in known for item in data.items], bool)
    return Fault(strange[data.item], "ratings")


def _pairs(data: Checked) -> pd.DataFrame:
    return pd.DataFrame({"pair": data.user * max(len(data.items), 1) + data.item, "rating": data.rating})


def _later_first(data: Checked) -> np.ndarray:
    """Rows in the order in which the last one of each pair is the one to keep."""
    return np.arange(len(data.user)) if data.time is None else np.argsort(data.time, kind="stable")


def _repeated(data: Checked, conflicting: bool) -> Fault:
    order = _later_first(data)
    pairs = _pairs(data).iloc[order]
    repeated = pairs.duplicated("pair", keep="last")
    flags = np.zeros(len(order), bool)
    if repeated.any():
        inside = pairs[pairs["pair"].isin(pairs.loc[repeated, "pair"])]
        values = inside.groupby("pair")["rating"].nunique(dropna=False)
        differ = set(values.index[values > 1])
        flags[order] = (repeated & (pairs["pair"].isin(differ) == conflicting)).to_numpy()
    return Fault(flags, "ratings")


def _times(data: Checked, wrong: Callable[[np.ndarray], np.ndarray]) -> Fault:
    empty = np.zeros(len(data.user), bool)
    return Fault(empty if data.time is None else np.asarray(wrong(data.time), bool), "ratings")


def _thin_users(data: Checked, limits: CheckLimits) -> Fault:
    return Fault((np.bincount(data.user, minlength=len(data.users)) < limits.user_ratings)[data.user], "users")


def _thin_items(data: Checked, limits: CheckLimits) -> Fault:
    count = dict(zip(data.items, np.bincount(data.item, minlength=len(data.items)), strict=True))
    return Fault(np.array([count.get(item, 0) < limits.item_ratings for item in data.catalog["item"]], bool), "items")


def _one_value(data: Checked, limits: CheckLimits) -> Fault:
    frame = pd.DataFrame({"user": data.user, "rating": data.rating})
    grouped = frame.groupby("user")["rating"].agg(["size", "nunique"]).reindex(range(len(data.users)), fill_value=0)
    odd = ((grouped["size"] >= limits.one_value) & (grouped["nunique"] == 1)).to_numpy()
    # Where everybody gives one value, the data is implicit and nobody is suspicious.
    return Fault((odd & (pd.Series(data.rating).nunique() > 1))[data.user], "users")


def _programs(data: Checked, limits: CheckLimits) -> Fault:
    touched = np.bincount(np.unique(_pairs(data)["pair"]) // max(len(data.items), 1), minlength=len(data.users))
    odd = (touched > limits.share * len(data.catalog)) & (touched >= limits.per_day)
    if data.time is not None:
        day = np.where(np.isfinite(data.time), data.time, 0) // 86_400
        busiest = pd.DataFrame({"user": data.user, "day": day}).value_counts().groupby("user").max()
        odd |= (busiest.reindex(range(len(data.users)), fill_value=0) >= limits.per_day).to_numpy()
    return Fault(odd[data.user], "users")


def _in_text(data: Checked, wrong: Callable[[str], bool]) -> Fault:
    flags = np.zeros(len(data.catalog), bool)
    for name in data.catalog.columns.drop("item"):
        flags |= np.array([wrong(text) for text in data.catalog[name]], bool)
    return Fault(flags, "items")


def _titles(data: Checked) -> pd.Series:
    return data.catalog["title"].str.strip()


def _is_control(text: str) -> bool:
    return not text.isprintable() and any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn") for char in text)


def plain_text(text: str) -> str:
    """Mends what can be mended for certain: mojibake that decodes, entities, tags, control and chat characters."""
    import html

    if _MOJIBAKE.search(text):
        for encoding in ("cp1252", "latin-1"):
            try:
                text = text.encode(encoding).decode("utf-8")
                break
            except UnicodeError:
                continue
    text = html.unescape(_MARKUP.sub(lambda found: found[0] if found[0].startswith("&") else " ", text))
    text = _MARKUP.sub(" ", _CHAT.sub(" ", text))
    visible = "".join(" " if unicodedata.category(char).startswith("C") else char for char in text)
    return " ".join(visible.split())


CHECKS: dict[str, Check] = {
    "empty-id": Check(_empty_ids, "error", "ratings without a user or an item", "Drop them", "drop"),
    "padded-id": Check(
        _padded_ids, "warning", "ids with spaces around them, which makes two of one", "Strip them in the source", None
    ),
    "rating-not-a-number": Check(
        _not_numbers, "error", "ratings that are not finite numbers", "Drop or repair them", "drop"
    ),
    "rating-off-scale": Check(
        _off_scale, "error", "ratings off the stated scale", "Drop them, or state another scale", "drop"
    ),
    "item-without-row": Check(
        _unknown_items,
        "error",
        "ratings of items that the item file does not hold",
        "Add the items, or drop the ratings",
        "drop",
    ),
    "duplicate-rating": Check(
        lambda data, _: _repeated(data, False), "warning", "ratings given twice with the same value", "Keep one", "drop"
    ),
    "conflicting-rating": Check(
        lambda data, _: _repeated(data, True),
        "warning",
        "ratings that a later one of the same user and item contradicts",
        "Keep the latest",
        "drop",
    ),
    "time-not-a-number": Check(
        lambda data, _: _times(data, lambda times: ~np.isfinite(times)),
        "error",
        "timestamps that are not numbers",
        "Drop or repair them",
        "drop",
    ),
    "future-time": Check(
        lambda data, _: _times(data, lambda times: times > data.now + 86_400),
        "warning",
        "timestamps in the future",
        "Check their unit (seconds since 1970) and the clock that wrote them",
        "drop",
    ),
    "ancient-time": Check(
        lambda data, _: _times(data, lambda times: times < _EARLIEST),
        "warning",
        "timestamps before 1990",
        "Check their unit: seconds since 1970",
        None,
    ),
    "thin-user": Check(
        _thin_users,
        "note",
        "users with too few ratings for a support and a query",
        "They are left out of episodes",
        None,
    ),
    "thin-item": Check(
        _thin_items, "note", "items with hardly any ratings", "Their means are shrunk; no need to drop them", None
    ),
    "one-value-rater": Check(
        _one_value,
        "warning",
        "users who give everything the same rating",
        "Leave them out: nothing can be learned from them",
        "drop",
    ),
    "suspicious-user": Check(
        _programs,
        "warning",
        "users who rate faster or more than people do",
        "Leave them out if they are programs",
        "drop",
    ),
    "empty-item-id": Check(
        lambda data, _: Fault((data.catalog["item"].str.strip() == "").to_numpy(bool), "items"),
        "error",
        "items without an id",
        "Drop them",
        "drop",
    ),
    "duplicate-item-id": Check(
        lambda data, _: Fault(data.catalog["item"].duplicated().to_numpy(bool), "items"),
        "error",
        "items whose id is taken",
        "Keep the first row of each",
        "drop",
    ),
    "empty-title": Check(
        lambda data, _: Fault((_titles(data) == "").to_numpy(bool), "items"),
        "warning",
        "items without a title: the language model has nothing to read",
        "Fill the title in from another source",
        None,
    ),
    "repeated-title": Check(
        lambda data, _: Fault(
            (_same_text(data).duplicated(keep=False) & (_titles(data) != "")).to_numpy(bool), "items"
        ),
        "warning",
        "items whose text is the same as another's",
        "Merge them, or add what tells them apart",
        None,
    ),
    "text-too-long": Check(
        lambda data, _: _in_text(data, lambda text: len(text) > MAX_TEXT),
        "error",
        f"items with a text of more than {MAX_TEXT:,} characters",
        "Shorten it",
        "drop",
    ),
    "wrong-encoding": Check(
        lambda data, _: _in_text(data, lambda text: bool(_MOJIBAKE.search(text))),
        "warning",
        "texts that were decoded with the wrong encoding",
        "Read the file as UTF-8, or let --fix decode them",
        "rewrite",
    ),
    "markup": Check(
        lambda data, _: _in_text(data, lambda text: bool(_MARKUP.search(text))),
        "warning",
        "texts with HTML tags or entities",
        "Let --fix turn them into plain text",
        "rewrite",
    ),
    "control-characters": Check(
        lambda data, _: _in_text(data, _is_control),
        "warning",
        "texts with control, bidirectional or invisible characters",
        "Prompts show spaces in their place; --fix removes them",
        "rewrite",
    ),
    "chat-tokens": Check(
        lambda data, _: _in_text(data, lambda text: bool(_CHAT.search(text))),
        "warning",
        "texts with the control tokens of chat models",
        "Prompts show spaces in their place; --fix removes them",
        "rewrite",
    ),
}
CODES = ("malformed-row", *CHECKS, "near-duplicate-item", "leak")


def _same_text(data: Checked) -> pd.Series:
    columns = [data.catalog[name] for name in data.catalog.columns.drop("item")]
    return pd.Series(
        ["\0".join(" ".join(text.casefold().split()) for text in row) for row in zip(*columns, strict=True)]
    )


def check(data: Checked, limits: CheckLimits | None = None) -> list[DataFinding]:
    """Runs every check; findings come in the order of `CHECKS`."""
    limits = limits or CheckLimits()
    found = malformed(data.tables)
    for code, rule in CHECKS.items():
        fault = rule.find(data, limits)
        if not fault.flags.any():
            continue
        count, total, rows = counted(data, fault)
        found.append(
            DataFinding(
                code, rule.severity, count, fault.of, total, rule.message, rule.cure, rows, rule.remedy is not None
            )
        )
    return found


def malformed(tables: Tables) -> list[DataFinding]:
    """Rows that the source set aside because they are no rows of their table at all."""
    rows = [
        f"{number}{side}"
        for frame, side in ((tables.ratings, ""), (tables.items, " (items)"))
        for number in frame.attrs.get("malformed", ())
    ]
    total = len(tables.ratings) + len(tables.items) + len(rows)
    message, cure = "rows with the wrong number of fields, or lines that are no objects", "Repair or drop them"
    found = DataFinding("malformed-row", "error", len(rows), "rows", total, message, cure, tuple(rows[:SHOWN]), True)
    return [found] if rows else []


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
