"""Explains scores by the ratings that they depend on: a user is adapted again without each rating."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metarec.data.interactions import Catalog, Ratings

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Reason:
    """A rated item, and how far another item's score would fall without that rating."""

    item: str
    title: str
    rating: float
    moved: float


def explain(
    support: Ratings,
    scores: Scores,
    scores_without: Callable[[Sequence[Ratings]], Sequence[Scores]],
    catalog: Catalog,
    most: int = 3,
) -> list[list[Reason]]:
    """Returns the ratings that changed each item's score most.

    Args:
        support: What the user rated.
        scores: Scores of the items to explain, shape (items,).
        scores_without: Adapts to each of several supports, and returns the same items' scores with each.
        catalog: The items.
        most: How many ratings per item.

    Returns:
        Up to `most` reasons per item, the largest change first; none for a user without ratings.
    """
    if not len(support) or not len(scores):
        return [[] for _ in scores]
    rows = np.arange(len(support))
    without = [support.unlabelled().rows(np.delete(rows, row)) for row in rows]
    moved = np.stack([scores - other for other in scores_without(without)])
    return [
        [
            Reason(
                catalog.ids[support.items[row]],
                catalog.title(int(support.items[row])),
                round(float(support.values[row]), 4),  # it is kept in single precision
                float(column[row]),
            )
            for row in np.argsort(-np.abs(column), kind="stable")[:most]
        ]
        for column in moved.T
    ]
