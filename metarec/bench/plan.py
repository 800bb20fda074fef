"""What a benchmark measures: tasks, methods, seeds and settings, as cells."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from metarec.bench.methods import METHODS
from metarec.bench.settings import canonical, label
from metarec.config import Section, flattened, read_yaml, validated
from metarec.data.task_files import load_task
from metarec.errors import ConfigError
from metarec.evaluation.metrics import BASELINE
from metarec.files.artifacts import content_hash, dump_json, parse_json
from metarec.lm.hub import check_backbone
from metarec.system.devices import check_device_name

_SLUG_LENGTH = 40
# Settings that name a model.
_MODELS = ("backbone", "collaborative.encoder")
_SETTINGS = "settings of runs by dotted key, such as backbone or train.steps, for the methods that read them"

_METHODS = "names, groups such as fold-in, or module:attribute"


class PlanPart(Section):
    """A block of cells: every method on every task and seed of the block."""

    tasks: tuple[str, ...] = Field(min_length=1)
    methods: tuple[str, ...] | None = Field(None, min_length=1, description=f"{_METHODS}; null: the plan's")
    seeds: int = Field(10, ge=1, description="number of split seeds")
    first_seed: int = Field(0, ge=0, description="the first of them: to keep splits that choices were made on apart")
    users: int | None = Field(None, ge=2, description="test users of each split at most, the same for all methods")
    train_users: tuple[int | None, ...] = Field(
        (None,), min_length=1, description="sizes of meta-training; null is all"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description=f"{_SETTINGS}; above the plan's")


class Plan(Section):
    """What a benchmark measures."""

    name: str
    description: str = ""
    methods: tuple[str, ...] = Field((), description=f"{_METHODS}, of the parts that name none")
    settings: dict[str, Any] = Field(default_factory=dict, description=_SETTINGS)
    parts: tuple[PlanPart, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Cell:
    """One method on one split.

    Args:
        task: The task's name, or its file.
        method: The method's name in `METHODS`.
        seed: The split's seed.
        users: Number of test users at most; None for all.
        train_users: Number of meta-training users at most; None for all.
        settings: Settings that the method reads and that differ from the defaults: pairs of dotted key and JSON.
    """

    task: str
    method: str
    seed: int
    users: int | None = None
    train_users: int | None = None
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> Path:
        """Where the cell lies below the benchmark's folder."""
        size = "" if self.train_users is None else f"-{self.train_users}-train-users"
        some = "" if self.users is None else f"-{self.users}-users"
        file = Path(self.task)
        task = file.stem if file.suffix in (".yaml", ".yml") else self.task
        method = _named_slug(self.method) if ":" in self.method else _slug(self.method)
        settings = f"-{_named_slug(label(self.changed))}" if self.settings else ""
        return Path(_slug(task)) / str(self.seed) / f"{method}{size}{some}{settings}"

    @property
    def changed(self) -> dict[str, Any]:
        """The settings as values by dotted key."""
        return {key: parse_json(text) for key, text in self.settings}

    @property
    def identity(self) -> dict[str, Any]:
        """What the cell is, as JSON values."""
        settings = {"settings": self.changed} if self.settings else {}
        return {
            "task": self.task,
            "method": self.method,
            "seed": self.seed,
            "users": self.users,
            "train_users": self.train_users,
            **settings,
        }


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", name.casefold()).strip("-")


def _named_slug(name: str) -> str:
    """Returns a short slug that no other name has."""
    return f"{_slug(name)[:_SLUG_LENGTH].strip('-')}-{content_hash(name)[:8]}"


def read_plan(path: Path) -> Plan:
    """Reads a plan from YAML.

    Raises:
        ConfigError: The file is not a plan.
    """
    return validated(Plan, read_yaml(path), str(path))


def with_settings(plan: Plan, settings: Mapping[str, Any]) -> Plan:
    """Returns the plan with settings above its own and those of its parts."""
    above = flattened(settings)
    parts = [part.model_copy(update={"settings": {**flattened(part.settings), **above}}) for part in plan.parts]
    return plan.model_copy(update={"parts": tuple(parts)})


def cells(plan: Plan) -> list[Cell]:
    """Returns a plan's cells, those of one split side by side.

    Raises:
        ConfigError: A part has no methods; a method's name is not known; a setting is not, or none of the methods reads
            it; or two cells would share a folder.
    """
    found: dict[Cell, None] = {}
    unread: dict[str, None] = {}
    for part in plan.parts:
        named = plan.methods if part.methods is None else part.methods
        if not named:
            raise ConfigError(
                f"plan '{plan.name}' names no methods for {', '.join(part.tasks)}", "Name them in the part or the plan"
            )
        methods = [name for given in named for name in METHODS.members(given)]
        if BASELINE not in methods:
            methods = [BASELINE, *methods]
        given = {**flattened(plan.settings), **flattened(part.settings)}
        settings = canonical(given, f"settings of plan '{plan.name}'")
        unread |= dict.fromkeys(settings)
        seeds = range(part.first_seed, part.first_seed + part.seeds)
        for task, seed, method, size in product(part.tasks, seeds, methods, part.train_users):
            read = tuple((key, _one_line(value)) for key, value in settings.items() if METHODS.get(method).reads(key))
            found[Cell(task, method, seed, part.users, size, read)] = None
    for cell in found:
        for key, _ in cell.settings:
            unread.pop(key, None)
    if unread:
        raise ConfigError(
            f"the setting '{next(iter(unread))}' changes none of the plan's methods",
            "Leave it out, or add a method that reads it",
        )
    _check_folders(list(found))
    return list(found)


def check_names(wanted: Iterable[Cell]) -> None:
    """Looks for the tasks, devices and models that cells name; imports no torch, so that a wrong name is said at once.

    A method from outside metarec may mean something else by a model's name: its models are not looked for.

    Raises:
        ConfigError: A task does not exist, or cannot be read; or there are no such devices.
        BackboneError: A model does not exist.
    """
    wanted = list(wanted)
    for task in {cell.task for cell in wanted}:
        load_task(task)
    for device in {cell.changed["device"] for cell in wanted if "device" in cell.changed}:
        check_device_name(device)
    for key in _MODELS:
        for name in {cell.changed[key] for cell in wanted if key in cell.changed and METHODS.is_own(cell.method)}:
            check_backbone(name)


def _one_line(value: Any) -> str:
    return " ".join(dump_json(value).split())


def _check_folders(wanted: list[Cell]) -> None:
    folders: dict[Path, Cell] = {}
    for cell in wanted:
        other = folders.setdefault(cell.folder, cell)
        if other != cell:
            raise ConfigError(
                f"'{cell.method}' on '{cell.task}' and '{other.method}' on '{other.task}' share the folder "
                f"'{cell.folder}'",
                "Rename one of them",
            )
