"""The linear kernel: one sweep equals expectation maximization as the textbook writes it, in any number of chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from metarec.data.interactions import Catalog, Interactions, Ratings, RatingScale
from metarec.scorers.collaborative import linear_kernel
from metarec.scorers.collaborative.features import side_by_side, word_vectors
from metarec.scorers.collaborative.linear_kernel import (
    LearnedWeights,
    RatedRows,
    _root,
    _sweep,
    fit_linear_kernel,
    fit_linear_prior,
)
from metarec.scorers.collaborative.residuals import Floats

ITEMS, WIDTH, USERS = 30, 4, 25


def made() -> tuple[RatedRows, Floats, LearnedWeights]:
    generator = np.random.default_rng(0)
    design = np.concatenate([generator.normal(size=(ITEMS, WIDTH)), np.ones((ITEMS, 1))], 1)
    rated = [generator.choice(ITEMS, generator.integers(1, 9), replace=False) for _ in range(USERS)]
    bounds = np.cumsum([0, *map(len, rated)])
    rows = RatedRows(bounds, np.concatenate(rated), generator.normal(size=bounds[-1]))
    covariance = np.eye(WIDTH + 1) * 0.3 + 0.05
    return rows, design, LearnedWeights(np.full(WIDTH + 1, 0.1), covariance, np.zeros(ITEMS), 0.6)


@pytest.mark.parametrize("chunk", [7, 512])
def test_systems_as_large_as_a_users_ratings_give_the_textbooks_sweep(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dempster, Laird and Rubin 1977: posteriors in the space of weights, then their moments."""
    monkeypatch.setattr(linear_kernel, "_CHUNK", chunk)
    rows, design, start = made()
    found = _sweep(rows, design.astype(np.float32), start, damping=0.0, item_damping=4.0, workers=2)
    rest = rows.value - design[rows.item] @ start.weights
    means, spread, unsure, explained = [], np.zeros((WIDTH + 1, WIDTH + 1)), 0.0, np.empty(len(rest))
    for first, end in zip(rows.bounds[:-1], rows.bounds[1:], strict=True):
        rated = design[rows.item[first:end]]
        posterior = np.linalg.inv(np.linalg.inv(start.covariance) + rated.T @ rated / start.noise)
        means.append(posterior @ rated.T @ rest[first:end] / start.noise)
        spread += posterior
        unsure += np.trace(rated @ posterior @ rated.T)
        explained[first:end] = rated @ means[-1]
    away = np.array(means)
    mean = away.mean(0)
    left = rest - explained
    items = np.bincount(rows.item, left, ITEMS) / (np.bincount(rows.item, minlength=ITEMS) + 4.0)
    assert found.weights == pytest.approx(start.weights + mean, abs=1e-5)
    assert found.covariance == pytest.approx((spread + (away - mean).T @ (away - mean)) / USERS, abs=1e-5)
    assert found.items == pytest.approx(items, abs=1e-5)
    assert found.noise == pytest.approx((((left - items[rows.item]) ** 2).sum() + unsure) / len(rest), abs=1e-5)


def test_a_narrow_root_keeps_the_directions_in_which_users_differ_most() -> None:
    generator = np.random.default_rng(1)
    wide = generator.normal(size=(6, 6)) * np.array([3.0, 2.0, 1.0, 0.1, 0.05, 0.01])
    covariance = wide.T @ wide
    whole, narrow = _root(covariance, 6), _root(covariance, 3)
    assert whole @ whole.T == pytest.approx(covariance)
    left = np.linalg.eigvalsh(covariance)[:3]
    assert np.linalg.norm(covariance - narrow @ narrow.T, 2) == pytest.approx(left[-1])


def shop(users: int, items: int, width: int, noise: float, unknown: int = 0) -> tuple[Interactions, Floats]:
    """Users whose weights on the first two of an item's features say what they think of it; the others say nothing.

    Their weights on an `unknown` number of features that nobody wrote down count as well.
    """
    generator = np.random.default_rng(0)
    features = generator.normal(size=(items, width))
    taste = generator.normal(size=(users, 2)) @ features[:, :2].T
    taste += generator.normal(size=(users, unknown)) @ generator.normal(size=(items, unknown)).T
    rated = [generator.choice(items, min(items, 30), replace=False) for _ in range(users)]
    rating = np.concatenate([taste[user, some] for user, some in enumerate(rated)])
    rating = np.clip(3 + rating + noise * generator.normal(size=len(rating)), -20, 20)
    interactions = Interactions(
        users=tuple(f"u{user}" for user in range(users)),
        user=np.repeat(np.arange(users), [len(some) for some in rated]),
        item=np.concatenate(rated),
        rating=rating.astype(np.float32),
        timestamp=None,
        catalog=Catalog(tuple(f"i{item}" for item in range(items)), {"title": tuple(map(str, range(items)))}),
        scale=RatingScale(-20, 20),
        dropped={},
    )
    return interactions, features


