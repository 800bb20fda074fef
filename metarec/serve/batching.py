"""Adapts users in batches and scores items in blocks, both of fixed shapes.

Matrix products of different shapes round differently. With fixed shapes a user's adapter and scores are the same to the
last bit, whoever else is adapted and whatever else is scored at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec.adapted_user import AdaptedUser
from metarec.data.interactions import Codes, Ratings
from metarec.recommender import MetaRecommender
from metarec.scorers.language.linearized import Linearized, linearize
from metarec.serve.items import longest
from metarec.threads import use_threads

# Users per batch: alone in the service, fifteen (and a padding row) in bulk. Larger batches serve more users a second
# and make a single one wait longer. The number of ratings is padded to a multiple of four, eight at least.
USERS_AT_ONCE = 1
BULK_USERS_AT_ONCE = 15
_FEWEST_RATINGS = 8
_RATINGS_STEP = 4
# Items per block; a smaller block takes about as long.
BLOCK = 32


class BatchedModel:
    """A recommender that adapts and scores in fixed shapes, on several threads.

    Args:
        trained: The recommender, without items that were added later.
        users_at_once: Users per batch; adapters are equal to the last bit only between equal numbers.
        workers: How many batches, or blocks, are computed at the same time.
        linearized: The first step's log-odds and gradients of some items; None computes all steps with the model.
    """

    def __init__(
        self, trained: MetaRecommender, *, users_at_once: int, workers: int, linearized: Linearized | None
    ) -> None:
        self._trained = trained
        self._users_at_once = users_at_once
        self._workers = ThreadPoolExecutor(workers, "model")
        self._linearized = linearized
        model = trained.adapted_model
        # Called between two blocks of work; what it raises ends the work.
        self.check: Callable[[], None] = lambda: None
        self._longest = 0 if model is None else longest(model)

    def adapt(
        self, recommender: MetaRecommender, supports: Sequence[Ratings]
    ) -> list[tuple[AdaptedUser, tuple[float, ...]]]:
        """Adapts to several users' ratings; the result for each is the same as if they were alone.

        Args:
            recommender: The recommender over the current catalog.
            supports: One user's ratings each.

        Returns:
            Each user's adapter, and their support loss before each step.
        """
        shapes = [(_padded(len(support)), self._starts_linearized(support)) for support in supports]
        batches: list[tuple[int, bool, list[int]]] = []
        for width, linearized in sorted(set(shapes)):
            rows = [row for row, shape in enumerate(shapes) if shape == (width, linearized)]
            starts = range(0, len(rows), self._users_at_once)
            batches += [(width, linearized, rows[start : start + self._users_at_once]) for start in starts]

        def adapt_batch(batch: tuple[int, bool, list[int]]) -> list[tuple[AdaptedUser, tuple[float, ...]]]:
            self.check()
            width, linearized, rows = batch
            return self._adapt_batch(recommender, [supports[row] for row in rows], width, linearized)

        done = self._workers.map(adapt_batch, batches) if len(batches) > 1 else map(adapt_batch, batches)
        found = {
            row: user
            for (_, _, rows), users in zip(batches, done, strict=True)
            for row, user in zip(rows, users, strict=True)
        }
        return [found[row] for row in range(len(supports))]

    def _starts_linearized(self, support: Ratings) -> bool:
        return self._linearized is not None and self._linearized.covers(support.items)

    def _adapt_batch(
        self, recommender: MetaRecommender, supports: Sequence[Ratings], width: int, linearized: bool
    ) -> list[tuple[AdaptedUser, tuple[float, ...]]]:
        batch = list(supports)
        if self._users_at_once > 1:
            batch += [*[Ratings.empty()] * (self._users_at_once - len(supports)), self._padding_row(width)]
        began = time.perf_counter()
        adapted = recommender.scorer().adapt(batch, self._linearized if linearized else None)
        seconds = (time.perf_counter() - began) / len(supports)
        users = []
        for row, support in enumerate(supports):
            state = {name: value[row].clone() for name, value in adapted.state.items()}
            user = recommender.adapted_user(support, state, bool(adapted.diverged[row]), seconds)
            users.append((user, tuple(map(float, adapted.losses[:, row]))))
        return users

    def _padding_row(self, width: int) -> Ratings:
        """Returns ratings of the longest item: they pad every batch to the same width and prompt length."""
        mean = self._trained.fitted.prior.mean
        return Ratings(np.full(width, self._longest, np.int64), np.full(width, mean, np.float32))

    def scores(self, adapted: AdaptedUser, codes: Codes) -> NDArray[np.float32]:
        """Scores items in whole blocks; the last one is filled up by repeating items."""
        if not len(codes):
            return np.zeros(0, np.float32)

        def score_block(block: Codes) -> Tensor:
            self.check()
            return adapted.scores(block)

        blocks = np.resize(codes, (-(-len(codes) // BLOCK), BLOCK))
        done = self._workers.map(score_block, blocks) if len(blocks) > 1 else map(score_block, blocks)
        scores: NDArray[np.float32] = torch.cat(list(done)).numpy()
        return scores[: len(codes)]


def _padded(ratings: int) -> int:
    return max(_FEWEST_RATINGS, -(-ratings // _RATINGS_STEP) * _RATINGS_STEP)


def linearize_most_rated(trained: MetaRecommender, limit: int) -> Linearized | None:
    """Reads the most rated items' log-odds and gradients at the meta-initialization.

    Args:
        trained: The recommender, without items that were added later.
        limit: Bytes that they may take.

    Returns:
        None where no item fits, or where users are not adapted by gradient steps.
    """
    fitted, inner = trained.fitted, trained.scorer().inner
    numbers = sum(value.numel() for name, value in fitted.meta.init.items() if name in fitted.meta.log_rate)
    model = trained.adapted_model
    if model is None or inner.head is not None or not inner.steps or not numbers:
        return None
    count = limit // (4 * numbers)
    chosen = np.sort(np.argsort(-fitted.prior.count, kind="stable")[:count])
    return linearize(model, fitted.meta, chosen) if count else None


def use_one_thread_per_batch(workers: int = 0) -> int:
    """Sets torch to one thread, which serves more users a second than all threads on one batch after another.

    Args:
        workers: How many batches run at the same time; 0 takes one per core.

    Returns:
        How many batches run at the same time.
    """
    workers = workers or torch.get_num_threads()
    use_threads(1)
    return workers
