"""The verb ``quickstart``: everything once, on real users, with a first table before any language model is read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metarec.cli.one_user import show_one_user
from metarec.cli.options import (
    BackboneOption,
    ConfigOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    NameOption,
    PresetOption,
    RunsOption,
    SeedOption,
    SetOption,
    TaskOption,
    console,
    print_json,
)
from metarec.cli.run_dirs import run_dir
from metarec.cli.runs import evaluate_run
from metarec.cli.training import check_names, run_settings, train_run

if TYPE_CHECKING:
    from metarec.config import RunConfig

app = typer.Typer()


@app.command(epilog="Example: metarec quickstart --seed 1 --name second")
def quickstart(
    name: NameOption = "quickstart",
    config: ConfigOption = None,
    preset: PresetOption = None,
    task: TaskOption = None,
    backbone: BackboneOption = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    overrides: SetOption = None,
    engine: EngineOption = None,
    runs: RunsOption = Path("runs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Train again even if the run is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Train, evaluate and adapt to one person never seen: the whole thing, on real users, in minutes."""
    run = run_dir(runs, name)
    named = {"task": task, "backbone": backbone, "device": device, "seed": seed}
    settings = run_settings(config, preset or "quick", named, overrides, engine)
    check_names(settings)
    from metarec.system.devices import check_device

    check_device(settings.device)
    stages = _Stages(quiet=json)
    plain = without_model(settings)
    stages.announce(
        *(["fit and evaluate what reads no language model: a first table"] if plain else []),
        "read prompts and meta-train" if plain else "meta-train",
        "evaluate on people never seen",
        "adapt to one of them",
    )
    if plain is not None:
        with stages.timed():
            _first_table(plain, quiet=json)
    with stages.timed():
        recommender = train_run(run, settings, not fresh, fresh, "without --fresh" if fresh else "again")
    with stages.timed():
        table = evaluate_run(recommender, run, json=False, quiet=json)
    with stages.timed():
        story = show_one_user(recommender, run, quiet=json)
    if json:
        print_json({"table": table, "user": story, "seconds": stages.seconds})
    else:
        typer.echo(f"\nEverything is in {run}; go on with: metarec recommend {run} --rating 'Toy Story=5'")


def without_model(settings: RunConfig) -> RunConfig | None:
    """Returns the settings without what reads a language model; None where nothing does, or nothing else is left."""
    from metarec.registries import TERMS

    if ":" in " ".join(settings.score):
        return None  # a term from outside may read anything
    score = tuple(name for name in settings.score if not TERMS.get(name).needs_model)
    if score == settings.score or "collaborative" not in score:
        return None
    features = tuple(name for name in settings.collaborative.features or ("text", "fields") if name != "lm")
    collaborative = settings.collaborative.model_copy(update={"features": features})
    return settings.model_copy(update={"score": score, "collaborative": collaborative})


def _first_table(settings: RunConfig, quiet: bool) -> None:
    """Fits by settings that read no language model, and prints their table; what they fit is used again later."""
    from metarec.bench.report import table
    from metarec.recommender import MetaRecommender

    report = MetaRecommender(None, settings).fit(settings.task).evaluate()
    if not quiet:
        console().print(table(report))


class _Stages:
    """Says what will be done, and of each part how long it took."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._names: tuple[str, ...] = ()
        self.seconds: dict[str, float] = {}

    def announce(self, *names: str) -> None:
        """Prints the parts in their order."""
        self._names = names
        if not self._quiet:
            typer.echo("This will")
            for place, name in enumerate(names, start=1):
                typer.echo(f"  {place}. {name}")

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Times the next part, and prints how long it took."""
        place = len(self.seconds)
        name, started = self._names[place], time.perf_counter()
        if not self._quiet:
            typer.echo(f"\n{place + 1}/{len(self._names)} {name}")
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)
        if not self._quiet:
            typer.echo(f"({self.seconds[name]:.0f} s)")
