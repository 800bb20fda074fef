"""Low-rank adapters batched over users, and their PEFT form on disk.

A state is a plain dict of tensors whose leading dimension is the user: ``<module>.lora_A`` is (users, rank, in),
``<module>.lora_B`` is (users, out, rank). Names under ``score.`` are scalars of the score, not of the language
model. Pure functions; knows nothing of prompts, ratings or transformers.

Source: Hu et al. 2021, "LoRA", eq. 3; the batched product is the one of Punica (Chen et al. 2023) in plain matmuls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from metarec.artifacts import dump_json, load_json, replace_dir, verify_dir
from metarec.errors import ArtifactError

AdapterState = dict[str, Tensor]

LORA_A = ".lora_A"
LORA_B = ".lora_B"
_PEFT_PREFIX = "base_model.model."
_PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_CONFIG = "adapter_config.json"
_USER_FILE = "user.json"
_SCORE_FILE = "score.safetensors"


@dataclass(frozen=True)
class LoraSpec:
    """Which linear layers carry an adapter and of what size.

    Args:
        rank: Inner dimension of every adapter.
        alpha: The adapter's output is scaled by ``alpha / rank``.
        shapes: Module path to (out features, in features).
    """

    rank: int
    alpha: float
    shapes: Mapping[str, tuple[int, int]]

    @property
    def scaling(self) -> float:
        """The factor on ``B A x``."""
        return self.alpha / self.rank


def init_lora(spec: LoraSpec, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> AdapterState:
    """Returns a fresh adapter without a user dimension: A uniform within 1/sqrt(in), B zero, so it changes nothing.

    Args:
        spec: Modules, shapes and rank.
        generator: Source of randomness.
        dtype: Type of the tensors.
    """
    state: AdapterState = {}
    for name, (out_features, in_features) in spec.shapes.items():
        bound = 1 / math.sqrt(in_features)
        uniform = torch.rand(spec.rank, in_features, generator=generator, dtype=dtype)
        state[name + LORA_A] = (2 * uniform - 1) * bound
        state[name + LORA_B] = torch.zeros(out_features, spec.rank, dtype=dtype)
    return state


def expand_users(state: Mapping[str, Tensor], users: int) -> AdapterState:
    """Adds a leading user dimension; all users share the memory until something writes a new tensor."""
    return {name: tensor.expand(users, *tensor.shape) for name, tensor in state.items()}


def select_user(state: Mapping[str, Tensor], user: int) -> AdapterState:
    """Returns one user's slice, without the user dimension."""
    return {name: tensor[user] for name, tensor in state.items()}


def lora_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Mapping[str, Tensor] | None, name: str, scaling: float
) -> Tensor:
    """Applies a frozen linear layer plus every user's own low-rank update, without a loop over users.

    Args:
        inputs: Activations, shape (users, ..., in).
        weight: Frozen weight, shape (out, in); may be of lower precision than `inputs`.
        bias: Frozen bias, shape (out,), or None.
        state: Adapters with a user dimension; None, or a state without `name`, applies the frozen layer alone.
        name: Module path of the layer.
        scaling: ``alpha / rank``.

    Returns:
        Activations, shape (users, ..., out), in the type of `inputs`.
    """
    frozen = functional.linear(inputs.to(weight.dtype), weight, bias).to(inputs.dtype)
    if state is None or name + LORA_A not in state:
        return frozen
    a, b = state[name + LORA_A], state[name + LORA_B]
    flat = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
    update = (flat @ a.transpose(1, 2)) @ b.transpose(1, 2)
    return frozen + scaling * update.view(frozen.shape)


def save_adapter(
    path: Path,
    state: Mapping[str, Tensor],
    spec: LoraSpec,
    *,
    base_model: str,
    task_type: str | None,
    user: Mapping[str, Any],
    invocation_tokens: tuple[int, ...] | None = None,
) -> None:
    """Writes one user's adapter as a standard PEFT directory, atomically.

    What PEFT has no place for (the score's scalars, the user's ratings) lies beside it in files of its own.

    Args:
        path: Directory to create or replace.
        state: One user's tensors, without a user dimension.
        spec: Modules, shapes and rank.
        base_model: Name or path of the frozen model, for PEFT.
        task_type: PEFT task type such as ``CAUSAL_LM``, or None.
        user: JSON-able facts to keep with the adapter.
        invocation_tokens: Token ids from whose start the adapter is active (activated LoRA), or None for everywhere.
    """
    peft = {
        f"{_PEFT_PREFIX}{name}.weight": tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if name.endswith((LORA_A, LORA_B))
    }
    score = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if name.startswith("score.")}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "target_modules": sorted(spec.shapes),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    if invocation_tokens is not None:
        config["alora_invocation_tokens"] = list(invocation_tokens)
    with replace_dir(path, "adapter") as directory:
        save_file(peft, directory / _PEFT_WEIGHTS, metadata={"format": "pt"})
        save_file(score, directory / _SCORE_FILE)
        (directory / _PEFT_CONFIG).write_text(dump_json(config), encoding="utf-8")
        (directory / _USER_FILE).write_text(dump_json(dict(user)), encoding="utf-8")


def load_adapter(path: Path, spec: LoraSpec, device: str = "cpu") -> tuple[AdapterState, dict[str, Any]]:
    """Reads what `save_adapter` wrote.

    Args:
        path: The directory.
        spec: What the adapter must fit.
        device: Where its tensors go.

    Returns:
        One user's tensors, bit for bit as saved, and the facts kept with them.

    Raises:
        ArtifactError: A file is missing, altered, or the adapter is of another shape.
    """
    verify_dir(path, "adapter")
    config = load_json(path / _PEFT_CONFIG)
    if (config["r"], config["lora_alpha"], config["target_modules"]) != (spec.rank, spec.alpha, sorted(spec.shapes)):
        raise ArtifactError(
            f"the adapter in '{path}' has rank {config['r']} on {len(config['target_modules'])} modules, the "
            f"recommender rank {spec.rank} on {len(spec.shapes)}",
            "Load it with the recommender that made it",
        )
    peft = read_tensors(path / _PEFT_WEIGHTS, device)
    state = {name.removeprefix(_PEFT_PREFIX).removesuffix(".weight"): tensor for name, tensor in peft.items()}
    state |= read_tensors(path / _SCORE_FILE, device)
    return state, load_json(path / _USER_FILE)


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        ArtifactError: The file is missing or not safetensors.
    """
    try:
        return load_file(path, device)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"'{path}' cannot be read: {error}", "Write it again") from None
