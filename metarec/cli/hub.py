"""The verb that writes a run for a model hub: ``hub``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metarec.cli.options import JsonOption, show

app = typer.Typer()


@app.command(epilog="Example: metarec hub runs/mine --out my-model && hf upload me/my-model my-model")
def hub(
    run: Annotated[Path, typer.Argument(help="Directory of a run that was evaluated.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    json: JsonOption = False,
) -> None:
    """Write a run as a folder for a model hub, with a card that states data, licences and measured gains."""
    from metarec.recommending.model_card import write_hub_folder

    write_hub_folder(run, out)
    show({"folder": str(out), "card": str(out / "README.md")}, json)
