"""Episodes: a disjoint split of users, then a support and a query for each user.

A domain is an episode in the same way, once `metarec.data.transforms` has put it in the place of a user. Everything is
a pure function of a seed and of names: a user's episode does not depend on the other users, and a training batch
depends on the seed and the step alone, so that a run can be resumed bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from metarec.data.interactions import Codes, Flags, Interactions, Ratings, SplitPart
from metarec.errors import ConfigError, DataError

Order = Literal["random", "time"]
Candidates = Literal["rated", "sampled", "full"]


@dataclass(frozen=True)
class Episode:
    """One user's data for few-shot learning.

    Args:
        user: The user's id.
        support: The ratings to adapt to; a K-shot support is its first K ratings, so smaller ones are nested in larger
            ones.
        query: The held-out ratings; the same for every K.
    """

    user: str
    support: Ratings
    query: Ratings


def split_users(
    interactions: Interactions, fractions: tuple[float, float, float], seed: int
) -> Mapping[SplitPart, Codes]:
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
    parts: dict[SplitPart, Codes] = {"train": np.sort(train), "validation": np.sort(validation), "test": np.sort(test)}
    no_part_is_empty(parts, len(interactions.users))
    return parts


def no_part_is_empty(parts: Mapping[SplitPart, Codes], users: int) -> None:
    """Raises a `DataError` if a part of a split has no users."""
    for name, part in parts.items():
        if len(part) == 0:
            raise DataError(f"{users} users leave none for {name}", "Use more users or other fractions")


def split_items(interactions: Interactions, unseen: float, seed: int) -> Flags:
    """Divides items into those that meta-training uses and those that are held out.

    Args:
        interactions: The dataset.
        unseen: Share of the catalog that is held out.
        seed: Another seed gives another division.

    Returns:
        True for items that meta-training uses, shape (items,).

    Raises:
        ConfigError: The share leaves no item on one side.
    """
    items = len(interactions.catalog)
    count = round(items * unseen)
    if not 0 < count < items:
        raise ConfigError(f"an unseen share of {unseen} leaves {count} of {items} items unseen", "Use e.g. 0.2")
    seen = np.ones(items, bool)
    seen[np.random.default_rng([seed, 1]).permutation(items)[:count]] = False
    return seen


def split_by_time(
    interactions: Interactions, fractions: tuple[float, float, float]
) -> tuple[Mapping[SplitPart, Codes], Flags]:
    """Divides users by the time of their first rating, and cuts each part's ratings off where the next part begins.

    The earliest users train, the latest are tested. A part's rows end at the first rating of the next part, so that
    neither a rating nor an item mean comes from the future.

    Args:
        interactions: The dataset, with timestamps.
        fractions: Shares of the three parts; they sum to one.

    Returns:
        User codes of each part, ascending; and which rows the parts may use, shape (rows,).

    Raises:
        DataError: The dataset has no timestamps, or a part would be empty.
    """
    if interactions.timestamp is None:
        raise DataError("the dataset has no timestamps", "Set split.by to 'user'")
    latest = np.inf if interactions.timestamp.dtype.kind == "f" else np.iinfo(np.int64).max
    first = np.full(len(interactions.users), latest, interactions.timestamp.dtype)
    np.minimum.at(first, interactions.user, interactions.timestamp)
    order = np.argsort(first, kind="stable")
    bounds = np.round(np.cumsum(fractions)[:2] * len(order)).astype(int)
    names: tuple[SplitPart, ...] = ("train", "validation", "test")
    parts: dict[SplitPart, Codes] = {
        name: np.sort(users) for name, users in zip(names, np.split(order, bounds), strict=True)
    }
    no_part_is_empty(parts, len(interactions.users))
    end = np.full_like(first, latest)
    end[parts["train"]] = first[parts["validation"]].min()
    end[parts["validation"]] = first[parts["test"]].min()
    return parts, interactions.timestamp < end[interactions.user]


def evaluation_episodes(
    interactions: Interactions,
    users: Codes,
    *,
    max_support: int,
    max_query: int,
    min_query: int,
    order: Order,
    seed: int,
    support_from: Flags | None = None,
    query_from: Flags | None = None,
    support_rows: Flags | None = None,
    query_rows: Flags | None = None,
    short_supports: bool = False,
    candidates: Candidates = "rated",
    sampled: int = 0,
) -> tuple[list[Episode], int]:
    """Cuts every user's ratings into one support and one query. An item is in an episode once at most.

    Args:
        interactions: The dataset.
        users: User codes.
        max_support: Size of every support, the largest K.
        max_query: Size of a query at most.
        min_query: Users with fewer ratings than `max_support` + `min_query` are left out.
        order: ``random`` (by `seed` and user id) or ``time`` (a user's earliest ratings are the support).
        seed: Seed of the random order, and of sampled candidates.
        support_from: Items that a support may hold, shape (items,); None for all.
        query_from: Items that a query may hold, shape (items,); None for all.
        support_rows: Ratings that a support may hold, shape (rows,); None for all.
        query_rows: Ratings that a query may hold, shape (rows,); None for all.
        short_supports: Keeps users with fewer than `max_support` ratings beside their query, with a shorter support.
        candidates: ``rated`` queries held-out ratings alone; ``sampled`` adds items that the user never rated, ``full``
            all of them. These have the lowest rating and are not liked.
        sampled: Number of unrated items that ``sampled`` adds.

    Returns:
        The episodes in the order of `users`, and the number of users with too few ratings.

    Raises:
        DataError: Order by time is asked for but the dataset has none.
    """
    everything = np.ones(len(interactions.catalog), bool)
    support_from = everything if support_from is None else support_from
    query_from = everything if query_from is None else query_from
    shown, asked = support_from[interactions.item], query_from[interactions.item]
    shown = shown if support_rows is None else shown & support_rows
    asked = asked if query_rows is None else asked & query_rows
    # If both are cut from the same ratings, a short support must leave enough for the query.
    reserved = min_query if (shown & asked).any() else 0
    episodes = []
    for user in users:
        name = interactions.users[user]
        rows = _first_of_each_item(interactions, _ordered_rows(interactions, user, order, seed))
        usable = rows[shown[rows]]
        size = min(max_support, len(usable) - reserved) if short_supports else max_support
        support = usable[: max(size, 0)]
        rest = rows[~np.isin(rows, support)]
        query = interactions.ratings(rest[asked[rest]][:max_query])
        if (len(support) < max_support and not short_supports) or len(query) < min_query:
            continue
        if candidates != "rated":
            unrated = query_from.copy()
            unrated[interactions.item[interactions.rows_of_user[user]]] = False
            query = _with_unrated(query, np.flatnonzero(unrated), interactions, candidates, sampled, seed, name)
        episodes.append(Episode(name, interactions.ratings(support).asking(query), query))
    return episodes, len(users) - len(episodes)


def _ordered_rows(interactions: Interactions, user: int, order: Order, seed: int) -> Codes:
    """Returns a user's rows in the order in which they are cut."""
    rows = interactions.rows_of_user[user]
    if order == "random":
        return seeded(seed, interactions.users[user]).permutation(rows)
    if interactions.timestamp is None:
        raise DataError("the dataset has no timestamps", "Set split.order to 'random'")
    return rows[np.argsort(interactions.timestamp[rows], kind="stable")]


def _first_of_each_item(interactions: Interactions, rows: Codes) -> Codes:
    """Drops later ratings of an item that a user rated more than once; `rows` are all of one user."""
    if len(rows) == 0 or interactions.items_of_user[interactions.user[rows[0]]] == len(rows):
        return rows
    _, first = np.unique(interactions.item[rows], return_index=True)
    return rows if len(first) == len(rows) else rows[np.sort(first)]


def _with_unrated(
    query: Ratings, unrated: Codes, data: Interactions, candidates: Candidates, sampled: int, seed: int, name: str
) -> Ratings:
    """Returns a query with unrated items, which have the lowest rating and are not liked."""
    if candidates == "sampled":
        unrated = seeded(seed, f"{name}\0candidates").choice(unrated, min(sampled, len(unrated)), replace=False)
    if query.liked is None:
        raise ConfigError("unrated candidates need labelled ratings", "Load the data through its task")
    # Nobody was there in the moment of an unrated item: it takes one of the query's.
    rows = np.resize(np.arange(len(query)), len(query) + len(unrated))
    return Ratings(
        np.concatenate([query.items, unrated]),
        np.concatenate([query.values, np.full(len(unrated), data.scale.low, np.float32)]),
        np.concatenate([query.liked, np.zeros(len(unrated), bool)]),
        None if query.side is None else query.side.rows(rows),
    )


def items_in(episodes: Sequence[Episode]) -> Codes:
    """Returns the codes of all items of some episodes' supports and queries, each once, ascending."""
    codes = [part.items for episode in episodes for part in (episode.support, episode.query)]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *codes]))


