"""A soft prompt: learned vectors in front of the prompt's embeddings, ``soft_prompt`` (users, tokens, hidden).

What every block holds of the vectors depends on them alone, since no token sees those after it: the frozen blocks run
over them once per user, and attention then sees their keys and values as it sees a prefix.

Source: Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metarec.errors import ConfigError
from metarec.lm.adapter_kinds import Adapters, AdapterSpec, BlockShape, Placement
from metarec.lm.adapter_kinds.lora import uniform
from metarec.lm.adapter_kinds.prefix import Prefix
from metarec.system.tensors import AdapterState

_NAME = "soft_prompt"
_KEYS, _VALUES = ".soft_keys", ".soft_values"


class SoftPrompt(Prefix):
    """Vectors in front of the prompt's embeddings; every block carries what it makes of them."""

    inner_rate = 3.0

    def tensor_shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        """See `AdapterKind.tensor_shapes`."""
        return {_NAME: next(iter(spec.shapes.values()))}

    def fresh(self, spec: AdapterSpec, generator: torch.Generator, dtype: torch.dtype) -> AdapterState:
        """Returns numbers uniform within 1/sqrt(hidden); no soft prompt changes nothing."""
        return {_NAME: uniform(self.tensor_shapes(spec)[_NAME], generator, dtype)}

    def prepared(self, adapters: Adapters, model: Any) -> Adapters:
        """Returns the adapters with every block's keys and values of the vectors; see `AdapterKind.prepared`."""
        hidden = adapters.state[_NAME][:, None]
        tokens = hidden.shape[2]
        positions = torch.arange(tokens, device=hidden.device)[None]
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).tril()[None]
        found: AdapterState = {}
        for path, block, places in zip(adapters.spec.shapes, model.blocks, model.places(positions), strict=True):
            own = block.key_values(hidden, places)
            for name, part in zip((_KEYS, _VALUES), own, strict=True):
                found[path + name] = part.transpose(1, 2).flatten(2)
            hidden = block(hidden, places, (), seen, own=own)
        return Adapters({**adapters.state, **found}, adapters.spec)

    def virtual_tokens(self, state: Mapping[str, Tensor], path: str) -> tuple[Tensor, Tensor]:
        """See `AdapterKind.virtual_tokens`."""
        return state[path + _KEYS], state[path + _VALUES]

    def check(self, model: str, blocks: Sequence[BlockShape], placement: Placement) -> None:
        """See `AdapterKind.check`."""
        if any(block.key_width is None for block in blocks):
            raise ConfigError(
                f"adapter.kind is 'soft-prompt', but '{model}' is not a causal LM with positions in attention alone",
                "Choose lora or bias",
            )
        super().check(model, blocks, placement)
        if not blocks[0].path.endswith(".0"):
            raise ConfigError(
                f"adapter.layers is {placement.layers}, and a soft prompt goes through all blocks of '{model}'",
                "Set adapter.layers to the number of its blocks",
            )
        if placement.active_tokens is not None:
            raise ConfigError(
                f"adapter.active_tokens is {placement.active_tokens}, and all tokens see a soft prompt",
                "Set adapter.active_tokens=null",
            )

    def spec(self, blocks: Sequence[BlockShape], placement: Placement) -> AdapterSpec:
        """See `AdapterKind.spec`."""
        shapes = {block.path: (placement.virtual_tokens, block.hidden or 0) for block in blocks}
        return replace(super().spec(blocks, placement), shapes=shapes)

    def peft_config(self, spec: AdapterSpec) -> dict[str, Any]:
        """See `AdapterKind.peft_config`."""
        tokens, width = self.tensor_shapes(spec)[_NAME]
        layers = len(spec.shapes)
        return {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": tokens, "token_dim": width, "num_layers": layers}

    def to_peft(self, spec: AdapterSpec, state: AdapterState) -> AdapterState:
        """See `AdapterKind.to_peft`."""
        return {"prompt_embeddings": state[_NAME].contiguous()}

    def from_peft(self, spec: AdapterSpec, weights: AdapterState) -> AdapterState:
        """See `AdapterKind.from_peft`."""
        return {_NAME: weights["prompt_embeddings"]}


SOFT_PROMPT = SoftPrompt()
