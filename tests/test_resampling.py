"""Intervals over users and items: they cover what intervals over users alone do not."""

from __future__ import annotations

import numpy as np
import pytest

from metarec.evaluation.metrics import bootstrap_interval
from metarec.evaluation.resampling import crossed_interval

USERS, ITEMS = 40, 8


def area(yes: np.ndarray, scores: np.ndarray) -> float:
    """Returns the AUC of scores without ties: the share of pairs in the right order."""
    return float(np.mean(scores[yes][:, None] > scores[~yes]))


def trial(seed: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Two methods that know nothing rank eight items by noise of their own, the same for all users, who agree a bit."""
    generator = np.random.default_rng(seed)
    good = generator.normal(size=ITEMS)
    liked = good + generator.normal(size=(USERS, ITEMS)) > 0
    liked[:, 0], liked[:, 1] = True, False
    first, second = (np.tile(generator.normal(size=ITEMS), (USERS, 1)) for _ in range(2))
    areas = [[area(yes, scores) for yes, scores in zip(liked, one, strict=True)] for one in (first, second)]
    users = np.repeat(np.arange(USERS), ITEMS).astype(str).tolist()
    items = np.tile(np.arange(ITEMS), USERS).astype(str).tolist()
    over_users = bootstrap_interval(np.subtract(*areas), seed)
    return over_users, crossed_interval(first.ravel(), second.ravel(), liked.ravel(), users, items, users, seed)


def test_an_interval_over_items_too_covers_what_one_over_users_misses() -> None:
    found = [trial(seed) for seed in range(60)]
    missed = [np.mean([not low <= 0 <= high for low, high in some]) for some in zip(*found, strict=True)]
    assert missed[0] > 0.5, "eight items decide, and forty users who share them are taken for forty pieces of evidence"
    assert missed[1] < 0.2


def test_the_same_scores_differ_by_nothing() -> None:
    scores = np.random.default_rng(0).normal(size=20)
    users, items = ["u"] * 10 + ["v"] * 10, [str(code % 10) for code in range(20)]
    assert crossed_interval(scores, scores, np.arange(20) % 2 == 0, users, items, users, 0) == (0, 0)


def test_a_user_of_one_class_and_no_users_are_no_evidence() -> None:
    scores, users = np.arange(4.0), ["u", "u", "v", "v"]
    liked = np.array([True, True, True, False])
    alone = crossed_interval(scores[2:], -scores[2:], liked[2:], users[2:], ["c", "d"], users[2:], 0)
    assert crossed_interval(scores, -scores, liked, users, ["a", "b", "c", "d"], users, 0) == alone == (-1, -1)
    nothing = np.zeros(0)
    assert np.isnan(crossed_interval(nothing, nothing, nothing > 0, [], [], [], 0)).all()


def test_a_person_in_two_splits_is_drawn_once() -> None:
    generator = np.random.default_rng(1)
    scores, other = generator.normal(size=(2, 400))
    liked = np.tile(np.arange(10) % 2 == 0, 40)
    users = np.repeat(np.arange(40), 10).astype(str).tolist()
    items = np.arange(400).astype(str).tolist()
    apart = crossed_interval(scores, other, liked, users, items, users, 0)
    doubled = (np.tile(some, 2) for some in (scores, other, liked))
    twice = [*users, *(f"again {user}" for user in users)]
    again = crossed_interval(*doubled, twice, [*items, *items], [*users, *users], 0)
    assert again == pytest.approx(apart)
