"""Adapters on disk in PEFT's own form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metarec.artifacts import dump_json, load_json, replace_dir, verify_dir
from metarec.errors import ArtifactError
from metarec.lm.adapters import BIAS, LORA_A, LORA_B, PREFIX_KEYS, PREFIX_VALUES, AdapterSpec
from metarec.tensors import AdapterState, read_tensors, write_tensors

_PEFT_PREFIX = "base_model.model."
_PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_CONFIG = "adapter_config.json"
_USER_FILE = "user.json"
_SCORE_FILE = "score.safetensors"


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
