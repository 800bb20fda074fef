"""Raw tables become `Interactions`: numbers checked, repeated ratings counted, bad rows named or set aside.

Knows the columns ``user, item, rating, timestamp`` and ``item, title, ...``; nothing of files or formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from metarec.data.interactions import PART_NAMES, Catalog, Flags, Interactions, RatingScale
from metarec.data.side import SideColumns, Texts
from metarec.data.sources.columns import coded, ids, rating_numbers, text_column, times
from metarec.data.text import MAX_TEXT
from metarec.errors import DataError, shown

# Column of the ratings that says which part of a given split a row belongs to, as a position in `PART_NAMES`.
PART = "part"

NOT_RATED = "not rated (0)"


@dataclass(frozen=True)
class Note:
    """One thing that a source did or left out, which a person should know.

    Args:
        code: Its short name, as `metarec.data.checks` lists it.
        severity: ``warning`` where it is probably a mistake, else ``note``.
        message: What was done, in words.
        cure: What to do if that is wrong.
        names: The columns or ids that it is about.
        of: What `names` are.
    """

    code: str
    severity: Literal["warning", "note"]
    message: str
    cure: str
    names: tuple[str, ...]
    of: str = "columns"

    def __str__(self) -> str:
        names = f": {', '.join(self.names[:10])}{', ...' if len(self.names) > 10 else ''}" if self.names else ""
        return f"{self.message}{names}. {self.cure}"


@dataclass(frozen=True)
class Tables:
    """A dataset as its source gives it, before anything is checked.

    Args:
        ratings: Columns ``user``, ``item``, ``rating`` and optionally ``timestamp`` and ``part`` (see `PART`).
        items: Columns ``item``, ``title`` and any text fields.
        where: The source's name, for errors.
        scale: The rating scale; None takes the lowest and highest rating there is.
        first_row: Row of the file that the first rating stands in, for errors.
        dropped: Rows that the source itself left out, by reason.
        notes: What else the source did that a person should know.
        files: Name, first row and number of ratings of each file, where there are several.
    """

    ratings: pd.DataFrame
    items: pd.DataFrame
    where: str
    scale: RatingScale | None = None
    first_row: int = 1
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    files: tuple[tuple[str, int, int], ...] = ()

    def place(self, row: int) -> str:
        """Returns the file and row that a rating stands in."""
        for name, first_row, count in self.files:
            if row < count:
                return f"{name} row {row + first_row}"
            row -= count
        return f"{self.where} row {row + self.first_row}"

    def __repr__(self) -> str:
        return f"Tables(ratings={len(self.ratings)}, items={len(self.items)}, where={self.where!r})"


def assemble(
    ratings: pd.DataFrame, items: pd.DataFrame, scale: RatingScale | None, where: str, *, quarantine: bool = False
) -> Interactions:
    """Checks raw columns and turns them into `Interactions`; see `assemble_tables`."""
    return assemble_tables(Tables(ratings, items, where, scale), quarantine=quarantine)


def assemble_tables(tables: Tables, *, quarantine: bool = False, of_rows: Sequence[str] = ()) -> Interactions:
    """Checks raw tables and turns them into `Interactions`.

    Args:
        tables: The tables.
        quarantine: Rows that cannot be read are left out and counted by reason, instead of being an error.
        of_rows: Columns of the ratings that are side information; those that are not there are passed over.

    Raises:
        DataError: A row cannot be read, a rated item is not in the catalog, or nothing is left.
    """
    ratings, where = tables.ratings, tables.where
    if ratings.empty:
        raise DataError(f"{where} holds no ratings", "Check the file and its columns")
    sieve = _Sieve(tables, quarantine)
    items = _items(tables, sieve)
    users, user_codes = ids(ratings["user"])
    blank = np.array([not user.strip() for user in users], bool)[user_codes]
    sieve.refuse(blank, lambda row: "the user id is empty", "user id empty")
    number, time, scale = _numbers(tables, sieve)
    item_codes = _item_codes(ratings, items, sieve)
    rows = np.flatnonzero(sieve.kept)
    if not len(rows):
        raise DataError(f"{where}: none of {len(ratings)} ratings can be read", "Run: metarec data check")
    part = ratings[PART].to_numpy(np.int64) if PART in ratings else None
    if part is not None:
        _refuse_shared_ratings(tables, rows, user_codes * len(items) + item_codes, part)
    latest = rows[_latest(user_codes[rows], item_codes[rows], len(items), None if time is None else time[rows])]
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
        timestamp=None if time is None else _clock(time[latest]),
        catalog=Catalog(
            tuple(items["item"]), {str(name): tuple(items[name]) for name in items.columns if name != "item"}
        ),
        scale=scale,
        dropped={**tables.dropped, **sieve.dropped, **({"repeated rating": repeated} if repeated else {})},
        notes=tuple(map(str, tables.notes)),
        part=None if part is None else part[latest],
        side=SideColumns(
            moments={name: _texts_of(ratings[name])[latest] for name in of_rows if name in ratings},
        ),
    )


def _texts_of(column: pd.Series) -> Texts:
    """Returns a column as texts without blanks around them, each different one in memory once."""
    names, codes = coded(column)
    found: Texts = np.array([str(name).strip() for name in names], object)[codes]
    return found


def _refuse_shared_ratings(tables: Tables, rows: np.ndarray, pair: np.ndarray, part: np.ndarray) -> None:
    """Refuses a rating that stands in two parts of a given split: training would see what is asked about."""
    parts = pd.Series(part[rows]).groupby(pair[rows]).agg(["min", "max"])
    shared = parts.index[parts["min"] != parts["max"]]
    if not len(shared):
        return
    there = rows[pair[rows] == shared[0]]
    first, other = int(there[0]), int(there[part[there] != part[there[0]]][0])
    user, item = (str(tables.ratings[name].iloc[first]) for name in ("user", "item"))
    places = " and ".join(f"{tables.place(row)} ({PART_NAMES[part[row]]})" for row in (first, other))
    raise DataError(
        f"{len(shared)} ratings stand in two parts of the split, e.g. user {shown(user)}, item {shown(item)}: {places}",
        "Remove them from one of the files",
    )


def _numbers(tables: Tables, sieve: _Sieve) -> tuple[np.ndarray, np.ndarray | None, RatingScale]:
    """Returns ratings and times as numbers, and the scale; rows without are refused."""
    ratings = tables.ratings
    number = rating_numbers(ratings["rating"])
    sieve.refuse(
        ~np.isfinite(number),
        lambda row: f"rating {_shown(ratings['rating'], row)} is not a finite number",
        "rating not a number",
    )
    time = None
    if "timestamp" in ratings:
        time = times(ratings["timestamp"])
        sieve.refuse(
            ~(np.abs(time) < 2**62),
            lambda row: f"timestamp {_shown(ratings['timestamp'], row)} is neither a number nor a date",
            "timestamp not a number",
            "Write dates as 2024-08-07, or map no timestamp: timestamp= (nothing)",
        )
    finite = number[np.isfinite(number)]
    scale = tables.scale or RatingScale(
        float(finite.min(initial=0.0 if not len(finite) else np.inf)),
        float(finite.max(initial=0.0 if not len(finite) else -np.inf)),
    )
    sieve.refuse(
        (number == 0) & (scale.low > 0),
        lambda row: "rating 0 is off the scale, as where nobody rated",
        NOT_RATED,
        f"Rate {scale}",
    )
    sieve.refuse(
        np.isfinite(number) & ((number < scale.low) | (number > scale.high)),
        lambda row: f"rating {number[row]:g} is off the scale",
        "rating off the scale",
        f"Rate {scale}",
    )
    return number, time, scale


def _item_codes(ratings: pd.DataFrame, items: pd.DataFrame, sieve: _Sieve) -> np.ndarray:
    """Returns each rating's row of the catalog; ratings of items that it does not hold are refused."""
    item_ids, codes = ids(ratings["item"])
    code_of_id = {item: code for code, item in enumerate(items["item"])}
    found: np.ndarray = np.array([code_of_id.get(item, -1) for item in item_ids], np.int64)[codes]
    sieve.refuse(
        found < 0,
        lambda row: f"item '{ratings['item'].iloc[row]}' has no row in the catalog",
        "item without a catalog row",
        "Add it to the item file",
    )
    return found


