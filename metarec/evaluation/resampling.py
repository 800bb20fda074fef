"""Intervals over users and items at once, for differences in AUC between two methods."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 499


def crossed_interval(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    liked: NDArray[np.bool_],
    users: Sequence[str],
    items: Sequence[str],
    people: Sequence[str],
    seed: int,
) -> tuple[float, float]:
    """Returns a 95% bootstrap interval of the mean difference in AUC, drawing people and items anew.

    Users who are asked about the same few items are not independent: an item that is easy to rank moves all of them.
    A resample draws people and, independently, items with replacement; a pair of items counts as often as both were
    drawn.

    Args:
        first: One method's score of every prediction, shape (predictions,).
        second: Another's.
        liked: What happened.
        users: Whose query each prediction is of.
        items: Which item it is about; the same id in two splits is the same item.
        people: The person of each; one person may be several users, in several splits.
        seed: Seed of the 499 resamples.

    Returns:
        The lower and the upper end; NaN where no user has both classes.

    Source: Owen 2007, "The pigeonhole bootstrap", which errs on the wide side.
    """
    if not len(first):
        return np.nan, np.nan
    import pandas as pd

    item, person = (pd.factorize(np.asarray(names, object))[0] for names in (items, people))
    item_counts, person_counts = _drawn(int(item.max()) + 1, int(person.max()) + 1, seed)
    total, weight = np.zeros(_RESAMPLES), np.zeros(_RESAMPLES)
    groups = pd.Series(np.arange(len(item))).groupby(np.asarray(users, object), sort=False).indices
    for rows in map(np.asarray, groups.values()):
        yes, no = rows[liked[rows]], rows[~liked[rows]]
        if not len(yes) or not len(no):
            continue
        # One row per item, so that the counts of an item's resamples lie side by side.
        drawn_yes, drawn_no = item_counts[item[yes]], item_counts[item[no]]
        pairs = drawn_yes.sum(0) * drawn_no.sum(0)
        gap = _wins(first[yes], first[no]) - _wins(second[yes], second[no])
        difference = ((gap.T @ drawn_yes) * drawn_no).sum(0)
        kept = person_counts[person[rows[0]]] * (pairs > 0)
        total += kept * np.divide(difference, pairs, out=np.zeros(_RESAMPLES), where=pairs > 0)
        weight += kept
    means = np.divide(total, weight, out=np.full(_RESAMPLES, np.nan), where=weight > 0)
    means = means[np.isfinite(means)]
    low, high = np.quantile(means, [0.025, 0.975]) if len(means) else (np.nan, np.nan)
    return float(low), float(high)


@lru_cache(maxsize=2)
def _drawn(items: int, people: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns how often resamples draw each item and each person: shapes (items, resamples), (people, resamples).

    The comparisons of one table ask for the same again and again.
    """
    generator = np.random.default_rng(seed)
    of_items, of_people = (
        np.ascontiguousarray(generator.multinomial(count, np.full(count, 1 / count), _RESAMPLES).T, np.float64)
        for count in (items, people)
    )
    return of_items, of_people


def _wins(yes: NDArray[np.floating], no: NDArray[np.floating]) -> NDArray[np.float64]:
    """Returns 1 where a liked item is scored above another one, a half where they tie, shape (liked, others)."""
    wins: NDArray[np.float64] = (yes[:, None] > no) + 0.5 * (yes[:, None] == no)
    return wins