def cold_correlation(interactions: Interactions, features: Floats, shown: int, **how: Any) -> float:
    """Correlation with other users' ratings of items that the fit has not met, ten others given."""
    known = interactions.subset((interactions.item < shown) & (interactions.user < 300))
    process = fit_linear_kernel(known, np.arange(300), features, name="kernel", sweeps=4, unrated=True, **how)
    found = []
    for user in range(300, len(interactions.users)):
        ratings = interactions.ratings(interactions.rows_of_user[user])
        cold = ratings.items >= shown
        support, query = Ratings(ratings.items[~cold][:10], ratings.values[~cold][:10]), ratings.items[cold]
        found.append(np.corrcoef(process.posterior_mean(support, query), ratings.values[cold])[0, 1])
    return float(np.mean(found))


def test_a_covariance_of_few_items_is_shrunk_and_then_says_more_of_others() -> None:
    interactions, features = shop(users=400, items=60, width=30, noise=0.5, unknown=2)
    whole, chosen = (cold_correlation(interactions, features, 45, shrinkage=how) for how in (0.0, None))
    assert chosen > whole + 0.02


def test_a_covariance_of_many_items_is_kept() -> None:
    interactions, features = shop(users=100, items=300, width=6, noise=0.5)
    known, everybody = interactions, np.arange(100)
    kept = fit_linear_prior(known, everybody, features, sweeps=6, shrinkage=0.0, unrated=True).covariance
    found = fit_linear_prior(known, everybody, features, sweeps=6, unrated=True).covariance
    share = [np.trace(some[:2, :2]) / np.trace(some[:-1, :-1]) for some in (kept, found)]
    assert share[1] > 0.8 * share[0]


def test_shrinkage_is_chosen_by_the_given_users_alone() -> None:
    interactions, features = shop(users=60, items=40, width=8, noise=1.0)
    some = np.arange(40)
    flipped = np.where(interactions.user < 40, interactions.rating, -interactions.rating).astype(np.float32)
    one, other = (
        fit_linear_prior(data, some, features, sweeps=2, unrated=True)
        for data in (interactions, replace(interactions, rating=flipped))
    )
    assert np.array_equal(one.covariance, other.covariance)


def test_all_of_the_target_is_equal_variances() -> None:
    interactions, features = shop(users=30, items=40, width=5, noise=1.0)
    found = fit_linear_prior(interactions, np.arange(30), features, sweeps=2, shrinkage=1.0).covariance
    variances = np.diag(found)
    assert found == pytest.approx(np.diag(variances))
    assert variances[:-1] == pytest.approx(variances[0])


def test_where_nobody_has_enough_ratings_the_covariance_is_not_shrunk() -> None:
    interactions, features = shop(users=30, items=40, width=5, noise=1.0)
    first = np.concatenate([interactions.rows_of_user[user][:1] for user in range(30)])
    single = interactions.subset(np.isin(np.arange(len(interactions)), first))
    kept, found = (
        fit_linear_prior(single, np.arange(30), features, sweeps=2, shrinkage=how).covariance for how in (0.0, None)
    )
    assert np.array_equal(kept, found)


def test_blocks_side_by_side_count_the_same_whatever_their_units() -> None:
    generator = np.random.default_rng(2)
    first, second = generator.normal(size=(50, 3)) + 7, generator.normal(size=(50, 8)) * 1000
    both = side_by_side([first, second, np.zeros((50, 0))])
    assert both.shape == (50, 11)
    assert [(both[:, some] ** 2).sum(1).mean() for some in (slice(3), slice(3, 11))] == pytest.approx([1, 1])


@pytest.mark.parametrize("texts", [["", "", ""], ["one", "two", "three"], ["!", "?", "..."]])
def test_texts_that_share_no_word_have_no_word_vectors(texts: list[str]) -> None:
    assert word_vectors(texts).shape == (3, 0)
