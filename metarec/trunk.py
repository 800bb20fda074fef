"""The part of the language model that reads items: frozen below, adapted on top.

Two trunks give the same states. `CachedTrunk` keeps what does not depend on the user (the layers below the adapted
ones; for activated LoRA also the item tokens' keys and values) in memory-mapped files, computed once per catalog.
`PlainTrunk` runs the whole transformers model with hooks: the reference, and the way for unknown structures.

Knows nothing of answers, ratings, losses or users' histories.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from metarec.artifacts import MANIFEST, cache_dir, content_hash, dump_json, load_json, verify_dir, write_manifest
from metarec.backbone import Backbone, BertWeights, LlamaWeights, final_state
from metarec.errors import ArtifactError
from metarec.lora import LORA_A, LORA_B, LoraSpec
from metarec.progress import progress
from metarec.prompts import CatalogPrompts
from metarec.transformer import Adapters, KeyValues

_BLOCK_ITEMS = 64


@dataclass(frozen=True)
class Placement:
    """Where the adapters sit.

    Args:
        layers: How many of the topmost blocks carry adapters.
        targets: Names of the linear layers within a block, such as ``q_proj``.
        rank: Rank of every adapter.
        alpha: Adapters are scaled by ``alpha / rank``.
        active_tokens: Only the last so many tokens of the prompt carry the adapter (activated LoRA, Greenewald et
            al. 2025); None means all tokens (plain LoRA).
    """

    layers: int
    targets: tuple[str, ...]
    rank: int
    alpha: float
    active_tokens: int | None


@dataclass(frozen=True)
class Gathered:
    """Items ready to be read: their codes (users, items), and a trunk's own inputs for them."""

    items: Tensor
    inputs: tuple[Any, ...]


class Trunk(Protocol):
    """Turns items and adapters into the states that answers are read from."""

    def gather(self, items: Tensor) -> Gathered:
        """Collects what reading some items needs, once for all the steps that read them.

        Args:
            items: Item codes, shape (users, items).
        """
        ...

    def last_states(self, gathered: Gathered, adapters: Adapters | None) -> Tensor:
        """Reads items.

        Args:
            gathered: The items.
            adapters: Every user's adapters; None reads with the frozen model.

        Returns:
            The state that the answer is read from, shape (users, items, hidden).
        """
        ...

    def frozen_states(self) -> Tensor:
        """Returns every item's state under the frozen model, float32, shape (catalog, hidden)."""
        ...


def lora_spec(backbone: Backbone, placement: Placement) -> LoraSpec:
    """Returns the shapes of the adapters that a placement asks for."""
    layers = backbone.model.config.num_hidden_layers
    shapes: dict[str, tuple[int, int]] = {}
    for index in range(layers - placement.layers, layers):
        linears = linear_shapes(backbone, f"{backbone.layer_path}.{index}")
        shapes |= {name: shape for name, shape in linears.items() if is_target(name, placement.targets)}
    return LoraSpec(placement.rank, placement.alpha, shapes)


def is_target(module: str, targets: Sequence[str]) -> bool:
    """Says whether a module path ends with one of the target names."""
    return any(module == target or module.endswith("." + target) for target in targets)


def linear_shapes(backbone: Backbone, below: str) -> dict[str, tuple[int, int]]:
    """Returns (out, in) of every linear layer below a module path."""
    shapes = {}
    for name, module in backbone.model.get_submodule(below).named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            # GPT-2's Conv1D keeps its weight as (in, out).
            rows, columns = weight.shape if isinstance(module, torch.nn.Linear) else weight.shape[::-1]
            shapes[f"{below}.{name}"] = (rows, columns)
    return shapes


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Averages real tokens and scales to unit length, as sentence encoders do."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(-2) / weights.sum(-2), dim=-1)


def _all_frozen_states(trunk: Trunk, items: int) -> Tensor:
    with torch.no_grad():
        blocks = torch.arange(items).split(_BLOCK_ITEMS)
        states = torch.cat([trunk.last_states(trunk.gather(block[None]), None)[0] for block in blocks])
        return states.to(torch.promote_types(states.dtype, torch.float32))


