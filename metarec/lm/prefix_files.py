"""Keeps what a model holds of the tokens that all prompts begin with, beside the items that it read.

A process that finds its items in the cache then opens only the adapted layers' weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from metarec.files.artifacts import is_whole, replace_dir
from metarec.system.tensors import read_tensors, write_tensors

_KIND, _FILE = "prefix", "prefix.safetensors"
_ENTERING = "entering"

# Every layer's keys and values, and the states that enter the adapted layers.
PrefixRun = tuple[Sequence[tuple[Tensor, Tensor]], Tensor]


def kept_prefix(path: Path, run: Callable[[], PrefixRun], device: Any) -> PrefixRun:
    """Returns the run of a prefix, from its directory if it was kept there before.

    Args:
        path: The directory, below one that is named by everything the run depends on.
        run: Runs the model over the prefix.
        device: Where the tensors go.

    Raises:
        ArtifactError: The disk has no room.
    """
    if not is_whole(path, _KIND):
        caches, entering = run()
        # As they are read later, so that all processes compute alike to the last bit.
        caches = [(keys.contiguous(), values.contiguous()) for keys, values in caches]
        tensors = {f"{part}.{layer}": one for layer, pair in enumerate(caches) for part, one in enumerate(pair)}
        with replace_dir(path, _KIND) as directory:
            write_tensors(directory / _FILE, {**tensors, _ENTERING: entering.contiguous()})
        return caches, entering.contiguous()
    kept = {name: tensor.clone().to(device) for name, tensor in read_tensors(path / _FILE).items()}
    layers = len(kept) // 2
    return [(kept[f"0.{layer}"], kept[f"1.{layer}"]) for layer in range(layers)], kept[_ENTERING]
