"""Runs the whole transformers model with a hook on every adapted layer.

Tests hold the cached forward to it; models that no backbone family recognises use it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarec.lm.adapter_kinds import Adapters
from metarec.lm.backbone import Backbone
from metarec.lm.forward import ItemBatch, pool, read_frozen
from metarec.lm.placement import Placement
from metarec.lm.pooling import pooled_tokens
from metarec.lm.tokenized import CatalogPrompts


@dataclass(frozen=True)
class ReferenceForward:
    """Runs the whole model for every item and user, with a hook on every adapted layer."""

    backbone: Backbone
    prompts: CatalogPrompts
    placement: Placement

    def read(self, items: np.ndarray) -> None:
        """See `Forward.read`; nothing is kept but what `frozen_states` returns."""

    def gather(self, items: Tensor, width: int = 0) -> ItemBatch:
        """See `Forward.gather`."""
        rows = [self.prompts.tokens[code] for code in items.flatten().tolist()]
        lengths = torch.tensor([len(row) for row in rows])
        width = max(width, *map(len, rows), 1)
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]).view(len(rows), width)
        return ItemBatch(items, (tokens.to(self.backbone.device), lengths.to(self.backbone.device)))

    def last_states(self, item_batch: ItemBatch, adapters: Adapters | None) -> Tensor:
        """See `Forward.last_states`."""
        users, count = item_batch.items.shape
        tokens, lengths = item_batch.inputs
        rows, width = tokens.shape
        if rows == 0:
            return torch.zeros(users, count, self.backbone.hidden_size, device=tokens.device)
        places = torch.arange(width, device=lengths.device)
        mask = places < lengths[:, None]
        active = mask
        if self.placement.active_tokens is not None:
            active = mask & (places >= lengths[:, None] - self.placement.active_tokens)
        with ExitStack() as hooks:
            if adapters is not None:
                for name in adapters.spec.shapes:
                    hook = partial(_add_update, adapters=adapters, name=name, active=active, users=users)
                    module = self.backbone.model.get_submodule(name)
                    hooks.callback(module.register_forward_hook(hook).remove)
            inputs = {"input_ids": tokens, "attention_mask": mask.long()}
            if self.backbone.kind in ("masked", "classifier"):
                hidden = self.backbone.before_any_head(inputs)
            else:
                hidden = self.backbone.model.base_model(**inputs, **self._no_cache()).last_hidden_state
        last = torch.arange(rows, device=lengths.device)
        if self.backbone.kind == "encoder":
            read = pool(hidden, pooled_tokens(mask[:, None], self.backbone.pooling))[:, 0]
        elif self.backbone.kind == "masked":
            blank = (tokens == self.prompts.mask_token).int().argmax(1)
            read = hidden[last, blank]
        elif hidden.ndim == 2:  # a classifier that pools before its last layer
            read = hidden
        else:
            read = hidden[last, lengths - 1]
        return read.view(users, count, -1)

    @cached_property
    def _frozen(self) -> tuple[Tensor, np.ndarray]:
        """Frozen states of the items that were read, shape (catalog, hidden), and which these are."""
        items = len(self.prompts.tokens)
        dtype = torch.promote_types(self.backbone.dtype, torch.float32)
        states = torch.zeros(items, self.backbone.hidden_size, dtype=dtype, device=self.backbone.device)
        return states, np.zeros(items, bool)

    def frozen_states(self, items: np.ndarray) -> Tensor:
        """See `Forward.frozen_states`; they are kept in memory."""
        states, known = self._frozen
        missing = np.unique(items[~known[items]])
        if len(missing):
            states[torch.from_numpy(missing)] = read_frozen(self, missing).to(states.dtype)
            known[missing] = True
        return states[torch.from_numpy(items)]

    def _no_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if self.backbone.kind == "causal" else {}


def _add_update(
    module: Any, args: Any, output: Tensor, *, adapters: Adapters, name: str, active: Tensor, users: int
) -> Tensor:
    precise = next(iter(adapters.state.values())).dtype
    inputs, frozen = (part.reshape(users, -1, part.shape[-1]).to(precise) for part in (args[0], output))
    update = adapters.spec.implementation.update(adapters.spec, adapters.state, name, inputs, frozen)
    masked: Tensor = update.expand(users, inputs.shape[1], -1).reshape(output.shape) * active.unsqueeze(-1)
    return output + masked.to(output.dtype)