def seeded(seed: int, name: str) -> np.random.Generator:
    """Returns a random generator that depends on a seed and a name alone."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
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
    hidden: Callable[[str], Flags] | None = None,
    short_supports: bool = False,
) -> list[Episode]:
    """Samples episodes of meta-training users, as a function of the seed and the step alone.

    All users of a batch have the same K, drawn evenly from `shots`; they are drawn from all who have enough for it.

    Args:
        interactions: The dataset.
        users: Meta-training users.
        batch_users: Number of different users.
        shots: The support sizes to draw K from.
        max_query: Size of a query at most.
        min_query: Users need at least K + `min_query` ratings.
        seed: Seed of the run.
        step: Number of the outer step.
        hidden: Returns the hidden items of a user id, shape (items,): a query holds hidden items alone, a support none.
        short_supports: Draws users with fewer than K ratings beside their query too, with a shorter support.

    Raises:
        DataError: No user has enough ratings.
    """
    generator = np.random.default_rng([seed, step])
    support_size = int(generator.choice(np.asarray(shots)))
    fewest = min(support_size, 1) if short_supports else support_size
    eligible = users[interactions.items_of_user[users] >= fewest + min_query]
    if len(eligible) == 0:
        raise DataError(
            f"no meta-training user has {fewest + min_query} ratings", "Lower train.shots or train.min_query"
        )
    episodes = []
    for user in generator.permutation(eligible):
        rows = _first_of_each_item(interactions, generator.permutation(interactions.rows_of_user[user]))
        is_hidden = np.zeros(len(rows), bool)
        if hidden is not None:
            is_hidden = hidden(interactions.users[user])[interactions.item[rows]]
        shown = rows[~is_hidden]
        # If both are cut from the same ratings, a short support must leave enough for the query.
        size = min(support_size, len(shown) - (min_query if hidden is None else 0)) if short_supports else support_size
        support = shown[:size]
        query = (shown[size:] if hidden is None else rows[is_hidden])[:max_query]
        if len(support) >= fewest and len(query) >= min_query:
            parts = interactions.ratings(support), interactions.ratings(query)
            episodes.append(Episode(interactions.users[user], *parts))
        if len(episodes) == batch_users:
            break
    if not episodes:
        raise DataError(
            f"no meta-training user has {fewest} ratings and {min_query} of hidden items", "Lower train.min_query"
        )
    return episodes
