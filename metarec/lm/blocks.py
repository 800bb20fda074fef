"""Transformer blocks as pure functions of frozen weights, activations and per-user adapters.

Two families: decoder blocks of the Llama kind (RMSNorm, rotary positions, grouped-query attention, gated MLP) and
encoder blocks of the BERT kind (post-norm, bidirectional). Activations are (users, items, tokens, hidden); keys and
values that do not depend on the user come from outside, so that the caller can compute them once.

Knows nothing of tokenizers, files or the transformers package; every operation has a second derivative.
Sources: Touvron et al. 2023 (Llama), Devlin et al. 2019 (BERT), Su et al. 2021 (RoPE, eq. 34).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from metarec.lm.adapters import PREFIX_KEYS, PREFIX_VALUES, adapted_linear


@dataclass(frozen=True)
class Linear:
    """A frozen linear layer: its module path, weight (out, in) and bias (out,) or None."""

    name: str
    weight: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> Linear:
        """Returns the layer in another precision."""
        return Linear(self.name, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


@dataclass(frozen=True)
class Adapters:
    """Every user's adapters as a block sees them: the state with a user dimension, and low-rank updates' factor."""

    state: Mapping[str, Tensor]
    scaling: float


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


@dataclass(frozen=True)
class LlamaBlock:
    """One decoder block: attention and gated MLP, each behind an RMSNorm; `path` is its module path."""

    path: str
    input_norm: Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    post_norm: Tensor
    gate: Linear
    up: Linear
    down: Linear
    kv_heads: int
    head_dim: int
    eps: float
    activation: Callable[[Tensor], Tensor]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The layers that can carry an adapter."""
        return (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)

    def key_values(
        self, hidden: Tensor, rope: tuple[Tensor, Tensor], adapters: Adapters | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns rotated keys and values of the tokens in `hidden`, each (users x items, kv heads, tokens, head)."""
        normed = rms_norm(hidden, self.input_norm, self.eps)
        keys = _heads(_project(normed, self.k, adapters), self.head_dim)
        values = _heads(_project(normed, self.v, adapters), self.head_dim)
        return rotate(keys, rope), values

    def __call__(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        past: Sequence[KeyValues],
        mask: Tensor | None,
        adapters: Adapters | None = None,
        own: tuple[Tensor, Tensor] | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """Runs the block over the active tokens.

        Args:
            hidden: Active tokens, shape (users, items, tokens, hidden).
            rope: Cosines and sines at the active tokens' positions, each broadcastable to
                (users x items, 1, tokens, head).
            past: Keys and values of the tokens that are not active; every user's own prefix comes before them.
            mask: Which active token sees which, shape (1 or rows, tokens, tokens); None allows all.
            adapters: Every user's adapters, or None for the frozen block.
            own: The active tokens' keys and values where the caller already has them.
            only: Positions of the tokens that attend and pass the MLP, shape (rows, kept); None for all.

        Returns:
            Active tokens after the block, shape (users, items, tokens or kept, hidden).
        """
        keys, values = own or self.key_values(hidden, rope, adapters)
        virtual = _virtual_tokens(adapters, self.path, hidden.shape[1], self.head_dim)
        if only is not None:
            rope = (pick(rope[0], only), pick(rope[1], only))
            mask = None if mask is None else pick(mask, only)
            hidden = pick(hidden.flatten(0, 1), only).view(*hidden.shape[:2], only.shape[1], hidden.shape[-1])
        query = _heads(_project(rms_norm(hidden, self.input_norm, self.eps), self.q, adapters), self.head_dim)
        attended = attend(rotate(query, rope), [*virtual, *past, KeyValues(keys, values, mask)])
        hidden = hidden + _project(attended.view(*hidden.shape[:-1], attended.shape[-1]), self.o, adapters)
        normed = rms_norm(hidden, self.post_norm, self.eps)
        gated = self.activation(_project(normed, self.gate, adapters)) * _project(normed, self.up, adapters)
        return hidden + _project(gated, self.down, adapters)


@dataclass(frozen=True)
class BertBlock:
    """One encoder block: attention and MLP, each followed by a LayerNorm over the residual sum."""

    q: Linear
    k: Linear
    v: Linear
    attention_out: Linear
    attention_norm: tuple[Tensor, Tensor]
    up: Linear
    down: Linear
    output_norm: tuple[Tensor, Tensor]
    head_dim: int
    eps: float
    activation: Callable[[Tensor], Tensor]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The layers that can carry an adapter."""
        return (self.q, self.k, self.v, self.attention_out, self.up, self.down)

    def __call__(
        self, hidden: Tensor, mask: Tensor, adapters: Adapters | None = None, only: Tensor | None = None
    ) -> Tensor:
        """Runs the block.

        Args:
            hidden: All tokens, shape (users, items, tokens, hidden).
            mask: Which token sees which, shape (users x items, tokens or 1, tokens).
            adapters: Every user's adapters, or None for the frozen block.
            only: Positions of the tokens that attend and pass the MLP, shape (rows, kept); None for all.

        Returns:
            Tokens after the block, shape (users, items, tokens or kept, hidden).
        """
        keys, values = (_heads(_project(hidden, linear, adapters), self.head_dim) for linear in (self.k, self.v))
        if only is not None:
            mask = pick(mask, only)
            hidden = pick(hidden.flatten(0, 1), only).view(*hidden.shape[:2], only.shape[1], hidden.shape[-1])
        query = _heads(_project(hidden, self.q, adapters), self.head_dim)
        attended = attend(query, [KeyValues(keys, values, mask)]).view(hidden.shape)
        hidden = self._norm(hidden + _project(attended, self.attention_out, adapters), self.attention_norm)
        raised = self.activation(_project(hidden, self.up, adapters))
        return self._norm(hidden + _project(raised, self.down, adapters), self.output_norm)

    def _norm(self, hidden: Tensor, parameters: tuple[Tensor, Tensor]) -> Tensor:
        weight, bias = (parameter.to(hidden.dtype) for parameter in parameters)
        return functional.layer_norm(hidden, hidden.shape[-1:], weight, bias, eps=self.eps)


def cast_block(block: LlamaBlock | BertBlock, dtype: torch.dtype) -> LlamaBlock | BertBlock:
    """Returns a block whose matrix products run in another precision; norms keep theirs."""
    parts = {field.name: getattr(block, field.name) for field in fields(block)}
    cast: dict[str, Any] = {name: part.to(dtype) for name, part in parts.items() if isinstance(part, Linear)}
    return replace(block, **cast)


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


def _virtual_tokens(adapters: Adapters | None, path: str, items: int, head_dim: int) -> list[KeyValues]:
    """Returns every user's own prefix of a block as attention sees it, once per row."""
    if adapters is None or path + PREFIX_KEYS not in adapters.state:
        return []
    prefix = (adapters.state[path + part] for part in (PREFIX_KEYS, PREFIX_VALUES))
    keys, values = (_heads(part[:, None].expand(-1, items, -1, -1), head_dim) for part in prefix)
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


def _heads(projected: Tensor, head_dim: int) -> Tensor:
    users, items, tokens, width = projected.shape
    return projected.reshape(users * items, tokens, width // head_dim, head_dim).transpose(1, 2)


def _project(inputs: Tensor, linear: Linear, adapters: Adapters | None) -> Tensor:
    state, scaling = (None, 0.0) if adapters is None else (adapters.state, adapters.scaling)
    return adapted_linear(inputs, linear.weight, linear.bias, state, linear.name, scaling)
