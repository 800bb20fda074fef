"""Explains recommendations by the ratings that they depend on: a user is adapted again without each rating."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metarec.adapted_user import AdaptedUser
from metarec.data.interactions import Codes, Ratings
from metarec.recommender import MetaRecommender
from metarec.serve.batching import BatchedModel


@dataclass(frozen=True)
class Reason:
    """A rated item, and how far a recommended item's score would fall without that rating."""

    item: str
    title: str
    rating: float
    moved: float


def explain(
    model: BatchedModel, recommender: MetaRecommender, adapted: AdaptedUser, codes: Codes, most: int = 3
) -> list[list[Reason]]:
    """Returns the ratings that changed each item's score most.

    Args:
        model: Adapts and scores.
        recommender: What the user was adapted from.
        adapted: The user.
        codes: The items to explain.
        most: How many ratings per item.

    Returns:
        Up to `most` reasons per item, the largest change first; none for a user without ratings.
    """
    support = adapted.support
    if not len(support) or adapted.diverged or not len(codes):
        return [[] for _ in codes]
    without = [Ratings(np.delete(support.items, row), np.delete(support.values, row)) for row in range(len(support))]
    full = model.scores(adapted, codes)
    moved = np.stack([full - model.scores(other, codes) for other, _ in model.adapt(recommender, without)])
    catalog = adapted.fitted.catalog
    return [
        [
            Reason(
                catalog.ids[support.items[row]],
                catalog.title(int(support.items[row])),
                float(support.values[row]),
                float(column[row]),
            )
            for row in np.argsort(-np.abs(column), kind="stable")[:most]
        ]
        for column in moved.T
    ]
