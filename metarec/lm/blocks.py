"""Parts of transformer blocks, as pure functions of frozen weights, activations and per-user adapters.

Activations are (users, items, tokens, hidden). Keys and values that do not depend on the user come from outside, so
that the caller can compute them once. Every operation has a second derivative. `metarec.lm.families` puts the parts
together.

Source of rotary positions: Su et al. 2021, "RoFormer", eq. 34.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from metarec.lm.adapter_kinds import Adapters
from metarec.lm.adapters import adapted_linear

AnyBlock = TypeVar("AnyBlock")
# Activation names of transformers configs.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
    "gelu_new": lambda inputs: functional.gelu(inputs, approximate="tanh"),
    "gelu_pytorch_tanh": lambda inputs: functional.gelu(inputs, approximate="tanh"),
}


@dataclass(frozen=True)
class Linear:
    """A frozen linear layer: its module path, weight (out, in) and bias (out,) or None."""

    name: str
    weight: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> Linear:
        """Returns the layer in another precision."""
        return Linear(self.name, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class KeyValues(NamedTuple):
    """Attention keys and values of tokens that lie before (or beside) the active ones.

    Attributes:
        keys: Shape (rows, kv heads, tokens, head); rows is users x items, or 1 where all rows share them.
        values: Same shape.
        mask: True where a token may be attended to, shape (rows, queries or 1, tokens); None allows all.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None


def cast_linears(block: AnyBlock, dtype: torch.dtype) -> AnyBlock:
    """Returns a block (a dataclass) whose matrix products run in another precision; norms keep theirs."""
    parts = {field.name: getattr(block, field.name) for field in fields(block)}  # type: ignore[arg-type]
    cast: dict[str, Any] = {name: part.to(dtype) for name, part in parts.items() if isinstance(part, Linear)}
    return replace(block, **cast)  # type: ignore[type-var]


def frozen_linear(model: Any, path: str) -> Linear:
    """Returns a linear layer of a transformers model, found by its module path."""
    linear = model.get_submodule(path)
    return Linear(path, linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def attend(query: Tensor, sources: Sequence[KeyValues]) -> Tensor:
    """Scaled dot-product attention over several sources of keys as if they were one.

    Args:
        query: Shape (rows, heads, queries, head); heads is a multiple of the key heads.
        sources: Keys and values; sources with a single row serve every row without being copied.

    Returns:
        Shape (rows, queries, heads x head).
    """
    rows, heads, queries, width = query.shape
    groups = sources[0].keys.shape[1]
    grouped = query.reshape(rows, groups, heads // groups * queries, width) * width**-0.5
    logits = []
    for source in sources:
        scores = _matmul_rows(grouped, source.keys.transpose(-1, -2))
        if source.mask is not None:
            split = scores.view(rows, groups, heads // groups, queries, scores.shape[-1])
            hidden = ~source.mask[:, None, None]
            scores = split.masked_fill(hidden, torch.finfo(scores.dtype).min).view(scores.shape)
        logits.append(scores)
    if len(sources) == 1:
        mixed = _matmul_rows(logits[0].softmax(-1), sources[0].values)
    else:
        weights = torch.cat(logits, -1).softmax(-1).split([source.keys.shape[2] for source in sources], -1)
        parts = [_matmul_rows(weight, source.values) for weight, source in zip(weights, sources, strict=True)]
        mixed = reduce(torch.add, parts)
    return mixed.reshape(rows, heads, queries, width).transpose(1, 2).reshape(rows, queries, heads * width)


def pick(tokens: Tensor, only: Tensor) -> Tensor:
    """Picks some of every row's tokens.

    Args:
        tokens: Shape (rows or 1, ..., tokens, width), with at most one dimension of size one between.
        only: Positions, shape (rows, kept).

    Returns:
        Shape (rows, ..., kept, width).
    """
    places = only.view(only.shape[0], *[1] * (tokens.ndim - 3), only.shape[1], 1)
    return tokens.expand(only.shape[0], *tokens.shape[1:]).take_along_dim(places, -2)


def virtual_tokens(adapters: Adapters | None, path: str, items: int, head_dim: int) -> list[KeyValues]:
    """Returns every user's own virtual tokens of a block as attention sees them, once per row; none for most kinds."""
    if adapters is None or path not in adapters.spec.shapes:
        return []
    found = adapters.spec.implementation.virtual_tokens(adapters.state, path)
    if found is None:
        return []
    keys, values = (split_heads(part[:, None].expand(-1, items, -1, -1), head_dim) for part in found)
    return [KeyValues(keys, values, None)]


def _matmul_rows(left: Tensor, right: Tensor) -> Tensor:
    """Multiplies (rows, groups, n, k) by (rows or 1, groups, k, m) without copying a shared right side."""
    if right.shape[0] == left.shape[0]:
        return left @ right
    rows, groups, n, k = left.shape
    product = left.transpose(0, 1).reshape(groups, rows * n, k) @ right[0]
    return product.view(groups, rows, n, right.shape[-1]).transpose(0, 1)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalization over the last dimension (Zhang and Sennrich 2019, eq. 4)."""
    return weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps))


def rotate(states: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Applies rotary positions to queries or keys, shape (rows, heads, tokens, head)."""
    cos, sin = rope
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat((-second, first), -1) * sin


def split_heads(projected: Tensor, head_dim: int) -> Tensor:
    """Turns (users, items, tokens, width) into (users x items, heads, tokens, head)."""
    users, items, tokens, width = projected.shape
    return projected.reshape(users * items, tokens, width // head_dim, head_dim).transpose(1, 2)


def project(inputs: Tensor, linear: Linear, adapters: Adapters | None) -> Tensor:
    """Applies a frozen linear layer plus every user's own update."""
    return adapted_linear(inputs, linear.weight, linear.bias, adapters, linear.name)
