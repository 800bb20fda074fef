"""The fitted stack in the cache: a run that was interrupted, and another on the same data and settings, reads it.

A stack is kept under the hash of all that it is a function of: data, split, features, settings, seed, and the code that
fits it. The files name no user.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from metarec.config import CollaborativeConfig
from metarec.data.interactions import Codes, Flags, Interactions
from metarec.files.artifacts import cache_dir, dump_json, is_whole, replace_dir
from metarec.scorers.collaborative.features import Features
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.stack import FittedStack, Fold, OutOfFold, Stacked, fit_stack
from metarec.scorers.collaborative.text import TextRidge, unit_vectors
from metarec.scorers.serialization import read_scorer, write_scorer

_KIND = "stack"
_PACKAGE = Path(__file__).parents[1]
# What a fit calls besides its own folder.
_CODE = ("data/episodes.py", "data/interactions.py", "meta/losses.py", "system/tensors.py")
_LIBRARIES = ("numpy", "scipy", "scikit-learn", "torch")


def cached_stack(
    interactions: Interactions,
    users: Codes,
    features: Features,
    settings: CollaborativeConfig,
    *,
    threshold: float,
    hide: float = 0.0,
    query_items: Flags | None = None,
    seed: int = 0,
) -> FittedStack:
    """Returns what `fit_stack` does for the same arguments, from the cache if it was fitted before.

    Raises:
        ArtifactError: The cache cannot be written.
    """
    options = {"threshold": str(threshold), "hide": hide, "seed": seed}
    if query_items is not None:
        options["query_items"] = np.flatnonzero(query_items).tolist()
    path = cache_dir() / _KIND / _key(interactions, users, features, settings, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes that want the same stack at the same time wait for the first one.
    with FileLock(path.with_suffix(".lock")):
        if is_whole(path, _KIND):
            return _read(path, [interactions.users[code] for code in users], features)
        fitted = fit_stack(
            interactions, users, features, settings, threshold=threshold, hide=hide, query_items=query_items, seed=seed
        )
        fold_of = fitted.out_of_fold.fold
        with replace_dir(path, _KIND) as directory:
            parts = {
                "prior": fitted.prior,
                "stack": _with_vectors(fitted.stack, np.zeros((0, 0))),
                "folds": tuple(
                    {
                        "prior": fold.prior,
                        "stack": _with_vectors(fold.stack, np.zeros((0, 0))),
                        "hidden": fold.hidden * 1,
                    }
                    for fold in fitted.out_of_fold.folds
                ),
                "fold": np.array([fold_of[interactions.users[code]] for code in users], np.int64),
            }
            write_scorer(directory, _KIND, parts)
    return fitted


def _read(path: Path, users: list[str], features: Features) -> FittedStack:
    parts: Any = read_scorer(path, _KIND)
    vectors = unit_vectors(features.text)
    folds = tuple(Fold(fold["prior"], _with_vectors(fold["stack"], vectors), fold["hidden"]) for fold in parts["folds"])
    fold_of = dict(zip(users, parts["fold"].tolist(), strict=True))
    return FittedStack(parts["prior"], _with_vectors(parts["stack"], vectors), OutOfFold(folds, fold_of))


def _with_vectors(stack: Stacked, vectors: Floats) -> Stacked:
    """Returns the stack whose text regression reads other vectors: they are the features', and are not kept twice."""
    members = tuple(
        replace(member, vectors=vectors) if isinstance(member, TextRidge) else member for member in stack.members
    )
    return replace(stack, members=members)


def _key(
    interactions: Interactions,
    users: Codes,
    features: Features,
    settings: CollaborativeConfig,
    options: Mapping[str, Any],
) -> str:
    """Returns the name of everything that a stack is a function of."""
    digest = hashlib.sha256(interactions.digest.encode())
    arrays = {"liked": interactions.liked, "users": users, "text": features.text, "unrated": features.unrated}
    arrays |= {f"block {name}": block for name, block in features.blocks.items()}
    for name, array in arrays.items():
        digest.update(f"{name} {None if array is None else (array.shape, str(array.dtype))}".encode())
        digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    digest.update(dump_json({**options, **settings.model_dump(mode="json")}).encode())
    for file in [*sorted((_PACKAGE / "scorers" / "collaborative").glob("*.py")), *(_PACKAGE / name for name in _CODE)]:
        digest.update(file.name.encode() + file.read_bytes())
    digest.update(" ".join(version(library) for library in _LIBRARIES).encode())
    return digest.hexdigest()[:16]
