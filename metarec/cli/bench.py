"""The verbs of a benchmark: ``bench | report | compare``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metarec.cli.options import BackboneOption, DeviceOption, JsonOption, SetOption, console, print_json
from metarec.errors import ConfigError, suggest

if TYPE_CHECKING:
    from metarec.bench.plan import Cell, Plan
    from metarec.bench.summary import Summary

app = typer.Typer()

OutOption = Annotated[Path, typer.Option("--out", help="Folder of the cells; what is there is not measured again.")]


@app.command(
    epilog="Example: metarec bench --task movielens/user-cold --method trivial --method GP --seeds 3; "
    "a whole table: metarec bench benchmarks/plans/headline.yaml --jobs 2"
)
def bench(
    plan: Annotated[Path | None, typer.Argument(help="YAML file with tasks, methods and seeds.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Task, family or group; may be repeated.", show_default=False)
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method, a group such as fold-in, or your own as module:attribute; may be repeated.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of split seeds, from 0 (without PLAN).", min=1)] = 3,
    users: Annotated[
        int | None, typer.Option(help="Number of test users of each split at most.", min=2, show_default=False)
    ] = None,
    backbone: BackboneOption = None,
    device: DeviceOption = None,
    sets: SetOption = None,
    out: OutOption = Path("runs/bench"),
    jobs: Annotated[int, typer.Option(help="Processes side by side; each takes its share of the cores.", min=1)] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells, and which are missing.")] = False,
    methods: Annotated[bool, typer.Option("--methods", help="List the groups and the methods.")] = False,
    json: JsonOption = False,
) -> None:
    """Measure methods on the same users, cell by cell; a benchmark that was stopped goes on where it was.

    Settings (--backbone, --device, --set) reach the methods that read them, above those of a plan. Rows measured with
    other settings than the defaults have them behind their name.
    """
    from metarec.bench.plan import cells as cells_of
    from metarec.bench.plan import check_names, with_settings
    from metarec.config import override

    if methods:
        _list_methods(json)
        return
    given = override({}, sets or [])
    given |= {key: value for key, value in {"backbone": backbone, "device": device}.items() if value is not None}
    chosen = with_settings(_plan(plan, task, method, seeds, users), given)
    cells = cells_of(chosen)
    if not dry_run:
        check_names(cells)
    from metarec.bench import cells as engine
    from metarec.bench.results import read_cells

    if dry_run:
        _list_cells(cells, engine.missing(cells, out), json)
        return
    engine.run(chosen, out, jobs=jobs, fresh=fresh)
    found = read_cells(out, folders=[cell.folder for cell in cells])
    notes = _side_notes(cells)
    _show(found, json, {"plan": chosen.model_dump(mode="json"), **({"notes": notes} if notes else {})})
    for note in [] if json else notes:
        typer.echo(note)


def _side_notes(cells: list[Cell]) -> list[str]:
    """Says of each task that brings anything of users and moments which of its methods do not read it."""
    from metarec.bench.methods import METHODS
    from metarec.data.task_files import load_task

    notes = []
    for task in dict.fromkeys(cell.task for cell in cells):
        named = load_task(task).side_named
        methods = dict.fromkeys(cell.method for cell in cells if cell.task == task)
        blind = [method for method in methods if not METHODS.reads_side(method)]
        if named and blind:
            notes.append(f"{task}: {', '.join(named)}; not read by {'; '.join(blind)}")
    return notes


def _plan(plan: Path | None, task: list[str] | None, method: list[str] | None, seeds: int, users: int | None) -> Plan:
    """Returns the plan of a file, or of the options.

    Raises:
        ConfigError: Both are given, or the plan is none.
    """
    from metarec.bench.plan import Plan, read_plan
    from metarec.config import validated
    from metarec.data.task_files import load_group

    if plan is not None and (task or method or users):
        raise ConfigError("a plan and --task, --method or --users are both given", "Change the plan, or leave it out")
    if plan is not None:
        return read_plan(plan)
    tasks = [name for given in task or ["movielens/user-cold"] for name in load_group(given)]
    part = {"tasks": tasks, "methods": method or ["trivial", "fold-in"], "seeds": seeds, "users": users}
    return validated(Plan, {"name": "bench", "parts": [part]}, "options")


def _list_methods(json: bool) -> None:
    """Prints the groups with their number of methods, then the methods with group and one line."""
    from metarec.bench.methods import METHODS

    groups = METHODS.groups()
    entries = {name: METHODS.get(name) for name in METHODS.names()}
    if json:
        listed = {name: {"group": entry.group, "about": entry.about} for name, entry in entries.items()}
        print_json({"groups": {group: len(members) for group, members in groups.items()}, "methods": listed})
        return
    typer.echo("Groups; each stands for all of its methods:")
    for group, members in groups.items():
        typer.echo(f"  {group:28s}{len(members):3d} method{'s' if len(members) > 1 else ''}")
    typer.echo("\nMethods:")
    wide, wide_group = max(map(len, entries)) + 2, max(map(len, groups)) + 2
    for name, entry in entries.items():
        typer.echo(f"  {name:{wide}s}{entry.group:{wide_group}s}{entry.about}")


def _list_cells(cells: list[Cell], missing: list[Cell], json: bool) -> None:
    """Prints the cells' folders, and which of them are to be measured."""
    if json:
        print_json([{"folder": str(cell.folder), "done": cell not in missing} for cell in cells])
        return
    for cell in cells:
        typer.echo(f"{'missing' if cell in missing else 'done   '}  {cell.folder}")


