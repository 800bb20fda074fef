"""Finds and reads task files: ``tasks/<family>/<name>.yaml``, includes, groups and a user's own folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metarec.config import merged, read_yaml, validated
from metarec.data.task import DatasetConfig, GroupConfig, Task
from metarec.errors import ConfigError, shown, suggest

TASKS_VARIABLE = "METAREC_TASKS"
DATA_VARIABLE = "METAREC_DATA"
_MAX_INCLUDES = 8
_LONGEST_KEY = 64


def load_task(name: str, include_path: Sequence[Path] = ()) -> Task:
    """Reads a task by name (``movielens/user-cold``) or by the path of a YAML file.

    A relative dataset path is looked for beside the task's file, then in ``$METAREC_DATA`` (default: ``data``).

    Args:
        name: The task.
        include_path: Folders of families, searched before metarec's own.

    Raises:
        ConfigError: There is no such task, or the file is not a valid one.
    """
    path = _task_file(name, include_path)
    values = read_task_yaml(path)
    if "group" in values:
        raise ConfigError(f"'{name}' is a group of tasks", f"Name one of: {', '.join(_group(values, path).tasks)}")
    task = validated(Task, values, str(path))
    return task.model_copy(update={"dataset": _located(task.dataset, path.parent)})


def load_group(name: str, include_path: Sequence[Path] = ()) -> list[str]:
    """Returns the names of a group's tasks, in order; a task's name gives itself, a family all its tasks.

    Raises:
        ConfigError: There is no such group, or it names a task that does not exist.
    """
    known = task_names(include_path)
    if name in known or Path(name).suffix in (".yaml", ".yml"):
        return [name]
    groups = group_names(include_path)
    if name in groups:
        config = _group(read_yaml(groups[name]), groups[name])
        for task in config.tasks:
            if task not in known:
                raise ConfigError(
                    f"'{groups[name]}' names the task '{task}', which does not exist", suggest(task, known)
                )
        return list(config.tasks)
    if family := [task for task in known if task.startswith(f"{name}/")]:
        return family
    raise ConfigError(f"no task, family or group is called '{name}'", suggest(name, [*known, *groups]))


def _group(values: Mapping[str, Any], path: Path) -> GroupConfig:
    return validated(GroupConfig, values, str(path))


def read_task_yaml(path: Path) -> dict[str, Any]:
    """Reads a task's YAML with what it includes; its own keys win, section by section.

    Raises:
        ConfigError: A file is missing or not plain YAML, or includes go round in circles.
    """
    return _with_includes(path, ())


def _with_includes(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above or len(above) >= _MAX_INCLUDES:
        chain = " -> ".join(part.name for part in (*above, path))
        raise ConfigError(f"'{path}' is included in a circle or too deep: {chain}", "Remove one 'include'")
    values = read_yaml(path)
    included = values.pop("include", [])
    names = [included] if isinstance(included, str) else included
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"'{path}': 'include' is {shown(included)}", "Name a YAML file, or a list of them")
    base: dict[str, Any] = {}
    for name in names:
        base = merged(base, _with_includes(path.parent / name, (*above, path.resolve())))
    return merged(base, values)


def _task_file(name: str, include_path: Sequence[Path]) -> Path:
    if Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    files = dict(_yaml_files(include_path))
    if name not in files:
        raise ConfigError(f"no task is called '{name}'", suggest(name, files))
    return files[name]


def _located(dataset: DatasetConfig, folder: Path) -> DatasetConfig:
    """Makes paths absolute; one that exists in neither place points to the data folder, where it is to be put."""
    parts = {name: _located(part, folder) for name, part in dataset.parts.items()}
    path = dataset.path
    if path is not None and not path.is_absolute():
        beside, common = folder / path, Path(os.environ.get(DATA_VARIABLE) or "data") / path
        path = (beside if beside.exists() else common).resolve()
    return dataset.model_copy(update={"path": path, "parts": parts})


def task_names(include_path: Sequence[Path] = ()) -> list[str]:
    """Returns the names of all tasks: metarec's own, and those of `include_path` and ``$METAREC_TASKS``."""
    return sorted(_task_files(include_path))


def group_names(include_path: Sequence[Path] = ()) -> dict[str, Path]:
    """Returns the groups of tasks there are, by name, with their files."""
    return {name: path for name, path in _yaml_files(include_path) if _is_group(path)}


def _task_files(include_path: Sequence[Path]) -> dict[str, Path]:
    return {name: path for name, path in _yaml_files(include_path) if not _is_group(path)}


def _is_group(path: Path) -> bool:
    # By its first key alone: a listing must not parse every file, and a broken one is named when it is loaded.
    with path.open("rb") as stream:
        return stream.readline(_LONGEST_KEY).startswith(b"group:")


def _yaml_files(include_path: Sequence[Path]) -> list[tuple[str, Path]]:
    own = [Path(part) for part in os.environ.get(TASKS_VARIABLE, "").split(os.pathsep) if part]
    found: list[tuple[str, Path]] = []
    # The user's own folders come last: a later name replaces an earlier one.
    for root in (tasks_dir(), *own, *include_path):
        if not root.is_dir():
            raise ConfigError(f"task folder '{root}' does not exist", "Give a folder of FAMILY/NAME.yaml files")
        files = sorted(path for path in root.glob("*/*.yaml") if not path.name.startswith("_"))
        found += [(path.relative_to(root).with_suffix("").as_posix(), path) for path in files]
    return found


def tasks_dir() -> Path:
    """Returns where the tasks lie: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parents[1]
    return package / "tasks" if (package / "tasks").is_dir() else package.parent / "tasks"
