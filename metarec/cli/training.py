"""Meta-training as the verbs `train` and `quickstart` run it, by one process or several. Knows no verb."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from metarec.cli.run_dirs import clear_run, kept_folders, refuse_deleting

if TYPE_CHECKING:
    from metarec.config import RunConfig
    from metarec.data.task import Task
    from metarec.meta.distributed import Ranks
    from metarec.recommender import MetaRecommender


def run_settings(
    config: Path | None,
    preset: str | None,
    named: Mapping[str, Any],
    overrides: list[str] | None,
    engine: str | None,
) -> RunConfig:
    """Returns the settings that a command line says: a preset, under a file, under options, under ``--set``."""
    from metarec.config import RunConfig, override, read_yaml, validated
    from metarec.presets import with_preset

    values = with_preset(preset or "standard", read_yaml(config) if config else {})
    values |= {key: value for key, value in named.items() if value is not None}
    assignments = [*(overrides or []), *([f"meta.engine={engine}"] if engine else [])]
    return validated(RunConfig, override(values, assignments), str(config) if config else "settings")


@contextmanager
def processes(settings: RunConfig) -> Iterator[Ranks]:
    """Yields the processes that torchrun started, see `metarec.meta.distributed.launched`, once the task is known."""
    check_names(settings)
    from metarec.meta.distributed import launched

    with launched(settings.device) as ranks:
        yield ranks


def check_names(settings: RunConfig) -> None:
    """Looks for the task, the device and the models that some settings name; imports no torch.

    Raises:
        ConfigError: There is no such task, or no such kind of device.
        BackboneError: There is no such model.
    """
    from metarec.lm.hub import check_backbone
    from metarec.system.devices import check_device_name

    check_device_name(settings.device)
    chosen_task(settings)
    features = settings.collaborative.features or ("text",)
    if {"prompt", "adapter", "history"} & set(settings.score) or "lm" in features:
        check_backbone(settings.backbone)
    if {"text", "tuned text"} & set(features):
        check_backbone(settings.collaborative.encoder)


def chosen_task(settings: RunConfig) -> str | Task:
    """Returns the task of some settings, or the table."""
    from metarec.data.source_options import is_table
    from metarec.data.task_files import load_task

    return settings.task if is_table(settings.task) else load_task(settings.task)


def train_run(
    run: Path,
    settings: RunConfig,
    resume: bool,
    fresh: bool,
    go_on: str,
    own: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
    start: Path | None = None,
    trackers: Sequence[str] = (),
) -> MetaRecommender:
    """Meta-trains by some settings, and keeps the recommender in the run.

    Args:
        run: The run's directory.
        settings: The settings.
        resume: Goes on from the run's checkpoint.
        fresh: Deletes what the run holds first.
        go_on: What a person adds to the command to go on after an interruption.
        own: Of a table: see `MetaRecommender.fit`.
        ranks: The processes that train together, of which the first writes and prints; None is this one alone.
        start: The run that it goes on from; None starts afresh.
        trackers: Where its numbers go; see `metarec.meta.tracking`.
    """
    import yaml

    from metarec.data.source_options import is_table
    from metarec.files.artifacts import replace_file
    from metarec.files.run_directory import RUN_MODEL

    if fresh:
        refuse_deleting(run, start, settings.backbone, settings.collaborative.encoder)
        kept_folders(run)
    chosen = chosen_task(settings)
    from metarec.data.training_users import refuse_small_data
    from metarec.meta.distributed import ALONE
    from metarec.recommender import MetaRecommender

    ranks = ranks or ALONE
    recommender = MetaRecommender.from_pretrained(settings.backbone, settings)
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    data = recommender.task_data(chosen, **(own or {}))
    if is_table(settings.task) and ranks.leads:
        from metarec.data.own_data import summary

        for sentence in summary(data.task, data.interactions.catalog):
            typer.echo(sentence, err=True)
    refuse_small_data(data, settings.train)
    from metarec.config import flattened
    from metarec.meta.tracking import TrackedRun, tracked

    tracked_run = TrackedRun(run.name, run, flattened(settings.model_dump(mode="json")))
    # What cannot be trained must not cost what was: the run is cleared once the first gradient is there.
    clear = partial(clear_run, run)
    try:
        with tracked(trackers if ranks.leads else (), tracked_run):
            recommender.fit(
                data, checkpoint=run / "checkpoint", resume=resume, fresh=fresh, clear=clear, ranks=ranks, start=start
            )
    except KeyboardInterrupt:
        if ranks.leads:
            typer.echo(f"interrupted; nothing is lost: run the same command {go_on} (run '{run}')", err=True)
        raise
    if ranks.leads:
        # Only now: settings that a checkpoint refuses must not replace those it was made with.
        replace_file(run / "config.yaml", lambda target: target.write_text(text, encoding="utf-8"))
        recommender.save_pretrained(run / RUN_MODEL)
    return recommender
