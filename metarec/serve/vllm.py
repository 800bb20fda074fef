"""Exports adapters for vLLM's file system LoRA resolver: a directory of PEFT directories by name.

A name is a user's random key and a hash of what is written, never an id, so that a server that caches by name never
serves an old adapter for a new one, neither after a rating nor of a recommender that was trained again. Only the
language model's part of the score is exported, a head that was fitted in closed form as an update of the output layer,
not its other terms and weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

from metarec.errors import ArtifactError, StoreError
from metarec.files.artifacts import content_hash, dump_json, load_json, recover_dir, replace_dir
from metarec.lm.output_layer import NO_PLACE, OutputLayer
from metarec.recommending.recommender_files import OUTPUT_LAYER
from metarec.scorers.language.score import HEAD
from metarec.serve.store import AdapterStore
from metarec.system.tensors import read_tensors, write_tensors

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_SCORE, _USER = "score.safetensors", "user.json"


def export_adapters(
    store: AdapterStore, out: Path, *, users: Collection[str] | None = None, base_model: str | None = None
) -> dict[str, str]:
    """Writes the newest adapter of each user.

    Args:
        store: The store with the adapters.
        out: ``VLLM_LORA_RESOLVER_CACHE_DIR``; adapters that exist under the same name stay as they are.
        users: Ids of the users to export; None exports all.
        base_model: The name under which vLLM serves the base model; None keeps the adapter's own.

    Returns:
        The adapter's name by user.

    Raises:
        StoreError: A user is unknown or has no adapter.
        ArtifactError: An adapter is damaged, or not one that vLLM takes.
    """
    names = {}
    found = set()
    for user, profile in store.users():
        if users is not None and user not in users:
            continue
        found.add(user)
        records = store.records(profile.key)
        if not records:
            continue
        store.verify(records[0])
        source = store.path(records[0])
        config, weights = load_json(source / _CONFIG), read_tensors(source / _WEIGHTS)
        if config["peft_type"] != "LORA" or config.get("lora_bias"):
            kind = "LoRA with biases" if config["peft_type"] == "LORA" else config["peft_type"]
            raise ArtifactError(f"the adapter is a {kind}", "vLLM takes LoRA: train with --set adapter.kind=lora")
        if config.get("alora_invocation_tokens"):
            problem = "the adapter is an activated LoRA, which vLLM does not serve"
            raise ArtifactError(problem, "Train with --set adapter.active_tokens=null")
        head = read_tensors(source / _SCORE).get(HEAD)
        if head is not None:
            layer = load_json(source / _USER).get(OUTPUT_LAYER)
            if layer is None:
                raise ArtifactError(NO_PLACE, "Export adapters that take gradient steps, or use another backbone")
            config, weights = OutputLayer(**layer).added_to(config, weights, head)
        if base_model is not None:
            config["base_model_name_or_path"] = base_model
        names[user] = name = f"{profile.key}-{_digest(config, weights)}"
        if recover_dir(out / name):
            continue
        with replace_dir(out / name, "vllm adapter") as directory:
            write_tensors(directory / _WEIGHTS, weights)
            (directory / _CONFIG).write_text(dump_json(config), encoding="utf-8")
    if missing := sorted({*(users or ())} - names.keys()):
        state = "has no adapter" if missing[0] in found else "is unknown"
        raise StoreError(f"user '{missing[0]}' {state}", "See: metarec store ls STORE --users")
    return names


def _digest(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Returns a hash of an adapter's configuration and weights."""
    raw = {name: weights[name].contiguous().view(uint8).numpy().tobytes() for name in sorted(weights)}
    return content_hash([config, {name: hashlib.sha256(part).hexdigest() for name, part in raw.items()}])
