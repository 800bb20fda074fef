"""The meta-learned kernel: turned processes score the same, and moving one follows the ranking loss of new users."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from known import CANDIDATES, GENRE, SUPPORT, TEST, THRESHOLD, TRAIN, VECTORS, WORLD, episodes

from metarec.config import KernelConfig
from metarec.data.interactions import Ratings
from metarec.evaluation.evaluate import evaluate
from metarec.scorers.collaborative.gp import GaussianProcess
from metarec.scorers.collaborative.gp_fitting import fit_gp
from metarec.scorers.collaborative.item_mean import fit_item_mean
from metarec.scorers.collaborative.kernel_learning import (
    KernelUpdate,
    StepSchedule,
    _scores,
    _tensors,
    aligned,
    learn_kernel_update,
    step_schedule,
)
from metarec.scorers.collaborative.trivial import ItemMean

FACTORS = 4
EVERY = np.arange(len(WORLD.catalog))
HALVES = (TRAIN[::2], TRAIN[1::2])


@cache
def process(half: int) -> GaussianProcess:
    return fit_gp(WORLD, HALVES[1 - half], {"text": VECTORS, "genres": GENRE}, factors=FACTORS, sweeps=3, seed=half)


@cache
def learned(steps: int) -> KernelUpdate:
    processes = [aligned(process(half), process(0), FACTORS) for half in (0, 1)]
    return learn_kernel_update(WORLD, processes, HALVES, StepSchedule(8, steps, 1e-3), threshold=THRESHOLD)


def nowhere() -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(_tensors(process(0), EVERY)[name])
        for name in ("mean", "loadings", "noise", "selection_effect")
    }


def test_a_turned_process_scores_as_before_and_lies_nearer_to_the_other() -> None:
    before, onto = process(1), process(0)
    after = aligned(before, onto, FACTORS)
    np.testing.assert_allclose(
        after.posterior_mean(SUPPORT, CANDIDATES), before.posterior_mean(SUPPORT, CANDIDATES), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(after.loadings[:, FACTORS:], before.loadings[:, FACTORS:])

    def distance(some: GaussianProcess) -> float:
        return float(np.linalg.norm((some.loadings - onto.loadings)[:, :FACTORS]))

    assert distance(after) < distance(before)


def test_scores_for_many_users_match_the_process_one_user_at_a_time() -> None:
    supports = [SUPPORT.head(4), SUPPORT.rows(slice(2, 6))]
    fitted = process(0)
    standardized = [(support.values - fitted.mean_rating) / fitted.scale for support in supports]
    scores = _scores(
        _tensors(fitted, EVERY),
        nowhere(),
        torch.from_numpy(np.stack([support.items for support in supports])),
        torch.from_numpy(np.stack(standardized)).float(),
        torch.from_numpy(np.stack([CANDIDATES, CANDIDATES[::-1].copy()])),
        fitted.selection_damping,
    )
    np.testing.assert_allclose(scores[0], fitted.posterior_mean(supports[0], CANDIDATES), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores[1], fitted.posterior_mean(supports[1], CANDIDATES[::-1]), rtol=1e-4, atol=1e-5)


def test_a_displacement_moves_scores_as_the_gradients_were_taken() -> None:
    fitted, moved = process(0), learned(20)
    tensors = {
        "mean": moved.mean,
        "loadings": moved.loadings,
        "noise": moved.log_noise,
        "selection_effect": moved.selection_effect,
    }
    scores = _scores(
        _tensors(fitted, EVERY),
        {name: torch.from_numpy(value).float() for name, value in tensors.items()},
        torch.from_numpy(SUPPORT.items[None]),
        torch.from_numpy((SUPPORT.values[None] - fitted.mean_rating) / fitted.scale).float(),
        torch.from_numpy(CANDIDATES[None]),
        fitted.selection_damping,
    )
    np.testing.assert_allclose(scores[0], moved.apply(fitted).posterior_mean(SUPPORT, CANDIDATES), rtol=1e-3, atol=1e-4)
    assert np.abs(scores[0].numpy() - fitted.posterior_mean(SUPPORT, CANDIDATES)).max() > 1e-3


def test_without_steps_nothing_moves_and_what_no_episode_asked_for_stays() -> None:
    still = learned(0).apply(process(0))
    np.testing.assert_allclose(
        still.posterior_mean(SUPPORT, CANDIDATES), process(0).posterior_mean(SUPPORT, CANDIDATES), rtol=1e-6
    )
    moved = learned(20)
    unrated = np.bincount(WORLD.item[np.isin(WORLD.user, TRAIN)], minlength=len(WORLD.catalog)) == 0
    assert unrated.any()
    assert not moved.loadings[unrated].any()
    assert not moved.mean[unrated].any()
    assert moved.loadings[~unrated].any(axis=1).all()


def test_the_same_seed_learns_the_same_displacement() -> None:
    np.testing.assert_array_equal(learned(20).loadings, learned.__wrapped__(20).loadings)


def test_moving_a_weak_process_makes_new_users_rankings_better() -> None:
    # One factor's worth of one sweep: there is something left to learn.
    weak = replace(process(0), loadings=0.3 * process(0).loadings, name="weak")
    other = replace(aligned(process(1), process(0), FACTORS))
    other = replace(other, loadings=0.3 * other.loadings)
    moved = learn_kernel_update(WORLD, [weak, other], HALVES, StepSchedule(16, 150, 0.01), threshold=THRESHOLD)
    report = evaluate(
        [ItemMean(fit_item_mean(WORLD, TRAIN)), weak, replace(moved.apply(weak), name="moved")],
        episodes(WORLD, TEST),
        (5,),
        WORLD.catalog,
        threshold=THRESHOLD,
        seed=0,
        baseline="item mean",
        left_out={},
    )
    assert report.values("moved", 5).mean() > report.values("weak", 5).mean()
    assert np.isfinite(moved.apply(weak).posterior_mean(Ratings.empty(), CANDIDATES)).all()


def test_more_users_make_more_and_smaller_steps_of_the_same_length_together() -> None:
    few, many = (step_schedule([np.arange(count), np.arange(count + 100)], KernelConfig()) for count in (179, 1600))
    assert few == StepSchedule(users=64, steps=400, lr=1e-3)
    assert many == StepSchedule(users=256, steps=800, lr=5e-4)
    between = step_schedule([np.arange(576)], KernelConfig())
    assert between.users == 144
    assert between.steps * between.lr == pytest.approx(0.4)
