"""Adapters batched over users.

A state is a plain dict of tensors whose leading dimension is the user. Three kinds of adapter exist:

- ``lora``: ``<module>.lora_A`` (users, rank, in) and ``<module>.lora_B`` (users, out, rank);
- ``bias``: ``<module>.bias_delta`` (users, out), added to the layer's output;
- ``prefix``: ``<block>.prefix_keys`` and ``<block>.prefix_values`` (users, tokens, width), which attention sees in
  front of the prompt.

Names under ``score.`` are the score's, not the language model's.

Sources: Hu et al. 2021, "LoRA", eq. 3, and Kalajdzievski 2023, "rsLoRA", eq. 5, for the scaling; Ben Zaken et al.
2022, "BitFit", for biases; Li and Liang 2021, "Prefix-Tuning", eq. 3; the batched product is the one of Punica (Chen et
al. 2023) in plain matmuls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from metarec.tensors import AdapterState

AdapterKind = Literal["lora", "bias", "prefix"]
LORA_A = ".lora_A"
LORA_B = ".lora_B"
BIAS = ".bias_delta"
PREFIX_KEYS = ".prefix_keys"
PREFIX_VALUES = ".prefix_values"


@dataclass(frozen=True)
class AdapterSpec:
    """Which adapters there are and of what size.

    Args:
        shapes: For ``lora`` and ``bias``, module path to (out features, in features); for ``prefix``, block path to
            (virtual tokens, width of keys).
        kind: What is learned.
        rank: Inner dimension of every low-rank update.
        alpha: A low-rank update is scaled by ``alpha / rank``.
        rslora: Scales by ``alpha / sqrt(rank)`` instead, so that higher ranks learn as fast.
    """

    shapes: Mapping[str, tuple[int, int]]
    kind: AdapterKind = "lora"
    rank: int = 1
    alpha: float = 1.0
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor on ``B A x``."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of one user's adapter."""
        found: dict[str, tuple[int, ...]] = {}
        for name, (rows, columns) in self.shapes.items():
            if self.kind == "lora":
                found |= {name + LORA_A: (self.rank, columns), name + LORA_B: (rows, self.rank)}
            elif self.kind == "bias":
                found[name + BIAS] = (rows,)
            else:
                found |= {name + PREFIX_KEYS: (rows, columns), name + PREFIX_VALUES: (rows, columns)}
        return found


def init_adapter(spec: AdapterSpec, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> AdapterState:
    """Returns a fresh adapter without a user dimension.

    LoRA's A is uniform within 1/sqrt(in) and its B zero, biases are zero: neither changes anything. A prefix has no
    such beginning, for attention spends weight on whatever it sees; it is uniform within 1/sqrt(width).

    Args:
        spec: Kind, shapes and rank.
        generator: Source of randomness.
        dtype: Type of the tensors.
    """
    state: AdapterState = {}
    for name, shape in spec.tensor_shapes.items():
        if name.endswith((LORA_B, BIAS)):
            state[name] = torch.zeros(shape, dtype=dtype)
        else:
            state[name] = (2 * torch.rand(shape, generator=generator, dtype=dtype) - 1) / math.sqrt(shape[-1])
    return state


def round_adapter(state: Mapping[str, Tensor], names: Iterable[str], dtype: torch.dtype) -> AdapterState:
    """Rounds tensors to the type they are stored in, so that what is scored now is what will be read back.

    A number beyond the type's range becomes its largest one.

    Args:
        state: Any state.
        names: The tensors to round; the others stay as they are.
        dtype: The type on disk.
    """
    largest = torch.finfo(dtype).max
    rounded = {name: state[name].clamp(-largest, largest).to(dtype).to(state[name].dtype) for name in names}
    return {**state, **rounded}


def adapted_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Mapping[str, Tensor] | None, name: str, scaling: float
) -> Tensor:
    """Applies a frozen linear layer plus every user's own update, without a loop over users.

    Args:
        inputs: Activations, shape (users, ..., in).
        weight: Frozen weight, shape (out, in); may be of lower precision than `inputs`.
        bias: Frozen bias, shape (out,), or None.
        state: Adapters with a user dimension; None, or a state without `name`, applies the frozen layer alone.
        name: Module path of the layer.
        scaling: The factor on a low-rank update.

    Returns:
        Activations, shape (users, ..., out), in the type of `inputs`.
    """
    frozen = functional.linear(inputs.to(weight.dtype), weight, bias).to(inputs.dtype)
    update = None if state is None else user_update(inputs, state, name, scaling)
    return frozen if update is None else frozen + update


def user_update(inputs: Tensor, state: Mapping[str, Tensor], name: str, scaling: float) -> Tensor | None:
    """Returns what the users' adapters add to a layer's output, or None where they say nothing of the layer.

    Args:
        inputs: Activations, shape (users, ..., in).
        state: Adapters with a user dimension.
        name: Module path of the layer.
        scaling: The factor on a low-rank update.

    Returns:
        Broadcastable to (users, ..., out).
    """
    if name + BIAS in state:
        delta = state[name + BIAS]
        return delta.view(delta.shape[0], *[1] * (inputs.ndim - 2), delta.shape[1])
    if name + LORA_A not in state:
        return None
    a, b = state[name + LORA_A], state[name + LORA_B]
    flat = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
    # Scaling the narrow product instead of the wide one saves a pass over the output.
    return ((scaling * (flat @ a.transpose(1, 2))) @ b.transpose(1, 2)).view(*inputs.shape[:-1], b.shape[1])
