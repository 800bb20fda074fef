"""Closed-form heads against scikit-learn and against arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_losses import numeric_gradients
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from metarec.meta.algorithms import closed_form
from metarec.meta.heads import prototype_head, ridge_head
from metarec.meta.inner_loop import MetaState
from metarec.system.tensors import AdapterState, expand_users

USERS, ITEMS, FEATURES = 3, 6, 9


def some_support() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(USERS, ITEMS, FEATURES, generator=generator, dtype=torch.float64)
    targets = torch.randn(USERS, ITEMS, generator=generator, dtype=torch.float64)
    real = torch.arange(ITEMS) < torch.tensor([[6], [3], [0]])
    return features, targets, real


def test_ridge_head_is_ridge_regression_on_each_users_own_ratings() -> None:
    features, targets, real = some_support()
    penalty = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    found = ridge_head(features, targets, real, penalty)
    for user in range(2):
        kept = real[user]
        model = Ridge(float(penalty[user]), fit_intercept=False).fit(features[user][kept], targets[user][kept])
        np.testing.assert_allclose(found[user], model.coef_, rtol=1e-8)
    assert not found[2].any(), "a user without ratings has no head"


def test_prototype_head_orders_by_nearness_to_the_two_classes() -> None:
    features, targets, real = some_support()
    liked = targets > targets[:, :1] - 1e-9
    liked[0, :3], liked[0, 3:] = True, False
    found = prototype_head(features, liked, real, torch.ones(USERS, dtype=torch.float64))
    model = NearestCentroid().fit(features[0], liked[0])
    queries = torch.randn(50, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    disliked_at, liked_at = (torch.from_numpy(centre) for centre in model.centroids_)
    nearer = (queries - disliked_at).square().sum(1) - (queries - liked_at).square().sum(1)
    offset = disliked_at.square().sum() - liked_at.square().sum()
    torch.testing.assert_close(queries @ found[0] + offset, nearer)
    assert not found[2].any()


@pytest.mark.parametrize("head", ["ridge", "prototypes"])
def test_the_meta_gradient_through_a_closed_form_head_matches_finite_differences(head: str) -> None:
    features, targets, real = some_support()
    queries = features.flip(1) + 0.3
    init = {"score.log_penalty": torch.tensor(0.2, dtype=torch.float64), "m": torch.eye(FEATURES).double()}
    meta = MetaState(init, {})

    def solve(state: AdapterState) -> AdapterState:
        shaped = features @ state["m"]
        strength = state["score.log_penalty"].exp()
        if head == "ridge":
            return {**state, "head": ridge_head(shaped, targets, real, strength)}
        return {**state, "head": prototype_head(shaped, targets > 0, real, strength)}

    def query_loss(state: AdapterState) -> Tensor:
        predicted = (queries @ state["m"] @ state["head"].unsqueeze(-1)).squeeze(-1)
        return (predicted - targets.flip(1)).square().mean(1)

    result = closed_form(meta, solve, query_loss, USERS)
    expected = numeric_gradients(
        meta, lambda moved: query_loss(solve(expand_users(moved.init, USERS))).mean(), meta.tensors()
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-6, atol=1e-7)


def test_a_head_that_is_not_finite_poisons_no_other_user() -> None:
    features, targets, real = some_support()
    meta = MetaState({"score.log_penalty": torch.tensor(0.2, dtype=torch.float64)}, {})

    def gradient(bad: float, rows: list[int]) -> AdapterState:
        wanted = targets.clone()
        wanted[0, 0] = bad

        def solve(state: AdapterState) -> AdapterState:
            penalty = state["score.log_penalty"].exp()
            return {"head": ridge_head(features[rows], wanted[rows], real[rows], penalty)}

        result = closed_form(meta, solve, lambda state: state["head"].square().sum(1), len(rows))
        assert result.diverged.tolist() == [row == 0 for row in rows]
        return result.gradients

    broken, clean = gradient(np.nan, [0, 1, 2]), gradient(np.nan, [1, 2])
    torch.testing.assert_close(broken["init/score.log_penalty"], clean["init/score.log_penalty"])
