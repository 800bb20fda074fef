"""Which episodes meta-training draws from a task, and how many users have enough ratings for them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from metarec.config import TrainConfig
from metarec.data.interactions import Flags
from metarec.data.task import Task
from metarec.errors import DataError

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData

_LOG = logging.getLogger(__name__)
# Said as a warning where so large a share of the users is left out.
_MANY = 0.5
# A loss compares two ratings at least.
_FEWEST_ASKED = 2


@dataclass(frozen=True)
class EpisodeSizes:
    """The sizes of meta-training episodes.

    Args:
        shots: Support sizes to draw from.
        min_query: Ratings that a query needs at least.
        short_supports: Whether a user with fewer than K ratings gives what they have.
    """

    shots: tuple[int, ...]
    min_query: int
    short_supports: bool

    def needed(self, shots: int) -> int:
        """Returns how many items a user must have rated for a support of K and a query."""
        return self.min_query + (min(shots, 1) if self.short_supports else shots)


def episode_sizes(task: Task, config: TrainConfig) -> EpisodeSizes:
    """Returns the sizes that the settings name, or else the task's own: its K above 0 and its smallest query."""
    return EpisodeSizes(
        config.shots or tuple(count for count in task.shots if count > 0) or task.shots,
        config.min_query or min(task.query.min_to_train, config.max_query),
        task.short_supports,
    )


def users_by_shots(
    data: TaskData, sizes: EpisodeSizes, hidden: Callable[[str], Flags] | None = None
) -> dict[int, dict[str, int]]:
    """Returns for each K how many meta-training users have enough ratings, and how many are left out.

    Args:
        data: The task's data.
        sizes: The sizes of episodes.
        hidden: See `metarec.data.episodes.training_batch`.

    Raises:
        DataError: For some K no user has enough.
    """
    interactions, users = data.interactions, data.parts["train"]
    rated = interactions.items_of_user[users]
    found = {}
    for shots in sizes.shots:
        enough = rated >= sizes.needed(shots)
        if hidden is not None:
            for place in np.flatnonzero(enough):
                items = np.unique(interactions.item[interactions.rows_of_user[users[place]]])
                asked = int(hidden(interactions.users[users[place]])[items].sum())
                shown = len(items) - asked
                enough[place] = asked >= sizes.min_query and shown >= sizes.needed(shots) - sizes.min_query
        found[shots] = {"enough": int(enough.sum()), "left_out": int((~enough).sum())}
    if any(not counts["enough"] for counts in found.values()):
        raise _too_few(data.task, sizes, found, int(rated.max(initial=0)), hidden is not None)
    return found


def _too_few(task: Task, sizes: EpisodeSizes, found: dict[int, dict[str, int]], most: int, hides: bool) -> DataError:
    lacking = next(shots for shots, counts in found.items() if not counts["enough"])
    kind = " of hidden items" if hides else ""
    counted = ", ".join(f"{counts['enough']} for K = {shots}" for shots, counts in found.items())
    possible = [shots for shots, counts in found.items() if counts["enough"]]
    if possible or most > sizes.min_query:
        lower = possible or [min(lacking, most - sizes.min_query)]
        cure = f"Set train.shots to {lower}, or lower train.min_query (now {sizes.min_query})"
    elif most > _FEWEST_ASKED:
        cure = f"Ask for less: --set train.shots=[1] --set train.min_query={most - 1}"
    else:
        cure = f"Meta-training takes {task.by}s with 3 rated items at least, one to adapt to and two to compare"
    return DataError(
        f"no meta-training {task.by} has {sizes.needed(lacking)} ratings, which K = {lacking} and a query of "
        f"{sizes.min_query}{kind} take: the most are {most}. Enough have {counted}",
        cure,
    )


def refuse_small_data(data: TaskData, config: TrainConfig) -> None:
    """Refuses data from which no episodes can be drawn; says how many users each K leaves out.

    Raises:
        DataError: For some K no meta-training user has enough ratings.
    """
    sizes = episode_sizes(data.task, config)
    for shots, counts in users_by_shots(data, sizes).items():
        left, all_of_them = counts["left_out"], sum(counts.values())
        if left:
            _LOG.log(
                logging.WARNING if left >= _MANY * all_of_them else logging.INFO,
                "meta-training with K = %d leaves %d of %d %ss out, who have fewer than %d ratings",
                *(shots, left, all_of_them, data.task.by, sizes.needed(shots)),
            )


def summary(found: dict[int, dict[str, int]]) -> dict[str, Any]:
    """Returns `users_by_shots` as JSON values."""
    return {str(shots): count for shots, count in found.items()}
