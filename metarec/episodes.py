"""Users become episodes: a disjoint split of users, then a support and a query set for each.

Everything is a pure function of a seed and of names: a user's split does not depend on which other users there are,
and a training batch depends on the seed and the step alone, which is what makes a run resumable bit for bit.
Knows nothing of labels, prompts or models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from metarec.errors import ConfigError, DataError
from metarec.interactions import Codes, Interactions, Ratings

Order = Literal["random", "time"]
Part = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Episode:
    """One user's data for few-shot learning.

    Args:
        user: The user's id.
        support: What may be adapted to; a K-shot support is its first K ratings, so smaller ones are nested in
            larger ones.
        query: What is held out; the same for every K.
    """

    user: str
    support: Ratings
    query: Ratings


def split_users(interactions: Interactions, fractions: tuple[float, float, float], seed: int) -> Mapping[Part, Codes]:
    """Divides users into meta-train, validation and test without overlap.

    Args:
        interactions: The dataset.
        fractions: Shares of the three parts; they sum to one.
        seed: Another seed gives another division.

    Returns:
        User codes of each part, ascending.

    Raises:
        ConfigError: The fractions are not positive or do not sum to one.
        DataError: A part would be empty.
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ConfigError(f"split fractions {fractions} are not positive numbers that sum to 1", "Use 0.8, 0.1, 0.1")
    order = np.random.default_rng(seed).permutation(len(interactions.users))
    held_out = [round(len(order) * fraction) for fraction in fractions[1:]]
    validation, test, train = np.split(order, np.cumsum(held_out))
    parts: dict[Part, Codes] = {"train": np.sort(train), "validation": np.sort(validation), "test": np.sort(test)}
    for name, users in parts.items():
        if len(users) == 0:
            raise DataError(
                f"{len(interactions.users)} users leave none for {name}", "Use more users or other fractions"
            )
    return parts


def evaluation_episodes(
    interactions: Interactions,
    users: Codes,
    *,
    max_support: int,
    max_query: int,
    min_query: int,
    order: Order,
    seed: int,
) -> tuple[list[Episode], int]:
    """Cuts every user's ratings into one support and one query.

    Args:
        interactions: The dataset.
        users: User codes.
        max_support: Size of every support, the largest K.
        max_query: Size of a query at most.
        min_query: Users with fewer ratings than `max_support` + `min_query` are left out.
        order: ``random`` (by `seed` and user id) or ``time`` (a user's earliest ratings are the support).
        seed: Seed of the random order.

    Returns:
        The episodes in the order of `users`, and how many users had too few ratings.

    Raises:
        DataError: Order by time is asked for but the dataset has none.
    """
    episodes = []
    for user in users:
        rows = interactions.rows_of_user[user]
        if len(rows) < max_support + min_query:
            continue
        name = interactions.users[user]
        if order == "time":
            if interactions.timestamp is None:
                raise DataError("the dataset has no timestamps", "Set split.order to 'random'")
            rows = rows[np.argsort(interactions.timestamp[rows], kind="stable")]
        else:
            rows = _generator(seed, name).permutation(rows)
        chosen = interactions.ratings(rows[: max_support + max_query])
        support = chosen.head(max_support)
        episodes.append(Episode(name, support, Ratings(chosen.items[max_support:], chosen.values[max_support:])))
    return episodes, len(users) - len(episodes)


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest[:16], np.uint32).tolist()])


def training_batch(
    interactions: Interactions,
    users: Codes,
    *,
    batch_users: int,
    shots: Sequence[int],
    max_query: int,
    min_query: int,
    seed: int,
    step: int,
) -> list[Episode]:
    """Samples episodes of meta-training users, as a function of the seed and the step alone.

    All users of a batch have the same K, drawn evenly from `shots`.

    Args:
        interactions: The dataset.
        users: Meta-training users.
        batch_users: How many different users to draw.
        shots: The support sizes to draw K from.
        max_query: Size of a query at most.
        min_query: Users need at least K + `min_query` ratings.
        seed: Seed of the run.
        step: Number of the outer step.

    Raises:
        DataError: No user has enough ratings.
    """
    generator = np.random.default_rng([seed, step])
    support_size = int(generator.choice(np.asarray(shots)))
    sizes = np.array([len(interactions.rows_of_user[user]) for user in users])
    eligible = users[sizes >= support_size + min_query]
    if len(eligible) == 0:
        raise DataError(
            f"no meta-training user has {support_size + min_query} ratings", "Lower train.shots or train.min_query"
        )
    episodes = []
    for user in generator.choice(eligible, min(batch_users, len(eligible)), replace=False):
        rows = generator.permutation(interactions.rows_of_user[user])[: support_size + max_query]
        chosen = interactions.ratings(rows)
        query = Ratings(chosen.items[support_size:], chosen.values[support_size:])
        episodes.append(Episode(interactions.users[user], chosen.head(support_size), query))
    return episodes
