"""Options that several verbs share, and how results are printed. Knows no verb."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metarec.errors import ConfigError, shown

if TYPE_CHECKING:
    from rich.console import Console

    from metarec.data.source_options import SourceOptions

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
PresetOption = Annotated[
    str | None,
    typer.Option(
        help="fast: no language model; quick: it reads prompts alone, and trains fewer steps; standard: all; "
        "text: for texts that carry taste; full: for an accelerator.",
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
CountingOption = Annotated[
    str | None,
    typer.Option(
        "--backbone", help="Count the prompts' tokens as this model does, and say which it cuts.", show_default=False
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="Where it runs, e.g. cuda (default: as the settings say).", show_default=False),
]
TrackerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tracker",
        help="Send losses and validation to tensorboard, mlflow, trackio or module:attribute; may be repeated.",
        show_default=False,
    ),
]
TaskArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="TASK",
        help="A task, by name or YAML file, as --task; or a table with user, item, rating, title: orders.csv, "
        "or a folder that 'metarec data check --fix' or 'data convert' wrote.",
        show_default=False,
    ),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the run's checkpoint.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Delete what the run holds, and train anew.")]
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
RatingsFileOption = Annotated[
    str | None, typer.Option("--ratings-file", help="Of table: the file with the ratings.", show_default=False)
]
ItemsFileOption = Annotated[
    str | None, typer.Option("--items-file", help="Of table: the file with the items.", show_default=False)
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option("--column", help="Of table: OURS=THEIRS, e.g. user=customer_id; may be repeated.", show_default=False),
]
ItemsIdOption = Annotated[
    str | None,
    typer.Option(
        "--items-id", help="Of table: the item file's column of ids, if it has another name.", show_default=False
    ),
]
SeparatorOption = Annotated[
    str | None, typer.Option(help="Of table: what separates fields (default: as the header looks).", show_default=False)
]
HeaderOption = Annotated[
    str | None,
    typer.Option(
        "--header",
        help="Of table: names of its columns, where the first row is data: user,item,rating,timestamp.",
        show_default=False,
    ),
]
LineBreaksOption = Annotated[
    bool, typer.Option("--line-breaks", help="Of table: quoted fields may hold line breaks, as reviews do.")
]
EncodingOption = Annotated[str, typer.Option(help="Of table: the encoding.")]
ScaleOption = Annotated[str | None, typer.Option(help="LOW,HIGH: the rating scale.", show_default=False)]


SideOption = Annotated[
    list[str] | None,
    typer.Option(
        "--side",
        help="Of table: what else is known, e.g. vectors.cover=covers.npz, item_graph=edges.csv, users=users.csv, "
        "friends=friends.csv, context=device,hour; may be repeated.",
        show_default=False,
    ),
]
AboutOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A sentence about the person, or FIELD=VALUE of the users' fields; may be repeated.", show_default=False
    ),
]
FriendOption = Annotated[
    list[str] | None, typer.Option(help="Id of a friend of the person; may be repeated.", show_default=False)
]
ContextOption = Annotated[
    list[str] | None,
    typer.Option(help="COLUMN=VALUE of the moment, e.g. device=phone; may be repeated.", show_default=False),
]


def one_task(what: str | None, task: str | None) -> str | None:
    """Returns the task that a command line names, as its argument or by ``--task``; None where it names none."""
    if what is not None and task is not None:
        raise ConfigError(f"'{what}' and --task '{task}' are two tasks", "Give one")
    return what or task


def side_files(entries: list[str] | None) -> dict[str, Any]:
    """Returns the options of a source that ``--side`` gives."""
    found: dict[str, Any] = {}
    for entry in entries or []:
        name, equals, value = entry.partition("=")
        if not equals:
            raise ConfigError(f"--side {shown(entry)} has no '='", "Write --side users=users.csv")
        if name == "vectors":
            raise ConfigError(f"--side {shown(entry)} does not name the vectors", f"Write --side vectors.cover={value}")
        if name.startswith("vectors."):
            found.setdefault("vectors", {})[name.removeprefix("vectors.")] = value
        else:
            found[name] = [part.strip() for part in value.split(",")] if name == "context" else value
    return found


def side_options(entries: list[str] | None) -> SourceOptions:
    """Returns the options of a source that ``--side`` alone gives."""
    from metarec.config import validated
    from metarec.data.source_options import SourceOptions

    return validated(SourceOptions, side_files(entries), "--side")


def person_facts(about: list[str] | None, friends: list[str] | None, context: list[str] | None) -> dict[str, Any]:
    """Returns what a command line tells of a person, as arguments of `MetaRecommender.adapt`."""
    fields: dict[str, str] = {}
    for entry in about or []:
        name, equals, value = entry.partition("=")
        fields[name if equals else "about"] = value if equals else entry
    moment: dict[str, str | float] = {}
    for entry in context or []:
        name, equals, value = entry.partition("=")
        if not equals:
            raise ConfigError(f"--context {shown(entry)} has no '='", "Write --context device=phone")
        moment[name] = value
    return {"about": fields, "friends": friends or (), "context": moment}


def show(facts: dict[str, Any], json: bool) -> None:
    """Prints facts line by line, or as JSON."""
    if json:
        print_json(facts)
        return
    for key, value in facts.items():
        typer.echo(f"{key.replace('_', ' ')}: {value}")


def print_json(value: Any) -> None:
    """Prints JSON and nothing else."""
    from metarec.files.artifacts import dump_json

    typer.echo(dump_json(value), nl=False)


def console() -> Console:
    """Returns where tables are printed: as wide as the terminal or COLUMNS; 140 characters in a file or pipe.

    Brackets are what they say: a row's settings and a title such as "[rec]" are no markup.
    """
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140, markup=False)


def source_options(
    ratings: str | None,
    items: str | None,
    items_id: str | None,
    columns: list[str] | None,
    separator: str | None,
    encoding: str,
    scale: str | None,
    header: str | None,
    line_breaks: bool,
    side: list[str] | None = None,
) -> SourceOptions:
    """Returns the options of a table that the command line gives; bad rows are set aside and counted."""
    from metarec.config import validated
    from metarec.data.source_options import SourceOptions

    named = {}
    for entry in columns or []:
        ours, equals, theirs = entry.partition("=")
        if not equals:
            raise ConfigError(f"--column {shown(entry)} has no '='", "Write --column user=customer_id")
        named[ours] = theirs
    values: dict[str, Any] = {"columns": named, "encoding": encoding}
    if separator is not None:
        values["separator"] = separator.replace("\\t", "\t")
    values |= {
        "bad_rows": "quarantine",
        "ratings": ratings,
        "items": {"file": items, "id": items_id} if items_id else items,
        "scale": scale.split(",") if scale else None,
        "header": header.split(",") if header else None,
        "line_breaks": line_breaks,
        **side_files(side),
    }
    return validated(SourceOptions, values, "options")
