"""Covers of a made shop whose colours follow from the item's kind, and tiny random encoders that read pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

_SIZE = 16
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_PREPARED = {
    "do_center_crop": False,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
    "size": {"height": _SIZE, "width": _SIZE},
}
_COLOURS = np.array([[200, 40, 40], [40, 160, 60], [50, 70, 200], [210, 190, 50]])


def tiny_encoder(folder: Path, kind: str) -> Path:
    """Writes a tiny random image encoder of a real class, with what prepares pictures for it.

    Args:
        folder: Where it is written.
        kind: ``clip``, ``siglip`` or ``vit``.

    Returns:
        The folder.
    """
    import transformers as hf

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pixels = {"image_size": _SIZE, "patch_size": 8}
        if kind == "clip":
            text = hf.CLIPTextConfig(**_SMALL, vocab_size=32, max_position_embeddings=8)
            vision = hf.CLIPVisionConfig(**_SMALL, **pixels)
            model = hf.CLIPModel(
                hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
            )
        elif kind == "siglip":
            model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**_SMALL, **pixels))
        else:
            model = hf.ViTModel(hf.ViTConfig(**_SMALL, **pixels))
    model.save_pretrained(folder)
    name = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor", "vit": "ViTImageProcessor"}[kind]
    (folder / "preprocessor_config.json").write_text(json.dumps({**_PREPARED, "image_processor_type": name}))
    return folder


def write_covers(folder: Path, kind: np.ndarray, seed: int) -> Path:
    """Writes a picture for each item: the colour of its kind, more or less bright, under a box of any colour and noise.

    Args:
        folder: Where they are written, each named by its item's id.
        kind: The kind of each item, one of four.
        seed: Seed of the draws.
    """
    from PIL import Image

    generator = np.random.default_rng([seed, 15])
    folder.mkdir()
    for code, one in enumerate(kind):
        pixels = np.broadcast_to(_COLOURS[one] * generator.uniform(0.6, 1.2), (32, 24, 3)).copy()
        top, left = generator.integers(0, 20), generator.integers(0, 12)
        pixels[top : top + 12, left : left + 12] = generator.integers(0, 256, 3)
        pixels += generator.normal(0, 20, pixels.shape)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"i{code}.png")
    return folder


def covers_read(folder: Path, kind: np.ndarray, seed: int) -> str:
    """Writes covers, and the vectors that a tiny random CLIP makes of them; returns the name of the vectors' file."""
    from metarec.lm.image_encoder import read_images

    out = folder / "covers.safetensors"
    read_images(write_covers(folder / "covers", kind, seed), tiny_encoder(folder / "encoder", "clip"), out)
    return out.name
