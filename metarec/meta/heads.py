"""Heads that fit a user in closed form, by one small linear system or two means per user.

A head is a vector whose product with an item's features is added to the item's score. Both are differentiable and
batched over users.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metarec.threads import one_thread


@dataclass(frozen=True)
class Support:
    """The support sets that heads are fitted to.

    Args:
        features: Support items, shape (users, items, features).
        residual: Ratings minus score and user bias, shape (users, items).
        liked: Which items were liked, shape (users, items).
        real: False at padding, shape (users, items).
    """

    features: Tensor
    residual: Tensor
    liked: Tensor
    real: Tensor


@dataclass(frozen=True)
class ClosedFormHead:
    """A head that is fitted instead of taking gradient steps; the outer loop learns its one parameter.

    Args:
        parameter: Name of that parameter, kept as a logarithm.
        start: Initial value of the logarithm.
        fit: Maps a support and the parameter, shape (users,), to heads, shape (users, features).
    """

    parameter: str
    start: float
    fit: Callable[[Support, Tensor], Tensor]


@one_thread()
def ridge_head(features: Tensor, targets: Tensor, real: Tensor, penalty: Tensor) -> Tensor:
    """Fits a ridge regression of a few targets on many features, by a linear system of the number of ratings.

    Args:
        features: Support items, shape (users, items, features).
        targets: Numbers to predict, shape (users, items).
        real: False at padding, shape (users, items).
        penalty: L2 penalty, positive, shape (users,).

    Returns:
        Shape (users, features); zero for a user without ratings.

    Source: Bertinetto et al. 2019, "Meta-learning with differentiable closed-form solvers", eq. 6 (R2-D2).
    """
    kept = features * real.unsqueeze(-1)
    identity = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    gram = kept @ kept.transpose(1, 2) + penalty[:, None, None] * identity
    weights: Tensor = torch.linalg.solve(gram, (targets * real).unsqueeze(-1))
    return (kept.transpose(1, 2) @ weights).squeeze(-1)


def prototype_head(features: Tensor, liked: Tensor, real: Tensor, scale: Tensor) -> Tensor:
    """Returns the difference of the mean features of liked and disliked items, times a scale.

    A prototype classifier with squared Euclidean distances is linear; its constant, which changes no order, is left
    out.

    Args:
        features: Support items, shape (users, items, features).
        liked: Which items were liked, shape (users, items).
        real: False at padding, shape (users, items).
        scale: Factor on the difference, shape (users,).

    Returns:
        Shape (users, features); zero for a user whose support has one class only.

    Source: Snell et al. 2017, "Prototypical Networks", eq. 1 and 8.
    """
    classes = torch.stack([liked & real, ~liked & real], 1).to(features.dtype)
    counts = classes.sum(2, keepdim=True)
    means = classes @ features / counts.clamp(min=1)
    both = (counts > 0).all(1)
    return 2 * scale[:, None] * (means[:, 0] - means[:, 1]) * both


RIDGE = ClosedFormHead(
    "log_penalty", 0.0, lambda support, penalty: ridge_head(support.features, support.residual, support.real, penalty)
)
PROTOTYPES = ClosedFormHead(
    "log_scale", -1.0, lambda support, scale: prototype_head(support.features, support.liked, support.real, scale)
)
