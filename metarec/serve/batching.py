"""Adapts users in batches and scores items in blocks, both of fixed shapes.

Matrix products of different shapes round differently. With fixed shapes a user's adapter and scores are the same to the
last bit, whoever else is adapted and whatever else is scored at the same time. Several users' items are scored together
where that is tried to leave every bit as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metarec.adapted_user import AdaptedUser
from metarec.data.interactions import Codes, Ratings
from metarec.recommender import MetaRecommender
from metarec.scorers.language.linearized import Linearized, linearize
from metarec.scorers.language.score import score_adapted
from metarec.serve.items import longest, prompt_lengths
from metarec.system.threads import use_threads

# Users per batch: alone in the service, fifteen (and a padding row) in bulk. Larger batches serve more users a second
# and make a single one wait longer. The number of ratings is padded to a multiple of four, eight at least.
USERS_AT_ONCE = 1
BULK_USERS_AT_ONCE = 15
_FEWEST_RATINGS = 8
_RATINGS_STEP = 4
# Items that are scored at least; fewer take about as long.
BLOCK = 32
# Of one user so many items are scored together, and with them those of other units: two at least, for a single user's
# products are computed in another way than several users'.
_UNIT, _FEWEST_UNITS, _MOST_UNITS = 16, 2, 8
# Prompts are padded to a length that all but one in a thousand items have at most, and longer ones to so many more.
_USUAL, _LONGER = 0.999, 32


@dataclass(frozen=True)
class _Unit:
    """Some of a user's items that are scored together.

    Args:
        row: Which user.
        codes: The items.
        places: Where they stand among the user's items.
        kind: Units of one kind may be computed together.
        width: See `AnswerModel.gather`.
    """

    row: int
    codes: Codes
    places: Codes
    kind: tuple[object, ...]
    width: int


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
        self._parallel = workers
        self._most: int | None = None
        self._workers = ThreadPoolExecutor(workers, "model")
        self._linearized = linearized
        model = trained.adapted_model
        # Called between two blocks of work; what it raises ends the work.
        self.check: Callable[[], None] = lambda: None
        self._longest = 0 if model is None else longest(model)

    def each(self, function: Callable[[Any], Any], parts: Sequence[Any]) -> Iterable[Any]:
        """Calls a function with each of several parts, on the workers' threads; returns the results in order.

        The function may call this again for a single part, which takes no other thread, but not for several.
        """
        return self._workers.map(function, parts) if len(parts) > 1 else map(function, parts)

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
        """Scores a user's items; see `scores_of`."""
        return self.scores_of([(adapted, codes)])[0]

    def scores_of(self, asked: Sequence[tuple[AdaptedUser, Codes]]) -> list[NDArray[np.float32]]:
        """Scores several users' items together; an item's score is the same whatever else is scored.

        Args:
            asked: Users and their items.

        Returns:
            One array per user, of the shape of its items.
        """
        found = [np.zeros(len(codes), np.float32) for _, codes in asked]
        units = [unit for row, (adapted, codes) in enumerate(asked) for unit in self._units(row, adapted, codes)]
        groups: list[list[_Unit]] = []
        for kind in dict.fromkeys(unit.kind for unit in units):
            groups += self._grouped([unit for unit in units if unit.kind == kind])

        def score_group(group: list[_Unit]) -> list[NDArray[np.float32]]:
            self.check()
            return _scores([asked[unit.row][0] for unit in group], group)

        done = self._workers.map(score_group, groups) if len(groups) > 1 else map(score_group, groups)
        for group, scores in zip(groups, done, strict=True):
            for unit, values in zip(group, scores, strict=True):
                found[unit.row][unit.places] = values[: len(unit.places)]
        return found

    def _units(self, row: int, adapted: AdaptedUser, codes: Codes) -> list[_Unit]:
        model = adapted.adapted_model
        lengths = np.zeros(len(codes), np.int64) if model is None else prompt_lengths(model)[codes]
        longer = np.maximum(-(-(lengths - self._usual) // _LONGER), 0)
        widths = self._usual + _LONGER * longer
        size = BLOCK if model is None else _UNIT
        units = []
        for width in np.unique(widths).tolist():
            places = np.flatnonzero(widths == width)
            kind = (width, id(adapted.fitted), *sorted(adapted.state))
            for start in range(0, len(places), size):
                some = places[start : start + size]
                units.append(_Unit(row, np.resize(codes[some], size), some, kind, width))
        return units

    def _grouped(self, units: list[_Unit]) -> list[list[_Unit]]:
        """Divides units of one kind among the workers; a last one is doubled where it would be alone."""
        pairs = -(-len(units) // _FEWEST_UNITS)
        full = [*units, *units[-1:] * (pairs * _FEWEST_UNITS - len(units))]
        most = self.units_at_once(units[0].codes) // _FEWEST_UNITS if pairs > 1 else 1
        parts = np.array_split(np.arange(pairs), max(-(-pairs // most), min(self._parallel, pairs)))
        return [full[_FEWEST_UNITS * part[0] : _FEWEST_UNITS * (part[-1] + 1)] for part in parts]

    @cached_property
    def _usual(self) -> int:
        """How many tokens prompts usually have at most; of the trained items, so that added ones change nothing."""
        model = self._trained.adapted_model
        return 0 if model is None else int(np.quantile(model.prompts.lengths, _USUAL, method="higher"))

    def units_at_once(self, codes: Codes) -> int:
        """Returns how many units may be computed together: as many as leave to each the bits of two.

        In which order products are added up depends on shapes and not on numbers, so one trial on this machine says it
        of all users and items.

        Args:
            codes: Items to try it on.
        """
        if self._most is None:
            self._most = _MOST_UNITS if self._trained.adapted_model is None else self._tried(codes)
        return self._most

    def _tried(self, codes: Codes) -> int:
        user, generator = self._trained.adapt([]), torch.Generator().manual_seed(0)
        codes = np.append(codes[codes < len(self._trained.fitted.catalog)], 0)  # those of the user's own catalog
        people = [
            replace(user, state={name: value + _noise_like(value, generator) for name, value in user.state.items()})
            for _ in range(_MOST_UNITS)
        ]
        units = [self._units(row, person, codes)[0] for row, person in enumerate(people)]
        every = range(0, _MOST_UNITS, _FEWEST_UNITS)
        alone = [
            scores
            for start in every
            for scores in _scores(people[start : start + _FEWEST_UNITS], units[start : start + _FEWEST_UNITS])
        ]
        most = _FEWEST_UNITS
        for count in range(2 * _FEWEST_UNITS, _MOST_UNITS + 1, _FEWEST_UNITS):
            together = _scores(people[:count], units[:count])
            if not all(map(np.array_equal, together, alone)):
                break
            most = count
        return most


def _scores(people: Sequence[AdaptedUser], units: Sequence[_Unit]) -> list[NDArray[np.float32]]:
    """Scores units of one kind; `people` says whose they are."""
    first = people[0]
    state = {name: torch.stack([person.state[name] for person in people]) for name in first.state}
    supports, blocks = [person.support for person in people], [unit.codes for unit in units]
    fitted, device = first.fitted, first.config.device
    model, width = first.adapted_model, units[0].width
    return [
        scores.numpy()
        for scores in score_adapted(state, supports, blocks, fitted.terms, fitted.prior, model, device, width)
    ]


def _noise_like(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
    return 0.01 * noise.to(value)


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
