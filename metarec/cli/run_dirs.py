"""The directory of a run: its name, what it holds, and how it is cleared. Knows no verb."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import typer

from metarec.errors import ConfigError, shown
from metarec.files.artifacts import MANIFEST, recover_dir
from metarec.files.run_directory import TUNED_MODEL


def run_dir(runs: Path, name: str) -> Path:
    """Returns a run's directory, refusing names that are paths."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--name {shown(name)} is not a plain name", "Use letters, digits, '.', '_' and '-'")
    return runs / name


def refuse_overwriting(run: Path, resume: bool, fresh: bool) -> None:
    """Refuses to train over a run that nobody said to go on with or to delete."""
    if resume and fresh:
        raise ConfigError("--resume and --fresh are both given", "Choose one of the two")
    kept = [part for part in ("model", "checkpoint") if recover_dir(run / part)]
    cure = "train anew with --fresh, or choose another --name"
    if kept and not resume and not fresh:
        raise ConfigError(f"'{run}' holds a {kept[0]} already", f"Go on with --resume, {cure}")
    if resume and kept == ["model"]:
        raise ConfigError(f"'{run}' holds a model and no checkpoint to go on from", cure.capitalize())


def refuse_deleting(run: Path, *read: Path | str | None) -> None:
    """Refuses to delete a run that is read from: an old run, or a model inside of it.

    Raises:
        ConfigError: One of the paths is the run, or lies in it.
    """
    for path in read:
        if path is not None and Path(path).resolve().is_relative_to(run.resolve()):
            raise ConfigError(f"--fresh would delete '{run}', and '{path}' is read from it", "Choose another --name")


def kept_folders(run: Path) -> list[Path]:
    """Returns the folders of a run that `clear_run` deletes.

    Raises:
        ConfigError: One was not written by metarec.
    """
    folders = [run / name for name in ("checkpoint", "model", TUNED_MODEL, "user") if recover_dir(run / name)]
    for folder in folders:
        if not (folder / MANIFEST).exists():
            raise ConfigError(f"'{folder}' was not written by metarec", "Move it, or choose another --name")
    return folders


def say_where_resuming_starts(run: Path, resume: bool) -> None:
    """Says on the error stream that there is nothing to go on from, where that is so."""
    if resume and not recover_dir(run / "checkpoint"):
        typer.echo(f"no checkpoint in '{run}': training starts at step 0", err=True)


def clear_run(run: Path) -> None:
    """Deletes what `train`, `evaluate` and `quickstart` keep in a run, and nothing else.

    Raises:
        ConfigError: A folder of that name is something else.
    """
    for folder in kept_folders(run):
        shutil.rmtree(folder)
    for name in ("config.yaml", "finetune.yaml", "table.json", "per_user.parquet", "user.json"):
        (run / name).unlink(missing_ok=True)
