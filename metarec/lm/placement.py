"""Where the adapters sit and of what kind they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metarec.errors import ConfigError, suggest
from metarec.lm.adapters import AdapterKind, AdapterSpec
from metarec.lm.backbone import Backbone, LlamaWeights
from metarec.lm.tokenized import CatalogPrompts


@dataclass(frozen=True)
class Placement:
    """Where the adapters sit and of what kind they are.

    Args:
        layers: How many of the topmost blocks carry adapters.
        targets: Names of the linear layers within a block, such as ``q_proj``; a prefix has none.
        rank: Rank of every low-rank adapter.
        alpha: See `metarec.lm.adapters.AdapterSpec`.
        active_tokens: Only the last so many tokens of the prompt carry the adapter (activated LoRA, Greenewald et
            al. 2025); None means all tokens (plain LoRA).
        kind: See `metarec.lm.adapters`.
        rslora: See `metarec.lm.adapters.AdapterSpec`.
        virtual_tokens: Length of a prefix.
    """

    layers: int
    targets: tuple[str, ...]
    rank: int
    alpha: float
    active_tokens: int | None
    kind: AdapterKind = "lora"
    rslora: bool = False
    virtual_tokens: int = 0


def adapter_spec(backbone: Backbone, placement: Placement) -> AdapterSpec:
    """Returns the shapes of the adapters that a placement asks for."""
    layers = backbone.model.config.num_hidden_layers
    shapes: dict[str, tuple[int, int]] = {}
    for index in range(layers - placement.layers, layers):
        path = f"{backbone.layer_path}.{index}"
        if placement.kind == "prefix":
            assert isinstance(backbone.weights, LlamaWeights)
            block = backbone.weights.blocks[index]
            shapes[path] = (placement.virtual_tokens, block.kv_heads * block.head_dim)
        else:
            linears = linear_shapes(backbone, path)
            shapes |= {name: shape for name, shape in linears.items() if is_target(name, placement.targets)}
    if placement.kind == "lora":
        return AdapterSpec(shapes, "lora", placement.rank, placement.alpha, placement.rslora)
    return AdapterSpec(shapes, placement.kind)


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
