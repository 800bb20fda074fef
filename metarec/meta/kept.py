"""Keeps what a training ends in, so that it is trained once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from metarec.files.artifacts import cache_dir, content_hash, is_whole, replace_dir
from metarec.system.tensors import AdapterState, read_tensors, write_tensors

_FILE = "tuned.safetensors"


def kept_tensors(kind: str, identity: Mapping[str, Any], make: Callable[[Path], AdapterState]) -> AdapterState:
    """Returns a training's tensors from the cache; trains, from its checkpoint if there is one, where they are not.

    Args:
        kind: What is kept; a folder of the cache.
        identity: All that the tensors depend on, as JSON values.
        make: Trains, with its checkpoint at a path; one that needs no checkpoint writes none.

    Raises:
        KeyboardInterrupt: After a checkpoint was written, from which the next call goes on.
    """
    path = cache_dir() / kind / content_hash(identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes that want the same tensors at the same time wait for the first one.
    with FileLock(path.with_suffix(".lock")):
        if not is_whole(path, kind):
            checkpoint = path.with_suffix(".checkpoint")
            tensors = make(checkpoint)
            with replace_dir(path, kind) as directory:
                write_tensors(directory / _FILE, tensors)
            if checkpoint.exists():
                shutil.rmtree(checkpoint)
        return read_tensors(path / _FILE, "cpu")
