"""Frozen weights of 8 or 4 bits: 8 with a scale by row, 4 with a scale by group of a row.

Weights alone are rounded; products are computed in the type of what a layer reads. On a processor that saves memory and
no time, since every product first makes its weights long again.

Source: Dettmers et al. 2022, "LLM.int8()", for weights by rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Bits = Literal[8, 4]
# So many weights of a row share a scale where they have 4 bits.
_GROUP = 32


@dataclass(frozen=True)
class RoundedWeight:
    """A matrix of rounded weights, which is made long where it is multiplied.

    Args:
        codes: Integers, shape (out, groups, weights of a group), or half as many of 4 bits.
        scales: One per group, shape (out, groups, 1).
        columns: Weights of a row.
        bits: How many bits a weight takes.
    """

    codes: Tensor
    scales: Tensor
    columns: int
    bits: Bits

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, as a tensor of the weights has them."""
        return len(self.codes), self.columns

    @property
    def device(self) -> torch.device:
        """Where the integers are."""
        return self.codes.device

    def __getitem__(self, rows: slice | Tensor) -> RoundedWeight:
        """Returns some of the rows."""
        return RoundedWeight(self.codes[rows], self.scales[rows], self.columns, self.bits)

    def to(self, dtype: torch.dtype) -> Tensor:
        """Returns the weights as numbers again, shape (out, in)."""
        codes = self.codes
        if self.bits == 4:
            unsigned = codes.to(torch.int16) & 0xFF
            codes = torch.stack([(unsigned & 15) - 8, (unsigned >> 4) - 8], -1).flatten(-2)
        return (codes.float() * self.scales.float()).flatten(1)[:, : self.columns].to(dtype)


class RoundedLinear(torch.nn.Linear):
    """A frozen linear layer of rounded weights.

    Args:
        layer: The layer that is rounded.
        bits: How many bits a weight takes.
    """

    def __init__(self, layer: torch.nn.Linear, bits: Bits) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        self.register_buffer("codes", torch.empty(0))
        self.register_buffer("scales", torch.empty(0))
        self.bias = layer.bias
        group = layer.in_features if bits == 8 else _GROUP
        rows = functional.pad(layer.weight.detach().float(), (0, -layer.in_features % group))
        parts = rows.view(layer.out_features, -1, group)
        largest = 2 ** (bits - 1) - 1
        self.scales = (parts.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float16).tiny).half()
        codes = (parts / self.scales.float()).round().clamp(-largest, largest).to(torch.int8)
        self.codes = codes if bits == 8 else (codes[..., ::2] + 8) | ((codes[..., 1::2] + 8) << 4)

    @property
    def rounded(self) -> RoundedWeight:
        """The weights as they are kept."""
        return RoundedWeight(self.codes, self.scales, self.in_features, self.bits)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights as numbers again, float32, shape (out, in)."""
        return self.rounded.to(torch.float32)

    def forward(self, inputs: Tensor) -> Tensor:
        """Applies the layer."""
        return functional.linear(inputs, self.rounded.to(inputs.dtype), self.bias)
