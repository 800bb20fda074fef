"""The known world of two opposite tastes, as scorers are tested on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from conftest import known_interactions

from metarec.data.episodes import Episode, evaluation_episodes
from metarec.data.interactions import Interactions, Ratings
from metarec.scorers.collaborative.features import item_features

THRESHOLD = 3.5
TRAIN, VALIDATION, TEST = np.split(np.arange(60), [40, 48])
UNRATED, TWIN = 40, 41


def world() -> Interactions:
    """The known world and two more items, alike in everything, which nobody ever rated."""
    data = known_interactions()
    fields = {name: (*column, column[0], column[0]) for name, column in data.catalog.fields.items()}
    return replace(data, catalog=replace(data.catalog, ids=(*data.catalog.ids, "unrated", "twin"), fields=fields))


WORLD = world()
ITEMS = len(WORLD.catalog)
GENRE = item_features(WORLD.catalog)["genres"]
VECTORS = np.concatenate([GENRE, 0.3 * np.random.default_rng(0).normal(size=(ITEMS, 8))], 1)
VECTORS[TWIN] = VECTORS[UNRATED]


def episodes(data: Interactions, users: np.ndarray) -> list[Episode]:
    return evaluation_episodes(data, users, max_support=10, max_query=14, min_query=5, order="random", seed=0)[0]


def ratings(*pairs: tuple[int, float]) -> Ratings:
    return Ratings(np.array([code for code, _ in pairs], np.int64), np.array([value for _, value in pairs], np.float32))


SUPPORT = ratings((0, 5.0), (1, 4.5), (2, 2.0), (3, 1.5), (8, 4.0), (UNRATED, 5.0))
CANDIDATES = np.array([4, 5, 6, 7, UNRATED, 20], np.int64)
