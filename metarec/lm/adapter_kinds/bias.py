"""Biases of linear layers: ``<module>.bias_delta`` (users, out), added to the layer's output.

Source: Ben Zaken et al. 2022, "BitFit".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from metarec.lm.adapter_kinds import AdapterKind, AdapterSpec
from metarec.lm.adapter_kinds.lora import LORA_A, LORA_B, PEFT_PREFIX, lora_config
from metarec.system.tensors import AdapterState

BIAS_DELTA = ".bias_delta"


class Bias(AdapterKind):
    """Biases of linear layers.

    PEFT knows a bias only beside a low-rank update, so files carry an empty update of rank one.
    """

    inner_rate = 3.0

    def tensor_shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        """See `AdapterKind.tensor_shapes`."""
        return {name + BIAS_DELTA: (rows,) for name, (rows, _) in spec.shapes.items()}

    def fresh(self, spec: AdapterSpec, generator: torch.Generator, dtype: torch.dtype) -> AdapterState:
        """Returns zeros: they change nothing."""
        return {name: torch.zeros(shape, dtype=dtype) for name, shape in self.tensor_shapes(spec).items()}

    def update(
        self, spec: AdapterSpec, state: Mapping[str, Tensor], name: str, inputs: Tensor, output: Tensor
    ) -> Tensor:
        """See `AdapterKind.update`."""
        delta = state[name + BIAS_DELTA]
        return delta.view(delta.shape[0], *[1] * (inputs.ndim - 2), delta.shape[1])

    def targets(self, asked: tuple[str, ...] | None, linears: Iterable[str]) -> tuple[str, ...]:
        """Returns the names asked for, or all linear layers."""
        return tuple(sorted(set(linears))) if asked is None else asked

    def peft_config(self, spec: AdapterSpec) -> dict[str, Any]:
        """See `AdapterKind.peft_config`."""
        return lora_config(spec, bias=True)

    def to_peft(self, spec: AdapterSpec, state: AdapterState) -> AdapterState:
        """See `AdapterKind.to_peft`."""
        weights: AdapterState = {}
        for name, (rows, columns) in spec.shapes.items():
            delta = state[name + BIAS_DELTA]
            weights[f"{PEFT_PREFIX}{name}{LORA_A}.weight"] = delta.new_zeros(spec.rank, columns)
            weights[f"{PEFT_PREFIX}{name}{LORA_B}.weight"] = delta.new_zeros(rows, spec.rank)
            weights[f"{PEFT_PREFIX}{name}{LORA_B}.bias"] = delta.contiguous()
        return weights

    def from_peft(self, spec: AdapterSpec, weights: AdapterState) -> AdapterState:
        """See `AdapterKind.from_peft`."""
        return {name + BIAS_DELTA: weights[f"{PEFT_PREFIX}{name}{LORA_B}.bias"] for name in spec.shapes}


BIAS = Bias()
