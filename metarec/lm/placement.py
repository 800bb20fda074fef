"""Fits adapters to a model: which layers carry them, of what sizes, and whether there is a place for them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metarec.errors import ConfigError, suggest
from metarec.lm.adapter_kinds import ADAPTER_KINDS, AdapterSpec, BlockShape, is_target
from metarec.lm.adapter_kinds import Placement as Placement
from metarec.lm.backbone import Backbone
from metarec.lm.rounded import RoundedLinear
from metarec.lm.tokenized import CatalogPrompts


def adapter_spec(backbone: Backbone, placement: Placement) -> AdapterSpec:
    """Returns the sizes of the adapters that a placement asks for."""
    return ADAPTER_KINDS.get(placement.kind).spec(adapted_blocks(backbone, placement.layers), placement)


def adapted_blocks(backbone: Backbone, layers: int) -> list[BlockShape]:
    """Returns the shapes of the topmost blocks, from bottom to top."""
    total = int(backbone.modules.config.num_hidden_layers)
    found = []
    for index in range(total - layers, total):
        path = f"{backbone.layer_path}.{index}"
        width = heads = None
        if backbone.weights is not None and backbone.weights.takes_prefix:
            block = backbone.weights.blocks[index]
            heads, width = block.kv_heads, block.kv_heads * block.head_dim
        modules = backbone.modules.get_submodule(path).modules()
        transposed = any(type(module).__name__ == "Conv1D" for module in modules)
        shapes = linear_shapes(backbone, path)
        found.append(BlockShape(path, shapes, width, heads, transposed, backbone.hidden_size))
    return found


def linear_shapes(backbone: Backbone, below: str) -> dict[str, tuple[int, int]]:
    """Returns (out, in) of every linear layer below a module path."""
    shapes = {}
    for name, module in backbone.modules.get_submodule(below).named_modules():
        if isinstance(module, RoundedLinear):
            shapes[f"{below}.{name}"] = module.rounded.shape
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            # GPT-2's Conv1D keeps its weight as (in, out).
            rows, columns = weight.shape if isinstance(module, torch.nn.Linear) else weight.shape[::-1]
            shapes[f"{below}.{name}"] = (rows, columns)
    return shapes


def default_placement(
    backbone: Backbone,
    prompts: CatalogPrompts,
    *,
    layers: int,
    targets: tuple[str, ...] | None,
    rank: int,
    alpha: float,
    active_tokens: int | Literal["auto"] | None,
    kind: str = "lora",
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
        virtual_tokens: See `Placement`; only for prefixes.

    Raises:
        ConfigError: The kind is not known, or the architecture has no usual targets.
    """
    adapter_kind = ADAPTER_KINDS.get(kind)
    names = {name.rsplit(".", 1)[-1] for name in linear_shapes(backbone, backbone.layer_path)}
    chosen = adapter_kind.targets(targets, names)
    if chosen is None:
        raise ConfigError(
            f"no usual adapter targets are known for '{backbone.name}'",
            f"Set adapter.targets to some of {', '.join(sorted(names))}",
        )
    if active_tokens == "auto":
        active_tokens = 1 if backbone.kind == "causal" and prompts.suffix else None
    length = adapter_kind.virtual_length(virtual_tokens)
    return Placement(layers, chosen, rank, alpha, active_tokens, kind, rslora, length)


def check_placement(backbone: Backbone, prompts: CatalogPrompts, placement: Placement) -> None:
    """Refuses adapters that the model or the prompts have no place for.

    Raises:
        ConfigError: There are fewer blocks, no such linear layer, or fewer common last tokens.
    """
    layers = backbone.modules.config.num_hidden_layers
    if not 1 <= placement.layers <= layers:
        raise ConfigError(f"adapter.layers is {placement.layers}", f"'{backbone.name}' has 1 to {layers}")
    if placement.rank < 1:
        raise ConfigError(f"adapter.rank is {placement.rank}", "Choose 1 or more")
    blocks = adapted_blocks(backbone, placement.layers)
    ADAPTER_KINDS.get(placement.kind).check(backbone.name, blocks, placement)
    _check_windows(backbone, prompts, placement)
    known = blocks[-1].linears
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


def _check_windows(backbone: Backbone, prompts: CatalogPrompts, placement: Placement) -> None:
    """Refuses virtual tokens that the prompts' last tokens would not see.

    Raises:
        ConfigError: A prefix and the longest prompt together are longer than an adapted block's attention looks back.
    """
    if not placement.virtual_tokens or backbone.weights is None:
        return
    windows = [block.window for block in backbone.weights.blocks[-placement.layers :] if block.window is not None]
    longest = int(prompts.lengths.max()) + placement.virtual_tokens
    if min(windows, default=longest) < longest:
        raise ConfigError(
            f"a prefix and the longest prompt have {longest} tokens, '{backbone.name}' looks back over {min(windows)}",
            "Choose lora or bias, or a shorter prompt",
        )
