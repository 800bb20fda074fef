"""The inner loop: a few gradient steps per user from the initialization, for all users at once.

A loss maps a state with a leading user dimension to one number per user, so the gradient of their sum holds each
user's own gradient and no loop over users is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metarec.system.tensors import AdapterState, expand_users

# Tensors of the initialization that only the support loss reads are called so: they shape the inner loop, and their
# gradient comes through its steps.
INNER = "inner."
Loss = Callable[[AdapterState], Tensor]
Solve = Callable[[AdapterState], AdapterState]


@dataclass(frozen=True)
class MetaState:
    """The meta-parameters, which the outer loop learns.

    Args:
        init: The initialization, without a user dimension.
        log_rate: Natural logarithm of the inner learning rate of each tensor that the inner loop adapts. The first
            dimension is the step, of size one where all steps share a rate; the rest is empty (one rate per tensor)
            or the tensor's own shape (one rate per number, as in Meta-SGD). Tensors of `init` without a rate are
            shared by all users and learned by the outer loop alone; those whose names begin with `INNER` are settings
            of the inner loop, which are learned through its steps as the rates are.
    """

    init: AdapterState
    log_rate: AdapterState

    def rate(self, name: str, step: int) -> Tensor:
        """Returns the inner rate of a tensor at a step; steps beyond the learned ones use the last."""
        rates = self.log_rate[name]
        return rates[min(step, len(rates) - 1)].exp()

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


def initial_meta_state(
    init: AdapterState, adapted: Iterable[str], inner_lr: float, *, steps: int = 1, elementwise: bool = False
) -> MetaState:
    """Returns meta-parameters in which the tensors named `adapted` start with the same inner rate.

    Args:
        init: The initialization.
        adapted: Names of the tensors that the inner loop adapts.
        inner_lr: The rate.
        steps: Learn a rate for each of so many steps; 1 shares one.
        elementwise: Learn a rate for every number instead of one per tensor.

    Raises:
        ValueError: `inner_lr` is not positive.
    """
    if not inner_lr > 0:
        raise ValueError(f"inner_lr is {inner_lr}; the learned rate starts from a positive one")
    rates = {}
    for name in adapted:
        shape = init[name].shape if elementwise else ()
        rates[name] = init[name].new_full((steps, *shape), math.log(inner_lr))
    return MetaState(init, rates)


@dataclass(frozen=True)
class Adapted:
    """The result of an inner loop.

    Args:
        state: Every user's adapted tensors, with a user dimension.
        losses: Support loss before each step, shape (steps, users).
        diverged: True for users with a non-finite loss or gradient, who keep the initialization, shape (users,).
        path: The adapted tensors and the support gradients before each step; empty unless `keep_path` is set.
    """

    state: AdapterState
    losses: Tensor
    diverged: Tensor
    path: tuple[tuple[AdapterState, AdapterState], ...]


def adapt(
    meta: MetaState,
    support_loss: Loss,
    users: int,
    steps: int,
    *,
    rate_scale: float = 1.0,
    prox_strength: float = 0.0,
    keep_path: bool = False,
    first: Loss | None = None,
) -> Adapted:
    """Takes `steps` gradient steps per user from the initialization.

    Args:
        meta: Initialization and inner rates.
        support_loss: Loss on the users' support sets, one number per user.
        users: Number of users in `support_loss`.
        steps: Gradient steps; 0 returns the initialization.
        rate_scale: Multiplies every inner rate; 0 returns the initialization exactly.
        prox_strength: Strength of a proximal term ``prox_strength / 2 * |state - init|^2`` (iMAML).
        keep_path: Keeps the tensors and gradients of every step, for an outer gradient.
        first: A cheaper loss for the first step, of the same value and gradient at the initialization.

    Returns:
        The adapted states, the support losses and which users diverged; none of them has an autograd graph.

    Source: Finn, Abbeel and Levine 2017, "Model-Agnostic Meta-Learning", eq. 1; learned rates per tensor after
    Antoniou et al. 2019, "How to train your MAML", section 4.
    """
    start = {name: value.detach() for name, value in expand_users(meta.init, users).items()}
    shared = {name: value for name, value in start.items() if name not in meta.log_rate}
    current = {name: start[name] for name in meta.log_rate}
    path: list[tuple[AdapterState, AdapterState]] = []
    diverged = torch.zeros(users, dtype=torch.bool, device=next(iter(start.values())).device)
    losses: list[Tensor] = []
    for step in range(steps):
        objective = first if step == 0 and first is not None else support_loss
        loss, gradients = _support_gradient(objective, current, shared)
        diverged = diverged | ~loss.isfinite() | ~finite_users(gradients)
        losses.append(loss)
        if keep_path:
            path.append((current, gradients))
        if diverged.any():
            gradients = {name: gradient.nan_to_num(0.0, 0.0, 0.0) for name, gradient in gradients.items()}
        moved = {}
        for name, gradient in gradients.items():
            total = gradient + prox_strength * (current[name] - start[name]) if prox_strength else gradient
            moved[name] = current[name] - rate_scale * meta.rate(name, step).detach() * total
        current = moved
    if steps:
        diverged = diverged | ~finite_users(current)
    if diverged.any():
        current = {name: torch.where(per_user(diverged, value), start[name], value) for name, value in current.items()}
    none = torch.zeros(0, users, device=diverged.device)
    return Adapted(shared | current, torch.stack(losses) if losses else none, diverged, tuple(path))


def _support_gradient(loss: Loss, adapted: AdapterState, shared: AdapterState) -> tuple[Tensor, AdapterState]:
    """Returns every user's loss, and its gradient by the adapted tensors."""
    leaves = {name: value.detach().requires_grad_() for name, value in adapted.items()}
    with torch.enable_grad():
        value = loss({**shared, **leaves})
        gradients = torch.autograd.grad(value.sum(), list(leaves.values()))
    return value.detach(), dict(zip(leaves, gradients, strict=True))


def finite_users(state: Mapping[str, Tensor]) -> Tensor:
    """Says which users' tensors are all finite, shape (users,); a norm beyond the type's range is not finite."""
    norms = [torch.linalg.vector_norm(value.reshape(len(value), -1), dim=1) for value in state.values()]
    return torch.stack(norms).isfinite().all(0)


def per_user(flags: Tensor, like: Tensor) -> Tensor:
    """Returns one flag per user with as many dimensions as a tensor, for masking it."""
    return flags.view(-1, *[1] * (like.ndim - 1))
