"""The transformer block: a pure function of frozen weights, activations and per-user adapters.

One block serves all families; what differs between them is data: which norms there are and where, how attention scales
and caps, how far it looks back, whether the MLP has a gate. `metarec.lm.layouts` fills it in.

Activations are (users, items, tokens, hidden). Keys and values that do not depend on the user come from outside, so
that the caller can compute them once. Every operation has a second derivative.

Source of rotary positions: Su et al. 2021, "RoFormer", eq. 34.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import reduce
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from metarec.lm.adapter_kinds import Adapters
from metarec.lm.adapters import adapted_linear
from metarec.lm.rounded import RoundedWeight

AnyPart = TypeVar("AnyPart")
# Cosines and sines of rotary positions, each broadcastable to (rows, heads, tokens, rotated width).
Rope = tuple[Tensor, Tensor]
# What a block knows of where tokens stand: rotary positions; an addition to the attention logits, shape
# (rows, heads, tokens, tokens); or nothing.
Places = Rope | Tensor | None


@dataclass(frozen=True)
class Linear:
    """A frozen linear layer, or some outputs of one that computes several things at once.

    Attributes:
        name: Its module path.
        weight: Shape (out, in); rounded weights are made long where they are multiplied.
        bias: Shape (out,), or None.
        whole: The layer whose outputs these are some of; None where they are all.
        rows: Which outputs of the whole layer they are.
    """

    name: str
    weight: Tensor | RoundedWeight
    bias: Tensor | None
    whole: Linear | None = None
    rows: slice | Tensor | None = None

    def part(self, rows: slice | Tensor) -> Linear:
        """Returns some of the layer's outputs."""
        return Linear(self.name, self.weight[rows], None if self.bias is None else self.bias[rows], self, rows)

    def to(self, dtype: torch.dtype) -> Linear:
        """Returns the layer in another precision."""
        bias = None if self.bias is None else self.bias.to(dtype)
        whole = None if self.whole is None else self.whole.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias, whole=whole)


@dataclass(frozen=True)
class Norm:
    """RMSNorm (Zhang and Sennrich 2019, eq. 4), or LayerNorm (Ba et al. 2016, eq. 4) where it is centred.

    Attributes:
        weight: Shape (width,).
        bias: Shape (width,), or None.
        eps: Added to the mean square.
        centred: Whether the mean is subtracted first.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool = False

    def __call__(self, hidden: Tensor) -> Tensor:
        """Normalizes over the last dimension."""
        weight = self.weight.to(hidden.dtype)
        if not self.centred:
            return weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps))
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return functional.layer_norm(hidden, hidden.shape[-1:], weight, bias, eps=self.eps)


@dataclass(frozen=True)
class Norms:
    """Where attention or the MLP is normalized: what it reads, what it adds, and the sum with what was there."""

    before: Norm | None = None
    after: Norm | None = None
    total: Norm | None = None


@dataclass(frozen=True)
class Attention:
    """Attention's frozen weights and rules.

    Attributes:
        q: Queries.
        k: Keys.
        v: Values.
        out: Output projection.
        head_dim: Width of a head.
        scale: Factor on the attention logits.
        q_norm: Norm of queries, over each head or over all heads together, as its width says; None without one.
        k_norm: The same for keys.
        cap: Attention logits x become ``cap tanh(x / cap)``; None leaves them.
        window: A token sees those fewer than so many positions away; None for all.
    """

    q: Linear
    k: Linear
    v: Linear
    out: Linear
    head_dim: int
    scale: float
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    cap: float | None = None
    window: int | None = None

    def heads(self, inputs: Tensor, linear: Linear, norm: Norm | None, adapters: Adapters | None) -> Tensor:
        """Projects tokens and splits the heads, shape (users x items, heads, tokens, head)."""
        projected = project(inputs, linear, adapters)
        if norm is not None and norm.weight.shape[0] == projected.shape[-1]:
            return split_heads(norm(projected), self.head_dim)
        split = split_heads(projected, self.head_dim)
        return split if norm is None else norm(split)


@dataclass(frozen=True)
class Mlp:
    """The MLP's frozen weights: ``down(activation(up(x)))``, or ``down(activation(gate(x)) up(x))`` with a gate."""

    gate: Linear | None
    up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]

    def __call__(self, inputs: Tensor, adapters: Adapters | None) -> Tensor:
        """Runs the MLP."""
        raised = project(inputs, self.up, adapters)
        if self.gate is None:
            return project(self.activation(raised), self.down, adapters)
        return project(self.activation(project(inputs, self.gate, adapters)) * raised, self.down, adapters)


