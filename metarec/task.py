"""Tasks are data: a YAML file says what is measured, and `load_task` turns it into checked settings.

Task files lie in ``tasks/<family>/<name>.yaml``; a wheel carries them inside the package. ``include`` takes shared
parts from another file, a file with ``group`` names several tasks, and a user's own folders come in by
``--include-path`` or ``METAREC_TASKS``. `load_task_data` reads, labels and splits the data; what meta-training may see
of it is a dataset of its own, so that no method can look further. Knows nothing of methods.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from metarec.artifacts import content_hash
from metarec.config import Section, read_yaml, validated
from metarec.episodes import (
    Candidates,
    Episode,
    Order,
    Part,
    evaluation_episodes,
    split_by_time,
    split_items,
    split_users,
)
from metarec.errors import ConfigError, DataError, suggest
from metarec.evaluate import METRICS, check_metric
from metarec.interactions import Codes, Flags, Interactions
from metarec.labels import LabelRule, read_rule
from metarec.prompts import REVIEW, PromptTemplate, derive_fields
from metarec.sources import SourceOptions, read_source
from metarec.views import as_domains, keep_users, merge, with_negatives

TASKS_VARIABLE = "METAREC_TASKS"
DATA_VARIABLE = "METAREC_DATA"
_MAX_INCLUDES = 8
_LONGEST_KEY = 64


class DatasetConfig(Section):
    """Which dataset, and where it is."""

    source: str
    path: Path | None = None
    options: SourceOptions = SourceOptions()
    fields: dict[str, str] = Field({}, description="catalog fields made from others, by Jinja2 templates")
    ratings_per_user: tuple[int, int | None] = Field((1, None), description="users with fewer or more are left out")
    parts: dict[str, DatasetConfig] = Field({}, description="of source 'mix': the datasets that are joined")

    @model_validator(mode="after")
    def _only_a_mix_has_parts(self) -> DatasetConfig:
        if bool(self.parts) != (self.source == "mix"):
            raise ValueError("'parts' and source 'mix' belong together")
        return self


class UnseenFrom(Section):
    """Items count as unseen from a value of a field on, e.g. movies released since a year."""

    field: str
    since: float


class TransferConfig(Section):
    """Which part of a mix is meta-trained on, and which one is adapted to."""

    train: str
    test: str


class SplitConfig(Section):
    """How users, items and ratings are divided."""

    by: Literal["user", "item", "both", "time"] = "user"
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    order: Order = "random"
    unseen: Annotated[float, Field(gt=0, lt=1)] | UnseenFrom | None = Field(
        None, description="which items meta-training never sees; by user, nobody is asked about them either"
    )
    users: Literal["new", "known"] = Field("new", description="known: test users' other ratings are trained on")
    transfer: TransferConfig | None = None
    seed: int | None = Field(None, ge=0, description="null takes the run's")

    @property
    def asks_unrated(self) -> bool:
        """Whether users are asked about items that nobody in meta-training rated."""
        return self.by in ("item", "both")

    @model_validator(mode="after")
    def _combinations(self) -> SplitConfig:
        if self.by == "time" and (self.users == "known" or self.transfer or self.unseen):
            raise ValueError("a split by time has new users, all items and one dataset")
        if self.by in ("item", "both") and self.unseen is None:
            raise ValueError(f"a split by {self.by} says which items are 'unseen', e.g. 0.2 of them")
        return self


class QueryConfig(Section):
    """How much of a user is held out, and what it is ranked among."""

    max: int = Field(50, ge=2)
    min: int = Field(5, ge=1)
    candidates: Candidates = "rated"
    sampled: int = Field(0, ge=0, description="unrated items per query, where candidates are 'sampled'")

    @model_validator(mode="after")
    def _sampled_says_how_many(self) -> QueryConfig:
        if (self.candidates == "sampled") != (self.sampled > 0):
            raise ValueError("'sampled' says how many unrated items join a query whose candidates are 'sampled'")
        return self


class PromptConfig(Section):
    """How an item is put to the language model."""

    text: str
    positive: str
    negative: str
    ratings: tuple[str, ...] = Field((), description="answer words from the lowest to the highest rating")
    recall: tuple[str, ...] = Field(
        (),
        description="sentences about an item that go on with what is known of it, read for items that nobody rated",
        # Tasks without any keep the digest they had before there were any.
        exclude_if=lambda sentences: not sentences,
    )


class DomainConfig(Section):
    """Which field of an item names its domain."""

    field: str
    separator: str = ", "


class NegativesConfig(Section):
    """How many items nobody touched stand beside each one that somebody did, in implicit data."""

    per_positive: int = Field(1, ge=1, le=100)
    draw: Literal["even", "popular"] = "even"


class Task(Section):
    """What is measured: a dataset, its episodes, the prompt and the label rule."""

    name: str
    version: int = Field(ge=1)
    description: str
    licence: str
    origin: str = Field("", description="where the data comes from, or how to cite it")
    dataset: DatasetConfig
    by: Literal["user", "domain"] = "user"
    domain: DomainConfig | None = None
    split: SplitConfig = SplitConfig()
    shots: tuple[int, ...] = (0, 5, 10, 20)
    short_supports: bool = Field(False, description="users with fewer than K ratings give what they have")
    query: QueryConfig = QueryConfig()
    label: str
    negatives: NegativesConfig | None = None
    metrics: tuple[str, ...] = METRICS
    prompt: PromptConfig

    @model_validator(mode="before")
    @classmethod
    def _threshold_is_a_label_rule(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "like_threshold" in values and "label" not in values:
            rest = {key: value for key, value in values.items() if key != "like_threshold"}
            return {**rest, "label": f"rating >= {values['like_threshold']}"}
        return values

    @field_validator("label")
    @classmethod
    def _label_is_a_rule(cls, text: str) -> str:
        read_rule(text)
        return text

    @field_validator("metrics")
    @classmethod
    def _metrics_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            check_metric(name)
        return tuple(dict.fromkeys((*METRICS, *names)))

    @model_validator(mode="after")
    def _shots_ascend(self) -> Task:
        if not self.shots or self.shots[0] < 0 or list(self.shots) != sorted(set(self.shots)):
            raise ValueError(f"shots {list(self.shots)} are not ascending numbers from 0 on")
        return self

    @property
    def recall(self) -> tuple[str, ...]:
        """Sentences that a causal language model reads of each item where ones are asked about that nobody rated."""
        return (self.prompt.recall or (REVIEW,)) if self.split.asks_unrated else ()

    @model_validator(mode="after")
    def _parts_fit(self) -> Task:
        if (self.by == "domain") != (self.domain is not None):
            raise ValueError("'by: domain' and a 'domain' belong together")
        if self.by == "domain" and (self.query.candidates != "rated" or self.rule.kind == "implicit"):
            raise ValueError("episodes by domain ask about rated items")
        if (self.rule.kind == "implicit") != (self.negatives is not None):
            raise ValueError("label 'implicit' and 'negatives' belong together")
        if self.rule.kind == "rating" and self.query.candidates != "rated":
            raise ValueError("label 'rating' asks about rated items, the others have no rating")
        transfer = self.split.transfer
        if transfer and not {transfer.train, transfer.test} <= set(self.dataset.parts):
            raise ValueError(f"split.transfer names no parts of the mix: {sorted(self.dataset.parts)}")
        return self

    @property
    def rule(self) -> LabelRule:
        """The label rule, read."""
        return read_rule(self.label)

    @property
    def like_threshold(self) -> float:
        """Ratings from here on are likes; NaN where the user's own mean decides."""
        return self.rule.threshold

    @property
    def template(self) -> PromptTemplate:
        """The prompt, ready to render."""
        return PromptTemplate(self.prompt.text, self.prompt.positive, self.prompt.negative)

    @property
    def digest(self) -> str:
        """Names the task by its content; where the data lies on this disk does not count."""
        values = self.model_dump(mode="json")
        for dataset in (values["dataset"], *values["dataset"]["parts"].values()):
            del dataset["path"]
        return content_hash(values)


