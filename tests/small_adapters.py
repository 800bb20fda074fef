"""Adapters of tiny models: where they sit, random ones, and items to answer for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metarec.lm.adapters import AdapterSpec
from metarec.lm.answer_model import AnswerModel
from metarec.lm.backbone import Backbone
from metarec.lm.cached_forward import CachedForward
from metarec.lm.placement import Placement, check_placement, default_placement
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.tokenized import CatalogPrompts
from metarec.system.tensors import AdapterState


def placement_of(
    backbone: Backbone,
    prompts: CatalogPrompts,
    active: int | None,
    layers: int = 2,
    targets: tuple[str, ...] | None = None,
) -> Placement:
    placed = default_placement(
        backbone, prompts, layers=layers, targets=targets, rank=2, alpha=4.0, active_tokens=active
    )
    check_placement(backbone, prompts, placed)
    return placed


def random_state(spec: AdapterSpec, users: int, seed: int = 0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    shapes = spec.tensor_shapes.items()
    return {name: torch.randn(users, *shape, generator=generator) * 0.3 for name, shape in shapes}


def some_items(users: int = 3, items: int = 5) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 40, (users, items)))


def both(backbone: Backbone, prompts: CatalogPrompts, placed: Placement) -> tuple[AnswerModel, AnswerModel]:
    fast = AnswerModel(backbone, prompts, placed, CachedForward(backbone, prompts, placed))
    plain = AnswerModel(backbone, prompts, placed, ReferenceForward(backbone, prompts, placed))
    return fast, plain
