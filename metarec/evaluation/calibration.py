"""From a method's scores to ratings and to probabilities of a like, fitted on validation users.

A score is only an order within one user. A line fitted in the same way for every method and K turns it into a rating,
a logistic regression on the same features into a probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarec.data.episodes import Episode
from metarec.data.interactions import Values
from metarec.scorer import Scorer, request

# Damping: pseudo-ratings that shrink a user's mean rating to the overall mean.
_USER_MEAN_DAMPING = 1.0
# Penalty on the logistic regression's weights, in observations; it keeps them finite where scores separate all likes.
_PENALTY = 1.0
_NEWTON_STEPS = 25

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """What turns one method's scores at one K into ratings and probabilities.

    Args:
        shots: K, the number of ratings that the method was given.
        mean: Mean of the validation users' ratings.
        low: Lowest rating of theirs.
        high: Highest rating of theirs.
        rating: Weights of 1, the score and the user's mean in a rating.
        like: The same in the log-odds of a like.
    """

    shots: int
    mean: float
    low: float
    high: float
    rating: tuple[float, ...]
    like: tuple[float, ...]

    def ratings(self, given: Values, scores: NDArray[np.floating]) -> Floats:
        """Returns predicted ratings, shape (items,).

        Args:
            given: The user's own ratings.
            scores: Scores of some items, shape (items,).
        """
        predicted: Floats = np.clip(_features(given, scores, self.mean) @ np.array(self.rating), self.low, self.high)
        return predicted

    def probabilities(self, given: Values, scores: NDArray[np.floating]) -> Floats:
        """Returns predicted probabilities that the user likes the items, shape (items,); see `ratings`."""
        return _logistic(_features(given, scores, self.mean) @ np.array(self.like))

    def to_json(self) -> dict[str, Any]:
        """Returns the calibration as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Calibration:
        """Returns what `to_json` wrote."""
        return cls(**{**values, "rating": tuple(values["rating"]), "like": tuple(values["like"])})


def fit_calibration(scorer: Scorer, episodes: Sequence[Episode], shots: int, threshold: float) -> Calibration:
    """Fits a method's calibration at one K.

    Args:
        scorer: The method.
        episodes: Validation users, one at least.
        shots: K.
        threshold: Ratings from here on are likes, in episodes that carry no labels.
    """
    scored = scorer.score([request(episode, shots) for episode in episodes])
    mean = float(np.concatenate([episode.query.values for episode in episodes]).mean())
    rows = np.concatenate(
        [
            _features(episode.support.head(shots).values, scores.detach().numpy(), mean)
            for episode, scores in zip(episodes, scored, strict=True)
        ]
    )
    target = np.concatenate([episode.query.values for episode in episodes]).astype(np.float64)
    liked = np.concatenate([episode.query.likes(threshold) for episode in episodes])
    line = np.linalg.lstsq(rows, target, rcond=None)[0]
    low, high = float(target.min()), float(target.max())
    return Calibration(shots, mean, low, high, tuple(line.tolist()), tuple(_fit_logistic(rows, liked).tolist()))


def at_count(calibrations: Sequence[Calibration], ratings: int) -> Calibration:
    """Returns the calibration for a number of ratings: between two K their weights are interpolated.

    Args:
        calibrations: Of one method, at ascending K; one at least.
        ratings: How many ratings the user has given; below the smallest K and above the largest, these are taken.
    """
    shots = [found.shots for found in calibrations]

    def interpolated(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
        return tuple(float(np.interp(ratings, shots, column)) for column in zip(*rows, strict=True))

    rating = interpolated([found.rating for found in calibrations])
    like = interpolated([found.like for found in calibrations])
    return replace(calibrations[0], shots=ratings, rating=rating, like=like)


def _features(given: Values, scores: NDArray[np.floating], mean: float) -> Floats:
    """Returns 1, the score and the user's mean rating, shrunk to 0 around the overall mean, shape (items, 3)."""
    user_mean = float((given - mean).sum()) / (len(given) + _USER_MEAN_DAMPING)
    return np.stack([np.ones(len(scores)), scores, np.full(len(scores), user_mean)], axis=1).astype(np.float64)


def _fit_logistic(rows: Floats, liked: NDArray[np.bool_]) -> Floats:
    """Fits a logistic regression by Newton's method, with a penalty on all weights but the first."""
    penalty = np.full(rows.shape[1], _PENALTY)
    penalty[0] = 1e-6
    weights = np.zeros(rows.shape[1])
    for _ in range(_NEWTON_STEPS):
        chance = _logistic(rows @ weights)
        gradient = rows.T @ (chance - liked) + penalty * weights
        curvature = (rows * (chance * (1 - chance))[:, None]).T @ rows + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        weights = weights - step
        if np.abs(step).max() < 1e-10:
            break
    return weights


def _logistic(odds: Floats) -> Floats:
    found: Floats = 1 / (1 + np.exp(-np.clip(odds, -500, 500)))
    return found
