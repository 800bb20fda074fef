"""Backbone families: how a transformers model is taken apart into blocks, so that a cache can run some of them.

A family is a description of how its models are built, in a file of its own: see `metarec.lm.layouts`. Another package
adds one by an entry point in the group ``metarec.backbone_families``, a script by ``FAMILIES.register``. Models that no
family recognises are run whole, by `metarec.lm.reference_forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from metarec import registries
from metarec.lm.adapter_kinds import Adapters
from metarec.lm.blocks import KeyValues, Places
from metarec.registry import Registry


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

    @property
    def window(self) -> int | None:
        """A token sees those fewer than so many positions away; None for all."""
        ...

    def key_values(self, hidden: Tensor, places: Places, adapters: Adapters | None = None) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of the tokens in `hidden`, each (users x items, kv heads, tokens, head)."""
        ...

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
        """Runs the block over the active tokens.

        Args:
            hidden: Active tokens, shape (users, items, tokens, hidden).
            places: What `BlockModel.places` says of the active tokens.
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
    def takes_prefix(self) -> bool:
        """Whether virtual tokens may stand in front of the prompt: positions are known to attention alone."""
        ...

    @property
    def limit(self) -> int | None:
        """Up to how many tokens the blocks are exact; None for any. Longer prompts are run by the whole model."""
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

    def places(self, positions: Tensor) -> Sequence[Places]:
        """Returns, for every block, what it knows of where tokens stand.

        Args:
            positions: Shape (rows, tokens).
        """
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

        Raises:
            NotExactError: It belongs to the family, but the blocks would not compute what it computes.
        """
        ...


FAMILIES: Registry[BackboneFamily] = registries.FAMILIES


class NotExactError(Exception):
    """A model belongs to a family, but its blocks would not compute what it computes; the message says why."""


@dataclass(frozen=True)
class TakenApart:
    """What came of taking a model apart.

    Attributes:
        family: Name of the family that it belongs to; None where no family knows it.
        blocks: Its blocks; None where it is run whole.
        why_not: Why it is run whole; None where it is not.
    """

    family: str | None
    blocks: BlockModel | None
    why_not: str | None


def take_apart(model: Any, kind: str) -> TakenApart:
    """Takes a model apart as the first family that recognises it does."""
    for name in FAMILIES.names():
        try:
            blocks = FAMILIES.get(name).take_apart(model, kind)
        except NotExactError as error:
            return TakenApart(name, None, str(error))
        if blocks is not None:
            return TakenApart(name, blocks, None)
    return TakenApart(None, None, f"no backbone family recognises its structure ({model.config.model_type})")
