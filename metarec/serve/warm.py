"""What the service computes of a recommender's items before it answers, kept beside the model for the next start.

It is a directory with a SHA-256 manifest, named by everything that its content depends on. One that is damaged, of
another recommender or of other settings is made again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec.errors import MetarecError
from metarec.files.artifacts import cache_dir, content_hash, dump_json, is_whole, load_json, replace_dir
from metarec.recommender import MetaRecommender
from metarec.scorers.language.linearized import Linearized
from metarec.serve.retrieval import Effects
from metarec.system.tensors import read_tensors, write_tensors

_LOG = logging.getLogger(__name__)
_KIND, _TENSORS, _FACTS = "warm", "warm.safetensors", "warm.json"
_FORMAT = 1


@dataclass(frozen=True)
class Warm:
    """What is known of the items of a catalog before anybody asks.

    Args:
        linearized: Log-odds and gradients at the initialization; None where there are none.
        effects: The effect of an adapter on every item.
        new_user_scores: Scores for a user without ratings, shape (items,).
    """

    linearized: Linearized | None
    effects: Effects
    new_user_scores: NDArray[np.float32]


def warm_folder(checkpoint: Path) -> Path:
    """Returns where to keep what a checkpoint's service computes: beside its model, or in the cache."""
    if os.access(checkpoint, os.W_OK):
        return checkpoint / _KIND
    return cache_dir() / _KIND / content_hash(str(checkpoint.absolute()))


def warm_key(recommender: MetaRecommender, linearized_bytes: int) -> str:
    """Returns a name for all that the content depends on."""
    config, prior = recommender.config, recommender.fitted.prior
    means = hashlib.sha256(prior.total.tobytes() + prior.count.tobytes()).hexdigest()
    facts = [_FORMAT, recommender.digest, means, linearized_bytes, config.device, config.cache, torch.__version__]
    return content_hash(facts)


def read_warm(folder: Path, key: str) -> Warm | None:
    """Reads what is kept, or returns None where nothing is, or it is damaged or of something else."""
    if not is_whole(folder, _KIND):
        return None
    facts = load_json(folder / _FACTS)
    if facts["key"] != key:
        return None
    tensors = read_tensors(folder / _TENSORS)
    linearized = None
    if "values" in tensors:
        start = {name.removeprefix("start/"): value for name, value in tensors.items() if name.startswith("start/")}
        ordered = {name: start[name] for name in facts["start"]}
        linearized = Linearized(ordered, tensors["place"], tensors["values"], tensors["slopes"])
    effects = Effects(tuple(facts["names"]), tensors.get("directions"), tensors["coordinates"].numpy())
    return Warm(linearized, effects, tensors["new_user_scores"].numpy())


def write_warm(folder: Path, key: str, warm: Warm) -> None:
    """Keeps what was computed; where that fails, the next start computes it again."""
    tensors: dict[str, Tensor] = {
        "coordinates": torch.from_numpy(np.ascontiguousarray(warm.effects.coordinates)),
        "new_user_scores": torch.from_numpy(np.ascontiguousarray(warm.new_user_scores)),
    }
    if warm.effects.directions is not None:
        tensors["directions"] = warm.effects.directions
    start = {} if warm.linearized is None else warm.linearized.start
    if warm.linearized is not None:
        one = warm.linearized
        tensors |= {"place": one.place, "values": one.values, "slopes": one.slopes}
        tensors |= {f"start/{name}": value for name, value in start.items()}
    facts = {"key": key, "names": list(warm.effects.names), "start": list(start)}
    try:
        with replace_dir(folder, _KIND) as directory:
            write_tensors(directory / _TENSORS, {name: value.cpu().contiguous() for name, value in tensors.items()})
            (directory / _FACTS).write_text(dump_json(facts), encoding="utf-8")
    except (MetarecError, OSError) as error:
        _LOG.warning("what the service computes at its start could not be kept (%s)", type(error).__name__)
