"""The verbs of a benchmark: ``bench | report | compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metarec.cli.options import JsonOption, print_json
from metarec.errors import ConfigError

if TYPE_CHECKING:
    from metarec.bench.summary import Summary

app = typer.Typer()
# The method that every other is compared with, beside the baseline.
REFERENCE = "metarec"

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
        typer.Option(help="Method, or a group such as fold-in; may be repeated.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many split seeds, from 0 (without PLAN).", min=1)] = 3,
    users: Annotated[
        int | None, typer.Option(help="Only so many test users of each split.", min=2, show_default=False)
    ] = None,
    out: OutOption = Path("runs/bench"),
    jobs: Annotated[int, typer.Option(help="Processes side by side; each takes its share of the cores.", min=1)] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured.")] = False,
    methods: Annotated[bool, typer.Option("--methods", help="List the methods there are.")] = False,
    json: JsonOption = False,
) -> None:
    """Measure methods on the same users: cells that can be stopped, repeated and shared among processes."""
    from metarec.bench import cells as engine
    from metarec.bench.methods import METHODS
    from metarec.bench.plan import Plan, read_plan
    from metarec.bench.plan import cells as cells_of
    from metarec.bench.summary import read_cells
    from metarec.config import validated
    from metarec.data.task_files import load_group
    from metarec.recommender import BASELINE

    if methods:
        listed = {name: {"group": entry.group, "about": entry.about} for name, entry in METHODS.items()}
        if json:
            print_json(listed)
        else:
            for name, entry in listed.items():
                typer.echo(f"{name:28s}{entry['group']:13s}{entry['about']}")
        return
    if plan is not None and (task or method or users):
        raise ConfigError("a plan and --task, --method or --users are both given", "Change the plan, or leave it out")
    if plan is not None:
        chosen = read_plan(plan)
    else:
        tasks = [name for given in task or ["movielens/user-cold"] for name in load_group(given)]
        part = {"tasks": tasks, "methods": method or ["trivial", "fold-in"], "seeds": seeds, "users": users}
        chosen = validated(Plan, {"name": "bench", "parts": [part]}, "options")
    cells = cells_of(chosen)
    if dry_run:
        missing = engine.missing(cells, out)
        if json:
            print_json([{"folder": str(cell.folder), "done": cell not in missing} for cell in cells])
        else:
            for cell in cells:
                typer.echo(f"{'missing' if cell in missing else 'done   '}  {cell.folder}")
        return
    engine.run(chosen, out, jobs=jobs, fresh=fresh)
    _show(read_cells(out, BASELINE, [cell.folder for cell in cells]), json, {"plan": chosen.model_dump(mode="json")})


@app.command(epilog="Example: metarec report runs/bench --html report.html --results results.json")
def report(
    out: Annotated[Path, typer.Argument(help="Folder of a benchmark's cells.")] = Path("runs/bench"),
    html: Annotated[
        Path | None, typer.Option(help="Write one self-contained page with tables and charts.", show_default=False)
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Write the table as JSON.", show_default=False)] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    json: JsonOption = False,
) -> None:
    """Say what the cells of a benchmark say together; as a table, as JSON, as a page."""
    from metarec.artifacts import replace_file, write_json
    from metarec.bench.summary import read_cells
    from metarec.recommender import BASELINE

    summaries = read_cells(out, BASELINE)
    if results is not None:
        write_json(results, summary(summaries))
    if html is not None:
        from metarec.bench.webpage import render

        page = render(summaries, REFERENCE)
        replace_file(html, lambda target: target.write_text(page, encoding="utf-8"))
    if markdown:
        from metarec.bench.report import markdown as written

        for group in summaries:
            typer.echo(f"{written(group, REFERENCE)}\n")
        return
    _show(summaries, json, {})


@app.command(epilog="Example: metarec compare runs/mine runs/other")
def compare(
    first: Annotated[Path, typer.Argument(help="An evaluated run, or a benchmark's folder.")],
    second: Annotated[Path, typer.Argument(help="Another one, on the same users.")],
    json: JsonOption = False,
) -> None:
    """Say what changed between two runs: paired differences of every method that both have, user by user."""
    from metarec.bench.summary import compare_runs

    rows = compare_runs(first, second)
    if json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{second} minus {first}, AUC, paired by user", title_justify="left")
    for column in ("task", "method", "K", "users", "difference", "95% interval", "p (Holm)"):
        table.add_column(column)
    for row in rows:
        interval = f"{row['low']:+.4f} {row['high']:+.4f}"
        cells = (row["task"], row["method"], row["shots"], row["episodes"], f"{row['difference']:+.4f}", interval)
        table.add_row(*map(str, cells), f"{row['p_holm']:.3g}")
    Console().print(table)


def summary(summaries: list[Summary]) -> dict[str, Any]:
    """Returns what a benchmark found as plain JSON values."""
    return {
        "baseline": summaries[0].report.baseline,
        "tables": [
            {
                "task": group.task,
                "train_users": group.train_users,
                "left_out": dict(group.report.left_out),
                **group.made,
                "rows": group.rows(REFERENCE),
                f"{REFERENCE} is ahead from": group.crossings(REFERENCE),
            }
            for group in summaries
        ],
    }


def _show(summaries: list[Summary], json: bool, facts: dict[str, Any]) -> None:
    if json:
        print_json({**facts, **summary(summaries)})
        return
    from rich.console import Console

    from metarec.bench.report import standings

    console = Console()
    for group in summaries:
        console.print(standings(group, REFERENCE))
