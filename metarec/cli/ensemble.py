"""The verb ``ensemble``: what the mean of several runs' scores is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metarec.cli.options import DeviceOption, JsonOption, console, print_json
from metarec.cli.runs import check_run, load_run
from metarec.errors import ConfigError

app = typer.Typer()


@app.command(epilog="Example: metarec ensemble runs/mine runs/tuned")
def ensemble(
    runs: Annotated[list[Path], typer.Argument(help="Directories of two runs or more, of one task and split.")],
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Score test users by the mean of several runs' scores, beside each of the runs."""
    if len(runs) < 2:
        raise ConfigError("an ensemble of one run", "Name two runs or more")
    for run in runs:
        check_run(run, device)
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is named twice", "Name each once")
    from dataclasses import replace

    from metarec.bench.report import table
    from metarec.evaluation.metrics import BASELINE
    from metarec.scorers.ensemble import Ensemble
    from metarec.training.fitting import unadapted_rows

    loaded = [load_run(run, device=device) for run in runs]
    first = loaded[0]
    for run, other in zip(runs[1:], loaded[1:], strict=True):
        if dict(other.fitted.split.hashes) != dict(first.fitted.split.hashes):
            raise ConfigError(
                f"'{run}' was trained on other data or another split than '{runs[0]}'",
                "Train both alike",
            )
    taken = [*(run.name for run in runs), BASELINE, Ensemble.name]
    names = [run.name if taken.count(run.name) == 1 else str(run) for run in runs]
    members = tuple(one.scorer(name=name) for one, name in zip(loaded, names, strict=True))
    mean = replace(unadapted_rows(first.fitted, BASELINE)[0], name=BASELINE)  # type: ignore[type-var]
    report = first.evaluate(scorers=[mean, *members, Ensemble(members)])
    shots = max(first.fitted.task.shots)
    against = {name: report.difference("ensemble", shots, name, shots) for name in names}
    if json:
        found = {name: {"difference": gain, "interval": list(span)} for name, (gain, span) in against.items()}
        print_json({**report.to_json(), "ensemble": {"shots": shots, "against": found}})
        return
    console().print(table(report))
    for name, (gain, (low, high)) in against.items():
        typer.echo(f"ensemble at K = {shots} against {name}: {gain:+.4f} AUC [{low:+.4f} {high:+.4f}]")
