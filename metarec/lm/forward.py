"""Says what runs the model: turns items and adapters into the states that answers are read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from metarec.lm.adapter_kinds import Adapters
from metarec.lm.item_cache import BLOCK_ITEMS


@dataclass(frozen=True)
class ItemBatch:
    """Items ready to be read: their codes (users, items), and the forward's own inputs for them."""

    items: Tensor
    inputs: tuple[Any, ...]


class Forward(Protocol):
    """Turns items and adapters into the states that answers are read from."""

    def read(self, items: np.ndarray) -> None:
        """Reads of some items what no adapter changes, all at once, where it is kept; later uses find it.

        Args:
            items: Item codes.
        """
        ...

    def gather(self, items: Tensor, width: int = 0) -> ItemBatch:
        """Collects what reading some items needs, once for all the steps that read them.

        Args:
            items: Item codes, shape (users, items).
            width: Tokens that every prompt takes at least. Where none has more, the others do not change how an item's
                numbers are rounded; 0 takes what the longest of them needs.
        """
        ...

    def last_states(self, item_batch: ItemBatch, adapters: Adapters | None) -> Tensor:
        """Reads items.

        Args:
            item_batch: The items.
            adapters: Every user's adapters; None reads with the frozen model.

        Returns:
            The state that the answer is read from, shape (users, items, hidden).
        """
        ...

    def frozen_states(self, items: np.ndarray) -> Tensor:
        """Returns the states of some items under the frozen model, float32, shape (items, hidden)."""
        ...


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Averages tokens and scales to unit length, as sentence encoders do.

    Args:
        hidden: States, shape (rows, tokens, hidden).
        mask: Which tokens are averaged, shape (rows, averages, tokens).

    Returns:
        Shape (rows, averages, hidden); zero where there is nothing to average.
    """
    weights = mask.to(hidden.dtype)
    return torch.nn.functional.normalize((weights @ hidden) / weights.sum(-1, keepdim=True).clamp(min=1), dim=-1)


def read_frozen(forward: Forward, items: np.ndarray) -> Tensor:
    """Returns the states of some items under the frozen model, read block by block, shape (items, hidden)."""
    with torch.no_grad():
        blocks = torch.from_numpy(items).split(BLOCK_ITEMS)
        states = torch.cat([forward.last_states(forward.gather(block[None]), None)[0] for block in blocks])
        return states.to(torch.promote_types(states.dtype, torch.float32))
