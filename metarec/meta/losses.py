"""Losses on a user's query: functions of scores and labels that return one number per user.

A loss is one function and one name in `metarec.registries.LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Labels:
    """Labels of the scored items.

    Args:
        liked: Whether the label rule calls the rating a like, shape (users, items).
        target: Standardized ratings, shape (users, items).
        real: False at padding, shape (users, items).
    """

    liked: Tensor
    target: Tensor
    real: Tensor


QueryLoss = Callable[[Tensor, Labels, float], Tensor]


def pairwise(scores: Tensor, labels: Labels, sharpness: float) -> Tensor:
    """Returns the logistic loss of every pair of a liked and a disliked item: a smooth surrogate of 1 - AUC.

    Args:
        scores: Shape (users, items).
        labels: The items' labels.
        sharpness: Factor on the scores' differences.

    Returns:
        Shape (users,); zero for a user who likes all or none.

    Source: see `pairwise_logistic`.
    """
    return pairwise_logistic(scores, labels.liked, labels.real, sharpness)


def pairwise_logistic(scores: Tensor, liked: Tensor, real: Tensor, sharpness: float) -> Tensor:
    """Returns the loss of `pairwise` for callers without ratings.

    Args:
        scores: Shape (users, items).
        liked: Shape (users, items).
        real: False at padding, shape (users, items).
        sharpness: Factor on the scores' differences.

    Source: Rendle et al. 2009, "BPR", eq. 4.
    """
    return _pair_loss(scores, (liked & real)[:, :, None] & (~liked & real)[:, None, :], sharpness)


def ordinal(scores: Tensor, labels: Labels, sharpness: float) -> Tensor:
    """Returns the logistic loss of every pair of items with different ratings, the higher one to be ranked first.

    Args:
        scores: Shape (users, items).
        labels: The items' labels.
        sharpness: Factor on the scores' differences.

    Returns:
        Shape (users,); zero for a user whose ratings are all the same.

    Source: Burges et al. 2005, "RankNet", eq. 3, with target probabilities of one.
    """
    both = labels.real[:, :, None] & labels.real[:, None, :]
    wins = both & (labels.target[:, :, None] > labels.target[:, None, :])
    return _pair_loss(scores, wins, sharpness)


def bce(scores: Tensor, labels: Labels, sharpness: float) -> Tensor:
    """Returns the binary cross-entropy of likes, scores times `sharpness` being log-odds of a like.

    Args:
        scores: Shape (users, items).
        labels: The items' labels.
        sharpness: Factor on the scores.

    Returns:
        Shape (users,); the mean over the user's items.
    """
    losses = functional.binary_cross_entropy_with_logits(
        sharpness * scores, labels.liked.to(scores.dtype), reduction="none"
    )
    return _mean(losses, labels.real)


def mse(scores: Tensor, labels: Labels, sharpness: float) -> Tensor:
    """Returns the mean squared error of scores as predictions of standardized ratings; `sharpness` has no effect.

    Args:
        scores: Shape (users, items).
        labels: The items' labels.
        sharpness: Not used.

    Returns:
        Shape (users,).
    """
    return _mean((scores - labels.target).square(), labels.real)


def smoothed(loss: QueryLoss, share: float) -> QueryLoss:
    """Returns a loss of which a share is taken at the opposite labels.

    Of the binary cross-entropy this is label smoothing; of a loss of pairs, each pair counts the other way round by the
    share.

    Args:
        loss: The loss.
        share: Share of the opposite labels; 0 returns the loss itself.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7, with two classes.
    """
    if not share:
        return loss

    def both(scores: Tensor, labels: Labels, sharpness: float) -> Tensor:
        opposite = replace(labels, liked=~labels.liked, target=-labels.target)
        return (1 - share) * loss(scores, labels, sharpness) + share * loss(scores, opposite, sharpness)

    return both


def info_nce(scores: Tensor, also: Tensor) -> Tensor:
    """Returns the InfoNCE loss of pairs: each first's own second against all others' seconds.

    Args:
        scores: How alike every first and every second are, over the temperature, shape (pairs, pairs).
        also: Seconds of others that are no wrong answers, shape (pairs, pairs); the diagonal does not count.

    Returns:
        Shape (pairs,).

    Source: van den Oord, Li and Vinyals 2018, "Contrastive Predictive Coding", eq. 4.
    """
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    wrong = scores.masked_fill(also & ~own, -torch.inf)
    return functional.cross_entropy(wrong, torch.arange(len(scores), device=scores.device), reduction="none")


def _pair_loss(scores: Tensor, wins: Tensor, sharpness: float) -> Tensor:
    """Averages the logistic loss over pairs (first, second) in which the first item should be ranked higher."""
    difference = scores[:, :, None] - scores[:, None, :]
    pairs = wins.to(scores.dtype)
    total = (functional.softplus(-sharpness * difference) * pairs).sum((1, 2))
    return total / pairs.sum((1, 2)).clamp(min=1)


def _mean(losses: Tensor, real: Tensor) -> Tensor:
    return (losses * real).sum(1) / real.sum(1).clamp(min=1)
