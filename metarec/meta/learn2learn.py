"""The meta-gradient by the library learn2learn, one user after another: a reference for tests and benchmarks.

It is written as the library's users would write it: a module is cloned, adapted, and backpropagated through.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from metarec.errors import ConfigError
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import Loss, MetaState
from metarec.system.doctor import LEARN2LEARN
from metarec.system.tensors import AdapterState


def meta_gradient(
    meta: MetaState, losses: Sequence[tuple[Loss, Loss]], steps: int, *, second_order: bool
) -> MetaGradient:
    """Returns the gradient of MAML or first-order MAML by ``learn2learn.algorithms.MetaSGD``.

    The library's MetaSGD takes rates that are functions of the meta-parameters' rates, so it computes MAML with learned
    rates of any granularity; its MAML has a single constant rate.

    Args:
        meta: The meta-parameters; rates must not differ between steps.
        losses: One support and one query loss per user.
        steps: Inner steps.
        second_order: Whether to use the Hessian.

    Returns:
        What `metarec.meta.algorithms.maml` returns for the same users together.

    Raises:
        ConfigError: learn2learn is not installed, or the rates differ between steps.
    """
    if any(len(rate) > 1 for rate in meta.log_rate.values()):
        raise ConfigError("learn2learn knows no rates per step", "Set meta.rates to 'tensor' or 'number'")
    meta_sgd = load_module("learn2learn.algorithms.meta_sgd").MetaSGD
    leaves = {name: value.detach().requires_grad_() for name, value in meta.tensors().items()}
    traced = MetaState.from_tensors(leaves)
    shared = {name: value for name, value in traced.init.items() if name not in traced.log_rate}
    adapted = _Tensors({name: traced.init[name] for name in traced.log_rate})
    rates = [traced.rate(name, 0).expand(traced.init[name].shape) for name in traced.log_rate]
    learner = meta_sgd(adapted, lrs=rates, first_order=not second_order)
    values, totals, kept = [], {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}, []
    for support_loss, query_loss in losses:
        clone = learner.clone()
        finite = True
        for _ in range(steps):
            loss = support_loss(_as_one_user({**shared, **clone()})).sum()
            finite = finite and bool(loss.isfinite())
            if not finite:
                break
            clone.adapt(loss)
        value = query_loss(_as_one_user({**shared, **clone()})).sum()
        finite = finite and bool(value.isfinite())
        values.append(value.detach())
        kept.append(finite)
        if finite:
            inputs = {**leaves, **{f"init/{name}": value for name, value in adapted.by_name.items()}}
            gradients = torch.autograd.grad(value, list(inputs.values()), allow_unused=True, retain_graph=True)
            for name, gradient in zip(inputs, gradients, strict=True):
                totals[name] = totals[name] + (torch.zeros_like(leaves[name]) if gradient is None else gradient)
    count = max(sum(kept), 1)
    return MetaGradient(
        torch.stack(values), {name: total.detach() / count for name, total in totals.items()}, ~torch.tensor(kept)
    )


class _Tensors(nn.Module):
    """The adapted tensors as a module, which learn2learn clones and updates."""

    def __init__(self, tensors: AdapterState) -> None:
        super().__init__()
        self._names = list(tensors)
        # Dots are not allowed in the names of parameters.
        for place, tensor in enumerate(tensors.values()):
            self.register_parameter(f"t{place}", nn.Parameter(tensor.detach().clone()))

    @property
    def by_name(self) -> AdapterState:
        return {name: getattr(self, f"t{place}") for place, name in enumerate(self._names)}

    def forward(self) -> AdapterState:
        return self.by_name


def _as_one_user(state: AdapterState) -> dict[str, Tensor]:
    return {name: tensor[None] for name, tensor in state.items()}


def check(algorithm: str) -> None:
    """Checks that the library is installed and has a meta-algorithm.

    Raises:
        ConfigError: It is not, or has not.
    """
    if algorithm not in ("fomaml", "maml"):
        raise ConfigError(f"meta.algorithm '{algorithm}' is not one learn2learn has", "Set meta.engine to 'batched'")
    load_module("learn2learn.algorithms.meta_sgd")


def load_module(name: str) -> Any:
    """Imports one module of learn2learn without its package's own imports, which need torchvision and gym."""
    spec = importlib.util.find_spec("learn2learn")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("learn2learn is not installed", f"Run: {LEARN2LEARN}")
    root = Path(next(iter(spec.submodule_search_locations)))
    for bare, path in (("learn2learn", root), ("learn2learn.algorithms", root / "algorithms")):
        if bare not in sys.modules:
            module = ModuleType(bare)
            module.__path__ = [str(path)]
            module.__spec__ = ModuleSpec(bare, None, is_package=True)
            module.__spec__.submodule_search_locations = module.__path__
            sys.modules[bare] = module
    return importlib.import_module(name)
