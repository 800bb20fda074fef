"""Tensors by name, with or without a leading user dimension, their safetensors files, and rows padded to one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from metarec.errors import ArtifactError

AdapterState = dict[str, Tensor]
_COPIES_FROM_PINNED = frozenset({"cuda"})


def expand_users(state: Mapping[str, Tensor], users: int) -> AdapterState:
    """Adds a leading user dimension; all users share the memory until something writes a new tensor."""
    return {name: tensor.expand(users, *tensor.shape) for name, tensor in state.items()}


def select_user(state: Mapping[str, Tensor], user: int) -> AdapterState:
    """Returns one user's slice, without the user dimension."""
    return {name: tensor[user] for name, tensor in state.items()}


def pad_rows(rows: Sequence[NDArray[np.generic]], dtype: DTypeLike, width: int | None = None) -> Tensor:
    """Returns one array per user as one tensor, each row filled with zeros at its end.

    Args:
        rows: Arrays of shape (entries,), of different lengths.
        dtype: Type of the tensor.
        width: Length of the padded rows; None takes the longest row's.

    Returns:
        Shape (rows, width), on the CPU.
    """
    width = max(map(len, rows), default=0) if width is None else width
    padded = np.zeros((len(rows), width), dtype)
    for row, entries in zip(padded, rows, strict=True):
        row[: len(entries)] = entries
    return torch.from_numpy(padded)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Returns a tensor on a device; from the CPU to CUDA it is copied while the CPU goes on.

    CUDA copies so from memory that stays in place (pinned); for other devices nothing is pinned.
    """
    if torch.device(device).type not in _COPIES_FROM_PINNED or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, by way of the CPU from any other device.

    Raises:
        ArtifactError: The file cannot be written: the disk is full, say, or the directory is gone.
    """
    try:
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"'{path}' cannot be written: {error}", "Make room, or choose another place") from None


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        ArtifactError: The file is missing or not safetensors.
    """
    try:
        return {name: tensor.to(device) for name, tensor in load_file(path, "cpu").items()}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"'{path}' cannot be read: {error}", "Write it again") from None


def read_by_length(items: np.ndarray, lengths: np.ndarray, read: Callable[[Tensor], Tensor], at_once: int) -> Tensor:
    """Returns a vector of each of some items, shape (items, width), reading texts of similar length side by side.

    Args:
        items: Item codes.
        lengths: Number of tokens of every item's text, shape (all items,).
        read: Returns the vectors of a block of items, differentiable or not.
        at_once: Size of a block at most.
    """
    order = np.argsort(lengths[items], kind="stable")
    vectors = torch.cat([read(block) for block in torch.from_numpy(items[order]).split(at_once)])
    return vectors[torch.from_numpy(np.argsort(order))]
