"""Divides users into groups whose metrics are compared: by activity, by how popular their items are, by a field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from metarec.data.episodes import Episode
from metarec.data.item_fields import numbers_in
from metarec.errors import DataError, suggest

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData

# What users are divided by, into thirds, and what the thirds are called.
GROUPINGS: Mapping[str, tuple[str, str, str]] = {
    "activity": ("few", "some", "many"),
    "mainstream": ("niche", "mixed", "popular"),
}
# A field with more values is no grouping.
_MOST_GROUPS = 6


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
    """Returns groups of some users: thirds by ``activity`` or by how ``mainstream`` they are, or those of a field.

    Activity is how many ratings a user has in the data, in support and query or neither; mainstream how many
    meta-training users rated the items of the user's support on average. A field of users with up to six values
    divides them by these; one of numbers, into thirds. Users of whom the field says nothing are in no group.

    Args:
        name: One of `GROUPINGS`, or a field of users.
        data: The task's data.
        episodes: The users.

    Raises:
        DataError: There is no such grouping, or the field has more values, or none.
    """
    whole = data.interactions if data.held_out is None else data.held_out
    if name not in GROUPINGS:
        if name not in whole.side.about:
            raise DataError(f"users cannot be grouped by '{name}'", suggest(name, [*GROUPINGS, *whole.side.about]))
        column = dict(zip(whole.users, map(str, whole.side.about[name]), strict=True))
        return _by_value(name, {episode.user: column[episode.user] for episode in episodes})
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


def _by_value(name: str, values: Mapping[str, str]) -> UserGroups:
    """Returns users by what a field says of them."""
    known = {user: value.strip() for user, value in values.items() if value.strip()}
    different = sorted(set(known.values()))
    if known and len(different) <= _MOST_GROUPS:
        return UserGroups(tuple(different), known)
    numbers = numbers_in(list(known.values()))
    if not known or np.isnan(numbers).any():
        raise DataError(
            f"users cannot be grouped by '{name}': it has {len(different)} values",
            f"Name a field of numbers, or one with up to {_MOST_GROUPS} values",
        )
    labels = [f"to {bound:g}" for bound in np.quantile(numbers, [1 / 3, 2 / 3, 1])]
    thirds = zip(known, _thirds(numbers), strict=True)
    return UserGroups(tuple(dict.fromkeys(labels)), {user: labels[third] for user, third in thirds})


def _thirds(values: NDArray[np.float64]) -> list[int]:
    """Returns the third of each value; equal values are in the same one."""
    bounds = np.quantile(values, [1 / 3, 2 / 3])
    return [int(third) for third in np.searchsorted(bounds, values, side="left")]
