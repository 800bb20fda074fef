"""The verb ``tune``: hyper-parameters by Optuna, chosen by validation users alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metarec.cli.options import (
    BackboneOption,
    ConfigOption,
    DeviceOption,
    JsonOption,
    NameOption,
    PresetOption,
    RunsOption,
    SeedOption,
    SetOption,
    TaskArgument,
    TaskOption,
    TrackerOption,
    one_task,
    print_json,
)
from metarec.cli.run_dirs import run_dir
from metarec.cli.training import check_names, chosen_task, run_settings
from metarec.errors import ConfigError

app = typer.Typer()
_STUDY, _BEST = "study.db", "best.yaml"


@app.command(
    epilog="Example: metarec tune --preset fast --param train.lr=log:0.0001..0.01 --param meta.inner_steps=1..5 "
    "--trials 20 --name search && metarec train --config runs/search/best.yaml --name mine"
)
def tune(
    what: TaskArgument = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            help="What is searched: KEY=LOW..HIGH, KEY=log:LOW..HIGH or KEY=VALUE,VALUE; may be repeated.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="How many trials in all, those of before among them.", min=1)] = 20,
    name: NameOption = "tune",
    config: ConfigOption = None,
    preset: PresetOption = None,
    task: TaskOption = None,
    backbone: BackboneOption = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    overrides: SetOption = None,
    runs: RunsOption = Path("runs"),
    tracker: TrackerOption = None,
    prune: Annotated[bool, typer.Option("--prune/--no-prune", help="End trials that are below the median.")] = True,
    json: JsonOption = False,
) -> None:
    """Search for settings by validation users; the same command goes on where it stopped. No test user is seen."""
    import yaml

    from metarec.files.artifacts import replace_file

    named = {"task": one_task(what, task), "backbone": backbone, "device": device, "seed": seed}
    settings = run_settings(config, preset, named, overrides, None)
    check_names(settings)
    from metarec.meta.tracking import check_trackers

    check_trackers(tracker or [])
    if not param:
        raise ConfigError("nothing is searched over", "Add --param train.lr=log:0.0001..0.01")
    from metarec.training.tuning import Parameter, tune

    parameters = [Parameter.read(text) for text in param]
    from metarec.config import override
    from metarec.data.given_task import load_given

    run = run_dir(runs, name)
    data = load_given(chosen_task(settings), {}, settings.seed)
    values = settings.model_dump(mode="json")
    try:
        found = tune(data, values, parameters, trials=trials, storage=run / _STUDY, prune=prune, trackers=tracker or ())
    except KeyboardInterrupt:
        typer.echo("interrupted; finished trials are kept: run the same command to go on", err=True)
        raise
    best = override(values, [f"{key}={value}" for key, value in found.settings.items()])
    text = yaml.safe_dump(best, sort_keys=False)
    replace_file(run / _BEST, lambda target: target.write_text(text, encoding="utf-8"))
    if json:
        facts = {"best": dict(found.settings), "validation_auc": found.value, "trials": list(map(dict, found.trials))}
        print_json({**facts, "config": str(run / _BEST)})
        return
    for trial in found.trials:
        value = "-" if trial["validation_auc"] is None else f"{trial['validation_auc']:.4f}"
        chosen = " ".join(f"{key}={value}" for key, value in trial["settings"].items())
        typer.echo(f"{trial['number']:4d}  {trial['state']:9s} {value:>6s}  {chosen}")
    typer.echo(f"best by validation users: {found.value:.4f}; train by it: metarec train --config {run / _BEST}")
