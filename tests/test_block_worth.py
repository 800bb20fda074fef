"""A block of item features is believed where it says more than chance of these users and of these items."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from made_shop import KINDS, USERS, own_tastes, pictures, shop

from metarec.data.interactions import Catalog, Interactions, RatingScale
from metarec.scorers.collaborative.block_worth import block_worth

_WORLDS = 20


def _ratings(seed: int) -> tuple[Interactions, np.ndarray]:
    """Returns the ratings of a shop in which people differ in the kinds that they like, and each item's kind."""
    world = shop(own_tastes(seed + 1), seed=seed)
    interactions = Interactions(
        users=tuple(f"u{code}" for code in range(USERS)),
        user=world.orders["user"].str[1:].to_numpy(np.int64),
        item=world.orders["item"].str[1:].to_numpy(np.int64),
        rating=world.orders["rating"].to_numpy(np.float32),
        timestamp=None,
        catalog=Catalog(tuple(world.items["item"]), {"title": tuple(world.items["title"])}),
        scale=RatingScale(1, 5),
        dropped={},
    )
    return interactions, world.kind


def _believed(vectors: Callable[[np.ndarray, int], np.ndarray]) -> int:
    """Returns in how many of some shops a block of vectors, made from items' kinds and a seed, is believed."""
    found = 0
    for seed in range(_WORLDS):
        ratings, kind = _ratings(seed)
        found += block_worth(ratings, np.unique(ratings.user), {"v": vectors(kind, seed)}, seed)["v"].significant
    return found


def test_vectors_that_tell_the_kind_are_believed_in_every_shop() -> None:
    assert _believed(pictures) == _WORLDS


def test_another_shops_vectors_of_few_directions_are_believed_in_none() -> None:
    """Few directions of few items lie along the kinds by chance, for all users alike."""

    def shuffled(kind: np.ndarray, seed: int) -> np.ndarray:
        other = np.random.default_rng([seed, 16]).integers(0, KINDS, len(kind))
        vectors = pictures(other, seed)
        return vectors - vectors.mean(0)

    assert _believed(shuffled) == 0
