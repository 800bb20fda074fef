"""The language model's opinion of a catalog: every item's answer log-odds, under every user's adapter.

Knows where adapters may sit and how an answer is read from a state; nothing of ratings, losses or users' histories.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from metarec.artifacts import content_hash
from metarec.backbone import Backbone, LlamaWeights
from metarec.errors import ConfigError, suggest
from metarec.lora import AdapterKind, AdapterSpec
from metarec.prompts import CatalogPrompts
from metarec.transformer import Adapters
from metarec.trunk import (
    CachedTrunk,
    Gathered,
    Placement,
    PlainTrunk,
    Trunk,
    adapter_spec,
    is_target,
    linear_shapes,
    pool,
)

_LOG = logging.getLogger(__name__)
# An encoder has no answer words of its own: its log-odds are a difference of cosines, sharpened like CLIP's.
_ENCODER_SHARPNESS = 20.0


@dataclass(frozen=True)
class Reader:
    """Gives every item's answer log-odds under every user's adapter.

    Args:
        backbone: The model.
        prompts: The catalog's prompts.
        placement: Where the adapters sit.
        trunk: What runs the model.
    """

    backbone: Backbone
    prompts: CatalogPrompts
    placement: Placement
    trunk: Trunk

    @property
    def identity(self) -> dict[str, str]:
        """Names what its answers depend on, but for precision: the backbone, the prompts and the placement."""
        return {
            "backbone": self.backbone.fingerprint,
            "prompts": self.prompts.digest,
            "placement": content_hash(asdict(self.placement)),
        }

    @cached_property
    def spec(self) -> AdapterSpec:
        """The adapters it takes."""
        return adapter_spec(self.backbone, self.placement)

    @property
    def invocation_tokens(self) -> tuple[int, ...] | None:
        """Token ids from whose start the adapter is active, or None where it is active everywhere."""
        count = self.placement.active_tokens
        return None if count is None else self.prompts.tokens[0][-count:]

    def gather(self, items: Tensor) -> Gathered:
        """Collects what reading some items needs, once for all the steps that read them.

        Args:
            items: Item codes, shape (users, items).
        """
        return self.trunk.gather(items)

    def log_odds(self, gathered: Gathered, state: Mapping[str, Tensor] | None) -> Tensor:
        """Reads items.

        Args:
            gathered: The items.
            state: Adapters with a user dimension; None reads with the frozen model.

        Returns:
            log p(yes) - log p(no), shape (users, items).
        """
        return self.answer(self.last_states(gathered, state))

    def last_states(self, gathered: Gathered, state: Mapping[str, Tensor] | None) -> Tensor:
        """Reads items as `log_odds` does; returns the states behind the answers, shape (users, items, hidden)."""
        adapters = None if state is None else Adapters(state, self.spec.scaling)
        return self.trunk.last_states(gathered, adapters)

    def features(self, states: Tensor) -> Tensor:
        """Returns states around the catalog's frozen mean, so that a frozen item has length one on average."""
        centre, length = self.frozen_moments
        return (states - centre) / length

    @cached_property
    def frozen_moments(self) -> tuple[Tensor, Tensor]:
        """The catalog's mean frozen state, shape (hidden,), and the root mean square length around it, a scalar."""
        centre = self.states.mean(0)
        return centre, (self.states - centre).square().sum(1).mean().sqrt()

    @cached_property
    def states(self) -> Tensor:
        """Every item's state under the frozen model, shape (catalog, hidden)."""
        return self.trunk.frozen_states()

    @cached_property
    def frozen_log_odds(self) -> Tensor:
        """Every item's log-odds under the frozen model, shape (catalog,)."""
        return self.answer(self.states)

    @cached_property
    def frozen_mean(self) -> Tensor:
        """Mean of the catalog's log-odds under the frozen model, a scalar."""
        return self.frozen_log_odds.mean()

    @cached_property
    def _answer_axis(self) -> tuple[Tensor, Tensor]:
        if self.prompts.answers is None:
            yes, no = (_encode(self.backbone, ids) for ids in self.prompts.answer_texts)
            return (yes - no) * _ENCODER_SHARPNESS, yes.new_zeros(())
        return self.backbone.answer_direction(*self.prompts.answers)

    def answer(self, state: Tensor) -> Tensor:
        """Turns states into log p(yes) - log p(no)."""
        direction, offset = self._answer_axis
        return state.to(direction.dtype) @ direction + offset


@torch.no_grad()
def _encode(backbone: Backbone, ids: tuple[int, ...]) -> Tensor:
    tokens = torch.tensor([ids], device=backbone.device)
    hidden: Tensor = backbone.model(input_ids=tokens).last_hidden_state
    return pool(hidden, torch.ones_like(tokens)[:, None])[0, 0]


