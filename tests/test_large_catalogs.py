"""Items that nobody rated cost a fit little: neither memory for what is learned of items, nor another result."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from known import GENRE, ITEMS, THRESHOLD, TRAIN, VECTORS, WORLD

from metarec.data.interactions import Interactions, Ratings
from metarec.scorers.collaborative import kernel_learning
from metarec.scorers.collaborative.gp import GaussianProcess
from metarec.scorers.collaborative.gp_fitting import fit_gp
from metarec.scorers.collaborative.item_mean import ItemPrior, taken
from metarec.scorers.collaborative.kernel_learning import StepSchedule, aligned, learn_kernel_update

FACTORS = 12
UNRATED = 10_000
HALVES = (TRAIN[::2], TRAIN[1::2])
FEATURES = {"text": VECTORS, "genres": GENRE}


def larger(unrated: int) -> Interactions:
    """The known world with more items that nobody ever rated."""
    fields = {name: (*column, *[column[0]] * unrated) for name, column in WORLD.catalog.fields.items()}
    ids = (*WORLD.catalog.ids, *(f"new {number}" for number in range(unrated)))
    return replace(WORLD, catalog=replace(WORLD.catalog, ids=ids, fields=fields))


def untouched(prior: ItemPrior) -> ItemPrior:
    return prior


@cache
def process(half: int, unrated: int) -> GaussianProcess:
    blocks = {name: np.concatenate([block, np.zeros((unrated, block.shape[1]))]) for name, block in FEATURES.items()}
    # The blocks' scales are means over the catalog; these keep them as they are in the small one.
    blocks = {name: block * np.sqrt((ITEMS + unrated) / ITEMS) for name, block in blocks.items()}
    return fit_gp(
        larger(unrated), HALVES[1 - half], blocks, smooth=untouched, factors=FACTORS, sweeps=3, components=99, seed=half
    )


def test_a_process_of_mostly_unrated_items_takes_no_matrix_for_each_of_them() -> None:
    tracemalloc.start()
    fitted = process.__wrapped__(0, UNRATED)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    loadings = fitted.loadings.nbytes
    assert peak < 10 * loadings
    assert 3 * loadings < UNRATED * FACTORS**2 * 8  # what one matrix each would take


def test_items_that_nobody_rated_have_the_factors_variance_and_no_loadings_of_their_own() -> None:
    fitted = process(0, UNRATED)
    assert not fitted.loadings[ITEMS:, :FACTORS].any()
    assert len(np.unique(fitted.noise[ITEMS:])) == 1
    assert fitted.noise[ITEMS] > fitted.noise[:40].max()


def test_the_kernel_learns_numbers_for_rated_items_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    adam = torch.optim.Adam

    def counted(groups: list[dict[str, list[torch.Tensor]]], **options: bool) -> torch.optim.Adam:
        rows.extend(len(value) for group in groups for value in group["params"])
        return adam(groups, **options)

    monkeypatch.setattr(kernel_learning.torch.optim, "Adam", counted)
    processes = [aligned(process(half, UNRATED), process(0, UNRATED), FACTORS) for half in (0, 1)]
    world, schedule = larger(UNRATED), StepSchedule(8, 20, 1e-3)
    found = learn_kernel_update(world, processes, HALVES, schedule, threshold=THRESHOLD)
    assert max(rows) < ITEMS + FACTORS
    assert found.mean.shape == (ITEMS + UNRATED,)
    assert not found.loadings[ITEMS:].any()
    small = [replace(one, mean=one.mean[:ITEMS], loadings=one.loadings[:ITEMS], noise=one.noise[:ITEMS])
             for one in processes]  # fmt: skip
    alone = learn_kernel_update(WORLD, small, HALVES, schedule, threshold=THRESHOLD)
    np.testing.assert_array_equal(found.loadings[:ITEMS], alone.loadings)
    np.testing.assert_array_equal(found.log_noise[:ITEMS], alone.log_noise)


def test_a_whole_catalog_is_scored_without_a_copy_of_its_loadings() -> None:
    loadings = np.random.default_rng(0).normal(size=(20_000, 40))
    mean, ones = np.zeros(len(loadings)), np.ones(40)
    one = GaussianProcess(3.5, 1.0, mean, loadings, mean + 0.5, 0 * ones, ones, 3.0)
    support, everything = Ratings(np.arange(3), np.array([5, 1, 4], np.float32)), np.arange(len(loadings))
    tracemalloc.start()
    whole = one.posterior_mean(support, everything)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < loadings.nbytes / 4
    others = np.random.default_rng(1).permutation(everything)[:50]
    np.testing.assert_allclose(one.posterior_mean(support, others), whole[others], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codes", [[], [3], [3, 4, 5], [5, 4, 3], [3, 5, 4], [0, 2, 2], [7, 7]])
def test_rows_that_follow_each_other_are_a_view_and_all_others_what_they_are(codes: list[int]) -> None:
    rows, asked = np.arange(20).reshape(10, 2), np.array(codes, np.int64)
    np.testing.assert_array_equal(taken(rows, asked), rows[asked])
    assert np.shares_memory(taken(rows, asked), rows) == (codes in ([3], [3, 4, 5]))
