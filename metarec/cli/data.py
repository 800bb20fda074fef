"""The verbs of a dataset: ``data check | describe | convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metarec.cli.options import (
    ColumnOption,
    CountingOption,
    EncodingOption,
    HeaderOption,
    ItemsFileOption,
    ItemsIdOption,
    JsonOption,
    LineBreaksOption,
    RatingsFileOption,
    ScaleOption,
    SeparatorOption,
    SideOption,
    print_json,
    source_options,
)
from metarec.errors import ConfigError, MetarecError

if TYPE_CHECKING:
    from metarec.data.checks.findings import DataFinding
    from metarec.data.source_options import SourceOptions
    from metarec.data.sources.assembly import Tables
    from metarec.data.task import Task

data_app = typer.Typer(help="Datasets: what they are, what is wrong with them, a copy.", no_args_is_help=True)

WhatArgument = Annotated[
    str,
    typer.Argument(
        help="A task, by name or YAML file; a table, e.g. orders.csv; a source, e.g. movielens, or module:attribute."
    ),
]
PathArgument = Annotated[
    Path | None, typer.Argument(help="Folder, zip or file of the dataset, where WHAT is a source.", show_default=False)
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write; any task reads it in place of the original.")]


@data_app.command("check", epilog="Example: metarec data check movielens/item-cold --fail-on error --fail-on markup=1%")
def check(
    what: WhatArgument,
    path: PathArgument = None,
    ratings_file: RatingsFileOption = None,
    items_file: ItemsFileOption = None,
    items_id: ItemsIdOption = None,
    column: ColumnOption = None,
    separator: SeparatorOption = None,
    encoding: EncodingOption = "utf-8",
    scale: ScaleOption = None,
    header: HeaderOption = None,
    line_breaks: LineBreaksOption = False,
    side: SideOption = None,
    fix: Annotated[
        Path | None, typer.Option("--fix", help="Write a cleaned copy to this folder.", show_default=False)
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Let --fix drop more than 5% of the ratings or of the items.")
    ] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            help="Status 1 if a finding (or all of: error, warning, note) has more: CODE, CODE=ROWS or CODE=SHARE%.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of a task: the seed of the split that is checked for leaks.")] = 0,
    backbone: CountingOption = None,
    json: JsonOption = False,
) -> None:
    """Say what is wrong with a dataset, with rows and cures; of a task also whether its split leaks."""
    if backbone is not None:
        from metarec.lm.hub import check_backbone

        check_backbone(backbone)
    from metarec.data import checks, repairs
    from metarec.data.checks import verdict
    from metarec.data.checks.findings import read_for_checks
    from metarec.data.checks.side import check_side
    from metarec.data.sources import write_tables
    from metarec.system.progress import progress

    thresholds = [verdict.read_threshold(text) for text in fail_on or []]
    options = source_options(
        ratings_file, items_file, items_id, column, separator, encoding, scale, header, line_breaks, side
    )
    task, tables, options, folder = _tables(what, path, options)
    with progress("checking", 3, after=2.0) as advance:
        data = read_for_checks(tables)
        findings = [*checks.check(data), *check_side(data, folder, options)]
        advance(1)
        mended, done = repairs.fix(data, findings, force=force) if fix else (tables, [])
        advance(2)
        if task is not None:
            findings += _of_the_split(task, seed)
        if backbone is not None:
            findings += _of_the_prompts(task, Path(what if path is None else path), options, backbone)
        advance(3)
    if fix:
        write_tables(mended, fix)
    over = verdict.broken(findings, thresholds)
    if json:
        where = {"where": tables.where, "fixed_copy": str(fix) if fix else None}
        print_json(verdict.to_json(findings, done, over, where))
    else:
        _print_findings(findings, tables.where)
        for sentence in [*(f"fixed: {sentence}" for sentence in done), *([f"written: {fix}"] if fix else [])]:
            typer.echo(sentence)
        for sentence in over:
            typer.echo(f"over the limit: {sentence}", err=True)
    if over:
        raise typer.Exit(1)


def _print_findings(findings: list[DataFinding], where: str) -> None:
    for finding in findings:
        typer.echo(_line(finding))
    if not findings:
        typer.echo(f"nothing found in {where}")


def _line(finding: DataFinding) -> str:
    rows = ", ".join(finding.rows) + (", ..." if finding.count > len(finding.rows) else "")
    head = f"{finding.severity:8s}{finding.code}: {finding.count} of {finding.total} {finding.of}: {finding.message}"
    named = finding.of if finding.of in ("users", "items", "ways", "columns") else "rows"
    return f"{head}\n        {named}: {rows}\n        cure: {finding.cure}"


def _of_the_split(task: Task, seed: int) -> list[DataFinding]:
    """Leaks of the task's split, and items that nearly repeat one on its other side."""
    from metarec.data.checks.splits import leakage, near_duplicates
    from metarec.data.task_data import load_task_data
    from metarec.errors import DataError

    try:
        data = load_task_data(task, seed)
    except DataError as error:
        typer.echo(f"the split was not checked: {error}", err=True)
        return []
    found = [leakage(data.leaks())]
    if data.seen is not None:
        found.append(near_duplicates(data.interactions.catalog, data.seen))
    return [finding for finding in found if finding]


