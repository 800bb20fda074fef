"""What a benchmark measures: tasks, methods and seeds, as cells."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from pydantic import Field

from metarec.bench.methods import METHODS
from metarec.config import Section, read_yaml, validated
from metarec.errors import ConfigError, suggest
from metarec.recommender import BASELINE


class PlanPart(Section):
    """A block of cells: every method on every task and seed of the block."""

    tasks: tuple[str, ...] = Field(min_length=1)
    methods: tuple[str, ...] = Field(min_length=1, description="names, or groups such as fold-in")
    seeds: int = Field(10, ge=1, description="how many split seeds, from 0")
    users: int | None = Field(None, ge=2, description="only so many test users of each split, the same for all methods")
    train_users: tuple[int | None, ...] = Field(
        (None,), min_length=1, description="sizes of meta-training; null is all"
    )


class Plan(Section):
    """What a benchmark measures."""

    name: str
    description: str = ""
    parts: tuple[PlanPart, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Cell:
    """One method on one split.

    Args:
        task: The task's name, or its file.
        method: The method's name in `METHODS`.
        seed: The split's seed.
        users: At most so many test users; None for all.
        train_users: At most so many meta-training users; None for all.
    """

    task: str
    method: str
    seed: int
    users: int | None = None
    train_users: int | None = None

    @property
    def folder(self) -> Path:
        """Where the cell lies below the benchmark's folder."""
        size = "" if self.train_users is None else f"-{self.train_users}-train-users"
        some = "" if self.users is None else f"-{self.users}-users"
        file = Path(self.task)
        task = file.stem if file.suffix in (".yaml", ".yml") else self.task
        return Path(_slug(task)) / str(self.seed) / f"{_slug(self.method)}{size}{some}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", name.casefold()).strip("-")


def read_plan(path: Path) -> Plan:
    """Reads a plan from YAML.

    Raises:
        ConfigError: The file is not a plan, or names a method that there is not.
    """
    return validated(Plan, read_yaml(path), str(path))


def cells(plan: Plan) -> list[Cell]:
    """Returns a plan's cells, those of one split side by side.

    Raises:
        ConfigError: A method's name is not known.
    """
    found: dict[Cell, None] = {}
    for part in plan.parts:
        methods = [name for given in part.methods for name in _named(given)]
        if BASELINE not in methods:
            methods = [BASELINE, *methods]
        for task, seed, method, size in product(part.tasks, range(part.seeds), methods, part.train_users):
            found[Cell(task, method, seed, part.users, size)] = None
    return list(found)


def _named(name: str) -> list[str]:
    if name in METHODS:
        return [name]
    group = [method for method in METHODS if METHODS[method].group == name]
    if not group:
        groups = dict.fromkeys(method.group for method in METHODS.values())
        raise ConfigError(f"no method or group is called '{name}'", suggest(name, [*METHODS, *groups]))
    return group
