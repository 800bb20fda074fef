"""Pairs of items that one user likes, and the loss by which items' vectors are learned from them.

Two items that the same meta-training user likes are a pair. The loss picks out a first item's partner among the
partners of other users (InfoNCE).

Sources: van den Oord et al. 2018, "Representation learning with contrastive predictive coding", eq. 4; frequent items
are corrected for as in Yi et al. 2019, "Sampling-bias-corrected neural modeling".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from metarec.data.interactions import Codes, Flags
from metarec.evaluation.evaluate import validation_auc
from metarec.meta.losses import info_nce
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.text import fit_two_tower

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData


@dataclass(frozen=True)
class DrawnPairs:
    """Pairs of items, one of each of some users.

    Args:
        first: Item codes, shape (pairs,).
        second: Item codes, shape (pairs,).
        also: Which users like whose second item too, so that it is no wrong answer, shape (pairs, pairs).
    """

    first: Codes
    second: Codes
    also: Flags


@dataclass(frozen=True)
class LikedPairs:
    """What pairs are drawn from, and how they are compared.

    Args:
        likes: The liked items of each user, two or more.
        items: Number of items.
        temperature: Divides the cosine of two items.
        frequency: Share of an item's log frequency that is taken off its score.
    """

    likes: Sequence[Codes]
    items: int
    temperature: float
    frequency: float

    @cached_property
    def log_frequency(self) -> Tensor:
        """Logarithm of each item's share of the likes, shape (items,)."""
        count = np.bincount(np.concatenate(self.likes), minlength=self.items)
        return torch.from_numpy(np.log(np.maximum(count, 1) / count.sum())).float()

    def draw(self, count: int, generator: np.random.Generator) -> DrawnPairs:
        """Returns a pair of each of some users, at most as many as there are."""
        users = generator.choice(len(self.likes), count, replace=False)
        drawn = np.stack([generator.choice(self.likes[user], 2, replace=False) for user in users])
        also = np.stack([np.isin(drawn[:, 1], self.likes[user]) for user in users])
        return DrawnPairs(drawn[:, 0], drawn[:, 1], also)

    def losses(self, first: Tensor, second: Tensor, drawn: DrawnPairs) -> Tensor:
        """Returns the loss of each pair, shape (pairs,).

        Args:
            first: Vectors of length one of the first items, shape (pairs, width).
            second: Those of the second items, of the same shape.
            drawn: The pairs.
        """
        scores = first @ second.T / self.temperature - self.frequency * self.log_frequency[drawn.second]
        return info_nce(scores, torch.from_numpy(drawn.also))


def liked_items(data: TaskData) -> list[Codes]:
    """Returns the liked items of every meta-training user who likes two or more."""
    known = data.interactions
    likes = known.likes(data.task.like_threshold)
    rows = (known.rows_of_user[user] for user in data.parts["train"])
    liked = (np.unique(known.item[some[likes[some]]]) for some in rows)
    return [items for items in liked if len(items) > 1]


def cosine_auc(vectors: Floats, data: TaskData, users: int) -> float:
    """Returns validation users' AUC by the cosine of an item and what the user likes, at the task's largest K.

    Args:
        vectors: A vector of each item that they rated, shape (items, width); others are not read.
        data: The task's data.
        users: So many validation users at most.
    """
    threshold = data.task.like_threshold
    episodes = data.evaluated("validation")[0][:users]
    return validation_auc(fit_two_tower(vectors, threshold=threshold), episodes, [max(data.task.shots)], threshold)
