"""Losses whose adapted parameters are known, and derivatives by central differences to hold gradients against."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from metarec.meta.inner_loop import Loss, MetaState, initial_meta_state
from metarec.system.tensors import AdapterState

USERS = 3
TARGETS = torch.tensor([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]], dtype=torch.float64)
QUERIES = TARGETS + 0.3
RATES = {"tensor": {}, "step": {"steps": 3}, "number": {"elementwise": True}}


def quadratic(targets: Tensor) -> Loss:
    """Half the squared distance of ``w`` to each user's target, scaled by the user's ``c``."""

    def loss(state: AdapterState) -> Tensor:
        return 0.5 * state["c"].square() * (state["w"] - targets).square().sum(1)

    return loss


def meta_state(rate: float = 0.1) -> MetaState:
    init = {
        "w": torch.tensor([0.2, -0.1], dtype=torch.float64),
        "c": torch.tensor(1.5, dtype=torch.float64),
    }
    return initial_meta_state(init, ["w"], rate)


def bent(targets: Tensor) -> Loss:
    """A loss with curvature of its own everywhere, in which adapted and shared tensors meet."""

    def loss(state: AdapterState) -> Tensor:
        distance = state["w"] - targets
        return (state["c"][:, None] * distance).tanh().square().sum(1) + 0.1 * distance.pow(4).sum(1)

    return loss


def numeric_gradients(
    meta: MetaState, value: Callable[[MetaState], Tensor], names: Iterable[str], step: float = 1e-6
) -> AdapterState:
    """Central differences of a scalar function of the meta-parameters."""
    found = {}
    for name in names:
        tensor = meta.tensors()[name]
        flat = torch.zeros(tensor.numel(), dtype=tensor.dtype)
        for place in range(tensor.numel()):
            ends = []
            for sign in (1, -1):
                moved = meta.tensors()
                shifted = tensor.clone().view(-1)
                shifted[place] += sign * step
                moved[name] = shifted.view(tensor.shape)
                ends.append(value(MetaState.from_tensors(moved)))
            flat[place] = (ends[0] - ends[1]) / (2 * step)
        found[name] = flat.view(tensor.shape)
    return found
