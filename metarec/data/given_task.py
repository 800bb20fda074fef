"""What `fit` takes, loaded and split: a task by name, by file or as it is, or a table of ratings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from metarec.data.own_data import load_own
from metarec.data.source_options import is_table
from metarec.data.sources import SOURCES
from metarec.data.task import Task
from metarec.data.task_data import TaskData, load_task_data
from metarec.data.task_files import load_task
from metarec.errors import ConfigError

TaskLike: TypeAlias = "str | Path | Task | TaskData | pd.DataFrame"
_TAKES = "Give a task's name, a YAML file, a table file (.csv, .parquet, ...), a DataFrame or a Task"


def load_given(task: TaskLike, own: Mapping[str, Any], seed: int) -> TaskData:
    """Loads what `fit` takes.

    Args:
        task: A task's name, a YAML file's path, a loaded task, or a table of ratings.
        own: What is stated about a table; see `metarec.data.own_data.own_task`.
        seed: Seed of the split.

    Raises:
        ConfigError: `task` is none of these, or choices are given for a task that brings its own.
    """
    if isinstance(task, TaskData):
        return task
    if isinstance(task, pd.DataFrame):
        return load_own(task, own, seed)
    if isinstance(task, str | Path) and is_table(task):
        return load_own(Path(task), own, seed)
    if own:
        raise ConfigError(f"'{min(own)}' is given for a task, which says it itself", "Give it with a table")
    if not isinstance(task, str | Path | Task):
        raise ConfigError(f"a task is a {type(task).__name__}", _TAKES)
    return load_task_data(task if isinstance(task, Task) else load_task(str(task)), seed)


def load_saved(task: Task, seed: int) -> TaskData:
    """Loads the task that a saved recommender names; its sources run only where they are allowed.

    Raises:
        ConfigError: A source outside metarec was not allowed; see `metarec.registry.Registry.get`.
    """
    for name in {part.source for part in (task.dataset, *task.dataset.parts.values()) if ":" in part.source}:
        SOURCES.get(name, from_file=True)
    return load_given(task, {}, seed)