@dataclass(frozen=True)
class TaskData:
    """A task's dataset, split by a seed.

    Args:
        task: The task.
        interactions: What may be trained on: rows of the training users are all that training may see of them.
        parts: User codes of meta-train, validation and test.
        seed: Seed of the split.
        held_out: Where validation and test episodes are cut from; None cuts them from `interactions`.
        seen: Items that meta-training may see, shape (items,); None for all.
    """

    task: Task
    interactions: Interactions
    parts: Mapping[Part, Codes]
    seed: int
    held_out: Interactions | None = None
    seen: Flags | None = None

    def episodes(self, part: Part) -> tuple[list[Episode], int]:
        """Returns the evaluation episodes of a part, and how many of its users have too few ratings."""
        split, query = self.task.split, self.task.query
        cold = self.seen if self.seen is None or split.by == "user" else ~self.seen
        return evaluation_episodes(
            self.interactions if self.held_out is None else self.held_out,
            self.parts[part],
            max_support=self.task.shots[-1],
            max_query=query.max,
            min_query=query.min,
            order=split.order,
            seed=self.seed,
            support_from=cold if split.by == "both" else self.seen,
            query_from=cold,
            short_supports=self.task.short_supports,
            candidates=query.candidates,
            sampled=query.sampled,
        )

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Names data, split and prompt by their content; they go into every result."""
        split: dict[str, Any] = {part: users.tolist() for part, users in self.parts.items()}
        if self.seen is not None:
            split["seen"] = np.flatnonzero(self.seen).tolist()
        whole = self.interactions if self.held_out is None else self.held_out
        return {
            "data": whole.digest,
            "split": content_hash(split),
            "prompt": content_hash(self.task.prompt.model_dump(mode="json")),
        }

    def leaks(self) -> list[str]:
        """Says in sentences what training could see of the test; none is right."""
        found = []
        episodes = [episode for part in ("validation", "test") for episode in self.episodes(part)[0]]
        rows = np.isin(self.interactions.user, self.parts["train"])
        trained = set(zip(self.interactions.user[rows].tolist(), self.interactions.item[rows].tolist(), strict=True))
        code = {user: position for position, user in enumerate(self.interactions.users)}
        asked = {(code[episode.user], int(item)) for episode in episodes for item in episode.query.items}
        if both := trained & asked:
            found.append(f"{len(both)} ratings are trained on and asked about")
        if self.seen is not None:
            items = {item for _, item in trained}
            if hidden := items & set(np.flatnonzero(~self.seen).tolist()):
                found.append(f"{len(hidden)} unseen items are rated in meta-training")
            shown = {int(item) for episode in episodes for item in episode.query.items} & items
            if shown and self.task.split.by != "user":
                found.append(f"{len(shown)} items of queries are rated in meta-training")
        if self.task.split.users == "new" and set(self.parts["train"]) & {
            *self.parts["validation"],
            *self.parts["test"],
        }:
            found.append("users are trained on and tested")
        mixed = sum(bool(set(episode.support.items) & set(episode.query.items)) for episode in episodes)
        if mixed:
            found.append(f"{mixed} episodes have an item in support and query")
        return found


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
        raise ConfigError(
            f"'{name}' is a group of tasks", f"Name one of: {', '.join(map(str, values.get('tasks', [])))}"
        )
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
        config = validated(GroupConfig, read_yaml(groups[name]), str(groups[name]))
        for task in config.tasks:
            if task not in known:
                raise ConfigError(
                    f"'{groups[name]}' names the task '{task}', which does not exist", suggest(task, known)
                )
        return list(config.tasks)
    if family := [task for task in known if task.startswith(f"{name}/")]:
        return family
    raise ConfigError(f"no task, family or group is called '{name}'", suggest(name, [*known, *groups]))


class GroupConfig(Section):
    """A suite of tasks."""

    group: str
    description: str = ""
    tasks: tuple[str, ...] = Field(min_length=1)


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
        raise ConfigError(f"'{path}': 'include' is {included!r}", "Name a YAML file, or a list of them")
    merged: dict[str, Any] = {}
    for name in names:
        merged = _merged(merged, _with_includes(path.parent / name, (*above, path.resolve())))
    return _merged(merged, values)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {key for key in over if isinstance(over[key], Mapping) and isinstance(base.get(key), Mapping)}
    return {**base, **over, **{key: _merged(base[key], over[key]) for key in both}}


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


def load_task_data(task: Task, seed: int) -> TaskData:
    """Reads a task's dataset, applies its label rule and splits it.

    Args:
        task: The task.
        seed: Seed of the split, of episodes and of negatives, unless the task fixes its own.

    Raises:
        DataError: The data cannot be read, or is too small for the split.
    """
    seed = seed if task.split.seed is None else task.split.seed
    data = load_dataset(task.dataset)
    if task.negatives:
        data = with_negatives(data, task.negatives.per_positive, seed, popular=task.negatives.draw == "popular")
    data = task.rule.apply(data)
    if task.domain:
        data = as_domains(data, task.domain.field, task.domain.separator)
    return _split(task, data, seed)


def load_dataset(config: DatasetConfig) -> Interactions:
    """Reads a dataset as a task names it: its source, its derived fields, its users of the right size."""
    if config.source == "mix":
        data = merge({name: load_dataset(part) for name, part in config.parts.items()})
    else:
        data = read_source(config.source, config.path, config.options)
    if config.fields:
        data = replace(data, catalog=derive_fields(data.catalog, config.fields))
    return keep_users(data, *config.ratings_per_user)


def _split(task: Task, data: Interactions, seed: int) -> TaskData:
    split = task.split
    if split.by == "time":
        parts, usable = split_by_time(data, split.fractions)
        return TaskData(task, data.subset(usable), parts, seed)
    parts = split_users(data, split.fractions, seed)
    if split.transfer:
        parts = _transfer(data, split, seed)
    seen = None if split.unseen is None else _seen_items(data, split.unseen, seed)
    if split.users == "known":
        parts = {**parts, "train": np.arange(len(data.users))}
    if seen is None and split.users == "new":
        return TaskData(task, data, parts, seed)
    trained = np.isin(data.user, parts["train"]) & (True if seen is None else seen[data.item])
    if split.users == "known":
        trained &= ~_asked(TaskData(task, data, parts, seed, data, seen))
    return TaskData(task, data.subset(trained), parts, seed, data, seen)


def _transfer(data: Interactions, split: SplitConfig, seed: int) -> Mapping[Part, Codes]:
    """Trains and validates on one part's users; tests those users of the other that its own task would test."""
    assert split.transfer
    codes = {
        name: np.array([code for code, user in enumerate(data.users) if user.startswith(f"{name}/")], np.int64)
        for name in (split.transfer.train, split.transfer.test)
    }
    source, target = codes.values()
    inside = {
        name: split_users(replace(data, users=tuple(data.users[code] for code in users)), split.fractions, seed)
        for name, users in codes.items()
    }
    trained, tested = inside.values()
    return {
        "train": source[trained["train"]],
        "validation": source[trained["validation"]],
        "test": target[tested["test"]],
    }


