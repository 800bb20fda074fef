"""Options that several verbs share, and how results are printed. Knows no verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file with settings.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting, e.g. train.steps=100; may be repeated.", show_default=False),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        help="batched, or learn2learn: the same training through that library, one user after another "
        "(default: batched).",
        show_default=False,
    ),
]
SeedOption = Annotated[
    int | None, typer.Option(help="Seed of split, training and tie-breaking (default: 0).", show_default=False)
]
TaskOption = Annotated[
    str | None, typer.Option(help="Task name or YAML file (default: movielens/user-cold).", show_default=False)
]
BackboneOption = Annotated[
    str | None,
    typer.Option(
        help="Embedded name, directory or Hugging Face name (default: smollm2-135m-instruct).", show_default=False
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="Where it runs, e.g. cuda (default: as the settings say).", show_default=False),
]
NameOption = Annotated[str, typer.Option(help="Name of the run; its files go to RUNS/NAME.")]
RunsOption = Annotated[Path, typer.Option("--runs", help="Directory of all runs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RatingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rating", help="ITEM=RATING by title or id, e.g. 'Toy Story=5'; may be repeated.", show_default=False
    ),
]
RatingsOption = Annotated[
    Path | None, typer.Option("--ratings", help="CSV file with the columns item,rating.", show_default=False)
]


def show(facts: dict[str, Any], json: bool) -> None:
    """Prints facts line by line, or as JSON."""
    if json:
        print_json(facts)
        return
    for key, value in facts.items():
        typer.echo(f"{key.replace('_', ' ')}: {value}")


def print_json(value: Any) -> None:
    """Prints JSON and nothing else."""
    from metarec.artifacts import dump_json

    typer.echo(dump_json(value), nl=False)