@dataclass(frozen=True)
class PlainTrunk:
    """Runs the whole model for every item and user, with a hook on every adapted layer."""

    backbone: Backbone
    prompts: CatalogPrompts
    placement: Placement

    def gather(self, items: Tensor) -> Gathered:
        """See `Trunk.gather`."""
        rows = [self.prompts.tokens[code] for code in items.flatten().tolist()]
        lengths = torch.tensor([len(row) for row in rows])
        width = max(map(len, rows), default=1)
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]).view(len(rows), width)
        return Gathered(items, (tokens.to(self.backbone.device), lengths.to(self.backbone.device)))

    def last_states(self, gathered: Gathered, adapters: Adapters | None) -> Tensor:
        """See `Trunk.last_states`."""
        users, count = gathered.items.shape
        tokens, lengths = gathered.inputs
        rows, width = tokens.shape
        if rows == 0:
            return torch.zeros(users, count, self.backbone.hidden_size, device=tokens.device)
        places = torch.arange(width, device=lengths.device)
        mask = places < lengths[:, None]
        active = mask
        if self.placement.active_tokens is not None:
            active = mask & (places >= lengths[:, None] - self.placement.active_tokens)
        with ExitStack() as hooks:
            for name in lora_spec(self.backbone, self.placement).shapes if adapters else ():
                assert adapters is not None
                hook = partial(_add_update, adapters=adapters, name=name, active=active, users=users)
                module = self.backbone.model.get_submodule(name)
                hooks.callback(module.register_forward_hook(hook).remove)
            inputs = {"input_ids": tokens, "attention_mask": mask.long()}
            if self.backbone.kind == "masked":
                hidden = self.backbone.before_any_head(inputs)
            else:
                hidden = self.backbone.model.base_model(**inputs, **self._no_cache()).last_hidden_state
        last = torch.arange(rows, device=lengths.device)
        if self.backbone.kind == "encoder":
            read = pool(hidden, mask)
        elif self.backbone.kind == "masked":
            blank = (tokens == self.prompts.mask_token).int().argmax(1)
            read = hidden[last, blank]
        else:
            read = hidden[last, lengths - 1]
        return read.view(users, count, -1)

    def frozen_states(self) -> Tensor:
        """See `Trunk.frozen_states`."""
        return _all_frozen_states(self, len(self.prompts.tokens))

    def _no_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if self.backbone.kind == "causal" else {}


def _add_update(
    module: Any, args: Any, output: Tensor, *, adapters: Adapters, name: str, active: Tensor, users: int
) -> Tensor:
    a, b = adapters.state[name + LORA_A], adapters.state[name + LORA_B]
    inputs = args[0].reshape(users, -1, args[0].shape[-1]).to(a.dtype)
    update = (inputs @ a.transpose(1, 2)) @ b.transpose(1, 2)
    masked: Tensor = update.view(output.shape) * active.unsqueeze(-1)
    return output + (adapters.scaling * masked).to(output.dtype)


