"""Losses on a query: known answers, gradients against finite differences, padding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from metarec.meta.losses import Labels, bce, mse, ordinal, pairwise
from metarec.registries import LOSSES

SCORES = torch.tensor([[0.3, -0.2, 1.0, 0.0]], dtype=torch.float64)
LABELS = Labels(
    liked=torch.tensor([[True, False, True, False]]),
    target=torch.tensor([[1.0, -1.0, 2.0, 0.0]], dtype=torch.float64),
    real=torch.tensor([[True, True, True, False]]),
)


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def test_pairwise_is_the_mean_over_pairs_of_a_like_and_a_dislike() -> None:
    expected = (softplus(-2 * (0.3 + 0.2)) + softplus(-2 * (1.0 + 0.2))) / 2
    assert float(pairwise(SCORES, LABELS, 2.0)) == pytest.approx(expected)


def test_ordinal_is_the_mean_over_pairs_of_different_ratings() -> None:
    expected = (softplus(-(0.3 + 0.2)) + softplus(-(1.0 + 0.2)) + softplus(-(1.0 - 0.3))) / 3
    assert float(ordinal(SCORES, LABELS, 1.0)) == pytest.approx(expected)


def test_bce_is_the_mean_cross_entropy_of_likes() -> None:
    expected = (softplus(-0.3) + softplus(-0.2) + softplus(-1.0)) / 3
    assert float(bce(SCORES, LABELS, 1.0)) == pytest.approx(expected)


def test_mse_is_the_mean_squared_error_of_ratings() -> None:
    assert float(mse(SCORES, LABELS, 7.0)) == pytest.approx((0.7**2 + 0.8**2 + 1.0**2) / 3)


@pytest.mark.parametrize("name", LOSSES.names())
def test_gradients_match_finite_differences(name: str) -> None:
    loss = LOSSES.get(name)
    assert torch.autograd.gradcheck(lambda scores: loss(scores, LABELS, 1.5), SCORES.clone().requires_grad_())


@pytest.mark.parametrize("name", LOSSES.names())
def test_padding_changes_nothing_and_an_empty_query_is_zero(name: str) -> None:
    loss = LOSSES.get(name)
    moved = SCORES.clone()
    moved[0, 3] = 100.0
    assert torch.equal(loss(moved, LABELS, 1.0), loss(SCORES, LABELS, 1.0))
    nothing: Tensor = torch.zeros(1, 4, dtype=torch.bool)
    assert float(loss(SCORES, Labels(LABELS.liked, LABELS.target, nothing), 1.0)) == 0.0
