"""Checks of the ratings: ids, numbers, times, repetitions, and users who do not rate as people do."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pandas as pd

from metarec.data.checks.findings import Check, Checked, CheckLimits, Fault
from metarec.data.sources.columns import scale_without_zero

_MOST_COMPARED = 50  # users who share a hash: a bound on what a made-up set can cost
_FACTORS = (  # odd numbers without a pattern: each orders hashes anew
    0x9E3779B97F4A7C15,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0xD6E8FEB86659FD93,
    0xA0761D6478BD642F,
    0xE7037ED1A0B428DB,
)
_EARLIEST = 631_152_000  # 1990-01-01: no recommender data is older


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


def _zeros(data: Checked, _: CheckLimits) -> Fault:
    odd = data.tables.scale is None and scale_without_zero(data.rating) is not None
    return Fault((data.rating == 0) & odd, "ratings")


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


def _twin_ids(data: Checked, _: CheckLimits) -> Fault:
    """Ids that differ in case, spaces, leading zeros or a decimal ``.0`` alone."""
    users = _twins(data.users)
    items = _twins(list(dict.fromkeys([*data.items, *data.catalog["item"]])))[: len(data.items)]
    return Fault(users[data.user] | items[data.item], "ratings")


def _twins(names: list[str]) -> np.ndarray:
    plain = ["".join(unicodedata.normalize("NFKC", name).casefold().split()).removesuffix(".0") for name in names]
    keys = pd.Series([name.lstrip("0") if name.isdigit() else name for name in plain], dtype=object)
    return (keys.duplicated(keep=False) & (keys != "")).to_numpy(bool)


def _alike(data: Checked, limits: CheckLimits) -> Fault:
    """Users whose rated items and ratings are nearly the same, found by three pairs of minima of hashes (MinHash)."""
    pairs = pd.DataFrame({"user": data.user, "item": data.item, "rating": data.rating}).drop_duplicates()
    size = np.bincount(pairs["user"], minlength=len(data.users))
    pairs = pairs[size[pairs["user"]] >= limits.user_ratings]
    hashed = pd.util.hash_pandas_object(pairs[["item", "rating"]], index=False).to_numpy(np.uint64)
    order = np.argsort(pairs["user"].to_numpy(), kind="stable")
    users, starts = np.unique(pairs["user"].to_numpy()[order], return_index=True)
    flags = np.zeros(len(data.users), bool)
    if not len(users):
        return Fault(flags[data.user], "users")
    ordered = hashed[order]
    sets = np.split(ordered, starts[1:])
    compared: set[tuple[int, int]] = set()
    for factors in zip(_FACTORS[::2], _FACTORS[1::2], strict=True):
        minima = [np.minimum.reduceat(ordered * np.uint64(factor), starts) for factor in factors]
        key = pd.Series(minima[0] ^ (minima[1] << np.uint64(1)))
        shared = key[key.duplicated(keep=False)]
        for places in shared.groupby(shared).indices.values():
            some = shared.index.to_numpy()[places][:_MOST_COMPARED].tolist()
            for one, two in set(combinations(some, 2)) - compared:
                compared.add((one, two))
                both = len(np.intersect1d(sets[one], sets[two]))
                if both >= limits.alike * (len(sets[one]) + len(sets[two]) - both):
                    flags[users[[one, two]]] = True
    return Fault(flags[data.user], "users")


def _skewed(data: Checked, limits: CheckLimits) -> Fault:
    known = data.rating[np.isfinite(data.rating)]
    positive = known[known > 0]
    flags = np.zeros(len(data.rating), bool)
    if len(positive) >= 20 and known.min() >= 0:
        median = float(np.median(positive))
        if positive.max() >= limits.skew * median and positive.mean() >= 1.5 * median:
            flags = np.isfinite(data.rating) & (data.rating > 10 * median)
    return Fault(flags, "ratings")


RATING_CHECKS: dict[str, Check] = {
    "empty-id": Check(_empty_ids, "error", "ratings without a user or an item", "Drop them", "drop"),
    "padded-id": Check(
        _padded_ids, "warning", "ids with spaces around them, which makes two of one", "Strip them in the source", None
    ),
    "twin-id": Check(
        _twin_ids,
        "warning",
        "ids that differ from another in case, spaces, leading zeros or '.0' alone",
        "Write every id in one way in the source, unless they are two",
        None,
    ),
    "rating-not-a-number": Check(
        _not_numbers, "error", "ratings that are not finite numbers", "Drop or repair them", "drop"
    ),
    "rating-off-scale": Check(
        _off_scale, "error", "ratings off the stated scale", "Drop them, or state another scale", "drop"
    ),
    "zero-rating": Check(
        _zeros,
        "warning",
        "ratings of 0 beside stars from 1 on, or one half: in many exports 0 means 'not rated'",
        "State the scale: --scale 1,5 leaves them out, --scale 0,5 counts them as ratings",
        None,
    ),
    "skewed-rating": Check(
        _skewed,
        "warning",
        "ratings far above the rest, as hours and counts have them: a few decide every mean",
        "Set 'rating: {transform: log}' in the task, or a label rule with a threshold",
        None,
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
        "timestamps that are neither numbers nor dates",
        "Write dates as 2024-08-07, or read none: --column timestamp=",
        "drop",
    ),
    "future-time": Check(
        lambda data, _: _times(data, lambda times: times > data.now + 86_400),
        "warning",
        "timestamps in the future",
        "Check the clock that wrote them",
        "drop",
    ),
    "ancient-time": Check(
        lambda data, _: _times(data, lambda times: times < _EARLIEST),
        "warning",
        "timestamps before 1990",
        "Check that they are seconds since 1970, or dates",
        None,
    ),
    "thin-user": Check(
        _thin_users,
        "note",
        "users with too few ratings for a support and a query",
        "They are left out of episodes",
        None,
    ),
    "one-value-rater": Check(
        _one_value,
        "warning",
        "users who give everything the same rating",
        "Leave them out: nothing can be learned from them",
        "drop",
    ),
    "near-duplicate-user": Check(
        _alike,
        "warning",
        "users who rate the same items the same as another: one may be trained on and the other tested",
        "Give them one id if they are one person",
        None,
    ),
    "suspicious-user": Check(
        _programs,
        "warning",
        "users who rate faster or more than people do",
        "Leave them out if they are programs",
        "drop",
    ),
}