def _of_the_prompts(task: Task | None, file: Path, options: SourceOptions, name: str) -> list[DataFinding]:
    """Prompts that are longer than a model reads; of a table those of the task that `train` makes of it."""
    from metarec.data.checks.findings import SHOWN, DataFinding
    from metarec.data.own_data import own_task
    from metarec.data.task_data import load_dataset
    from metarec.lm.loading import load_backbone
    from metarec.lm.tokenized import count_tokens

    backbone = load_backbone(name)
    try:
        if task is None:
            task, data = own_task(file, options.model_dump(exclude_unset=True))
        else:
            data = load_dataset(task.dataset, files=task.split.files)
    except MetarecError as error:
        typer.echo(f"the prompts were not counted: {error}", err=True)
        return []
    encodes = backbone.kind == "encoder"
    counts = count_tokens(backbone, task.item_text if encodes else task.template, data.catalog)
    if not counts.over:
        said = f"the {len(data.catalog)} prompts have at most {counts.longest} tokens; '{name}' reads {counts.limit}"
        typer.echo(said, err=True)
        return []
    shown = tuple(data.catalog.ids[code] for code in counts.over[:SHOWN])
    return [
        DataFinding(
            "long-prompt", "warning" if encodes else "error", len(counts.over), "items", len(data.catalog),
            f"prompts of more than the {counts.limit} tokens that '{name}' reads, the longest of {counts.longest}"
            + (": their ends are cut off" if encodes else ": fit refuses them"),
            "Cut a field in the template, such as {{ text[:200] }}, or choose another model", shown, False,
        )
    ]  # fmt: skip


