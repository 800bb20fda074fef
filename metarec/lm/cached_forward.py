"""Runs only the adapted layers, over a cache of what no adapter changes.

The states that enter the adapted layers, and for activated LoRA also the item tokens' keys and values, are computed
once per item, when it is first asked for, and lie in memory-mapped files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarec.config import Precision
from metarec.files.artifacts import cache_dir, content_hash
from metarec.lm.adapter_kinds import Adapters, Placement
from metarec.lm.backbone import Backbone
from metarec.lm.blocks import KeyValues, Places, pick, within
from metarec.lm.families import Block, BlockModel
from metarec.lm.forward import ItemBatch, pool
from metarec.lm.item_cache import ItemCache, Rows, read_missing
from metarec.lm.packing import PADDING, PREFIX, Packed, pack
from metarec.lm.pooling import pooled_tokens
from metarec.lm.precision import to_int8
from metarec.lm.prefix_files import PrefixRun, kept_prefix
from metarec.lm.tokenized import CatalogPrompts
from metarec.system.tensors import to_device

_KIND = "forward"


class _Ragged:
    """Rows of different numbers per item: item i owns ``flat[starts[i] : starts[i] + lengths[i]]``."""

    def __init__(self, flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        self.flat = flat
        self.starts = starts
        self.lengths = lengths

    def padded(self, items: np.ndarray, width: int = 0) -> tuple[Tensor, Tensor]:
        """Returns padded rows, shape (items, longest or `width`, ...), and True where a row is real."""
        lengths = self.lengths[items]
        steps = np.arange(max(int(lengths.max(initial=0)), width, 1))
        real = steps < lengths[:, None]
        rows = np.where(real, self.starts[items][:, None] + steps, 0)
        return torch.from_numpy(self.flat[rows]), torch.from_numpy(real)

    def packed(self, items: np.ndarray, prefix: int, width: int = 0) -> tuple[Tensor, Packed]:
        """Returns items side by side, shape (rows, places, ...), and where they are; the prefix's places mean nothing.

        Args:
            items: Item codes, shape (users, items).
            prefix: Places to leave free at the start of every row.
            width: See `pack`.
        """
        layout = pack(self.lengths[items], prefix, width)
        rows_each = len(layout.owner) // len(items)
        per_row = layout.last.shape[1]
        begins = np.zeros((len(items), rows_each * per_row), np.int64)
        begins[:, : items.shape[1]] = self.starts[items]
        begins = begins.reshape(len(layout.owner), per_row)
        rows = np.take_along_axis(begins, np.maximum(layout.owner, 0), 1) + layout.offset
        return torch.from_numpy(self.flat[np.where(layout.owner >= 0, rows, 0)]), layout


@dataclass(frozen=True)
class CachedForward:
    """Runs the adapted layers alone, in activated LoRA over the last tokens alone; the rest comes from a cache.

    Args:
        backbone: The model; it computes the cache.
        prompts: The catalog's prompts.
        placement: Where the adapters sit.
        block_dtype: Precision of the adapted blocks' frozen weights; None keeps the backbone's.
        kept: Precision in which activated LoRA's frozen keys and values are kept; float64 models keep float64.
    """

    backbone: Backbone
    prompts: CatalogPrompts
    placement: Placement
    block_dtype: torch.dtype | None = None
    kept: Precision = "float32"

    @property
    def _model(self) -> BlockModel:
        assert self.backbone.weights is not None, "only models that a family recognises are cached"
        return self.backbone.weights

    @property
    def _dtype(self) -> torch.dtype:
        # What is learned on top is never of lower precision than float32, whatever the frozen weights are.
        return torch.float64 if self.backbone.dtype == torch.float64 else torch.float32

    @property
    def _first(self) -> int:
        return int(self.backbone.modules.config.num_hidden_layers) - self.placement.layers

    @property
    def _frozen_tail(self) -> bool:
        return self.placement.active_tokens is not None

    @cached_property
    def _lengths(self) -> np.ndarray:
        return self.prompts.lengths

    @cached_property
    def _active_lengths(self) -> np.ndarray:
        active = self.placement.active_tokens
        return np.full(len(self._lengths), active) if active is not None else self._lengths - self._shared

    @property
    def _shared(self) -> int:
        # A bidirectional model's prefix sees the item, so nothing of it can be shared.
        return self.prompts.prefix if self._model.causal else 0

    @cached_property
    def path(self) -> Path:
        """The cache's directory, named by everything its content depends on."""
        key = content_hash(
            {
                "backbone": self.backbone.fingerprint,
                "dtype": str(self.backbone.dtype),
                "prompts": self.prompts.digest,
                "first_layer": self._first,
                "active_tokens": self.placement.active_tokens,
                "shared": self._shared,
                "block_dtype": None if self.block_dtype is None else str(self.block_dtype),
                "kept": self._kept,
            }
        )
        return cache_dir() / _KIND / key

    @property
    def bytes_per_item(self) -> float:
        """Bytes that the cache takes for an item of the catalog, on average."""
        return sum(float(rows.counts.mean()) * rows.row_bytes for rows in self._arrays.values())

    @cached_property
    def _kept(self) -> str:
        return "float64" if self._dtype == torch.float64 else self.kept

    @cached_property
    def _frozen_lengths(self) -> np.ndarray:
        if not self._frozen_tail:
            return np.zeros_like(self._lengths)
        lengths: np.ndarray = self._lengths - self._shared - self._active_lengths
        return lengths

    @cached_property
    def _cache(self) -> ItemCache:
        return ItemCache(self.path, self._arrays)

    @cached_property
    def _arrays(self) -> dict[str, Rows]:
        exact = "float64" if self._dtype == torch.float64 else "float32"
        ones = np.ones_like(self._lengths)
        arrays = {
            "active": Rows(self._active_lengths, (self.backbone.hidden_size,), exact),
            "states": Rows(ones, (self.backbone.hidden_size,), exact),
        }
        if self._frozen_tail:
            block = self._model.blocks[0]
            heads = (self.placement.layers, 2, block.kv_heads)
            arrays["frozen"] = Rows(self._frozen_lengths, (*heads, block.head_dim), self._kept)
            if self._kept == "int8":
                arrays["scales"] = Rows(self._frozen_lengths, heads, "float16")
        return arrays

    def frozen_states(self, items: np.ndarray) -> Tensor:
        """See `Forward.frozen_states`."""
        self.read(items)
        rows, starts = self._cache.rows("states")
        return to_device(torch.from_numpy(rows[starts[items]]), self.backbone.device)

    def read(self, items: np.ndarray) -> None:
        """See `Forward.read`."""
        read_missing(self._cache, items, self._lengths, self._read_block, self.backbone.readers)

    @torch.no_grad()
    def _read_block(self, items: np.ndarray) -> dict[str, np.ndarray]:
        """Runs the frozen model over some items; returns the rows that the cache keeps of them."""
        tokens = [self.prompts.tokens[item][self._shared :] for item in items]
        lengths = np.array([len(ids) for ids in tokens])
        width = int(lengths.max())
        padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in tokens], device=self.backbone.device)
        mask = _causal(width, padded.device)
        if not self._model.causal:
            mask = (torch.arange(width) < torch.from_numpy(lengths)[:, None]).to(padded.device)[:, None]
        entering, caches = self._run_frozen(padded, mask)
        places = np.arange(width)
        active = (places >= (lengths - self._active_lengths[items])[:, None]) & (places < lengths[:, None])
        rows = {"active": entering.cpu().numpy()[active]}
        if self._frozen_tail:
            # (items, tokens, layers, keys and values, kv heads, head)
            both = torch.stack([torch.stack(pair) for pair in caches]).permute(2, 4, 0, 1, 3, 5)
            rows |= self._packed(both.cpu().numpy()[places < self._frozen_lengths[items][:, None]])
        # What a fresh adapter scores is exactly this, so it is read from what is kept.
        rows["states"] = self._states_of(items, rows)
        return rows

    def _packed(self, frozen: np.ndarray) -> dict[str, np.ndarray]:
        if self._kept != "int8":
            return {"frozen": frozen.astype(self._kept)}
        integers, scales = to_int8(frozen)
        return {"frozen": integers, "scales": scales}

    def _states_of(self, items: np.ndarray, rows: dict[str, np.ndarray]) -> np.ndarray:
        """Returns the frozen states of items that were just read, shape (items, hidden)."""
        flat = {}
        for name, lengths in (("active", self._active_lengths), ("frozen", self._frozen_lengths)):
            starts = np.zeros_like(self._lengths)
            starts[items] = np.cumsum(lengths[items]) - lengths[items]
            flat[name] = starts
        codes = torch.from_numpy(items)[None]
        states = self.last_states(self._gathered(codes, rows, flat), None)[0]
        return states.to(self._dtype).cpu().numpy()

    def _run_frozen(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Returns the states that enter the adapted layers and, for activated LoRA, those layers' keys and values."""
        model = self._model
        hidden = model.embed(tokens, self._shared)[None].to(self._dtype)
        positions = torch.arange(self._shared, self._shared + tokens.shape[1], device=tokens.device)[None]
        places = model.places(positions)
        entering, caches = hidden, []
        for index, block in enumerate(model.blocks):
            if index == self._first:
                entering = hidden
                if not self._frozen_tail:
                    break
            own = block.key_values(hidden, places[index])
            if index >= self._first:
                caches.append(own)
            if index == len(model.blocks) - 1:
                break
            seen = within(mask, self._window(index), positions, positions)
            hidden = block(hidden, places[index], self._prefix(index, positions), seen, own=own)
        return entering[0], caches

    def _window(self, layer: int) -> int | None:
        """Returns how far a layer's tokens look back; None where that is farther than any prompt is long."""
        window, longest = self._model.blocks[layer].window, int(self._lengths.max()) + self.placement.virtual_tokens
        return window if window is not None and window < longest else None

    def _adapted(self, mask: Tensor | None, positions: Tensor) -> tuple[Sequence[Places], list[Tensor | None]]:
        """Returns what each adapted layer knows of where tokens stand, and which of them sees which."""
        layers = range(self._first, len(self._model.blocks))
        seen = [within(mask, self._window(layer), positions, positions) for layer in layers]
        return self._model.places(positions)[self._first :], seen

    @cached_property
    def _blocks(self) -> Sequence[Block]:
        """The adapted blocks."""
        blocks = self._model.blocks[self._first :]
        return blocks if self.block_dtype is None else [block.to(self.block_dtype) for block in blocks]

    @cached_property
    def _prefix_run(self) -> PrefixRun:
        """The common prefix in the frozen model, computed once and kept beside the items."""
        return kept_prefix(self.path / "prefix", self._run_prefix, self.backbone.device)

    def _run_prefix(self) -> PrefixRun:
        """Runs the common prefix: every layer's keys and values, and what enters the adapted layers."""
        with torch.no_grad():
            tokens = torch.tensor([self.prompts.tokens[0][: self._shared]], device=self.backbone.device)
            hidden = self._model.embed(tokens, 0)[None].to(self._dtype)
            positions = torch.arange(self._shared, device=tokens.device)[None]
            places = self._model.places(positions)
            causal = _causal(self._shared, tokens.device)
            caches: list[tuple[Tensor, Tensor]] = []
            entering = hidden
            for index, block in enumerate(self._model.blocks):
                if index == self._first:
                    entering = hidden
                own = block.key_values(hidden, places[index])
                caches.append(own)
                seen = within(causal, self._window(index), positions, positions)
                hidden = block(hidden, places[index], (), seen, own=own)
        return caches, entering

    def _prefix(self, layer: int, positions: Tensor) -> list[KeyValues]:
        """Returns a layer's keys and values of the common prefix, as tokens at some positions see them."""
        if not self._shared:
            return []
        before = torch.arange(self._shared, device=positions.device)[None]
        return [KeyValues(*self._prefix_run[0][layer], within(None, self._window(layer), positions, before))]

    def gather(self, items: Tensor, width: int = 0) -> ItemBatch:
        """See `Forward.gather`."""
        self.read(items.numpy())
        found = {name: self._cache.rows(name) for name in self._cache.names}
        rows, starts = ({name: pair[place] for name, pair in found.items()} for place in (0, 1))
        return self._gathered(items, rows, starts, width)

    def _gathered(
        self, items: Tensor, rows: Mapping[str, np.ndarray], starts: Mapping[str, np.ndarray], width: int = 0
    ) -> ItemBatch:
        """Collects what reading some items needs from rows of any number of items; see `ItemCache.rows`."""
        active = _Ragged(rows["active"], starts["active"], self._active_lengths)
        if not self._frozen_tail:
            return ItemBatch(items, self._gather_packed(items, active, max(width - self._shared, 0)))
        frozen = _Ragged(rows["frozen"], starts["frozen"], self._frozen_lengths)
        scales = _Ragged(rows["scales"], starts["frozen"], self._frozen_lengths) if "scales" in rows else None
        before = max(width - self._shared - int(self._active_lengths[0]), 0)
        return ItemBatch(items, self._gather_tail(items, active, frozen, scales, before))

    def _gather_tail(
        self, items: Tensor, active: _Ragged, frozen: _Ragged, scales: _Ragged | None, least: int
    ) -> tuple[Any, ...]:
        """Returns the last tokens' states, and the frozen keys and values of all tokens before them."""
        users, count = items.shape
        codes = items.flatten().numpy()
        device = self.backbone.device
        hidden = to_device(active.padded(codes)[0], device)
        width = hidden.shape[1]
        flat, real = (to_device(part, device) for part in frozen.padded(codes, least))
        flat = flat.to(self._dtype)
        if scales is not None:
            flat *= to_device(scales.padded(codes, least)[0], device).to(self._dtype)[..., None]
        # (layers, keys and values, rows, kv heads, tokens, head)
        heads = flat.permute(2, 3, 0, 4, 1, 5).contiguous()
        lengths = to_device(torch.from_numpy(self._lengths[codes]), device)
        positions = lengths[:, None] - width + torch.arange(width, device=device)
        before = self._shared + torch.arange(real.shape[1], device=device)[None]
        past = []
        for layer, (keys, values) in enumerate(heads, self._first):
            seen = within(real[:, None], self._window(layer), positions, before)
            past.append([*self._prefix(layer, positions), KeyValues(keys, values, seen)])
        last = torch.full((len(codes), 1), width - 1, device=device)
        places, masks = self._adapted(_causal(width, device) if width > 1 else None, positions)
        return hidden.view(users, count, *hidden.shape[1:]), places, past, masks, last

    def _gather_packed(self, items: Tensor, active: _Ragged, width: int) -> tuple[Any, ...]:
        """Returns all tokens of several items side by side, behind one copy of the common prefix; see `pack`."""
        users = len(items)
        device = self.backbone.device
        flat, layout = active.packed(items.numpy(), self._shared, width)
        hidden = to_device(flat, device)
        if self._shared:
            hidden[:, : self._shared] = self._prefix_run[1][0]
        # PEFT counts a prefix of virtual tokens as positions; its keys themselves are not rotated.
        before = np.where(layout.owner == PREFIX, 0, self._shared) + self.placement.virtual_tokens
        positions = to_device(torch.from_numpy(np.where(layout.owner == PADDING, 0, layout.offset + before)), device)
        visible = to_device(torch.from_numpy(layout.visible(causal=self._model.causal)), device)
        places, masks = self._adapted(visible, positions)
        hidden = hidden.view(users, -1, *hidden.shape[1:])
        read = to_device(self._places_read(items, layout), device)
        return hidden, places, [()] * self.placement.layers, masks, read

    def _places_read(self, items: Tensor, layout: Packed) -> Tensor:
        """Returns where the answer is read: at the last or the mask token, or for encoders pooled over each item.

        Returns:
            Positions, shape (rows, items per row), or which places belong to an item, shape (rows, items, places).
        """
        if self.backbone.kind == "causal":
            return torch.from_numpy(layout.last)
        if self.backbone.kind == "encoder":
            own = torch.from_numpy(layout.owner[:, None, :] == np.arange(layout.last.shape[1])[:, None])
            return pooled_tokens(own, self.backbone.pooling)
        before = np.zeros(layout.last.size, np.int64).reshape(len(items), -1)
        before[:, : items.shape[1]] = self._after_blank[items.numpy()]
        return torch.from_numpy(layout.last - before.reshape(layout.last.shape)).clamp(min=0)

    @cached_property
    def _after_blank(self) -> np.ndarray:
        mask_token = self.prompts.mask_token
        return np.array([len(ids) - 1 - ids.index(mask_token) for ids in self.prompts.tokens])

    def last_states(self, item_batch: ItemBatch, adapters: Adapters | None) -> Tensor:
        """See `Forward.last_states`."""
        users, count = item_batch.items.shape
        hidden, places, past, masks, read = item_batch.inputs
        pooled = self.backbone.kind == "encoder"
        if adapters is not None:
            adapters = adapters.spec.implementation.prepared(adapters, self._model)
        for layer, block in enumerate(self._blocks):
            # Of the topmost layer nothing but what the answer is read from is needed.
            top = layer == self.placement.layers - 1 and not pooled and hidden.shape[2] > 1
            only = read if top else None
            hidden = block(hidden, places[layer], past[layer], masks[layer], adapters, only=only)
        if pooled:
            states = pool(self._model.final(hidden).flatten(0, 1), read)
        else:
            states = hidden if hidden.shape[2] == read.shape[1] else pick(hidden.flatten(0, 1), read)
        width = self.backbone.hidden_size
        states = states.reshape(users, states.numel() // (users * width), width)[:, :count]
        return states if pooled else self._model.final(states)


def _causal(tokens: int, device: Any) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None]
