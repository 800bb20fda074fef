"""The verb ``finetune``: one language model for all users, in a run that is used like any other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from metarec.cli.options import (
    BackboneOption,
    DeviceOption,
    FreshOption,
    JsonOption,
    NameOption,
    ResumeOption,
    RunsOption,
    SeedOption,
    TaskArgument,
    TaskOption,
    TrackerOption,
    one_task,
    show,
)
from metarec.cli.run_dirs import (
    clear_run,
    kept_folders,
    refuse_deleting,
    refuse_overwriting,
    run_dir,
    say_where_resuming_starts,
)
from metarec.cli.training import check_names, chosen_task

app = typer.Typer()


@app.command(
    epilog="Example: metarec finetune movielens/user-cold --name tuned && metarec evaluate runs/tuned; a BERT with "
    "five classes: metarec finetune --backbone bert-base-uncased --name stars --set trainable=all --set classes=5 "
    "--set class_loss=1"
)
def finetune(
    what: TaskArgument = None,
    name: NameOption = "tuned",
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of fine-tuning settings.", show_default=False)
    ] = None,
    task: TaskOption = None,
    backbone: BackboneOption = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="One setting, e.g. trainable=all or fgm=1, see docs/finetuning.md; may be repeated.",
            show_default=False,
        ),
    ] = None,
    runs: RunsOption = Path("runs"),
    tracker: TrackerOption = None,
    resume: ResumeOption = False,
    fresh: FreshOption = False,
    json: JsonOption = False,
) -> None:
    """Fine-tune a model for all users: a LoRA or all of it, by their histories; keep a recommender in RUNS/NAME."""
    task = one_task(what, task)
    run = run_dir(runs, name)
    refuse_overwriting(run, resume, fresh)
    from metarec.config import FineTuneConfig, RunConfig, flattened, override, read_yaml, validated
    from metarec.meta.tracking import TrackedRun, check_trackers, tracked

    check_trackers(tracker or [])
    named = {"task": task, "backbone": backbone, "device": device, "seed": seed}
    score = ["item mean", "history"]
    values = {**{key: value for key, value in named.items() if value is not None}, "score": score}
    chosen = override(read_yaml(config) if config else {}, overrides or [])
    validated(FineTuneConfig, chosen, str(config) if config else "--set")  # before anything is imported or read
    settings = validated(RunConfig, values, "options")
    check_names(settings)
    if fresh:
        refuse_deleting(run, settings.backbone)
        kept_folders(run)
    import yaml

    from metarec.data.given_task import load_given
    from metarec.files.artifacts import replace_file
    from metarec.files.run_directory import RUN_MODEL, TUNED_MODEL
    from metarec.meta.checkpoints import clear_checkpoint
    from metarec.recommending.finetuning import fine_tune_settings, fine_tuned_recommender

    tuning = fine_tune_settings(chosen, str(config) if config else "--set")
    data = load_given(chosen_task(settings), {}, settings.seed)
    say_where_resuming_starts(run, resume)
    tracked_run = TrackedRun(
        name, run, {"backbone": settings.backbone, "task": settings.task, **flattened(tuning.model_dump(mode="json"))}
    )
    try:
        with tracked(tracker or (), tracked_run):
            recommender = fine_tuned_recommender(
                data,
                tuning,
                settings,
                run / TUNED_MODEL,
                checkpoint=run / "checkpoint",
                resume=resume,
                clear=partial(clear_run, run) if fresh else None,
            )
    except KeyboardInterrupt:
        typer.echo(f"interrupted; nothing is lost: run the same command with --resume (run '{run}')", err=True)
        raise
    for file, kept in (("config.yaml", recommender.config), ("finetune.yaml", tuning)):
        text = yaml.safe_dump(kept.model_dump(mode="json"), sort_keys=False)
        replace_file(run / file, lambda target, text=text: target.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    recommender.save_pretrained(run / RUN_MODEL)
    if tuning.trainable == "all":  # four copies of a whole model are worth keeping only while they can be resumed from
        clear_checkpoint(run / "checkpoint")
    unprinted = ("history", "fine_tuned", "rating_shares")
    if recommender.fitted.training["best_step"] == 0:
        typer.echo(
            "validation users' items are ordered best by the model as it was: nothing of the training is kept; "
            "try more steps or another lr",
            err=True,
        )
    facts = {key: value for key, value in recommender.fitted.training.items() if key not in unprinted}
    show({"run": str(run), "backbone": str(run / TUNED_MODEL), **facts}, json)