@data_app.command("describe", epilog="Example: metarec data describe orders.csv --column user=customer --json")
def describe(
    what: WhatArgument,
    path: PathArgument = None,
    ratings_file: RatingsFileOption = None,
    items_file: ItemsFileOption = None,
    items_id: ItemsIdOption = None,
    column: ColumnOption = None,
    separator: SeparatorOption = None,
    encoding: EncodingOption = "utf-8",
    scale: ScaleOption = None,
    header: HeaderOption = None,
    line_breaks: LineBreaksOption = False,
    side: SideOption = None,
    json: JsonOption = False,
) -> None:
    """Say what a dataset is: sizes, density, ratings per user and item, histogram, time span, fields, and the rest."""
    from metarec.data.checks.findings import read_for_checks
    from metarec.data.checks.side import describe_side
    from metarec.data.description import describe as described

    options = source_options(
        ratings_file, items_file, items_id, column, separator, encoding, scale, header, line_breaks, side
    )
    _, tables, options, folder = _tables(what, path, options)
    data = read_for_checks(tables)
    facts = {**described(data), **describe_side(data, folder, options)}
    if json:
        print_json(facts)
        return
    for key, value in facts.items():
        if value == {}:
            continue
        if isinstance(value, dict):
            typer.echo(f"{key.replace('_', ' ')}:")
            for name, inner in value.items():
                shown = (
                    ", ".join(f"{part} {_short(number)}" for part, number in inner.items())
                    if isinstance(inner, dict)
                    else _short(inner)
                )
                typer.echo(f"  {name}: {shown}")
        elif key == "notes":
            for sentence in value:
                typer.echo(f"note: {sentence}")
        elif key != "schema_version":
            typer.echo(f"{key.replace('_', ' ')}: {_short(value)}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


@data_app.command(
    "convert", epilog="Example: metarec data convert table orders.csv --column user=customer --out data/mine"
)
def convert(
    what: WhatArgument,
    out: OutOption,
    path: PathArgument = None,
    ratings_file: RatingsFileOption = None,
    items_file: ItemsFileOption = None,
    items_id: ItemsIdOption = None,
    column: ColumnOption = None,
    separator: SeparatorOption = None,
    encoding: EncodingOption = "utf-8",
    scale: ScaleOption = None,
    header: HeaderOption = None,
    line_breaks: LineBreaksOption = False,
    json: JsonOption = False,
) -> None:
    """Write a dataset as Parquet with a manifest; every task reads the folder in place of the original."""
    from metarec.data.sources import write_tables

    _, tables, *_ = _tables(
        what,
        path,
        source_options(ratings_file, items_file, items_id, column, separator, encoding, scale, header, line_breaks),
    )
    write_tables(tables, out)
    facts: dict[str, Any] = {"written": str(out), "ratings": len(tables.ratings), "items": len(tables.items)}
    facts |= {"dropped": dict(tables.dropped), "notes": [str(note) for note in tables.notes]}
    if json:
        print_json(facts)
    else:
        typer.echo(f"{len(tables.ratings):,} ratings and {len(tables.items):,} items written to {out}")
        for reason, count in tables.dropped.items():
            typer.echo(f"left out: {count:,}, {reason}")
        for note in tables.notes:
            typer.echo(f"note: {note}")


def _tables(what: str, path: Path | None, options: SourceOptions) -> tuple[Task | None, Tables, SourceOptions, Path]:
    """Returns the task, its tables, the options they are read with, and where names of other files start."""
    from metarec.data.own_data import own_tables
    from metarec.data.side_files import side_folder
    from metarec.data.source_options import SIDE_OPTIONS, is_table
    from metarec.data.sources import SOURCES, read_tables
    from metarec.data.task_files import load_task, task_names

    if what in SOURCES.names() or (":" in what and not Path(what).exists()):
        options = _with_separator(what, path, options)
        tables = own_tables(path, options) if what == "table" and path else read_tables(what, path, options)
        return None, tables, options, side_folder(path)
    file = Path(what)
    if is_table(file) or (file.is_dir() and what not in task_names()):
        if not file.exists():
            raise ConfigError(f"the table '{what}' does not exist", "Check the path")
        if path is not None:
            raise ConfigError(f"'{what}' and '{path}' are two datasets", "Give one; --items-file names the items' file")
        options = _with_separator("table", file, options)
        return None, own_tables(file, options), options, side_folder(file)
    task = load_task(what)
    if path is not None:
        raise ConfigError(f"'{what}' is a task and brings its own path, got '{path}'", "Leave the path out")
    dataset = task.dataset
    if dataset.source == "mix":
        raise ConfigError(f"'{what}' joins several datasets", f"Check each: {', '.join(dataset.parts)}")
    of_task = dataset.options.model_copy(update={"bad_rows": "quarantine"})
    if named := sorted(options.model_fields_set & SIDE_OPTIONS):
        raise ConfigError(f"'{what}' is a task, and --side names '{named[0]}'", "Name it in the task's dataset.options")
    tables = read_tables(dataset.source, dataset.path, of_task, task.split.files)
    return task, tables, of_task, side_folder(dataset.path)


def _with_separator(source: str, path: Path | None, options: SourceOptions) -> SourceOptions:
    """Reads the separator off a table's header where nobody named it."""
    from metarec.data.sources.table import guess_separator

    if source != "table" or path is None or not path.is_file() or "separator" in options.model_fields_set:
        return options
    return options.model_copy(update={"separator": guess_separator(path, options.encoding)})
