"""Caches of what a model reads of every item: directories that are filled block by block, and go on after a stop.

Knows nothing of models, nor of what the arrays hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from metarec.artifacts import MANIFEST, dump_json, load_json, write_manifest
from metarec.progress import progress

BLOCK_ITEMS = 64
# How far an interrupted reading is.
_DONE = "done.json"


def start_reading(path: Path) -> None:
    """Makes a cache's directory, or takes up one that is not complete or not whole."""
    path.mkdir(parents=True, exist_ok=True)
    (path / MANIFEST).unlink(missing_ok=True)


def open_array(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> np.memmap:
    """Opens an array on disk, or makes one of zeros; float64 or float32."""
    if path.exists():
        return np.load(path, mmap_mode="r+", allow_pickle=False)  # type: ignore[no-any-return]
    return np.lib.format.open_memmap(path, "w+", np.float64 if dtype == torch.float64 else np.float32, shape)


def blocks_to_read(path: Path, lengths: np.ndarray, arrays: Sequence[np.memmap]) -> Iterator[np.ndarray]:
    """Yields item codes block by block, items of like length together; goes on where an interrupted reading stopped.

    Args:
        path: The cache's directory.
        lengths: Tokens of every item, shape (items,).
        arrays: What the caller fills with each block before it asks for the next; written through now and then.
    """
    order = np.argsort(lengths, kind="stable")
    marker = path / _DONE
    done = int(load_json(marker)["items"]) if marker.exists() else 0
    work = np.cumsum(lengths[order])
    with progress(f"reading {len(order):,} items once", int(work[-1])) as advance:
        for start in range(done, len(order), BLOCK_ITEMS):
            items = order[start : start + BLOCK_ITEMS]
            yield items
            stop = start + len(items)
            advance(int(work[stop - 1]))
            if start // BLOCK_ITEMS % 16 == 15:
                for array in arrays:
                    array.flush()
                marker.write_text(dump_json({"items": stop}), encoding="utf-8")
    for array in arrays:
        array.flush()


def finish_reading(path: Path, kind: str) -> None:
    """Declares a cache complete."""
    (path / _DONE).unlink(missing_ok=True)
    write_manifest(path, kind)
