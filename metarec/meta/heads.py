"""Heads that fit a user in closed form: ridge regression, prototypes, or the posterior of a learned prior.

A head is a vector whose product with an item's features is added to the item's score. Both are differentiable and
batched over users.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metarec.config import Start
from metarec.registries import ALGORITHMS
from metarec.system.tensors import AdapterState
from metarec.system.threads import one_thread


@dataclass(frozen=True)
class Support:
    """The support sets that heads are fitted to.

    Args:
        features: Support items, shape (users, items, features).
        error: Ratings minus score, shape (users, items).
        residual: Ratings minus score and user bias, shape (users, items).
        liked: Which items were liked, shape (users, items).
        real: False at padding, shape (users, items).
    """

    features: Tensor
    error: Tensor
    residual: Tensor
    liked: Tensor
    real: Tensor

    @classmethod
    def empty(cls, users: int, features: int, like: Tensor) -> Support:
        """Returns supports without ratings, of the type and device of a tensor."""
        none = like.new_zeros(users, 0)
        flags = none.bool()
        return cls(like.new_zeros(users, 0, features), none, none, flags, flags)


@dataclass(frozen=True)
class WeightPrior:
    """A normal distribution of users' weights on an item's features; the last weight is the user's bias.

    Args:
        mean: Shape (features + 1,).
        root: Its product with its transpose is the covariance, shape (features + 1, directions).
        noise: Variance of a rating.
    """

    mean: Tensor
    root: Tensor
    noise: float


@dataclass(frozen=True)
class ClosedFormHead:
    """A head that is fitted instead of taking gradient steps; the outer loop learns its parameters.

    Args:
        start: Returns the parameters before training, by name, from a prior of users' weights; None where `has_prior`
            is False.
        fit: Maps a support and the parameters, with a leading user dimension, to heads, shape (users, features).
        has_prior: Whether it starts at a prior of users' weights that was fitted on meta-training users.
    """

    start: Callable[[WeightPrior | None], AdapterState]
    fit: Callable[[Support, Mapping[str, Tensor]], Tensor]
    has_prior: bool = False


@one_thread(scipy=False)
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


@one_thread(scipy=False)
def posterior_head(features: Tensor, errors: Tensor, real: Tensor, prior: Mapping[str, Tensor]) -> Tensor:
    """Returns the posterior mean of each user's weights, by a linear system of the number of ratings.

    Args:
        features: Support items, shape (users, items, features).
        errors: Ratings minus score, shape (users, items).
        real: False at padding, shape (users, items).
        prior: The parameters of `DKT`, with a user dimension.

    Returns:
        Shape (users, features), without the bias; the prior's mean for a user without ratings.

    Source: Harrison et al. 2018, "Meta-learning priors for efficient online Bayesian regression" (ALPaCA), eq. 6, in
    the form of Patacchiola et al. 2020, "Bayesian meta-learning for the few-shot setting via deep kernels", eq. 6.
    """
    mean, root = _scaled(prior, features)
    loadings, rest, covariance = _conditions(features, errors, real, prior)
    dual = torch.linalg.solve(covariance, rest.unsqueeze(-1))
    weights: Tensor = mean + (root @ (loadings.mT @ dual)).squeeze(-1)
    return weights[:, :-1]


@one_thread(scipy=False)
def leave_one_out_errors(features: Tensor, errors: Tensor, real: Tensor, prior: Mapping[str, Tensor]) -> Tensor:
    """Returns each rating minus what the posterior given the user's other ratings expects, shape (users, items).

    Args:
        features: See `posterior_head`.
        errors: See `posterior_head`.
        real: See `posterior_head`.
        prior: See `posterior_head`.

    Source: Rasmussen and Williams 2006, eq. 5.12.
    """
    _, rest, covariance = _conditions(features, errors, real, prior)
    inverse = torch.linalg.inv(covariance)
    found: Tensor = (inverse @ rest.unsqueeze(-1)).squeeze(-1) / inverse.diagonal(dim1=1, dim2=2) * real
    return found


def _conditions(
    features: Tensor, errors: Tensor, real: Tensor, prior: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the ratings' loadings, what they differ from the prior's mean by, and their covariance."""
    mean, root = _scaled(prior, features)
    biased = torch.cat([features, torch.ones_like(features[..., :1])], -1) * real.unsqueeze(-1)
    loadings = biased @ root
    rest = (errors - (biased @ mean.unsqueeze(-1)).squeeze(-1)) * real
    identity = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    return loadings, rest, loadings @ loadings.mT + prior["log_noise"].exp()[:, None, None] * identity


def _scaled(prior: Mapping[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and root of users' weights, which the parameters are `_unit` times."""
    unit = _unit(features.shape[-1])
    return prior["mean"] / unit, prior["root"] / unit


def _unit(features: int) -> float:
    """Features have length one, so that weights are this much larger where a feature's own size is one.

    Parameters of such a size are what the outer loop's rate is meant for.
    """
    return math.sqrt(features)


def posterior_parameters(prior: WeightPrior) -> AdapterState:
    """Returns the parameters of `posterior_head` for a prior of users' weights."""
    unit = _unit(len(prior.mean) - 1)
    noise = prior.mean.new_tensor(math.log(prior.noise))
    return {"mean": prior.mean * unit, "root": prior.root * unit, "log_noise": noise}


RIDGE = ClosedFormHead(
    lambda _: {"log_penalty": torch.tensor(0.0)},
    lambda support, learned: ridge_head(support.features, support.residual, support.real, learned["log_penalty"].exp()),
)
PROTOTYPES = ClosedFormHead(
    lambda _: {"log_scale": torch.tensor(-1.0)},
    lambda support, learned: prototype_head(support.features, support.liked, support.real, learned["log_scale"].exp()),
)


def _dkt_start(prior: WeightPrior | None) -> AdapterState:
    assert prior is not None
    return posterior_parameters(prior)


DKT = ClosedFormHead(
    _dkt_start,
    lambda support, learned: posterior_head(support.features, support.error, support.real, learned),
    has_prior=True,
)


def takes_steps(algorithm: str, *, from_file: bool = False) -> bool:
    """Says whether users of a meta-algorithm, by name, take gradient steps; see `metarec.registry.Registry.get`."""
    return not isinstance(ALGORITHMS.get(algorithm, from_file=from_file), ClosedFormHead)


def closed_form_head(algorithm: str, start: Start, *, from_file: bool = False) -> ClosedFormHead | None:
    """Returns the head that users have under a meta-algorithm, by name; None where they have none.

    Args:
        algorithm: A name in `ALGORITHMS`; a head's own name wins.
        start: Where gradient steps start.
        from_file: See `metarec.registry.Registry.get`.
    """
    found = ALGORITHMS.get(algorithm, from_file=from_file)
    if isinstance(found, ClosedFormHead):
        return found
    return DKT if start == "posterior" else None
