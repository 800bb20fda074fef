"""Decoders of the Llama family: RMSNorm, rotary positions, grouped-query attention, gated MLP.

Source: Touvron et al. 2023, "LLaMA".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarec.lm.adapter_kinds import Adapters
from metarec.lm.blocks import (
    ACTIVATIONS,
    KeyValues,
    Linear,
    attend,
    cast_linears,
    frozen_linear,
    pick,
    project,
    rms_norm,
    rotate,
    split_heads,
    virtual_tokens,
)
from metarec.lm.families import Rope

# Model types whose block is exactly `LlamaBlock`: no norm on queries or keys, no residual multiplier.
_MODEL_TYPES = {"llama", "mistral", "qwen2"}


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

    def key_values(self, hidden: Tensor, rope: Rope | None, adapters: Adapters | None = None) -> tuple[Tensor, Tensor]:
        """See `Block.key_values`."""
        assert rope is not None
        normed = rms_norm(hidden, self.input_norm, self.eps)
        keys = split_heads(project(normed, self.k, adapters), self.head_dim)
        values = split_heads(project(normed, self.v, adapters), self.head_dim)
        return rotate(keys, rope), values

    def __call__(
        self,
        hidden: Tensor,
        rope: Rope | None,
        past: Sequence[KeyValues],
        mask: Tensor | None,
        adapters: Adapters | None = None,
        own: tuple[Tensor, Tensor] | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """See `Block.__call__`."""
        assert rope is not None
        keys, values = own or self.key_values(hidden, rope, adapters)
        front = virtual_tokens(adapters, self.path, hidden.shape[1], self.head_dim)
        if only is not None:
            rope = (pick(rope[0], only), pick(rope[1], only))
            mask = None if mask is None else pick(mask, only)
            hidden = pick(hidden.flatten(0, 1), only).view(*hidden.shape[:2], only.shape[1], hidden.shape[-1])
        query = split_heads(project(rms_norm(hidden, self.input_norm, self.eps), self.q, adapters), self.head_dim)
        attended = attend(rotate(query, rope), [*front, *past, KeyValues(keys, values, mask)])
        hidden = hidden + project(attended.view(*hidden.shape[:-1], attended.shape[-1]), self.o, adapters)
        normed = rms_norm(hidden, self.post_norm, self.eps)
        gated = self.activation(project(normed, self.gate, adapters)) * project(normed, self.up, adapters)
        return hidden + project(gated, self.down, adapters)

    def to(self, dtype: torch.dtype) -> LlamaBlock:
        """See `Block.to`."""
        return cast_linears(self, dtype)


@dataclass(frozen=True)
class LlamaWeights:
    """A Llama-like decoder taken apart; see `BlockModel`.

    Args:
        embeddings: Shape (vocabulary, hidden).
        blocks: From bottom to top.
        final_norm: Weight of the last RMSNorm, shape (hidden,).
        eps: The last RMSNorm's epsilon.
        rotary: Positions (tokens,) to their cosines and sines.
        window: See `BlockModel.window`.
    """

    embeddings: Tensor
    blocks: tuple[LlamaBlock, ...]
    final_norm: Tensor
    eps: float
    rotary: Callable[[Tensor], Rope]
    window: int | None

    @property
    def causal(self) -> bool:
        """See `BlockModel.causal`."""
        return True

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        """See `BlockModel.embed`."""
        return self.embeddings[tokens]

    def rope(self, positions: Tensor) -> Rope:
        """See `BlockModel.rope`."""
        return self.rotary(positions)

    def final(self, hidden: Tensor) -> Tensor:
        """See `BlockModel.final`."""
        return rms_norm(hidden, self.final_norm, self.eps)


class Llama:
    """Llama, Mistral and Qwen2."""

    def take_apart(self, model: Any, kind: str) -> LlamaWeights | None:
        """See `BackboneFamily.take_apart`."""
        known = model.config.model_type in _MODEL_TYPES and model.config.hidden_act in ACTIVATIONS
        return llama_weights(model) if known and kind == "causal" else None


def llama_weights(model: Any) -> LlamaWeights | None:
    """Takes a causal LM with Llama's module names apart, or returns None where its layers have other parts."""
    known = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
    if any({name for name, _ in layer.named_children()} != known for layer in model.model.layers):
        return None

    def rotary(positions: Tensor) -> Rope:
        # The angles come in the type of the first argument; bfloat16 would blur them.
        precise = torch.promote_types(model.dtype, torch.float32)
        like = model.model.embed_tokens.weight.new_zeros(1, dtype=precise)
        cos, sin = model.model.rotary_emb(like, positions[None])
        return cos[0], sin[0]

    return LlamaWeights(
        embeddings=model.model.embed_tokens.weight.detach(),
        blocks=tuple(_block(model, index) for index in range(len(model.model.layers))),
        final_norm=model.model.norm.weight.detach(),
        eps=model.config.rms_norm_eps,
        rotary=rotary,
        window=getattr(model.config, "sliding_window", None),
    )


def _block(model: Any, index: int) -> LlamaBlock:
    config, layer, path = model.config, model.model.layers[index], f"model.layers.{index}"
    attention = {name: frozen_linear(model, f"{path}.self_attn.{name}_proj") for name in ("q", "k", "v", "o")}
    mlp = {name: frozen_linear(model, f"{path}.mlp.{name}_proj") for name in ("gate", "up", "down")}
    return LlamaBlock(
        path=path,
        input_norm=layer.input_layernorm.weight.detach(),
        post_norm=layer.post_attention_layernorm.weight.detach(),
        **attention,
        **mlp,
        kv_heads=config.num_key_value_heads,
        head_dim=layer.self_attn.head_dim,
        eps=config.rms_norm_eps,
        activation=ACTIVATIONS[config.hidden_act],
    )


LLAMA = Llama()
