"""Encoders of the BERT family: learned positions, attention in both directions, LayerNorm after every residual sum.

Source: Devlin et al. 2019, "BERT".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
    split_heads,
)
from metarec.lm.families import Rope


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
    def kv_heads(self) -> int:
        """See `Block.kv_heads`."""
        return self.k.weight.shape[0] // self.head_dim

    def key_values(self, hidden: Tensor, rope: Rope | None, adapters: Adapters | None = None) -> tuple[Tensor, Tensor]:
        """See `Block.key_values`."""
        keys, values = (project(hidden, linear, adapters) for linear in (self.k, self.v))
        return split_heads(keys, self.head_dim), split_heads(values, self.head_dim)

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
        keys, values = own or self.key_values(hidden, rope, adapters)
        if only is not None:
            mask = None if mask is None else pick(mask, only)
            hidden = pick(hidden.flatten(0, 1), only).view(*hidden.shape[:2], only.shape[1], hidden.shape[-1])
        query = split_heads(project(hidden, self.q, adapters), self.head_dim)
        attended = attend(query, [*past, KeyValues(keys, values, mask)]).view(hidden.shape)
        hidden = self._norm(hidden + project(attended, self.attention_out, adapters), self.attention_norm)
        raised = self.activation(project(hidden, self.up, adapters))
        return self._norm(hidden + project(raised, self.down, adapters), self.output_norm)

    def _norm(self, hidden: Tensor, parameters: tuple[Tensor, Tensor]) -> Tensor:
        weight, bias = (parameter.to(hidden.dtype) for parameter in parameters)
        return functional.layer_norm(hidden, hidden.shape[-1:], weight, bias, eps=self.eps)

    def to(self, dtype: torch.dtype) -> BertBlock:
        """See `Block.to`."""
        return cast_linears(self, dtype)


@dataclass(frozen=True)
class BertWeights:
    """A BERT-like encoder taken apart; see `BlockModel`.

    Args:
        embeddings: Tokens (rows, tokens) to the states that enter the lowest block.
        blocks: From bottom to top.
        transform: The last block's state to what the vocabulary head multiplies; None where there is no such head.
    """

    embeddings: Callable[[Tensor], Tensor]
    blocks: tuple[BertBlock, ...]
    transform: Callable[[Tensor], Tensor] | None

    @property
    def causal(self) -> bool:
        """See `BlockModel.causal`."""
        return False

    @property
    def window(self) -> int | None:
        """See `BlockModel.window`."""
        return None

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        """See `BlockModel.embed`."""
        assert start == 0, "an encoder's prompts share no prefix"
        return self.embeddings(tokens)

    def rope(self, positions: Tensor) -> None:
        """See `BlockModel.rope`."""
        return

    def final(self, hidden: Tensor) -> Tensor:
        """See `BlockModel.final`."""
        return hidden if self.transform is None else self.transform(hidden)


class Bert:
    """BERT, as a masked LM or as a sentence encoder."""

    def take_apart(self, model: Any, kind: str) -> BertWeights | None:
        """See `BackboneFamily.take_apart`."""
        if model.config.model_type != "bert" or model.config.hidden_act not in ACTIVATIONS:
            return None
        path = "bert." if hasattr(model, "bert") else ""
        encoder = model.get_submodule(path[:-1]) if path else model
        return BertWeights(
            embeddings=lambda tokens: encoder.embeddings(input_ids=tokens),
            blocks=tuple(
                _block(model, layer, f"{path}encoder.layer.{i}") for i, layer in enumerate(encoder.encoder.layer)
            ),
            transform=(lambda hidden: model.cls.predictions.transform(hidden.to(model.dtype)))
            if kind == "masked"
            else None,
        )


def _block(model: Any, layer: Any, path: str) -> BertBlock:
    attention_norm, output_norm = layer.attention.output.LayerNorm, layer.output.LayerNorm
    return BertBlock(
        q=frozen_linear(model, f"{path}.attention.self.query"),
        k=frozen_linear(model, f"{path}.attention.self.key"),
        v=frozen_linear(model, f"{path}.attention.self.value"),
        attention_out=frozen_linear(model, f"{path}.attention.output.dense"),
        attention_norm=(attention_norm.weight.detach(), attention_norm.bias.detach()),
        up=frozen_linear(model, f"{path}.intermediate.dense"),
        down=frozen_linear(model, f"{path}.output.dense"),
        output_norm=(output_norm.weight.detach(), output_norm.bias.detach()),
        head_dim=model.config.hidden_size // model.config.num_attention_heads,
        eps=model.config.layer_norm_eps,
        activation=ACTIVATIONS[model.config.hidden_act],
    )


BERT = Bert()
