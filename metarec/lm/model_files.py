"""Looks at a model's directory before any loader does: safetensors only, whole, and where its index says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from metarec.errors import BackboneError
from metarec.files.artifacts import MANIFEST, load_json, verify_dir

_CURE = "Fetch the model again, or convert its weights to safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def check_model_dir(directory: Path) -> None:
    """Checks a model's weights and the indexes that name them.

    Raises:
        BackboneError: An index names a file that is not safetensors, not there or elsewhere; weights are damaged, or
            pickled alone.
        ArtifactError: An index is not JSON, or the directory is metarec's own and a byte of it changed.
    """
    if (directory / MANIFEST).exists():
        verify_dir(directory, "model")
    for index in sorted(directory.glob("*.index.json")):
        held = load_json(index)
        named = held.get("weight_map") if isinstance(held, dict) else None
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            raise BackboneError(f"'{index}' is no index of weights", _CURE)
        if index.name.endswith(".bin.index.json") and any(directory.glob("*.safetensors")):
            continue  # beside safetensors, which are read instead
        for file in sorted(set(named.values())):
            if not file.endswith(".safetensors") or Path(file).name != file:
                raise BackboneError(f"'{index}' names '{file}'; only safetensors beside it are read", _CURE)
            if not (directory / file).is_file():
                raise BackboneError(f"'{directory / file}', which '{index.name}' names, is missing", _CURE)
    for file in sorted(directory.glob("*.safetensors")):
        _check_weights(file)
    refuse_pickles(str(directory), [file.name for file in directory.iterdir()])


def missing_shards(directory: Path) -> list[str]:
    """Returns the files that a directory's indexes of safetensors name and that are not there."""
    named = {
        file
        for index in directory.glob("*.safetensors.index.json")
        for file in load_json(index).get("weight_map", {}).values()
    }
    return sorted(file for file in named if not (directory / file).is_file())


def refuse_pickles(name: str, files: Iterable[str]) -> None:
    """Raises a `BackboneError` where a model's only weights are pickled, which could run code when they are read.

    Args:
        name: The model's name.
        files: The names of its files; those in folders of their own belong to other uses of the model.
    """
    beside = [file for file in files if "/" not in file]
    pickled = sorted(file for file in beside if file.endswith(_PICKLED))
    if pickled and not any(file.endswith(".safetensors") for file in beside):
        raise BackboneError(
            f"the model '{name}' has pickled weights alone ('{pickled[0]}'), which could run code when they are read",
            "Convert them to safetensors where you trust their source, and give the directory",
        )


def refuse_missing_weights(name: str, missing: Iterable[str]) -> None:
    """Raises a `BackboneError` where weights are missing that a loader would fill with random numbers.

    Args:
        name: The model's name.
        missing: Names of the missing weights.
    """
    # Sentence encoders are published without the pooler, which nothing here reads.
    left = sorted(key for key in missing if "pooler" not in key)
    if left:
        raise BackboneError(
            f"the model '{name}' lacks {len(left)} weights that its configuration asks for, '{left[0]}' among them",
            "Fetch the model again; check 'num_hidden_layers' and 'architectures' in its config.json",
        )


def _check_weights(file: Path) -> None:
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"'{file}' is empty, truncated or altered: {error}", _CURE) from None