def open_reader(
    backbone: Backbone, prompts: CatalogPrompts, placement: Placement, block_dtype: torch.dtype | None = None
) -> Reader:
    """Returns a reader over the fastest trunk that is exact for the model.

    Args:
        backbone: The model.
        prompts: The catalog's prompts.
        placement: Where the adapters sit.
        block_dtype: Precision of the adapted blocks' frozen weights, where they can be told apart from the others.

    Raises:
        ConfigError: The placement does not fit the model or the prompts.
    """
    check_placement(backbone, prompts, placement)
    if backbone.weights is None:
        _LOG.warning(
            "the structure of '%s' (%s) is not one metarec can take apart; reading it whole, which is slower",
            backbone.name,
            backbone.model.config.model_type,
        )
        return Reader(backbone, prompts, placement, PlainTrunk(backbone, prompts, placement))
    return Reader(backbone, prompts, placement, CachedTrunk(backbone, prompts, placement, block_dtype))


# Where adapters go when nobody says: what attention looks for, what it passes on, and what it writes.
_DEFAULT_TARGETS = (
    ("q_proj", "v_proj", "o_proj"),
    ("query", "value", "dense"),
    ("q_lin", "v_lin", "out_lin"),
    ("c_attn", "c_proj"),
)


def default_placement(
    backbone: Backbone,
    prompts: CatalogPrompts,
    *,
    layers: int,
    targets: tuple[str, ...] | None,
    rank: int,
    alpha: float,
    active_tokens: int | Literal["auto"] | None,
    kind: AdapterKind = "lora",
    rslora: bool = False,
    virtual_tokens: int = 0,
) -> Placement:
    """Fills in what a configuration leaves open.

    Args:
        backbone: The model.
        prompts: The catalog's prompts.
        layers: See `Placement`.
        targets: See `Placement`; None takes the usual ones of the architecture.
        rank: See `Placement`.
        alpha: See `Placement`.
        active_tokens: See `Placement`; ``auto`` is the last token of a causal LM, and all tokens of other models.
        kind: See `Placement`.
        rslora: See `Placement`.
        virtual_tokens: See `Placement`; counts for prefixes alone.

    Raises:
        ConfigError: The architecture has no usual targets.
    """
    if kind == "prefix":
        targets = ()
    if targets is None:
        names = {name.rsplit(".", 1)[-1] for name in linear_shapes(backbone, backbone.layer_path)}
        targets = (
            tuple(sorted(names))
            if kind == "bias"
            else next((usual for usual in _DEFAULT_TARGETS if names.issuperset(usual)), None)
        )
        if targets is None:
            raise ConfigError(
                f"no usual adapter targets are known for '{backbone.name}'",
                f"Set adapter.targets to some of {', '.join(sorted(names))}",
            )
    if active_tokens == "auto":
        active_tokens = 1 if backbone.kind == "causal" and prompts.suffix else None
    virtual_tokens = virtual_tokens if kind == "prefix" else 0
    return Placement(layers, targets, rank, alpha, active_tokens, kind, rslora, virtual_tokens)


def check_placement(backbone: Backbone, prompts: CatalogPrompts, placement: Placement) -> None:
    """Refuses adapters that the model or the prompts have no place for.

    Raises:
        ConfigError: There are fewer blocks, no such linear layer, or fewer common last tokens.
    """
    layers = backbone.model.config.num_hidden_layers
    if not 1 <= placement.layers <= layers:
        raise ConfigError(f"adapter.layers is {placement.layers}", f"'{backbone.name}' has 1 to {layers}")
    if placement.rank < 1:
        raise ConfigError(f"adapter.rank is {placement.rank}", "Choose 1 or more")
    if placement.kind == "prefix":
        if not isinstance(backbone.weights, LlamaWeights):
            raise ConfigError(
                f"adapter.kind is 'prefix', but '{backbone.name}' is not a Llama-like causal LM", "Choose lora or bias"
            )
        if placement.virtual_tokens < 1:
            raise ConfigError(f"adapter.virtual_tokens is {placement.virtual_tokens}", "Choose 1 or more")
    known = linear_shapes(backbone, backbone.layer_path + f".{layers - 1}")
    for target in placement.targets:
        if not any(is_target(name, (target,)) for name in known):
            raise ConfigError(
                f"adapter.targets names '{target}', which no block of '{backbone.name}' has",
                suggest(target, sorted({name.rsplit(".", 1)[-1] for name in known})),
            )
    if placement.active_tokens is None:
        return
    if backbone.kind != "causal":
        raise ConfigError(
            f"adapter.active_tokens is {placement.active_tokens}, but '{backbone.name}' is not a causal LM",
            "Set it to null: where tokens see those after them, no token's state is independent of the adapter",
        )
    if not 1 <= placement.active_tokens <= prompts.suffix:
        raise ConfigError(
            f"adapter.active_tokens is {placement.active_tokens}, but all prompts share only their last "
            f"{prompts.suffix} tokens",
            "Lower it, or end the prompt template with a fixed text",
        )
