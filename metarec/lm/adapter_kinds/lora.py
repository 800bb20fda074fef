"""Low-rank updates of linear layers: ``<module>.lora_A`` (users, rank, in), ``<module>.lora_B`` (users, out, rank).

Sources: Hu et al. 2021, "LoRA", eq. 3, and Kalajdzievski 2023, "rsLoRA", eq. 5, for the scaling; the product batched
over users is the one of Punica (Chen et al. 2023) in plain matmuls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metarec.lm.adapter_kinds import AdapterKind, AdapterSpec, BlockShape, Placement
from metarec.system.tensors import AdapterState

LORA_A = ".lora_A"
LORA_B = ".lora_B"
PEFT_PREFIX = "base_model.model."


class Lora(AdapterKind):
    """Low-rank updates of linear layers."""

    inner_rate = 0.3

    def scaling(self, spec: AdapterSpec) -> float:
        """Returns the factor on ``B A x``."""
        return spec.alpha / (math.sqrt(spec.rank) if spec.rslora else spec.rank)

    def tensor_shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        """See `AdapterKind.tensor_shapes`."""
        found: dict[str, tuple[int, ...]] = {}
        for name, (rows, columns) in spec.shapes.items():
            found |= {name + LORA_A: (spec.rank, columns), name + LORA_B: (rows, spec.rank)}
        return found

    def fresh(self, spec: AdapterSpec, generator: torch.Generator, dtype: torch.dtype) -> AdapterState:
        """Returns A uniform within 1/sqrt(in), and B zero: it changes nothing."""
        return {
            name: torch.zeros(shape, dtype=dtype) if name.endswith(LORA_B) else uniform(shape, generator, dtype)
            for name, shape in self.tensor_shapes(spec).items()
        }

    def update(
        self, spec: AdapterSpec, state: Mapping[str, Tensor], name: str, inputs: Tensor, output: Tensor
    ) -> Tensor:
        """See `AdapterKind.update`."""
        a, b = state[name + LORA_A], state[name + LORA_B]
        flat = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
        # Scaling the narrow product instead of the wide one saves a pass over the output.
        update = (self.scaling(spec) * (flat @ a.transpose(1, 2))) @ b.transpose(1, 2)
        return update.view(*inputs.shape[:-1], b.shape[1])

    def spec(self, blocks: Sequence[BlockShape], placement: Placement) -> AdapterSpec:
        """See `AdapterKind.spec`."""
        plain = super().spec(blocks, placement)
        return replace(plain, rank=placement.rank, alpha=placement.alpha, rslora=placement.rslora)

    def peft_config(self, spec: AdapterSpec) -> dict[str, Any]:
        """See `AdapterKind.peft_config`."""
        return lora_config(spec, bias=False)

    def to_peft(self, spec: AdapterSpec, state: AdapterState) -> AdapterState:
        """See `AdapterKind.to_peft`."""
        return {f"{PEFT_PREFIX}{name}.weight": tensor.contiguous() for name, tensor in state.items()}

    def from_peft(self, spec: AdapterSpec, weights: AdapterState) -> AdapterState:
        """See `AdapterKind.from_peft`."""
        return {name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor for name, tensor in weights.items()}


def lora_config(spec: AdapterSpec, *, bias: bool) -> dict[str, Any]:
    """Returns PEFT's configuration of low-rank updates, with biases beside them or without."""
    return {
        "peft_type": "LORA",
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.rslora,
        "lora_bias": bias,
        "target_modules": sorted(spec.shapes),
        "bias": "none",
        "lora_dropout": 0.0,
    }


def uniform(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Returns numbers drawn uniformly within 1/sqrt(last dimension)."""
    return (2 * torch.rand(shape, generator=generator, dtype=dtype) - 1) / math.sqrt(shape[-1])


LORA = Lora()
