"""The linear kernel: one sweep equals expectation maximization as the textbook writes it, in any number of chunks."""

from __future__ import annotations

import numpy as np
import pytest

from metarec.scorers.collaborative import linear_kernel
from metarec.scorers.collaborative.features import side_by_side, word_vectors
from metarec.scorers.collaborative.linear_kernel import LearnedWeights, RatedRows, _root, _sweep
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


def test_blocks_side_by_side_count_the_same_whatever_their_units() -> None:
    generator = np.random.default_rng(2)
    first, second = generator.normal(size=(50, 3)) + 7, generator.normal(size=(50, 8)) * 1000
    both = side_by_side([first, second, np.zeros((50, 0))])
    assert both.shape == (50, 11)
    assert [(both[:, some] ** 2).sum(1).mean() for some in (slice(3), slice(3, 11))] == pytest.approx([1, 1])


@pytest.mark.parametrize("texts", [["", "", ""], ["one", "two", "three"], ["!", "?", "..."]])
def test_texts_that_share_no_word_have_no_word_vectors(texts: list[str]) -> None:
    assert word_vectors(texts).shape == (3, 0)
