"""Smaller copies of a frozen model: blocks' weights in 8 or 4 bits, or fewer blocks.

Weights alone are rounded, see `metarec.lm.rounded`.

Source: Men et al. 2024, "ShortGPT", eq. 1, for the influence of a block.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from metarec.errors import ConfigError
from metarec.files.artifacts import content_hash
from metarec.lm.backbone import Backbone
from metarec.lm.rounded import Bits, RoundedLinear


def rounded(backbone: Backbone, bits: Bits) -> Backbone:
    """Returns a copy of a model whose blocks' linear layers have weights of so many bits.

    Args:
        backbone: The model, which does not change; other parts are shared with the copy.
        bits: Of a weight.

    Raises:
        ConfigError: Its blocks have no linear layers that can be rounded.
    """
    model = _copied(backbone)
    blocks = model.get_submodule(backbone.layer_path)
    found = [(name, module) for name, module in blocks.named_modules() if type(module) is torch.nn.Linear]
    if not found:
        raise ConfigError(
            f"the blocks of '{backbone.name}' have no linear layers whose weights can be rounded",
            "Set backbone_precision=full, or choose another model",
        )
    for name, module in found:
        path, _, last = name.rpartition(".")
        setattr(blocks.get_submodule(path), last, RoundedLinear(module, bits))
    return _named(backbone, model, f"int{bits}")


def with_blocks(backbone: Backbone, kept: Sequence[int]) -> Backbone:
    """Returns a copy of a model that has some of its blocks alone, in their order.

    Args:
        backbone: The model, which does not change.
        kept: The blocks' numbers, from 0 at the bottom.

    Raises:
        ConfigError: There is no such block, or none is left.
    """
    count = int(backbone.modules.config.num_hidden_layers)
    order = sorted(set(kept))
    if not order or not 0 <= order[0] <= order[-1] < count:
        raise ConfigError(f"blocks {order} of {count}", f"Keep some of 0 to {count - 1}")
    model = _copied(backbone)
    path, _, last = backbone.layer_path.rpartition(".")
    blocks = model.get_submodule(backbone.layer_path)
    left = torch.nn.ModuleList([blocks[place] for place in order])
    for number, block in enumerate(left):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", number)  # noqa: B010 - what a module has beside tensors and modules
    setattr(model.get_submodule(path), last, left)
    for config in {id(found): found for found in (model.config, model.base_model.config)}.values():
        config.num_hidden_layers = len(order)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[place] for place in order]
    return _named(backbone, model, f"blocks {order}")


@torch.no_grad()
def influence(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """Returns how far each block turns the states that pass through it: one minus the mean cosine, shape (blocks,).

    Args:
        backbone: The model.
        texts: What is read.
    """
    total: Tensor | None = None
    tokens = 0
    for text in texts:
        ids = torch.tensor(backbone.tokenize([text]), device=backbone.device)
        output = backbone.model.base_model(input_ids=ids, output_hidden_states=True)
        states = _around_blocks(backbone, output.hidden_states)
        turned = torch.stack(
            [1 - functional.cosine_similarity(before, after, dim=-1).sum() / ids.shape[1] for before, after in states]
        )
        total = turned * ids.shape[1] if total is None else total + turned * ids.shape[1]
        tokens += ids.shape[1]
    if total is None:
        raise ConfigError("no text to read", "Give some")
    return total / tokens


def weight_bytes(backbone: Backbone) -> int:
    """Returns the bytes that a model's weights take in memory; what several parts share counts once."""
    held = [*backbone.modules.parameters(), *backbone.modules.buffers()]
    return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in held}.values())


def _around_blocks(backbone: Backbone, hidden: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns the states before and after every block; the last one's are often behind the model's final norm."""
    count = int(backbone.modules.config.num_hidden_layers)
    return [(hidden[place], hidden[place + 1]) for place in range(count)]


def _copied(backbone: Backbone) -> Any:
    """Returns a copy of the modules that shares the frozen parameters."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in backbone.model.parameters()}
    return copy.deepcopy(backbone.model, shared)


def _named(backbone: Backbone, model: Any, how: str) -> Backbone:
    name, fingerprint = f"{backbone.name}, {how}", content_hash([backbone.fingerprint, how])
    return replace(backbone, name=name, fingerprint=fingerprint, modules=model.eval(), open_model=None)
