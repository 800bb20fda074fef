"""Virtual tokens in front of the prompt: ``<block>.prefix_keys`` and ``.prefix_values`` (users, tokens, width).

Source: Li and Liang 2021, "Prefix-Tuning", eq. 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metarec.errors import ConfigError
from metarec.lm.adapter_kinds import AdapterKind, AdapterSpec, BlockShape, Placement
from metarec.lm.adapter_kinds.lora import uniform
from metarec.system.tensors import AdapterState

_KEYS = ".prefix_keys"
_VALUES = ".prefix_values"


class Prefix(AdapterKind):
    """Keys and values that attention sees in front of the prompt, in every block that carries adapters.

    PEFT knows a prefix only in front of all tokens of all blocks; prefixes elsewhere are written in the same form, for
    metarec alone.
    """

    inner_rate = 3.0

    def tensor_shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        """See `AdapterKind.tensor_shapes`."""
        return {name + part: shape for name, shape in spec.shapes.items() for part in (_KEYS, _VALUES)}

    def fresh(self, spec: AdapterSpec, generator: torch.Generator, dtype: torch.dtype) -> AdapterState:
        """Returns numbers uniform within 1/sqrt(width).

        No prefix changes nothing, for attention spends weight on whatever it sees.
        """
        return {name: uniform(shape, generator, dtype) for name, shape in self.tensor_shapes(spec).items()}

    def update(
        self, spec: AdapterSpec, state: Mapping[str, Tensor], name: str, inputs: Tensor, output: Tensor
    ) -> Tensor:
        """Refuses: a prefix changes what attention sees, not what a linear layer returns.

        Raises:
            ConfigError: Always; only `metarec.lm.cached_forward.CachedForward` reads with a prefix.
        """
        raise ConfigError(f"'{name}' reads no prefix when the whole model runs", "Choose lora or bias")

    def virtual_tokens(self, state: Mapping[str, Tensor], path: str) -> tuple[Tensor, Tensor]:
        """See `AdapterKind.virtual_tokens`."""
        return state[path + _KEYS], state[path + _VALUES]

    def targets(self, asked: tuple[str, ...] | None, linears: Iterable[str]) -> tuple[str, ...]:
        """Returns none: a prefix belongs to a block."""
        return ()

    def virtual_length(self, asked: int) -> int:
        """See `AdapterKind.virtual_length`."""
        return asked

    def check(self, model: str, blocks: Sequence[BlockShape], placement: Placement) -> None:
        """See `AdapterKind.check`."""
        if any(block.key_width is None for block in blocks):
            raise ConfigError(
                f"adapter.kind is 'prefix', but '{model}' is not a causal LM that knows positions in attention alone",
                "Choose lora or bias",
            )
        if placement.virtual_tokens < 1:
            raise ConfigError(f"adapter.virtual_tokens is {placement.virtual_tokens}", "Choose 1 or more")

    def spec(self, blocks: Sequence[BlockShape], placement: Placement) -> AdapterSpec:
        """See `AdapterKind.spec`."""
        tokens = placement.virtual_tokens
        shapes = {block.path: (tokens, block.key_width) for block in blocks if block.key_width is not None}
        # PEFT would divide the width by the number of all heads, where several share a key head.
        return AdapterSpec(shapes, placement.kind, peft_facts={"num_attention_heads": blocks[0].kv_heads})

    def peft_config(self, spec: AdapterSpec) -> dict[str, Any]:
        """See `AdapterKind.peft_config`."""
        tokens, width = next(iter(spec.shapes.values()))
        layers = len(spec.shapes)
        return {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": tokens, "token_dim": width, "num_layers": layers}

    def to_peft(self, spec: AdapterSpec, state: AdapterState) -> AdapterState:
        """Returns one row per virtual token: keys and values of the first block, then of the second, and so on."""
        return {"prompt_embeddings": torch.cat([state[name] for name in self.tensor_shapes(spec)], 1)}

    def from_peft(self, spec: AdapterSpec, weights: AdapterState) -> AdapterState:
        """See `AdapterKind.from_peft`."""
        names = list(self.tensor_shapes(spec))
        return dict(zip(names, weights["prompt_embeddings"].chunk(len(names), 1), strict=True))


PREFIX = Prefix()