@app.command(epilog="Example: metarec report runs/bench --html report.html --results results.json")
def report(
    out: Annotated[Path, typer.Argument(help="Folder of a benchmark's cells.")] = Path("runs/bench"),
    html: Annotated[
        Path | None, typer.Option(help="Write one self-contained page with tables and charts.", show_default=False)
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Write the table as JSON.", show_default=False)] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Compare every row with this one, beside the item mean (default: metarec).", show_default=False
        ),
    ] = None,
    crossed: Annotated[
        bool,
        typer.Option(
            "--crossed", help="Intervals over people and items, for users who are asked about the same items."
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Pool the cells of a benchmark into a table: printed, as JSON, or as a page with charts."""
    from metarec.bench.report import RowNames
    from metarec.bench.results import as_json, read_cells
    from metarec.bench.summary import REFERENCE
    from metarec.files.artifacts import replace_file, write_json

    summaries = read_cells(out)
    rows = {name: method.settings for group in summaries for name, method in group.methods.items()}
    if reference is not None:
        reference = RowNames.of({"method": name, "settings": changed} for name, changed in rows.items()).full(reference)
    if reference is not None and reference not in rows:
        raise ConfigError(f"'{out}' has no row '{reference}'", suggest(reference, rows))
    reference = reference or REFERENCE
    if results is not None:
        write_json(results, as_json(summaries, reference, crossed))
    if html is not None:
        from metarec.bench.webpage import render

        page = render(summaries, reference)
        replace_file(html, lambda target: target.write_text(page, encoding="utf-8"))
    if markdown:
        from metarec.bench.report import markdown as written

        for group in summaries:
            typer.echo(f"{written(group, reference, crossed)}\n")
        return
    _show(summaries, json, {}, reference, crossed)


@app.command(epilog="Example: metarec compare runs/mine runs/other")
def compare(
    first: Annotated[Path, typer.Argument(help="An evaluated run, or a benchmark's folder.")],
    second: Annotated[Path, typer.Argument(help="Another one, on the same users.")],
    json: JsonOption = False,
) -> None:
    """Compare two runs user by user: paired differences of every method that both have."""
    from metarec.bench.results import compare_runs

    rows = compare_runs(first, second)
    if json:
        print_json(rows)
        return
    from rich.table import Table

    table = Table(title=f"{second} minus {first}, AUC, paired by user", title_justify="left")
    for column in ("task", "method", "K", "users", "difference", "95% interval", "p (Holm)"):
        table.add_column(column)
    for row in rows:
        interval = f"{row['low']:+.4f} {row['high']:+.4f}"
        cells = (row["task"], row["method"], row["shots"], row["episodes"], f"{row['difference']:+.4f}", interval)
        table.add_row(*map(str, cells), f"{row['p_holm']:.3g}")
    console().print(table)


@app.command(
    epilog="Example: metarec robustness runs/fast --items 1500; one part alone: "
    "metarec robustness runs/fast --part 'flipped ratings'"
)
def robustness(
    run: Annotated[Path, typer.Argument(help="Directory of a run; its settings are fitted anew on disturbed data.")],
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="noisy titles, flipped ratings, injected profiles, prompt injection; may be repeated (default: all).",
            show_default=False,
        ),
    ] = None,
    items: Annotated[
        int | None, typer.Option(help="Only so many of the most rated items (default: all).", min=20)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON.", show_default=False)] = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Measure what noise in titles and ratings, false users and hostile titles do to a run's ranking."""
    from metarec.cli.runs import load_run, provenance

    recommender = load_run(run, device=device)
    from metarec.bench.robustness import PARTS, most_rated
    from metarec.bench.robustness import robustness as measured
    from metarec.files.artifacts import write_json

    data = recommender.task_data()
    data = data if items is None else most_rated(data, items)
    said = typer.echo if not json else (lambda _: None)
    found = {**measured(recommender, data, part or PARTS, advance=said), **provenance(recommender)}
    if out is not None:
        write_json(out, found)
    if json:
        print_json(found)
        return
    for name in PARTS:
        for line in _flat(found.get(name, {})):
            typer.echo(f"{name}: {line}")


def _flat(values: dict[str, Any], above: str = "") -> Iterator[str]:
    """Yields lines of nested results: every number with its path, a difference with its interval."""
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name} ")
        elif key in ("difference", "shift"):
            yield f"{name} {value:+.4f} [{values['low']:+.4f} {values['high']:+.4f}]"
        elif key not in ("low", "high"):
            yield f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"


def _show(
    summaries: list[Summary], json: bool, facts: dict[str, Any], reference: str | None = None, crossed: bool = False
) -> None:
    """Prints the tables of a benchmark, or as JSON with some facts beside them."""
    from metarec.bench.results import as_json
    from metarec.bench.summary import REFERENCE

    if json:
        print_json({**facts, **as_json(summaries, reference or REFERENCE, crossed)})
        return
    from metarec.bench.report import standings

    wide = console()
    for group in summaries:
        wide.print(standings(group, reference or REFERENCE, wide.width, crossed))
