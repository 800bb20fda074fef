"""Outer losses: functions of scores and labels, one number per user."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def pairwise_logistic(scores: Tensor, liked: Tensor, real: Tensor, sharpness: float) -> Tensor:
    """Logistic loss of the score differences of every liked and disliked item of a user.

    Args:
        scores: Shape (users, items).
        liked: Shape (users, items).
        real: False at padding, shape (users, items).
        sharpness: Factor on the score's differences.

    Returns:
        Shape (users,); zero for a user who likes all or none.

    Source: Rendle et al. 2009, "BPR", eq. 4.
    """
    pairs = ((liked & real)[:, :, None] & (~liked & real)[:, None, :]).float()
    difference = scores[:, :, None] - scores[:, None, :]
    total = (functional.softplus(-sharpness * difference) * pairs).sum((1, 2))
    return total / pairs.sum((1, 2)).clamp(min=1)
