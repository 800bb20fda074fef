"""Tasks are data: a YAML file says what is measured, and `load_task` turns it into checked settings.

Task files lie in ``tasks/<family>/<name>.yaml``; a wheel carries them inside the package. Knows nothing of methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from metarec.artifacts import content_hash
from metarec.config import Section, read_yaml, validated
from metarec.episodes import Episode, Order, Part, evaluation_episodes, split_users
from metarec.errors import ConfigError, suggest
from metarec.interactions import Codes, Interactions
from metarec.prompts import PromptTemplate
from metarec.sources import read_source


class DatasetConfig(Section):
    """Which dataset, and where it is."""

    source: str
    path: Path | None = None


class SplitConfig(Section):
    """How users and their ratings are divided."""

    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    order: Order = "random"


class QueryConfig(Section):
    """How much of a user is held out."""

    max: int = Field(50, ge=2)
    min: int = Field(5, ge=2)


class PromptConfig(Section):
    """How an item is put to the language model."""

    text: str
    positive: str
    negative: str


class Task(Section):
    """What is measured: a dataset, its episodes, the prompt and the label rule."""

    name: str
    version: int = Field(ge=1)
    description: str
    licence: str
    dataset: DatasetConfig
    split: SplitConfig = SplitConfig()
    shots: tuple[int, ...] = (0, 5, 10, 20)
    query: QueryConfig = QueryConfig()
    like_threshold: float
    prompt: PromptConfig

    @model_validator(mode="after")
    def _shots_ascend(self) -> Task:
        if not self.shots or self.shots[0] < 0 or list(self.shots) != sorted(set(self.shots)):
            raise ValueError(f"shots {list(self.shots)} are not ascending numbers from 0 on")
        return self

    @property
    def template(self) -> PromptTemplate:
        """The prompt, ready to render."""
        return PromptTemplate(self.prompt.text, self.prompt.positive, self.prompt.negative)

    @property
    def digest(self) -> str:
        """Names the task by its content; where the data lies on this disk does not count."""
        return content_hash(self.model_dump(mode="json", exclude={"dataset": {"path"}}))


@dataclass(frozen=True)
class TaskData:
    """A task's dataset, split by a seed.

    Args:
        task: The task.
        interactions: The dataset.
        parts: User codes of meta-train, validation and test.
        seed: Seed of the split.
    """

    task: Task
    interactions: Interactions
    parts: Mapping[Part, Codes]
    seed: int

    def episodes(self, part: Part) -> tuple[list[Episode], int]:
        """Returns the evaluation episodes of a part, and how many of its users have too few ratings."""
        return evaluation_episodes(
            self.interactions,
            self.parts[part],
            max_support=self.task.shots[-1],
            max_query=self.task.query.max,
            min_query=self.task.query.min,
            order=self.task.split.order,
            seed=self.seed,
        )


def load_task(name: str) -> Task:
    """Reads a task by name (``movielens/user-cold``) or by the path of a YAML file.

    Relative dataset paths are relative to the task's file.

    Raises:
        ConfigError: There is no such task, or the file is not a valid one.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = task_names()
        if name not in known:
            raise ConfigError(f"no task is called '{name}'", suggest(name, known))
        path = tasks_dir() / f"{name}.yaml"
    task = validated(Task, read_yaml(path), str(path))
    source = task.dataset
    if source.path is not None and not source.path.is_absolute():
        resolved = source.model_copy(update={"path": (path.parent / source.path).resolve()})
        task = task.model_copy(update={"dataset": resolved})
    return task


def load_task_data(task: Task, seed: int) -> TaskData:
    """Reads a task's dataset and splits its users by `seed`."""
    interactions = read_source(task.dataset.source, task.dataset.path)
    return TaskData(task, interactions, split_users(interactions, task.split.fractions, seed), seed)


def task_names() -> list[str]:
    """Returns the names of all tasks that come with metarec."""
    root = tasks_dir()
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.glob("*/*.yaml"))


def tasks_dir() -> Path:
    """Returns where the tasks lie: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parent
    return package / "tasks" if (package / "tasks").is_dir() else package.parent / "tasks"
