"""Adapters batched over users, and their PEFT form on disk.

A state is a plain dict of tensors whose leading dimension is the user. Three kinds of adapter exist:

- ``lora``: ``<module>.lora_A`` (users, rank, in) and ``<module>.lora_B`` (users, out, rank);
- ``bias``: ``<module>.bias_delta`` (users, out), added to the layer's output;
- ``prefix``: ``<block>.prefix_keys`` and ``<block>.prefix_values`` (users, tokens, width), which attention sees in
  front of the prompt.

Names under ``score.`` are the score's, not the language model's. Pure functions; knows nothing of prompts, ratings or
transformers.

Sources: Hu et al. 2021, "LoRA", eq. 3, and Kalajdzievski 2023, "rsLoRA", eq. 5, for the scaling; Ben Zaken et al.
2022, "BitFit", for biases; Li and Liang 2021, "Prefix-Tuning", eq. 3; the batched product is the one of Punica (Chen et
al. 2023) in plain matmuls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from metarec.artifacts import dump_json, load_json, replace_dir, verify_dir
from metarec.errors import ArtifactError

AdapterState = dict[str, Tensor]
AdapterKind = Literal["lora", "bias", "prefix"]

LORA_A = ".lora_A"
LORA_B = ".lora_B"
BIAS = ".bias_delta"
PREFIX_KEYS = ".prefix_keys"
PREFIX_VALUES = ".prefix_values"
_PEFT_PREFIX = "base_model.model."
_PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_CONFIG = "adapter_config.json"
_USER_FILE = "user.json"
_SCORE_FILE = "score.safetensors"


@dataclass(frozen=True)
class AdapterSpec:
    """Which adapters there are and of what size.

    Args:
        shapes: For ``lora`` and ``bias``, module path to (out features, in features); for ``prefix``, block path to
            (virtual tokens, width of keys).
        kind: What is learned.
        rank: Inner dimension of every low-rank update.
        alpha: A low-rank update is scaled by ``alpha / rank``.
        rslora: Scales by ``alpha / sqrt(rank)`` instead, so that higher ranks learn as fast.
    """

    shapes: Mapping[str, tuple[int, int]]
    kind: AdapterKind = "lora"
    rank: int = 1
    alpha: float = 1.0
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor on ``B A x``."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of one user's adapter."""
        found: dict[str, tuple[int, ...]] = {}
        for name, (rows, columns) in self.shapes.items():
            if self.kind == "lora":
                found |= {name + LORA_A: (self.rank, columns), name + LORA_B: (rows, self.rank)}
            elif self.kind == "bias":
                found[name + BIAS] = (rows,)
            else:
                found |= {name + PREFIX_KEYS: (rows, columns), name + PREFIX_VALUES: (rows, columns)}
        return found


def init_adapter(spec: AdapterSpec, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> AdapterState:
    """Returns a fresh adapter without a user dimension.

    LoRA's A is uniform within 1/sqrt(in) and its B zero, biases are zero: neither changes anything. A prefix has no
    such beginning, for attention spends weight on whatever it sees; it is uniform within 1/sqrt(width).

    Args:
        spec: Kind, shapes and rank.
        generator: Source of randomness.
        dtype: Type of the tensors.
    """
    state: AdapterState = {}
    for name, shape in spec.tensor_shapes.items():
        if name.endswith((LORA_B, BIAS)):
            state[name] = torch.zeros(shape, dtype=dtype)
        else:
            state[name] = (2 * torch.rand(shape, generator=generator, dtype=dtype) - 1) / math.sqrt(shape[-1])
    return state


def expand_users(state: Mapping[str, Tensor], users: int) -> AdapterState:
    """Adds a leading user dimension; all users share the memory until something writes a new tensor."""
    return {name: tensor.expand(users, *tensor.shape) for name, tensor in state.items()}


def select_user(state: Mapping[str, Tensor], user: int) -> AdapterState:
    """Returns one user's slice, without the user dimension."""
    return {name: tensor[user] for name, tensor in state.items()}


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


def adapted_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Mapping[str, Tensor] | None, name: str, scaling: float
) -> Tensor:
    """Applies a frozen linear layer plus every user's own update, without a loop over users.

    Args:
        inputs: Activations, shape (users, ..., in).
        weight: Frozen weight, shape (out, in); may be of lower precision than `inputs`.
        bias: Frozen bias, shape (out,), or None.
        state: Adapters with a user dimension; None, or a state without `name`, applies the frozen layer alone.
        name: Module path of the layer.
        scaling: The factor on a low-rank update.

    Returns:
        Activations, shape (users, ..., out), in the type of `inputs`.
    """
    frozen = functional.linear(inputs.to(weight.dtype), weight, bias).to(inputs.dtype)
    update = None if state is None else user_update(inputs, state, name, scaling)
    return frozen if update is None else frozen + update


def user_update(inputs: Tensor, state: Mapping[str, Tensor], name: str, scaling: float) -> Tensor | None:
    """Returns what the users' adapters add to a layer's output, or None where they say nothing of the layer.

    Args:
        inputs: Activations, shape (users, ..., in).
        state: Adapters with a user dimension.
        name: Module path of the layer.
        scaling: The factor on a low-rank update.

    Returns:
        Broadcastable to (users, ..., out).
    """
    if name + BIAS in state:
        delta = state[name + BIAS]
        return delta.view(delta.shape[0], *[1] * (inputs.ndim - 2), delta.shape[1])
    if name + LORA_A not in state:
        return None
    a, b = state[name + LORA_A], state[name + LORA_B]
    flat = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
    # Scaling the narrow product instead of the wide one saves a pass over the output.
    return ((scaling * (flat @ a.transpose(1, 2))) @ b.transpose(1, 2)).view(*inputs.shape[:-1], b.shape[1])


