"""AdaLoRA's budget of ranks: after every step the least important singular values of a joint LoRA become 0.

PEFT counts the importance and draws the line; this module hands it the gradients of metarec's outer loop, and keeps
what it has counted with the checkpoint.

Source: Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", algorithm 1 and eq. 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What PEFT counts of every number: its smoothed sensitivity, and how much that varies.
_COUNTED = {"sensitivity": "exp_avg_ipt", "uncertainty": "exp_avg_unc"}


@dataclass(frozen=True)
class RankAllocation:
    """The budget of ranks of a model in training; see `metarec.meta.outer_loop.AfterStep`.

    Args:
        wrapped: The PEFT model with an AdaLoRA.
        parameters: Its trained parameters by name.
        prefix: What the outer loop puts before a parameter's name.
    """

    wrapped: Any
    parameters: Mapping[str, torch.nn.Parameter]
    prefix: str

    def __call__(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Counts what a step's gradients say, and sets singular values that are over the budget to 0, in place.

        Args:
            tensors: The outer loop's tensors by name, after the optimizer's step, with their gradients.
            step: How many steps have been taken.
        """
        for name, parameter in self.parameters.items():
            parameter.data = tensors[self.prefix + name]
            parameter.grad = tensors[self.prefix + name].grad
        self.wrapped.base_model.update_and_allocate(step)
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Returns what has been counted, and which ranks are left, as tensors by name."""
        counted = self.wrapped.base_model.rankallocator
        found = {
            f"{kind}/{name}": value
            for kind, attribute in _COUNTED.items()
            for name, value in getattr(counted, attribute).items()
        }
        left = {name: torch.tensor(kept) for name, kept in (self._settings.rank_pattern or {}).items()}
        return {**found, **{f"left/{name}": kept for name, kept in left.items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Inverts `state`."""
        counted = self.wrapped.base_model.rankallocator
        counted.reset_ipt()
        left: dict[str, list[bool]] = {}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == "left":
                left[name] = value.tolist()
            else:
                getattr(counted, _COUNTED[kind])[name] = value
                counted.ipt[name] = torch.zeros_like(value)
        self._settings.rank_pattern = left or None

    @property
    def _settings(self) -> Any:
        return self.wrapped.peft_config["default"]


def distance_from_orthogonal(parameters: Mapping[str, Tensor]) -> Tensor:
    """Returns how far the singular vectors of an AdaLoRA are from orthogonal: the mean Frobenius norm, a scalar.

    Args:
        parameters: The trained parameters by name.
    """
    grams = [value @ value.T for name, value in parameters.items() if ".lora_A." in name]
    grams += [value.T @ value for name, value in parameters.items() if ".lora_B." in name]
    return torch.stack([torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]).mean()
