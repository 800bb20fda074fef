"""Backbone families: how a transformers model is taken apart into blocks, so that a cache can run some of them.

One file per family. Another package adds one by an entry point in the group ``metarec.backbone_families``, a script by
``FAMILIES.register``. Models that no family recognises are run whole, by `metarec.lm.reference_forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from metarec import registries
from metarec.lm.adapter_kinds import Adapters
from metarec.lm.blocks import KeyValues
from metarec.registry import Registry

# Cosines and sines of rotary positions.
Rope = tuple[Tensor, Tensor]


class Block(Protocol):
    """One transformer block with frozen weights."""

    @property
    def kv_heads(self) -> int:
        """Number of key heads."""
        ...

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        ...

    def key_values(self, hidden: Tensor, rope: Rope | None, adapters: Adapters | None = None) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of the tokens in `hidden`, each (users x items, kv heads, tokens, head)."""
        ...

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
        """Runs the block over the active tokens.

        Args:
            hidden: Active tokens, shape (users, items, tokens, hidden).
            rope: Cosines and sines at the active tokens' positions, each broadcastable to
                (users x items, 1, tokens, head); None where the family has none.
            past: Keys and values of the tokens that are not active; every user's virtual tokens come before them.
            mask: Which active token sees which, shape (1 or rows, tokens or 1, tokens); None allows all.
            adapters: Every user's adapters, or None for the frozen block.
            own: The active tokens' keys and values where the caller already has them.
            only: Positions of the tokens that attend and pass the MLP, shape (rows, kept); None for all.

        Returns:
            Active tokens after the block, shape (users, items, tokens or kept, hidden).
        """
        ...

    def to(self, dtype: torch.dtype) -> Block:
        """Returns the block with matrix products in another precision; norms keep theirs."""
        ...


class BlockModel(Protocol):
    """A model taken apart into blocks."""

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks, from bottom to top."""
        ...

    @property
    def causal(self) -> bool:
        """Whether tokens see only those before them: then prompts can share a prefix, and states can stay frozen."""
        ...

    @property
    def window(self) -> int | None:
        """How many tokens attention looks back at most; None for all. Longer prompts are run by the whole model."""
        ...

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        """Returns the states that enter the lowest block.

        Args:
            tokens: Token ids, shape (rows, tokens).
            start: Position of the first token.

        Returns:
            Shape (rows, tokens, hidden).
        """
        ...

    def rope(self, positions: Tensor) -> Rope | None:
        """Returns cosines and sines of positions (tokens,), each (tokens, head); None where blocks rotate nothing."""
        ...

    def final(self, hidden: Tensor) -> Tensor:
        """Turns states after the topmost block into what the vocabulary head multiplies or an encoder averages."""
        ...


class BackboneFamily(Protocol):
    """Models that are taken apart in the same way."""

    def take_apart(self, model: Any, kind: str) -> BlockModel | None:
        """Returns a model's blocks, or None where it does not belong to the family.

        Args:
            model: A frozen transformers model.
            kind: ``causal``, ``masked`` or ``encoder``.
        """
        ...


FAMILIES: Registry[BackboneFamily] = registries.FAMILIES


def take_apart(model: Any, kind: str) -> BlockModel | None:
    """Returns a model's blocks as the first family that recognises it takes them apart, or None."""
    found = (FAMILIES.get(name).take_apart(model, kind) for name in FAMILIES.names())
    return next((blocks for blocks in found if blocks is not None), None)