class KeyValues(NamedTuple):
    """Attention keys and values of tokens that lie before (or beside) the active ones.

    Attributes:
        keys: Shape (rows, kv heads, tokens, head); rows is users x items, or 1 where all rows share them.
        values: Same shape.
        mask: True where a token may be attended to, shape (rows or 1, queries or 1, tokens); None allows all.
        bias: Added to the attention logits, shape (rows or 1, heads, queries, tokens); None adds nothing.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    bias: Tensor | None = None


@dataclass(frozen=True)
class TransformerBlock:
    """Attention and an MLP, each added to what was there; see `metarec.lm.families.Block`.

    Attributes:
        path: Module path.
        attention: See `Attention`.
        mlp: See `Mlp`.
        attention_norms: Where attention is normalized.
        mlp_norms: Where the MLP is normalized.
        parallel: Whether the MLP reads what attention reads, instead of what it returns.
    """

    path: str
    attention: Attention
    mlp: Mlp
    attention_norms: Norms
    mlp_norms: Norms
    parallel: bool = False

    @property
    def head_dim(self) -> int:
        """See `Block.head_dim`."""
        return self.attention.head_dim

    @property
    def kv_heads(self) -> int:
        """See `Block.kv_heads`."""
        return self.attention.k.weight.shape[0] // self.attention.head_dim

    @property
    def window(self) -> int | None:
        """See `Block.window`."""
        return self.attention.window

    def key_values(self, hidden: Tensor, places: Places, adapters: Adapters | None = None) -> tuple[Tensor, Tensor]:
        """See `Block.key_values`."""
        part, inputs = self.attention, _normed(hidden, self.attention_norms.before)
        keys = part.heads(inputs, part.k, part.k_norm, adapters)
        return rotate(keys, places), part.heads(inputs, part.v, None, adapters)

    def __call__(
        self,
        hidden: Tensor,
        places: Places,
        past: Sequence[KeyValues],
        mask: Tensor | None,
        adapters: Adapters | None = None,
        own: tuple[Tensor, Tensor] | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """See `Block.__call__`."""
        part = self.attention
        keys, values = own or self.key_values(hidden, places, adapters)
        front = virtual_tokens(adapters, self.path, hidden.shape[1], part.head_dim)
        if only is not None:
            places = pick(places, only) if isinstance(places, Tensor) else places and _pick_rope(places, only)
            mask = None if mask is None else pick(mask, only)
            past = [_seen_by(source, only) for source in past]
            hidden = pick(hidden.flatten(0, 1), only).view(*hidden.shape[:2], only.shape[1], hidden.shape[-1])
        inputs = _normed(hidden, self.attention_norms.before)
        query = rotate(part.heads(inputs, part.q, part.q_norm, adapters), places)
        bias = places if isinstance(places, Tensor) else None
        attended = attend(query, [*front, *past, KeyValues(keys, values, mask, bias)], part.scale, part.cap)
        update = project(attended.view(*hidden.shape[:-1], attended.shape[-1]), part.out, adapters)
        between = _add(hidden, update, self.attention_norms)
        inputs = _normed(hidden if self.parallel else between, self.mlp_norms.before)
        return _add(between, self.mlp(inputs, adapters), self.mlp_norms)

    def to(self, dtype: torch.dtype) -> TransformerBlock:
        """See `Block.to`."""
        return cast_linears(self, dtype)


def _normed(hidden: Tensor, norm: Norm | None) -> Tensor:
    return hidden if norm is None else norm(hidden)


def _add(hidden: Tensor, update: Tensor, norms: Norms) -> Tensor:
    return _normed(hidden + _normed(update, norms.after), norms.total)


def _seen_by(source: KeyValues, only: Tensor) -> KeyValues:
    if source.mask is None or source.mask.shape[1] == 1:
        return source
    return source._replace(mask=pick(source.mask, only))


def _pick_rope(rope: Rope, only: Tensor) -> Rope:
    return pick(rope[0], only), pick(rope[1], only)


def cast_linears(part: AnyPart, dtype: torch.dtype) -> AnyPart:
    """Returns a dataclass whose matrix products run in another precision; norms keep theirs."""
    found = {field.name: getattr(part, field.name) for field in fields(part)}  # type: ignore[arg-type]
    cast: dict[str, Any] = {name: value.to(dtype) for name, value in found.items() if isinstance(value, Linear)}
    inner = {name: value for name, value in found.items() if is_dataclass(value) and name not in cast}
    return replace(part, **cast, **{name: cast_linears(value, dtype) for name, value in inner.items()})  # type: ignore[type-var]


def attend(query: Tensor, sources: Sequence[KeyValues], scale: float, cap: float | None = None) -> Tensor:
    """Dot-product attention over several sources of keys as if they were one.

    Args:
        query: Shape (rows, heads, queries, head); heads is a multiple of the key heads.
        sources: Keys and values; sources with a single row serve every row without being copied.
        scale: See `Attention.scale`.
        cap: See `Attention.cap`.

    Returns:
        Shape (rows, queries, heads x head).
    """
    rows, heads, queries, width = query.shape
    groups = sources[0].keys.shape[1]
    grouped = query.reshape(rows, groups, heads // groups * queries, width) * scale
    logits = []
    for source in sources:
        scores = _matmul_rows(grouped, source.keys.transpose(-1, -2))
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        if source.bias is not None:
            scores = (scores.view(rows, heads, queries, -1) + source.bias).view(scores.shape)
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


def within(mask: Tensor | None, window: int | None, queries: Tensor, keys: Tensor) -> Tensor | None:
    """Hides from every query what lies as far away as the attention window is wide, or farther.

    Args:
        mask: See `KeyValues.mask`.
        window: See `Attention.window`.
        queries: Positions of the tokens that attend, shape (rows or 1, queries).
        keys: Positions of the tokens that are attended to, shape (rows or 1, tokens).
    """
    if window is None:
        return mask
    near = (queries[:, :, None] - keys[:, None, :]).abs() < window
    return near if mask is None else mask & near


def rotate(states: Tensor, places: Places) -> Tensor:
    """Applies rotary positions, where there are any, to queries or keys (rows, heads, tokens, head)."""
    if not isinstance(places, tuple):
        return states
    cos, sin = places
    # Some families rotate only the first numbers of every head.
    rotated, rest = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, -1)
    rotated = rotated * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((rotated, rest), -1) if rest.shape[-1] else rotated


def split_heads(projected: Tensor, head_dim: int) -> Tensor:
    """Turns (users, items, tokens, width) into (users x items, heads, tokens, head)."""
    users, items, tokens, width = projected.shape
    return projected.reshape(users * items, tokens, width // head_dim, head_dim).transpose(1, 2)


def project(inputs: Tensor, linear: Linear, adapters: Adapters | None) -> Tensor:
    """Applies a frozen linear layer plus every user's own update."""
    if linear.whole is not None and adapters is not None and linear.name in adapters.spec.shapes:
        # An adapter belongs to the whole layer.
        return project(inputs, linear.whole, adapters)[..., linear.rows]
    weight = linear.weight.to(inputs.dtype) if isinstance(linear.weight, RoundedWeight) else linear.weight
    return adapted_linear(inputs, weight, linear.bias, adapters, linear.name)
