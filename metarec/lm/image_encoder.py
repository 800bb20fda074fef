"""Reads a folder of pictures by a frozen image encoder (CLIP, SigLIP, ViT, ...): one vector for each item.

The model is a local directory with safetensors weights. What is read is kept as it goes: a stopped reading goes on
where it was.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarec.data.interactions import Values
from metarec.errors import BackboneError, DataError
from metarec.files.artifacts import content_hash, load_json, replace_file
from metarec.lm.model_files import check_model_dir, refuse_missing_weights
from metarec.system.progress import progress

_LOG = logging.getLogger(__name__)
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_KEPT_EVERY = 256


def read_images(
    folder: Path, model: Path, out: Path, *, batch: int = 16, device: str = "cpu", fresh: bool = False
) -> int:
    """Writes a vector of each picture of a folder, under the picture's name without its ending, which is an item's id.

    Args:
        folder: The pictures: .jpg, .png, .webp, .gif or .bmp.
        model: A directory with an image encoder of transformers and its preprocessing.
        out: The ``.safetensors`` file; pictures that it holds already are not read again.
        batch: Pictures that are read at once.
        device: Where the model runs.
        fresh: Reads all pictures again.

    Returns:
        How many vectors the file holds.

    Raises:
        DataError: The folder holds no picture that can be read, or `out` is of another model.
        BackboneError: The model cannot be loaded, or is no image encoder.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES) if folder.is_dir() else []
    if not files:
        raise DataError(f"'{folder}' holds no picture", f"Give a folder of {', '.join(IMAGES)}, named by items' ids")
    if len({path.stem for path in files}) < len(files):
        raise DataError(f"'{folder}' holds two pictures of one name", "Keep one for each item")
    check_model_dir(model)
    name = content_hash(load_json(model / "config.json")) if (model / "config.json").is_file() else ""
    found = {} if fresh else _kept(out, name)
    left = [path for path in files if path.stem not in found]
    if not left:
        return len(found)
    encoder, processor = _load(model, device)
    with progress("reading pictures", len(left), after=2.0) as advance:
        try:
            for start in range(0, len(left), batch):
                found |= _read(encoder, processor, left[start : start + batch], device)
                advance(min(start + batch, len(left)))
                if start % _KEPT_EVERY < batch:
                    _keep(out, found, name)
        finally:
            if found:
                _keep(out, found, name)
    if not found:
        raise DataError(f"none of {len(files)} pictures of '{folder}' can be read", "Check the files")
    return len(found)


def _kept(out: Path, name: str) -> dict[str, Values]:
    """Returns the vectors that a file holds; none where there is no file.

    Raises:
        DataError: They are of another model.
    """
    if not out.is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(out, framework="numpy") as tensors:
            facts, vectors = tensors.metadata() or {}, tensors.get_tensor("vectors")
    except SafetensorError as error:
        raise DataError(f"'{out}' cannot be read: {error}", "Give another name, or --fresh") from None
    if facts.get("model") != name:
        raise DataError(f"'{out}' holds vectors of another model", "Give another name, or --fresh")
    return dict(zip(json.loads(facts["ids"]), vectors, strict=True))


def _keep(out: Path, found: dict[str, Values], name: str) -> None:
    from safetensors.numpy import save_file

    facts = {"ids": json.dumps(list(found)), "model": name}
    replace_file(out, lambda path: save_file({"vectors": np.stack(list(found.values()))}, path, facts))


def _load(model: Path, device: str) -> tuple[Any, Any]:
    """Returns an image encoder and what prepares pictures for it."""
    try:
        from PIL import Image  # noqa: F401 - transformers would say that it is missing in a page of text
    except ImportError:
        raise BackboneError("pictures need the package pillow", "pip install 'metarec[images]'") from None
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
        encoder, loading = AutoModel.from_pretrained(
            model, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        cure = "Give a directory of CLIP, SigLIP or ViT with config.json, preprocessor_config.json and safetensors"
        raise BackboneError(f"'{model}' is no image encoder: {str(error).splitlines()[0]}", cure) from None
    refuse_missing_weights(str(model), loading["missing_keys"])
    return encoder.eval().to(device), processor


@torch.inference_mode()
def _read(encoder: Any, processor: Any, files: Sequence[Path], device: str) -> dict[str, Values]:
    """Returns the vector of each picture that can be read; a line names each that cannot."""
    from PIL import Image

    unreadable = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)
    pictures = {}
    for path in files:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                with Image.open(path) as picture:
                    pictures[path.stem] = picture.convert("RGB")
            except unreadable as error:
                _LOG.warning("'%s' cannot be read and is left out: %s", path, error)
    if not pictures:
        return {}
    pixels = processor(images=list(pictures.values()), return_tensors="pt")["pixel_values"].to(device)
    vectors = _features(encoder, pixels).float().cpu().numpy()
    return dict(zip(pictures, vectors, strict=True))


def _features(encoder: Any, pixels: Tensor) -> Tensor:
    """Returns what an encoder says of pictures: CLIP's projection, a trained pooling, or its class token's state."""
    if hasattr(encoder, "get_image_features"):
        found = encoder.get_image_features(pixel_values=pixels)
        return found if isinstance(found, Tensor) else found.pooler_output
    states = encoder(pixel_values=pixels)
    projected = getattr(states, "image_embeds", None)
    if projected is not None:
        return projected  # type: ignore[no-any-return]
    # A pooler may be published without weights; a SigLIP has a head in its place.
    if getattr(states, "pooler_output", None) is not None and not hasattr(encoder, "pooler"):
        return states.pooler_output  # type: ignore[no-any-return]
    return states.last_hidden_state[:, 0]  # type: ignore[no-any-return]
