"""Adapters batched over users: fresh ones, rounded ones, and linear layers that carry them.

A state is a plain dict of tensors whose leading dimension is the user; `metarec.lm.adapter_kinds` says which tensors a
kind of adapter has. Names under ``score.`` belong to the score, not to the language model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from metarec.lm.adapter_kinds import Adapters, AdapterSpec
from metarec.system.tensors import AdapterState


def init_adapter(spec: AdapterSpec, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> AdapterState:
    """Returns a fresh adapter without a user dimension; see `AdapterKind.fresh`.

    Args:
        spec: Kind, shapes and rank.
        generator: Source of randomness.
        dtype: Type of the tensors.
    """
    return spec.implementation.fresh(spec, generator, dtype)


def round_adapter(state: Mapping[str, Tensor], names: Iterable[str], dtype: torch.dtype) -> AdapterState:
    """Rounds tensors to the type they are stored in, so that what is scored now is what will be read back.

    A number beyond the type's range becomes its largest one.

    Args:
        state: Any state.
        names: The tensors to round; the others stay as they are.
        dtype: The type on disk.
    """
    largest = torch.finfo(dtype).max
    rounded = {name: state[name].clamp(-largest, largest).to(dtype).to(state[name].dtype) for name in names}
    return {**state, **rounded}


def adapted_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, adapters: Adapters | None, name: str) -> Tensor:
    """Applies a frozen linear layer plus every user's own update, without a loop over users.

    Args:
        inputs: Activations, shape (users, ..., in).
        weight: Frozen weight, shape (out, in); may be of lower precision than `inputs`.
        bias: Frozen bias, shape (out,), or None.
        adapters: Every user's adapters; None, or adapters without this layer, applies the frozen layer alone.
        name: Module path of the layer.

    Returns:
        Activations, shape (users, ..., out), in the type of `inputs`.
    """
    frozen = functional.linear(inputs.to(weight.dtype), weight, bias).to(inputs.dtype)
    if adapters is None or name not in adapters.spec.shapes:
        return frozen
    spec = adapters.spec
    return frozen + spec.implementation.update(spec, adapters.state, name, inputs, frozen)
