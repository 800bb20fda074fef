"""The verbs that make features of items: ``features images``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metarec.cli.options import JsonOption, show
from metarec.errors import ConfigError

features_app = typer.Typer(help="Vectors of items from what is known of them.", no_args_is_help=True)


@features_app.callback()
def _together() -> None:
    """Vectors of items from what is known of them."""


@features_app.command(
    epilog="Example: metarec features images covers --model models/clip-vit-base-patch32 --out covers.safetensors; "
    "then: metarec train orders.csv --side vectors.cover=covers.safetensors"
)
def images(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures, each named by its item's id: 42.jpg.")],
    model: Annotated[Path, typer.Option(help="Directory of an image encoder of transformers: CLIP, SigLIP, ViT, ...")],
    out: Annotated[Path, typer.Option(help="The .safetensors file; what it holds is not read again.")],
    batch: Annotated[int, typer.Option(min=1, help="Pictures that are read at once.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Read all pictures again.")] = False,
    json: JsonOption = False,
) -> None:
    """Read a folder of pictures by an image encoder; Ctrl-C loses nothing."""
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out '{out}' is no .safetensors", "Write --out covers.safetensors")
    if not model.is_dir():
        raise ConfigError(f"the model directory '{model}' does not exist", "Check the path")
    from metarec.lm.image_encoder import read_images
    from metarec.system.devices import check_device

    vectors = read_images(folder, model, out, batch=batch, device=check_device(device), fresh=fresh)
    show({"vectors": vectors, "file": str(out)}, json)