def _seen_items(data: Interactions, unseen: float | UnseenFrom, seed: int) -> Flags:
    if isinstance(unseen, float):
        return split_items(data, unseen, seed)
    if unseen.field not in data.catalog.fields:
        raise DataError(f"the catalog has no field '{unseen.field}'", suggest(unseen.field, data.catalog.fields))
    numbers = np.array(
        [float(text) if text.replace(".", "", 1).isdigit() else -np.inf for text in data.catalog.fields[unseen.field]]
    )
    seen: Flags = numbers < unseen.since
    if seen.all() or not seen.any():
        raise DataError(
            f"{unseen.field} since {unseen.since:g} leaves {seen.sum()} of {len(seen)} items seen", "Choose another"
        )
    return seen


def _asked(data: TaskData) -> Flags:
    """Rows that a validation or test query asks about."""
    whole = data.held_out if data.held_out is not None else data.interactions
    code = {user: position for position, user in enumerate(whole.users)}
    episodes = [episode for part in ("validation", "test") for episode in data.episodes(part)[0]]
    keys = [code[episode.user] * len(whole.catalog) + episode.query.items for episode in episodes]
    asked = np.concatenate([*keys, np.zeros(0, np.int64)])
    flags: Flags = np.isin(whole.user * len(whole.catalog) + whole.item, asked)
    return flags


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
    package = Path(__file__).parent
    return package / "tasks" if (package / "tasks").is_dir() else package.parent / "tasks"
