"""Tensors by name, with or without a leading user dimension, and their safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from metarec.errors import ArtifactError

AdapterState = dict[str, Tensor]


def expand_users(state: Mapping[str, Tensor], users: int) -> AdapterState:
    """Adds a leading user dimension; all users share the memory until something writes a new tensor."""
    return {name: tensor.expand(users, *tensor.shape) for name, tensor in state.items()}


def select_user(state: Mapping[str, Tensor], user: int) -> AdapterState:
    """Returns one user's slice, without the user dimension."""
    return {name: tensor[user] for name, tensor in state.items()}


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
