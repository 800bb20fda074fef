"""Writes and reads adapters as PEFT directories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metarec.errors import ArtifactError
from metarec.files.artifacts import dump_json, load_json, replace_dir, verify_dir
from metarec.lm.adapter_kinds import AdapterSpec
from metarec.lm.output_layer import OutputLayer, without_output_layer
from metarec.system.tensors import AdapterState, read_tensors, write_tensors

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
    head: tuple[OutputLayer, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes one user's adapter as a standard PEFT directory, atomically.

    What PEFT has no place for (the score's tensors, the user's ratings) lies beside it in files of its own. Adapters of
    a kind that PEFT does not have are written in a directory of the same form, whose ``peft_type`` PEFT refuses.

    Args:
        path: Directory to create or replace.
        state: One user's tensors, without a user dimension.
        spec: Kind, shapes and rank.
        base_model: Name or path of the frozen model, for PEFT.
        task_type: PEFT task type such as ``CAUSAL_LM``, or None.
        user: JSON-able facts to keep with the adapter.
        invocation_tokens: Token ids from whose start the adapter is active (activated LoRA), or None for everywhere.
        head: The user's head and the output layer that is updated by it; None leaves it out.
        dtype: Type of the adapter's tensors on disk; `round_adapter` says what is lost.
    """
    tensors = {name: state[name].detach().cpu().to(dtype) for name in spec.tensor_shapes}
    weights = spec.implementation.to_peft(spec, tensors)
    score = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if name.startswith("score.")}
    config = {
        **_peft_config(spec),
        **spec.peft_facts,
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
    }
    if invocation_tokens is not None:
        config["alora_invocation_tokens"] = list(invocation_tokens)
    if head is not None:
        layer, vector = head
        config, weights = layer.added_to(config, weights, vector)
    with replace_dir(path, "adapter", private=True) as directory:
        write_tensors(directory / _PEFT_WEIGHTS, weights)
        write_tensors(directory / _SCORE_FILE, score)
        (directory / _PEFT_CONFIG).write_text(dump_json(config), encoding="utf-8")
        (directory / _USER_FILE).write_text(dump_json(dict(user)), encoding="utf-8")


def _peft_config(spec: AdapterSpec) -> dict[str, Any]:
    """Returns the part of a PEFT configuration that follows from the adapters' sizes."""
    config = spec.implementation.peft_config(spec)
    if config is None:
        shapes = {name: list(shape) for name, shape in sorted(spec.tensor_shapes.items())}
        config = {"peft_type": f"metarec {spec.kind}", "tensors": shapes}
    return config


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
    config, weights = without_output_layer(load_json(path / _PEFT_CONFIG), read_tensors(path / _PEFT_WEIGHTS, device))
    expected = _peft_config(spec)
    differing = [key for key, value in expected.items() if config.get(key) != value]
    if differing:
        key = differing[0]
        raise ArtifactError(
            f"the adapter in '{path}' has {key} {config.get(key)!r}, the recommender {expected[key]!r}",
            "Load it with the recommender that made it",
        )
    state = spec.implementation.from_peft(spec, weights)
    state = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in state.items()}
    state |= read_tensors(path / _SCORE_FILE, device)
    return state, load_json(path / _USER_FILE)
