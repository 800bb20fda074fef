"""Bottlenecks behind attention and behind the MLP: a narrow layer, GELU, and back, added to what the layer returns.

Tensors: ``<module>.down`` (users, rank, out), ``.down_bias`` (users, rank), ``.up`` (users, out, rank), ``.up_bias``
(users, out).

Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1. PEFT has no such kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from metarec.lm.adapter_kinds import AdapterKind, AdapterSpec, BlockShape, Placement
from metarec.lm.adapter_kinds.lora import uniform
from metarec.system.tensors import AdapterState

_DOWN, _DOWN_BIAS, _UP, _UP_BIAS = ".down", ".down_bias", ".up", ".up_bias"
# The last layers of attention and of the MLP, as architectures call them, by names that a block then has.
_LAST_LAYERS = (
    ({"o_proj", "down_proj"}, ("o_proj", "down_proj")),
    ({"out_proj", "fc2"}, ("out_proj", "fc2")),
    ({"out_lin", "lin2"}, ("out_lin", "lin2")),
    ({"dense", "dense_4h_to_h"}, ("attention.dense", "dense_4h_to_h")),
    ({"query", "dense"}, ("output.dense",)),
    ({"q", "o", "dense"}, ("o", "output.dense")),
    ({"c_attn", "c_proj"}, ("c_proj",)),
    ({"Wqkv", "Wo"}, ("Wo",)),
)


class Bottleneck(AdapterKind):
    """A two-layer network behind a linear layer, added to its output."""

    inner_rate = 0.3

    def tensor_shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        """See `AdapterKind.tensor_shapes`."""
        found: dict[str, tuple[int, ...]] = {}
        for name, (rows, _) in spec.shapes.items():
            found |= {
                name + _DOWN: (spec.rank, rows),
                name + _DOWN_BIAS: (spec.rank,),
                name + _UP: (rows, spec.rank),
                name + _UP_BIAS: (rows,),
            }
        return found

    def fresh(self, spec: AdapterSpec, generator: torch.Generator, dtype: torch.dtype) -> AdapterState:
        """Returns narrow layers uniform within 1/sqrt(out), and zeros elsewhere: they change nothing."""
        return {
            name: uniform(shape, generator, dtype) if name.endswith(_DOWN) else torch.zeros(shape, dtype=dtype)
            for name, shape in self.tensor_shapes(spec).items()
        }

    def update(
        self, spec: AdapterSpec, state: Mapping[str, Tensor], name: str, inputs: Tensor, output: Tensor
    ) -> Tensor:
        """See `AdapterKind.update`."""
        flat = output.reshape(output.shape[0], -1, output.shape[-1])
        narrow = functional.gelu(flat @ state[name + _DOWN].transpose(1, 2) + state[name + _DOWN_BIAS][:, None])
        update = narrow @ state[name + _UP].transpose(1, 2) + state[name + _UP_BIAS][:, None]
        return update.view(output.shape)

    def targets(self, asked: tuple[str, ...] | None, linears: Iterable[str]) -> tuple[str, ...] | None:
        """Returns the names asked for, or the last layers of attention and of the MLP."""
        names = set(linears)
        if asked is not None:
            return asked
        return next((last for known, last in _LAST_LAYERS if names >= known), None)

    def spec(self, blocks: Sequence[BlockShape], placement: Placement) -> AdapterSpec:
        """See `AdapterKind.spec`."""
        return replace(super().spec(blocks, placement), rank=placement.rank, peft_facts={})


BOTTLENECK = Bottleneck()
