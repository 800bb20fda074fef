"""Meta-learning algorithms as pure functions over an `AdapterState` and a loss.

An inner loop adapts every user's own copy of the initialization to the user's support loss; an outer gradient moves
the initialization and the inner rates. A loss maps a state with a leading user dimension to one number per user, so
the gradient of their sum holds each user's own gradient and no loop over users is needed.

Knows nothing of text, ratings or language models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metarec.lora import AdapterState, expand_users

Loss = Callable[[AdapterState], Tensor]


@dataclass(frozen=True)
class MetaState:
    """The meta-parameters: what the outer loop learns.

    Args:
        init: The initialization, without a user dimension.
        log_rate: Natural logarithm of the inner learning rate of each tensor that the inner loop adapts; tensors
            of `init` without one are shared by all users and learned by the outer loop alone.
    """

    init: AdapterState
    log_rate: AdapterState

    def tensors(self) -> AdapterState:
        """Returns every meta-parameter under a flat name, for optimizers and files."""
        return {f"init/{name}": value for name, value in self.init.items()} | {
            f"log_rate/{name}": value for name, value in self.log_rate.items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> MetaState:
        """Inverts `tensors`."""
        parts: dict[str, AdapterState] = {"init": {}, "log_rate": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = value
        return cls(**parts)


def initial_meta_state(init: AdapterState, adapted: Iterable[str], inner_lr: float) -> MetaState:
    """Returns meta-parameters in which the tensors named `adapted` start with the same inner rate.

    Raises:
        ValueError: `inner_lr` is not positive.
    """
    if not inner_lr > 0:
        raise ValueError(f"inner_lr is {inner_lr}; the learned rate starts from a positive one")
    return MetaState(init, {name: init[name].new_tensor(math.log(inner_lr)) for name in adapted})


@dataclass(frozen=True)
class Adapted:
    """What an inner loop gives back.

    Args:
        state: Every user's adapted tensors, with a user dimension.
        losses: Support loss before each step, shape (steps, users).
        diverged: True for users whose inner loop met a non-finite loss or gradient and who therefore keep the
            initialization, shape (users,).
    """

    state: AdapterState
    losses: Tensor
    diverged: Tensor


def adapt(
    meta: MetaState,
    support_loss: Loss,
    users: int,
    steps: int,
    *,
    rate_scale: float = 1.0,
) -> Adapted:
    """Takes `steps` gradient steps per user from the initialization.

    The support gradients are constants of the result, its dependence on `meta` is not: backpropagating through
    ``state`` gives the first-order meta-gradient, including that of the learned rates.

    Args:
        meta: Initialization and inner rates.
        support_loss: Loss on the users' support sets, one number per user.
        users: How many users `support_loss` is about.
        steps: Gradient steps; 0 returns the initialization.
        rate_scale: Multiplies every inner rate; 0 returns the initialization exactly.

    Returns:
        The adapted states, the support losses and which users diverged.

    Source: Finn, Abbeel and Levine 2017, "Model-Agnostic Meta-Learning", eq. 1; learned rates per tensor after
    Antoniou et al. 2019, "How to train your MAML", section 4.
    """
    start = expand_users(meta.init, users)
    state = dict(start)
    device = next(iter(meta.init.values())).device
    diverged = torch.zeros(users, dtype=torch.bool, device=device)
    losses: list[Tensor] = []
    for _ in range(steps):
        leaves = {name: state[name].detach().requires_grad_() for name in meta.log_rate}
        with torch.enable_grad():
            loss = support_loss({**{name: value.detach() for name, value in state.items()}, **leaves})
            gradients = dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values())), strict=True))
        finite = loss.detach().isfinite()
        for gradient in gradients.values():
            finite = finite & gradient.reshape(users, -1).isfinite().all(1)
        diverged = diverged | ~finite
        losses.append(loss.detach())
        for name, gradient in gradients.items():
            step = rate_scale * meta.log_rate[name].exp() * gradient.nan_to_num(0.0, 0.0, 0.0)
            state[name] = state[name] - step
    if diverged.any():
        state = {name: torch.where(_per_user(diverged, value), start[name], value) for name, value in state.items()}
    return Adapted(state, torch.stack(losses) if losses else torch.zeros(0, users, device=device), diverged)


def _per_user(flags: Tensor, like: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class MetaGradient:
    """One outer step's worth of learning.

    Args:
        loss: Query loss of each user after adapting, shape (users,).
        gradients: Gradient of the mean over users that did not diverge, by flat meta-parameter name.
        diverged: Which users' inner loop diverged; they add nothing to the gradient, shape (users,).
    """

    loss: Tensor
    gradients: AdapterState
    diverged: Tensor


Algorithm = Callable[[MetaState, Loss, Loss, int, int], MetaGradient]


def fomaml(meta: MetaState, support_loss: Loss, query_loss: Loss, users: int, steps: int) -> MetaGradient:
    """First-order MAML with learned inner rates.

    Source: Finn, Abbeel and Levine 2017, section 5.2: the query gradient at the adapted parameters, taken as the
    gradient at the initialization. The rate's gradient is exact up to the same first-order approximation.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in meta.tensors().items()}
    adapted = adapt(MetaState.from_tensors(leaves), support_loss, users, steps)
    loss = query_loss(adapted.state)
    kept = ~adapted.diverged & loss.detach().isfinite()
    total = torch.where(kept, loss, torch.zeros_like(loss)).sum() / kept.sum().clamp(min=1)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return MetaGradient(loss.detach(), _filled(leaves, gradients), ~kept)


def reptile(meta: MetaState, support_loss: Loss, query_loss: Loss, users: int, steps: int) -> MetaGradient:
    """Reptile: the outer gradient is the way from the adapted parameters back to the initialization.

    As in the paper the inner loop sees all of a user's data: support and query loss are averaged. Tensors that the
    inner loop does not adapt, and the inner rates, follow the first-order gradient of the same loss.

    Source: Nichol, Achiam and Schulman 2018, "On First-Order Meta-Learning Algorithms", algorithm 1; the difference
    is divided by the inner rate (their section 3), so that one outer rate serves every tensor.
    """

    def joint(state: AdapterState) -> Tensor:
        return (support_loss(state) + query_loss(state)) / 2

    leaves = {name: value.detach().requires_grad_() for name, value in meta.tensors().items()}
    traced = MetaState.from_tensors(leaves)
    adapted = adapt(traced, joint, users, steps)
    loss = joint(adapted.state)
    kept = ~adapted.diverged & loss.detach().isfinite()
    count = kept.sum().clamp(min=1)
    total = torch.where(kept, loss, torch.zeros_like(loss)).sum() / count
    gradients = _filled(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True))
    for name, log_rate in meta.log_rate.items():
        moved = (meta.init[name] - adapted.state[name].detach()) * _per_user(kept, adapted.state[name])
        gradients[f"init/{name}"] = moved.sum(0) / (count * log_rate.exp() * max(steps, 1))
    return MetaGradient(loss.detach(), gradients, ~kept)


def _filled(leaves: Mapping[str, Tensor], gradients: Iterable[Tensor | None]) -> AdapterState:
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient.detach()
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


ALGORITHMS: dict[str, Algorithm] = {"fomaml": fomaml, "reptile": reptile}