def save_adapter(
    path: Path,
    state: Mapping[str, Tensor],
    spec: AdapterSpec,
    *,
    base_model: str,
    task_type: str | None,
    user: Mapping[str, Any],
    invocation_tokens: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes one user's adapter as a standard PEFT directory, atomically.

    What PEFT has no place for (the score's tensors, the user's ratings) lies beside it in files of its own. PEFT knows
    a bias only beside a low-rank update, so ``bias`` adapters carry an empty one of rank one. It knows a prefix only
    in front of all tokens of all blocks; prefixes elsewhere are written in the same form, for metarec alone.

    Args:
        path: Directory to create or replace.
        state: One user's tensors, without a user dimension.
        spec: Kind, shapes and rank.
        base_model: Name or path of the frozen model, for PEFT.
        task_type: PEFT task type such as ``CAUSAL_LM``, or None.
        user: JSON-able facts to keep with the adapter.
        invocation_tokens: Token ids from whose start the adapter is active (activated LoRA), or None for everywhere.
        dtype: Type of the adapter's tensors on disk; `round_adapter` says what is lost.
    """
    weights = _to_peft({name: state[name].detach().cpu().to(dtype) for name in spec.tensor_shapes}, spec)
    score = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if name.startswith("score.")}
    config = {
        **_peft_config(spec),
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
    }
    if invocation_tokens is not None:
        config["alora_invocation_tokens"] = list(invocation_tokens)
    with replace_dir(path, "adapter", private=True) as directory:
        write_tensors(directory / _PEFT_WEIGHTS, weights)
        write_tensors(directory / _SCORE_FILE, score)
        (directory / _PEFT_CONFIG).write_text(dump_json(config), encoding="utf-8")
        (directory / _USER_FILE).write_text(dump_json(dict(user)), encoding="utf-8")


def _peft_config(spec: AdapterSpec) -> dict[str, Any]:
    """Returns the part of a PEFT configuration that follows from the adapters' shapes."""
    if spec.kind == "prefix":
        tokens, width = next(iter(spec.shapes.values()))
        layers = len(spec.shapes)
        return {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": tokens, "token_dim": width, "num_layers": layers}
    return {
        "peft_type": "LORA",
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.rslora,
        "lora_bias": spec.kind == "bias",
        "target_modules": sorted(spec.shapes),
        "bias": "none",
        "lora_dropout": 0.0,
    }


def _to_peft(state: AdapterState, spec: AdapterSpec) -> AdapterState:
    if spec.kind == "prefix":
        # One row per virtual token: keys and values of the first block, then of the second, and so on.
        columns = [state[name + part] for name in spec.shapes for part in (PREFIX_KEYS, PREFIX_VALUES)]
        return {"prompt_embeddings": torch.cat(columns, 1)}
    if spec.kind == "lora":
        return {f"{_PEFT_PREFIX}{name}.weight": tensor.contiguous() for name, tensor in state.items()}
    weights: AdapterState = {}
    for name, (rows, columns_in) in spec.shapes.items():
        delta = state[name + BIAS]
        weights[f"{_PEFT_PREFIX}{name}{LORA_A}.weight"] = delta.new_zeros(spec.rank, columns_in)
        weights[f"{_PEFT_PREFIX}{name}{LORA_B}.weight"] = delta.new_zeros(rows, spec.rank)
        weights[f"{_PEFT_PREFIX}{name}{LORA_B}.bias"] = delta.contiguous()
    return weights


def _from_peft(weights: AdapterState, spec: AdapterSpec) -> AdapterState:
    if spec.kind == "prefix":
        names = [name + part for name in spec.shapes for part in (PREFIX_KEYS, PREFIX_VALUES)]
        return dict(zip(names, weights["prompt_embeddings"].chunk(len(names), 1), strict=True))
    if spec.kind == "lora":
        return {name.removeprefix(_PEFT_PREFIX).removesuffix(".weight"): tensor for name, tensor in weights.items()}
    return {name + BIAS: weights[f"{_PEFT_PREFIX}{name}{LORA_B}.bias"] for name in spec.shapes}


def load_adapter(path: Path, spec: AdapterSpec, device: str = "cpu") -> tuple[AdapterState, dict[str, Any]]:
    """Reads what `save_adapter` wrote.

    Args:
        path: The directory.
        spec: What the adapter must fit.
        device: Where its tensors go.

    Returns:
        One user's tensors in float32, bit for bit as saved, and the facts kept with them.

    Raises:
        ArtifactError: A file is missing, altered, or the adapter is of another kind or shape.
    """
    verify_dir(path, "adapter")
    config = load_json(path / _PEFT_CONFIG)
    expected = _peft_config(spec)
    differing = [key for key, value in expected.items() if config.get(key) != value]
    if differing:
        key = differing[0]
        raise ArtifactError(
            f"the adapter in '{path}' has {key} {config.get(key)!r}, the recommender {expected[key]!r}",
            "Load it with the recommender that made it",
        )
    state = _from_peft(read_tensors(path / _PEFT_WEIGHTS, device), spec)
    state = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in state.items()}
    state |= read_tensors(path / _SCORE_FILE, device)
    return state, load_json(path / _USER_FILE)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file.

    Raises:
        ArtifactError: The file cannot be written: the disk is full, say, or the directory is gone.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"'{path}' cannot be written: {error}", "Make room, or choose another place") from None


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        ArtifactError: The file is missing or not safetensors.
    """
    try:
        return load_file(path, device)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"'{path}' cannot be read: {error}", "Write it again") from None
