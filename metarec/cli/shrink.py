"""The verb ``shrink``: a model with fewer blocks, as a directory that is a backbone like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from metarec.cli.options import JsonOption, show
from metarec.errors import ConfigError

app = typer.Typer()
# Texts by which blocks are compared.
_SAMPLE = 16


@app.command(
    epilog="Example: metarec shrink smollm2-135m-instruct --blocks 24 --out small && "
    "metarec train --backbone small --name mine && metarec serve --checkpoint runs/mine"
)
def shrink(
    backbone: Annotated[str, typer.Argument(help="The model: an embedded name, a directory or a Hugging Face name.")],
    blocks: Annotated[int, typer.Option(help="How many of its blocks are kept.", min=1)],
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    keep: Annotated[
        Literal["lowest", "influential"],
        typer.Option(help="Which: the lowest, or those that turn the states of a task's prompts most."),
    ] = "lowest",
    task: Annotated[str, typer.Option(help="Of influential: the task whose prompts are read.")] = "movielens/user-cold",
    json: JsonOption = False,
) -> None:
    """Write a model with fewer blocks, which every verb takes as --backbone."""
    from metarec.lm.hub import check_backbone

    check_backbone(backbone)
    from metarec.lm.loading import load_backbone, save_backbone
    from metarec.lm.smaller import influence, weight_bytes, with_blocks

    if out.resolve() == Path(backbone).resolve():
        raise ConfigError(f"--out '{out}' is the model that is read", "Choose another directory")
    whole = load_backbone(backbone)
    count = int(whole.modules.config.num_hidden_layers)
    if blocks >= count:
        raise ConfigError(f"--blocks is {blocks}, and '{backbone}' has {count}", f"Keep 1 to {count - 1}")
    kept = list(range(blocks))
    if keep == "influential":
        from metarec.data.task_data import load_task_data
        from metarec.data.task_files import load_task

        chosen = load_task(task)
        catalog = load_task_data(chosen, 0).interactions.catalog
        texts = [chosen.template.render(catalog, code) for code in range(min(_SAMPLE, len(catalog)))]
        kept = influence(whole, texts).argsort(descending=True)[:blocks].tolist()
    small = with_blocks(whole, kept)
    save_backbone(out, small)
    show(
        {
            "backbone": str(out),
            "blocks": sorted(kept),
            "of": count,
            "bytes": weight_bytes(small),
            "bytes_before": weight_bytes(whole),
        },
        json,
    )
