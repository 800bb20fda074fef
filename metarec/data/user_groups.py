"""Divides users into groups whose metrics are compared: by how much they rated, by how popular it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from metarec.data.episodes import Episode
from metarec.errors import DataError, suggest

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData

# What users are divided by, into thirds, and what the thirds are called.
GROUPINGS: Mapping[str, tuple[str, str, str]] = {
    "activity": ("few", "some", "many"),
    "mainstream": ("niche", "mixed", "popular"),
}


@dataclass(frozen=True)
class UserGroups:
    """Groups of users.

    Args:
        labels: The groups, in their order.
        of_user: The group of each user, by id.
    """

    labels: tuple[str, ...]
    of_user: Mapping[str, str]


def user_groups(name: str, data: TaskData, episodes: Sequence[Episode]) -> UserGroups:
    """Returns the thirds of some users by ``activity``, or by how ``mainstream`` they are.

    Activity is how many ratings a user has in the data, in support and query or neither; mainstream how many
    meta-training users rated the items of the user's support on average.

    Args:
        name: One of `GROUPINGS`.
        data: The task's data.
        episodes: The users.

    Raises:
        DataError: There is no such grouping.
    """
    if name not in GROUPINGS:
        raise DataError(f"users cannot be grouped by '{name}'", suggest(name, GROUPINGS))
    whole = data.interactions if data.held_out is None else data.held_out
    if name == "activity":
        rated = dict(zip(whole.users, whole.items_of_user.tolist(), strict=True))
        values = np.array([rated[episode.user] for episode in episodes], np.float64)
    else:
        trained = np.isin(data.interactions.user, data.parts["train"])
        raters = np.bincount(data.interactions.item[trained], minlength=len(whole.catalog))
        values = np.array([raters[episode.support.items].mean() if len(episode.support) else 0 for episode in episodes])
    labels = GROUPINGS[name]
    users = [episode.user for episode in episodes]
    return UserGroups(labels, {user: labels[third] for user, third in zip(users, _thirds(values), strict=True)})


def _thirds(values: NDArray[np.float64]) -> list[int]:
    """Returns the third of each value; equal values are in the same one."""
    bounds = np.quantile(values, [1 / 3, 2 / 3])
    return [int(third) for third in np.searchsorted(bounds, values, side="left")]
