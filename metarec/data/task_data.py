"""Reads, labels and splits a task's data, so that no method can see the test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from metarec.data.episodes import (
    Episode,
    evaluation_episodes,
    no_part_is_empty,
    split_by_time,
    split_items,
    split_users,
)
from metarec.data.interactions import PART_NAMES, Codes, Flags, Interactions, SplitPart
from metarec.data.side_files import with_side
from metarec.data.sources import read_source
from metarec.data.task import DatasetConfig, QueryConfig, SplitConfig, Task, UnseenFrom
from metarec.data.templates import derive_fields
from metarec.data.transforms import DOMAIN, as_domains, keep_users, log_ratings, merge, with_negatives
from metarec.errors import DataError, shown, suggest
from metarec.files.artifacts import content_hash


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
    parts: Mapping[SplitPart, Codes]
    seed: int
    held_out: Interactions | None = None
    seen: Flags | None = None

    def __repr__(self) -> str:
        users = ", ".join(f"{part}={len(codes)}" for part, codes in self.parts.items())
        return f"TaskData(task={self.task.name!r}, seed={self.seed}, {users}, {self.interactions!r})"

    def episodes(self, part: SplitPart) -> tuple[list[Episode], int]:
        """Returns the evaluation episodes of a part, and how many of its users have too few ratings."""
        split, query = self.task.split, self.task.query
        cold = self.seen if self.seen is None or split.by == "user" else ~self.seen
        shown, asked = cold if split.by == "both" else self.seen, cold
        if split.cross:
            shown, asked = self._of_part(split.cross.support), self.query_items
        return evaluation_episodes(
            self.interactions if self.held_out is None else self.held_out,
            self.parts[part],
            max_support=self.task.shots[-1],
            max_query=query.max,
            min_query=query.min,
            order=split.order,
            seed=self.seed,
            support_from=shown,
            query_from=asked,
            short_supports=self.task.short_supports,
            candidates=query.candidates,
            sampled=query.sampled,
            **self._rows_of_a_given_split(part),
        )

    @property
    def query_items(self) -> Flags | None:
        """Items of the part of a mix that users are asked about, shape (items,); None where that is no part alone."""
        cross = self.task.split.cross
        return None if cross is None else self._of_part(cross.query)

    def _of_part(self, part: str) -> Flags:
        """Says which items are of a part of the mix, and seen in meta-training if some are not, shape (items,)."""
        domain: Flags = np.array([name == part for name in self.interactions.catalog.fields[DOMAIN]], bool)
        return domain if self.seen is None else domain & self.seen

    def _rows_of_a_given_split(self, part: SplitPart) -> dict[str, Flags]:
        """Which ratings a support and a query may hold, where known users' ratings are divided by files."""
        if self.held_out is None or self.held_out.part is None:
            return {}
        return {"support_rows": self.held_out.part == 0, "query_rows": self.held_out.part == PART_NAMES.index(part)}

    def evaluated(self, part: SplitPart) -> tuple[list[Episode], int]:
        """Returns what `episodes` does, for a part in which somebody must be left.

        Raises:
            DataError: Nobody of the part has enough ratings.
        """
        episodes, too_few = self.episodes(part)
        if episodes:
            return episodes, too_few
        whole = self.interactions if self.held_out is None else self.held_out
        rated = whole.items_of_user[self.parts[part]]
        task, support = self.task, 0 if self.task.short_supports else self.task.shots[-1]
        unseen = "" if self.seen is None else "; the task's 'split' says of which items"
        raise DataError(
            f"none of {len(rated)} {part} {task.by}s has the {support} + {task.query.min} ratings that "
            f"{support} shots and a query need: they have {rated.min()} to {rated.max()} "
            f"(median {np.median(rated):g}){unseen}",
            "Lower 'shots' or 'query.min' in the task, or set 'short_supports: true'",
        )

    def enough(self, shots: int) -> dict[SplitPart, tuple[int, int]]:
        """Returns of each part how many users have enough ratings for a support of some size, and how many have not.

        Of meta-training that is the support and `query.min` ratings of different items, as `fit` takes them where the
        settings name no others; with short supports one rating is a support.
        """
        rated = self.interactions.items_of_user[self.parts["train"]]
        support = min(shots, 1) if self.task.short_supports else shots
        trained = int((rated >= support + self.task.query.min_to_train).sum())
        found: dict[SplitPart, tuple[int, int]] = {"train": (trained, len(rated) - trained)}
        asks = replace(self, task=self.task.model_copy(update={"shots": (shots,), "query": self._smallest_query}))
        for part in ("validation", "test"):
            episodes, left = asks.episodes(part)
            found[part] = len(episodes), left
        return found

    @property
    def _smallest_query(self) -> QueryConfig:
        return self.task.query.model_copy(update={"candidates": "rated", "sampled": 0})

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Names data, split and prompt by their content; they go into every result."""
        split: dict[str, Any] = {part: users.tolist() for part, users in self.parts.items()}
        if self.seen is not None:
            split["seen"] = np.flatnonzero(self.seen).tolist()
        whole = self.interactions if self.held_out is None else self.held_out
        if whole.part is not None:
            split["rows"] = whole.part.tolist()
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


# The source of a task whose data were a DataFrame: they are kept nowhere.
IN_MEMORY = "dataframe"


def load_task_data(task: Task, seed: int, data: Interactions | None = None) -> TaskData:
    """Reads a task's dataset, applies its label rule and splits it.

    Args:
        task: The task.
        seed: Seed of the split, of episodes and of negatives, unless the task fixes its own.
        data: The dataset, without labels, where it was read already.

    Raises:
        DataError: The data cannot be read, or is too small for the split.
    """
    seed = seed if task.split.seed is None else task.split.seed
    data = load_dataset(task.dataset, data, task.split.files)
    if len(data.catalog) < 2:
        raise DataError("the dataset has one item, and there is nothing to rank", "Check the column of the items' ids")
    if task.rating.transform == "log":
        data = log_ratings(data)
    if task.negatives:
        data = with_negatives(data, task.negatives.per_positive, seed, popular=task.negatives.draw == "popular")
    data = task.rule.apply(data)
    if task.domain:
        data = as_domains(data, task.domain.field, task.domain.separator)
    return _split(task, data, seed)


def load_dataset(
    config: DatasetConfig, data: Interactions | None = None, files: Mapping[SplitPart, str] | None = None
) -> Interactions:
    """Reads a dataset as a task names it: its source, its derived fields, its users of the right size.

    Args:
        config: What the task says.
        data: What its source holds, where it was read already.
        files: The file of each part of a given split.

    Raises:
        DataError: The data cannot be read, or were a DataFrame that is not given again.
    """
    if data is not None:
        pass
    elif config.source == IN_MEMORY:
        raise DataError("the ratings were a DataFrame, which is kept nowhere", "Give it again, e.g. evaluate(frame)")
    elif config.source == "mix":
        parts = {name: load_dataset(part) for name, part in config.parts.items()}
        data = merge(parts, shared_users=config.shared_users)
    else:
        data = read_source(config.source, config.path, config.options, files)
    if config.source != "mix":
        data = with_side(data, config.path, config.options)
    if config.fields:
        data = replace(data, catalog=derive_fields(data.catalog, config.fields))
    return keep_users(data, *config.ratings_per_user)


def _split(task: Task, data: Interactions, seed: int) -> TaskData:
    split = task.split
    if split.files:
        return _given_split(task, data, seed)
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


def _given_split(task: Task, data: Interactions, seed: int) -> TaskData:
    """Divides users, or with known users their ratings, as the files of the task's split do."""
    if data.part is None:
        raise DataError(f"the split of task '{task.name}' is by files", "Give the path, not ratings read before")
    users: dict[SplitPart, Codes] = {
        name: np.unique(data.user[data.part == place]) for place, name in enumerate(PART_NAMES)
    }
    if task.split.users == "known":
        if missing := len(np.setdiff1d(np.union1d(users["validation"], users["test"]), users["train"])):
            raise DataError(
                f"{missing} validation or test users have no ratings in '{task.split.train}'",
                "Remove them, or set split.users to 'new' where no user is in two files",
            )
        return TaskData(task, data.subset(data.part == 0), users, seed, data)
    for first, other in combinations(PART_NAMES, 2):
        both = np.intersect1d(users[first], users[other])
        if len(both):
            files = task.split.files
            raise DataError(
                f"{len(both)} users are in '{files[first]}' and in '{files[other]}', e.g. {shown(data.users[both[0]])}",
                "Set split.users to 'known' where these files divide the ratings of the same users",
            )
    if not task.split.validation:
        held_out = np.random.default_rng(seed).permutation(users["train"])
        count = round(len(held_out) * task.split.fractions[1])
        users = {**users, "validation": np.sort(held_out[:count]), "train": np.sort(held_out[count:])}
    no_part_is_empty(users, len(data.users))
    return TaskData(task, data, users, seed)


def _transfer(data: Interactions, split: SplitConfig, seed: int) -> Mapping[SplitPart, Codes]:
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