def _clock(time: np.ndarray) -> np.ndarray:
    """Returns whole seconds as integers, as most datasets have them; fractions stay."""
    whole = np.asarray(time, np.int64)
    return whole if np.array_equal(whole, time) else time


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
            raise DataError(f"{self._tables.place(row)}: {say(row)}", many)  # type: ignore[operator]
        self.kept[rows] = False
        self.dropped[reason] = len(rows)


def _items(tables: Tables, sieve: _Sieve) -> pd.DataFrame:
    """Checks the catalog; under quarantine, faulty items go and their ratings are counted with them."""
    items = catalog_texts(tables)
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
    kept = items[~bad].reset_index(drop=True)
    if "item id twice" in sieve.dropped:
        filled = first_filled(items).set_index("item")
        fields = kept.columns.drop("item")
        kept[fields] = filled.loc[kept["item"], fields].to_numpy()
    return kept


def catalog_texts(tables: Tables) -> pd.DataFrame:
    """Returns the item table as text, ids in the form in which ratings name them."""
    texts = {str(name): text_column(tables.items[name]) for name in tables.items.columns}
    names, codes = ids(tables.items["item"])
    return pd.DataFrame({**texts, "item": pd.Series(np.array(names, object)[codes], dtype=object)})


def first_filled(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns one row for each item: of every field the first value that is not blank."""
    texts = pd.DataFrame({name: text_column(frame[name]) for name in frame.columns})
    filled = texts.where(texts.apply(lambda column: column.str.strip() != ""))
    filled["item"] = texts["item"]
    found: pd.DataFrame = (
        filled.groupby("item", sort=False, dropna=False).first().fillna("").reset_index()[list(frame.columns)]
    )
    found.attrs = frame.attrs
    return found


def _shown(column: pd.Series, row: int) -> str:
    return repr(str(column.iloc[row])[:80])


def _latest(user: np.ndarray, item: np.ndarray, items: int, time: np.ndarray | None) -> np.ndarray:
    pair = user * items + item
    if len(pd.unique(pair)) == len(pair):
        return np.arange(len(pair))
    order = np.arange(len(pair)) if time is None else np.argsort(time, kind="stable")
    return np.sort(order[~pd.Series(pair[order]).duplicated(keep="last").to_numpy()])
