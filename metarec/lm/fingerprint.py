"""Names a model by its weights and by those settings that change what the weights mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metarec.files.artifacts import MANIFEST, content_hash, load_json, sha256_file

# Settings that leave the states of a frozen model as they are: versions, loading, training, generation and labels.
_BOOKKEEPING = re.compile(
    r"_.*|transformers_version|(torch_)?dtype|use_cache|output_.*|return_dict|.*attn_implementation.*|.*experts_implementation.*"
    r"|.*dropout.*|.*pdrop|initializer_range|gradient_checkpointing|chunk_size_feed_forward|pretraining_tp"
    r"|id2label|label2id|problem_type|finetuning_task"
)


def weights_fingerprint(location: str, config: Any) -> str:
    """Returns a hash of a model's weights and of the settings that change their meaning.

    It depends neither on the version of transformers nor on the precision that the weights are loaded in.

    Args:
        location: The directory, or the Hugging Face name, that the model was loaded from.
        config: Its transformers configuration.
    """
    directory = Path(location)
    if not directory.is_dir():
        commit = getattr(config, "_commit_hash", None)
        # A commit fixes weights and settings both.
        return content_hash([location, commit] if commit else [location, meaningful(config.to_dict())])
    if (directory / MANIFEST).exists():
        hashes = load_json(directory / MANIFEST)["sha256"]
        weights = {name: digest for name, digest in hashes.items() if name.endswith(".safetensors")}
    else:
        weights = {file.name: sha256_file(file) for file in sorted(directory.glob("*.safetensors"))}
    # The file, not the loaded configuration: to that, each version of transformers adds its own defaults.
    return content_hash([weights, meaningful(load_json(directory / "config.json"))])


def meaningful(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those settings of a configuration that change what its weights mean, in one form for all versions."""
    kept = {key: value for key, value in settings.items() if value is not None and not _BOOKKEEPING.fullmatch(key)}
    # Parts of a model, such as text_config, have settings of their own.
    parts = {key: value for key, value in kept.items() if key.endswith("_config") and isinstance(value, Mapping)}
    kept |= {key: meaningful(value) for key, value in parts.items()}
    # transformers 5 writes rope_theta and rope_scaling as one mapping.
    if "rope_theta" in kept or "rope_scaling" in kept:
        scaling = kept.pop("rope_scaling", {})
        theta = {"rope_theta": kept.pop("rope_theta")} if "rope_theta" in kept else {}
        kept["rope_parameters"] = {**scaling, **theta, **kept.get("rope_parameters", {})}
    if isinstance(kept.get("rope_parameters"), Mapping):
        rope = dict(kept["rope_parameters"])
        kind = rope.pop("type", "default")
        kept["rope_parameters"] = {"rope_type": kind, **rope}
    return kept
