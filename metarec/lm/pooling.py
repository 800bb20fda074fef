"""Says how a sentence encoder makes one vector of a text's tokens, as the files beside its weights have it.

Sentence encoders are published as a list of modules, `modules.json`: the transformer, then the pooling, whose folder
holds its settings. What has no such list averages all tokens.

Source: Reimers and Gurevych 2019, "Sentence-BERT", section 3 (mean and first token).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metarec.errors import BackboneError
from metarec.files.artifacts import load_json, write_json
from metarec.lm.hub import find_on_hub

Pooling = Literal["mean", "first"]
_LOG = logging.getLogger(__name__)
_MODULES, _SETTINGS, _FOLDER = "modules.json", "config.json", "1_Pooling"
# A vector is scaled to length one, so that what an average is divided by makes no difference.
_MEANS: dict[str, Pooling] = {
    "mean": "mean",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean",
    "cls": "first",
    "cls_token": "first",
}
_MODE = "pooling_mode"
# Modules that leave directions as they are, or that every encoder has.
_READ = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class SentenceModules:
    """What follows the transformer of a sentence encoder.

    Args:
        pooling: Names of the ways in which it pools; there should be one.
        others: Kinds of modules that are not read here.
        known: False where the hub's cache has the model, and not the list of its modules.
    """

    pooling: tuple[str, ...] = ("mean",)
    others: tuple[str, ...] = ()
    known: bool = True

    @staticmethod
    def of(location: str) -> SentenceModules:
        """Returns what a model's files say, or the mean of all tokens where they say nothing.

        Args:
            location: Its directory, or its name on the Hugging Face hub; files are fetched from there if the model is
                not in the cache yet.

        Raises:
            ArtifactError: One of the files is not JSON.
        """
        if _fetched_without_modules(location):
            return SentenceModules(known=False)
        listed = _file(location, _MODULES)
        modules = load_json(listed) if listed is not None else []
        kinds = {str(module.get("type", "")).rpartition(".")[2]: str(module.get("path", "")) for module in modules}
        others = tuple(sorted(set(kinds) - set(_READ)))
        found = _file(location, f"{kinds['Pooling']}/{_SETTINGS}") if kinds.get("Pooling") else None
        return SentenceModules(others=others) if found is None else SentenceModules(_modes(load_json(found)), others)

    def read_as(self, name: str) -> Pooling:
        """Returns how an encoder pools; warns of modules that are not read, and where nothing says how it pools.

        Args:
            name: How the encoder was asked for.

        Raises:
            BackboneError: It pools in a way that is not known here.
        """
        if not self.known:
            _LOG.warning(
                "the hub's cache does not say how the encoder '%s' pools, so that all tokens are averaged; "
                "hf download %s fetches it",
                *(name, name),
            )
        if self.others:
            _LOG.warning("the encoder '%s' has modules that are not read: %s", name, ", ".join(self.others))
        known = {_MEANS.get(mode) for mode in self.pooling}
        for mode in known:
            if mode is not None and len(known) == 1:
                return mode
        raise BackboneError(
            f"the encoder '{name}' pools by {' and '.join(self.pooling) or 'nothing'}; known are the mean "
            "of all tokens and the first one",
            "Choose another sentence encoder",
        )


def _modes(settings: dict[str, Any]) -> tuple[str, ...]:
    """Returns the modes that a pooling's settings name: one by name, or flags as older versions write them."""
    named = settings.get(_MODE)
    if named is not None:
        return (str(named),)
    flags = {key.removeprefix(f"{_MODE}_"): value for key, value in settings.items() if key.startswith(f"{_MODE}_")}
    return tuple(sorted(mode for mode, on in flags.items() if on is True))


def write_pooling(directory: Path, pooling: Pooling, width: int) -> None:
    """Writes an encoder's list of modules, from which `SentenceModules` and sentence-transformers read how it pools.

    Args:
        directory: The encoder's directory.
        pooling: How it pools.
        width: Of its states.
    """
    types = {"": "Transformer", _FOLDER: "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(types.items())
    ]
    write_json(directory / _MODULES, modules)
    settings = {"word_embedding_dimension": width}
    settings |= {f"{_MODE}_cls_token": pooling == "first", f"{_MODE}_mean_tokens": pooling == "mean"}
    write_json(directory / _FOLDER / _SETTINGS, settings)


def pooled_tokens(own: Tensor, pooling: Pooling) -> Tensor:
    """Returns which tokens are averaged, of the same shape.

    Args:
        own: Which tokens are a text's own, the first one first, shape (..., tokens).
        pooling: How the encoder pools.
    """
    return own & (own.to(torch.int32).cumsum(-1) == 1) if pooling == "first" else own


def _fetched_without_modules(location: str) -> bool:
    """Says whether the hub's cache has a model's weights, and does not know whether it has a list of modules."""
    if Path(location).is_dir() or not find_on_hub(location):
        return False
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(location, _MODULES) is None


def _file(location: str, name: str) -> Path | None:
    """Returns a file of a model; None where the model has none of this name."""
    if Path(location).is_dir():
        path = Path(location) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(location, name, local_files_only=find_on_hub(location)))
    except EntryNotFoundError:  # so does what is not in the cache where only the cache is asked
        return None
