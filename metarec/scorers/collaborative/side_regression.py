"""Ridge regression of ratings on products of side information's and items' features, and which blocks it reads.

Every block of side information has a scale of its own, chosen on users held out, and is left out where it does not help
them. Two towers may read a text about a user beside the regression, or in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from metarec.data.interactions import Codes, Interactions
from metarec.data.side import Side, Texts
from metarec.scorers.collaborative.residuals import Floats, Residuals
from metarec.scorers.collaborative.side_effects import FRIENDS
from metarec.scorers.collaborative.side_readers import Friends, Reader, friends_of, side_kind
from metarec.scorers.collaborative.two_towers import TowerData, fit_towers

_LOG = logging.getLogger(__name__)
# Scales of a block of side information that are tried, beside leaving it out.
_SCALES = (0.01, 0.03, 0.1, 0.3, 1.0)
_DAMP = 10.0
_ITERATIONS = 40
# Standard errors by which a block has to lower the error of held-out users.
_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class SideBlocks:
    """Features of side information of some rows.

    Args:
        about: Field of users to what reads it.
        moments: Column of moments to what reads it.
        friends: What reads friends.
        features: Block to its features, by user or by row.
        of_rows: The blocks that are by row.
        texts: The fields of users that are texts.
        unread: Sentences about fields and columns that hold nothing to read.
    """

    about: Mapping[str, Reader]
    moments: Mapping[str, Reader]
    friends: Friends | None
    features: Mapping[str, Floats]
    of_rows: frozenset[str]
    texts: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


def read_blocks(
    interactions: Interactions,
    users: Codes,
    own: np.ndarray,
    tastes: Floats,
    text_reader: Callable[[str, Texts], Reader | str],
) -> SideBlocks:
    """Reads side information as numbers.

    Args:
        interactions: The dataset, with side information.
        users: The meta-training users, whose values say how each block is read.
        own: Which rows are theirs, shape (rows,).
        tastes: Their tastes in the order of user codes, for friends, shape (users, width).
        text_reader: Returns what reads a field, given its name and values, or why nothing does.
    """
    side, ordered = interactions.side, np.sort(users)
    about, moments, features, unread = {}, {}, {}, []
    for name, column in side.about.items():
        reader = text_reader(name, column[ordered])
        if isinstance(reader, str):
            unread.append(f"users' field '{name}' is not read: {reader}")
        else:
            about[name], features[name] = reader, reader.read(column[ordered])
    for name, column in side.moments.items():
        reader = text_reader(name, column[own])
        if isinstance(reader, str):
            unread.append(f"the moments' column '{name}' is not read: {reader}")
        else:
            moments[name], features[name] = reader, reader.read(column[own])
    friends = None
    if any(side.friends):
        friends = friends_of([interactions.users[code] for code in ordered], tastes)
        features[FRIENDS] = friends.read([Side(friends=side.friends[code]) for code in ordered])
    texts = tuple(
        name for name in about if side_kind(name, [text for text in side.about[name][ordered] if text]) == "text"
    )
    return SideBlocks(about, moments, friends, features, frozenset(moments), texts, tuple(unread))


@dataclass(frozen=True)
class _Grouped:
    """Features of a block, once for each user or each different moment.

    Args:
        features: Shape (groups, width).
        group: The group of each rating, shape (ratings,).
    """

    features: Floats
    group: Codes


class SideRegression:
    """Ridge regression of residuals on products of side information's and items' features."""

    def __init__(self, residuals: Residuals, items: Floats, blocks: SideBlocks) -> None:
        self._residuals, self._items = residuals, items
        self._blocks: dict[str, _Grouped] = {}
        for name, block in blocks.features.items():
            if name in blocks.of_rows:
                different, place = np.unique(block, axis=0, return_inverse=True)
                self._blocks[name] = _Grouped(different, place.ravel())
            else:
                self._blocks[name] = _Grouped(block, residuals.user)

    def choose(self, seed: int) -> dict[str, tuple[float, tuple[float, float]]]:
        """Returns the scale of every block that lowers held-out users' error, with how far it does."""
        held_out = np.random.default_rng([seed, 3]).permutation(self._residuals.shape[0]) % 2
        chosen: dict[str, tuple[float, tuple[float, float]]] = {}
        best = self._errors({}, held_out)
        for name in self._blocks:
            scales = {other: scale for other, (scale, _) in chosen.items()}
            tried = {scale: self._errors({**scales, name: scale}, held_out) for scale in _SCALES}
            scale = min(tried, key=lambda one: float(tried[one].sum()))
            gain = best - tried[scale]
            mean, error = float(gain.mean()), float(gain.std() / np.sqrt(len(gain)))
            significant = mean > _STANDARD_ERRORS * error and mean > 0
            _LOG.info("side information '%s' lowers the squared error by %.4f (%.4f)", name, mean, error)
            if significant:
                chosen[name], best = (scale, (mean, error)), tried[scale]
            else:
                _LOG.warning("side information '%s' does not help users held out: it is left out", name)
        return chosen

    def choose_towers(
        self, scales: Mapping[str, float], texts: Mapping[str, TowerData], seed: int
    ) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Returns the scales that stay, and the fields whose texts towers read, with how far that lowers the error.

        Towers are read beside the ridge regression of a text, or in its place, whichever lowers held-out users' error
        more; if neither does, the regression alone.
        """
        held_out = np.random.default_rng([seed, 3]).permutation(self._residuals.shape[0]) % 2
        kept, gains = dict(scales), {}
        for name, data in texts.items():
            before = self._errors(kept, held_out)
            without = {other: scale for other, scale in kept.items() if other != name}
            tried = [(some, self._errors_with_towers(some, data, held_out, seed)) for some in (kept, without)]
            best, errors = min(tried, key=lambda one: float(one[1].sum()))
            gain = before - errors
            mean, error = float(gain.mean()), float(gain.std() / np.sqrt(len(gain)))
            _LOG.info("two towers that read '%s' lower the squared error by %.4f (%.4f)", name, mean, error)
            if mean > _STANDARD_ERRORS * error and mean > 0:
                kept, gains[name] = dict(best), (mean, error)
        return kept, gains

    def _errors_with_towers(self, scales: Mapping[str, float], data: TowerData, held_out: Codes, seed: int) -> Floats:
        """Returns what `_errors` does, under towers too that were trained on the other half."""
        user, value = self._residuals.user, self._residuals.value
        squares = np.zeros(self._residuals.shape[0])
        for half in (0, 1):
            rows = held_out[user] == half
            left = value - self.predicted(self.solve(scales, ~rows) if scales else {})
            towers = fit_towers(data, held_out != half, left, seed)
            if towers is not None:
                users, items = towers.of(data.features)[user[rows]], towers.items[self._residuals.item[rows]]
                left[rows] -= (users * items).sum(1)
            squares += np.bincount(user[rows], left[rows] ** 2, len(squares))
        return squares / np.maximum(np.bincount(user, minlength=len(squares)), 1)

    def _errors(self, scales: Mapping[str, float], held_out: Codes) -> Floats:
        """Returns each user's mean squared error under effects learned from the other half, shape (users,)."""
        user, value = self._residuals.user, self._residuals.value
        squares = np.zeros(self._residuals.shape[0])
        for half in (0, 1):
            rows = held_out[user] == half
            effects = self.solve(scales, ~rows) if scales else {}
            left = value[rows] - self.predicted(effects)[rows]
            squares += np.bincount(user[rows], left**2, len(squares))
        return squares / np.maximum(np.bincount(user, minlength=len(squares)), 1)

    def predicted(self, effects: Mapping[str, Floats]) -> Floats:
        """Returns what effects add to each rating, shape (ratings,)."""
        items = self._items[self._residuals.item]
        found = np.zeros(len(items))
        for name, effect in effects.items():
            block = self._blocks[name]
            found += ((block.features @ effect)[block.group] * items).sum(1)
        return found

    def solve(self, scales: Mapping[str, float], rows: np.ndarray | None) -> dict[str, Floats]:
        """Returns the effects of blocks with given scales, from some rows."""
        from scipy.sparse import csr_array
        from scipy.sparse.linalg import LinearOperator, lsmr

        if not scales:
            return {}
        chosen = np.ones(len(self._residuals.value), bool) if rows is None else rows
        value, known = self._residuals.value[chosen], self._items[self._residuals.item[chosen]]
        ratings, width = known.shape
        features = [self._blocks[name].features * scale for name, scale in scales.items()]
        groups = [self._blocks[name].group[chosen] for name in scales]
        # Each sums what is known of ratings over the ratings of a group.
        sums = [
            csr_array((np.ones(ratings), (group, np.arange(ratings))), (len(block), ratings))
            for group, block in zip(groups, features, strict=True)
        ]
        bounds = np.cumsum([0, *(block.shape[1] for block in features)]).tolist()

        def forward(flat: Floats) -> Floats:
            parts = np.split(flat.reshape(-1, width), bounds[1:-1])
            weights = sum((block @ part)[group] for block, part, group in zip(features, parts, groups, strict=True))
            return np.asarray((weights * known).sum(1))

        def back(errors: Floats) -> Floats:
            moved = known * errors.ravel()[:, None]
            return np.concatenate(
                [(block.T @ (total @ moved)).ravel() for block, total in zip(features, sums, strict=True)]
            )

        shape = (ratings, bounds[-1] * width)
        operator = LinearOperator(shape, matvec=forward, rmatvec=back, dtype=np.float64)
        flat = lsmr(operator, value, damp=np.sqrt(_DAMP), maxiter=_ITERATIONS)[0].reshape(-1, width)
        return {
            name: part * scale for (name, scale), part in zip(scales.items(), np.split(flat, bounds[1:-1]), strict=True)
        }