class _Ragged:
    """Rows of different lengths in one flat array: item i owns rows ``offsets[i]`` to ``offsets[i + 1]``."""

    def __init__(self, flat: np.ndarray, lengths: np.ndarray) -> None:
        self.flat = flat
        self.lengths = lengths
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])

    def gather(self, items: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns padded rows, shape (items, longest, ...), and True where a row is real."""
        lengths = self.lengths[items]
        steps = np.arange(max(int(lengths.max(initial=0)), 1))
        real = steps < lengths[:, None]
        rows = np.where(real, self.offsets[items][:, None] + steps, 0)
        return torch.from_numpy(self.flat[rows]), torch.from_numpy(real)


@dataclass(frozen=True)
class CachedTrunk:
    """Reads from a cache; only the adapted layers, and in activated LoRA only their last tokens, run."""

    backbone: Backbone
    prompts: CatalogPrompts
    placement: Placement

    @property
    def _dtype(self) -> torch.dtype:
        # What is learned on top is never of lower precision than float32, whatever the frozen weights are.
        return torch.float64 if self.backbone.dtype == torch.float64 else torch.float32

    @property
    def _first(self) -> int:
        return int(self.backbone.model.config.num_hidden_layers) - self.placement.layers

    @property
    def _frozen_tail(self) -> bool:
        return self.placement.active_tokens is not None

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.prompts.tokens])

    @cached_property
    def _active_lengths(self) -> np.ndarray:
        active = self.placement.active_tokens
        return np.full(len(self._lengths), active) if active is not None else self._lengths - self._shared

    @property
    def _shared(self) -> int:
        # A bidirectional model's prefix sees the item, so nothing of it can be shared.
        return self.prompts.prefix if isinstance(self.backbone.weights, LlamaWeights) else 0

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
            }
        )
        return cache_dir() / "trunk" / key

    @cached_property
    def _cache(self) -> tuple[_Ragged, _Ragged]:
        try:
            verify_dir(self.path, "trunk")
        except ArtifactError:
            self._build()
        active = np.load(self.path / "active.npy", mmap_mode="r", allow_pickle=False)
        frozen = np.load(self.path / "frozen.npy", mmap_mode="r", allow_pickle=False)
        frozen_lengths = self._lengths - self._shared - self._active_lengths
        return _Ragged(active, self._active_lengths), _Ragged(frozen, frozen_lengths)

    def frozen_states(self) -> Tensor:
        """See `Trunk.frozen_states`."""
        _ = self._cache
        return torch.from_numpy(np.load(self.path / "states.npy", allow_pickle=False)).to(self.backbone.device)

    @torch.no_grad()
    def _build(self) -> None:
        """Computes the cache block by block; an interrupted build goes on where it stopped."""
        layers = self.placement.layers
        active_rows, frozen_rows = int(self._active_lengths.sum()), 0
        width = 0
        if isinstance(self.backbone.weights, LlamaWeights) and self._frozen_tail:
            frozen_rows = int((self._lengths - self._shared).sum()) - active_rows
            block = self.backbone.weights.blocks[0]
            width = block.kv_heads * block.head_dim
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / MANIFEST).unlink(missing_ok=True)
        active = _open_array(self.path / "active.npy", (active_rows, self.backbone.hidden_size), self._dtype)
        frozen = _open_array(self.path / "frozen.npy", (frozen_rows, layers, 2, width), self._dtype)
        into = (
            _Ragged(active, self._active_lengths),
            _Ragged(frozen, self._lengths - self._shared - self._active_lengths),
        )
        order = np.argsort(self._lengths, kind="stable")
        marker = self.path / "done.json"
        done = int(load_json(marker)["items"]) if marker.exists() else 0
        work = np.cumsum(self._lengths[order] - self._shared)
        with progress(f"reading {len(order):,} items once", int(work[-1])) as advance:
            for start in range(done, len(order), _BLOCK_ITEMS):
                items = order[start : start + _BLOCK_ITEMS]
                self._build_block(items, *into)
                stop = start + len(items)
                advance(int(work[stop - 1]))
                if start // _BLOCK_ITEMS % 16 == 15:
                    active.flush()
                    frozen.flush()
                    marker.write_text(dump_json({"items": stop}), encoding="utf-8")
        active.flush()
        frozen.flush()
        self.__dict__["_cache"] = into
        np.save(
            self.path / "states.npy", _all_frozen_states(self, len(self._lengths)).cpu().numpy(), allow_pickle=False
        )
        marker.unlink(missing_ok=True)
        write_manifest(self.path, "trunk")

    def _build_block(self, items: np.ndarray, active: _Ragged, frozen: _Ragged) -> None:
        tokens = [self.prompts.tokens[item][self._shared :] for item in items]
        lengths = np.array([len(ids) for ids in tokens])
        width = int(lengths.max())
        padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in tokens], device=self.backbone.device)
        weights = self.backbone.weights
        caches: list[tuple[Tensor, Tensor]] = []
        if isinstance(weights, BertWeights):
            mask = torch.arange(width, device=padded.device) < torch.from_numpy(lengths).to(padded.device)[:, None]
            hidden = weights.embed(padded)[None].to(self._dtype)
            for bert_block in weights.blocks[: self._first]:
                hidden = bert_block(hidden, mask[:, None])
            entering = hidden[0]
        else:
            assert isinstance(weights, LlamaWeights)
            entering, caches = self._run_decoder(weights, padded)
        for row, item in enumerate(items):
            length, count = lengths[row], self._active_lengths[item]
            begin = active.offsets[item]
            active.flat[begin : begin + count] = entering[row, length - count : length].cpu().numpy()
            kept, begin = frozen.lengths[item], frozen.offsets[item]
            for layer, (keys, values) in enumerate(caches):
                for kind, source in enumerate((keys, values)):
                    flat = source[row].transpose(0, 1)[:kept].flatten(1)
                    frozen.flat[begin : begin + kept, layer, kind] = flat.cpu().numpy()

    def _run_decoder(self, weights: LlamaWeights, tokens: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Returns the states that enter the adapted layers and, for activated LoRA, those layers' keys and values."""
        width = tokens.shape[1]
        hidden = weights.embeddings[tokens][None].to(self._dtype)
        positions = torch.arange(self._shared, self._shared + width, device=tokens.device)
        rope = _shaped(weights.rope(positions))
        causal = _causal(width, tokens.device)
        entering, caches = hidden, []
        for index, block in enumerate(weights.blocks):
            if index == self._first:
                entering = hidden
                if not self._frozen_tail:
                    break
            own = block.key_values(hidden, rope)
            if index >= self._first:
                caches.append(own)
            if index == len(weights.blocks) - 1:
                break
            hidden = block(hidden, rope, self._prefix(index), causal, own=own)
        return entering[0], caches

    @cached_property
    def _prefix_run(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """The common prefix through the frozen model: every layer's keys and values, and the states at the top."""
        weights = self.backbone.weights
        assert isinstance(weights, LlamaWeights)
        with torch.no_grad():
            tokens = torch.tensor(self.prompts.tokens[0][: self._shared], dtype=torch.long, device=self.backbone.device)
            hidden = weights.embeddings[tokens][None, None].to(self._dtype)
            rope = _shaped(weights.rope(torch.arange(self._shared, device=tokens.device)))
            causal = _causal(self._shared, tokens.device)
            caches: list[tuple[Tensor, Tensor]] = []
            entering = hidden
            for index, block in enumerate(weights.blocks):
                if index == self._first:
                    entering = hidden
                own = block.key_values(hidden, rope)
                caches.append(own)
                hidden = block(hidden, rope, (), causal, own=own)
        return caches, entering

    def _prefix(self, layer: int) -> list[KeyValues]:
        return [KeyValues(*self._prefix_run[0][layer], None)] if self._shared else []

    def gather(self, items: Tensor) -> Gathered:
        """See `Trunk.gather`."""
        users, count = items.shape
        codes = items.flatten().numpy()
        active, frozen = self._cache
        device = self.backbone.device
        hidden, real = (part.to(device) for part in active.gather(codes))
        hidden = hidden.view(users, count, *hidden.shape[1:])
        weights = self.backbone.weights
        if isinstance(weights, BertWeights):
            return Gathered(items, (hidden, real))
        assert isinstance(weights, LlamaWeights)
        lengths = torch.from_numpy(self._lengths[codes]).to(device)
        past: list[list[KeyValues]] = [[] for _ in range(self.placement.layers)]
        if self._frozen_tail:
            width = hidden.shape[2]
            flat, past_real = (part.to(device) for part in frozen.gather(codes))
            block = weights.blocks[0]
            # (layers, keys and values, rows, kv heads, tokens, head)
            heads = flat.unflatten(-1, (block.kv_heads, block.head_dim)).permute(2, 3, 0, 4, 1, 5).contiguous()
            for layer, (keys, values) in enumerate(heads):
                past[layer] = [*self._prefix(self._first + layer), KeyValues(keys, values, past_real[:, None])]
            positions = lengths[:, None] - width + torch.arange(width, device=device)
        else:
            # The prefix is active too, so every user's own prefix runs in front of every item.
            prefix = self._prefix_run[1].expand(users, count, -1, -1)
            hidden = torch.cat([prefix, hidden], 2)
            positions = torch.arange(hidden.shape[2], device=device)[None]
        rope = _shaped(weights.rope(positions.flatten()), tuple(positions.shape))
        return Gathered(items, (hidden, rope, past, lengths))

    def last_states(self, gathered: Gathered, adapters: Adapters | None) -> Tensor:
        """See `Trunk.last_states`."""
        users, count = gathered.items.shape
        weights = self.backbone.weights
        if isinstance(weights, BertWeights):
            hidden, real = gathered.inputs
            for bert_block in weights.blocks[self._first :]:
                hidden = bert_block(hidden, real[:, None], adapters)
            return self._read_bert(hidden, real, gathered.items.flatten())
        assert isinstance(weights, LlamaWeights)
        hidden, rope, past, lengths = gathered.inputs
        causal = _causal(hidden.shape[2], hidden.device)
        for layer, block in enumerate(weights.blocks[self._first :]):
            # Where the last token is the same for all rows, nothing else of the top layer is read.
            top = self._frozen_tail and layer == self.placement.layers - 1
            hidden = block(hidden, rope, past[layer], causal, adapters, last_only=top)
        flat = hidden.flatten(0, 1)
        rows = torch.arange(len(flat), device=flat.device)
        chosen = flat[:, -1] if self._frozen_tail else flat[rows, lengths - 1]
        return final_state(weights, chosen).view(users, count, -1)

    def _read_bert(self, hidden: Tensor, real: Tensor, codes: Tensor) -> Tensor:
        users, count = hidden.shape[:2]
        flat = hidden.flatten(0, 1)
        if self.backbone.kind == "encoder":
            return pool(flat, real).view(users, count, -1)
        blanks = [self.prompts.tokens[code].index(self.prompts.mask_token) for code in codes.tolist()]
        return self.backbone.before_head(flat[torch.arange(len(flat)), blanks]).view(users, count, -1)


def _open_array(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> np.memmap:
    if path.exists():
        return np.load(path, mmap_mode="r+", allow_pickle=False)  # type: ignore[no-any-return]
    return np.lib.format.open_memmap(path, "w+", np.float64 if dtype == torch.float64 else np.float32, shape)


def _shaped(rope: tuple[Tensor, Tensor], shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Gives cosines and sines the dimensions (rows, 1, tokens, head)."""
    cos, sin = rope
    rows = shape or (1, cos.shape[0])
    return cos.view(rows[0], 1, rows[1], cos.shape[-1]), sin.view(rows[0], 1, rows[1], sin.shape[-1])


def _causal(tokens: int, device: Any) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None]
