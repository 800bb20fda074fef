"""Shrinks a covariance of users' weights: fewer directions, more equal variances, by what orders held-out users best.

A covariance that was learned from the ratings of a hundred items can explain how any two of them go together, and then
says little of other items. How much of it to believe is chosen by users, and where it matters by items, that it was not
learned from.

Source: Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", eq. 2, within
the leading directions; intensity and scale are chosen by cross-validation. The criterion is a pairwise logistic loss at
its best sharpness: of a squared error, few users with strong tastes have the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from metarec.data.interactions import Codes, Values
from metarec.scorers.collaborative.residuals import Floats

_INTENSITIES = (0.0, 0.2, 0.5, 0.8, 0.9, 0.95, 1.0)
_SCALES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
_SHARPNESS = (0.5, 1.0, 2.0, 4.0, 8.0)
_FEWEST = 2


@dataclass(frozen=True)
class Directions:
    """The leading directions of a covariance.

    Args:
        axes: Orthonormal columns, shape (width, rank).
        variances: The covariance's variance along each, shape (rank,).
        mean: The mean variance of a weight.
    """

    axes: Floats
    variances: Floats
    mean: float

    @classmethod
    def of(cls, covariance: Floats, rank: int) -> Directions:
        """Returns the `rank` directions along which a covariance is largest, or all of them if there are fewer."""
        values, vectors = np.linalg.eigh(covariance)
        return cls(
            vectors[:, ::-1][:, :rank], np.clip(values[::-1][:rank], 0.0, None), float(np.diag(covariance).mean())
        )


@dataclass(frozen=True)
class Shrinkage:
    """How the variances along the leading directions of a covariance are changed.

    Args:
        intensity: Share of the mean variance in each; at 1 all are equal.
        scale: Factor on the result.
    """

    intensity: float
    scale: float = 1.0

    def of(self, directions: Directions) -> Floats:
        """Returns the shrunk covariance, shape (width, width)."""
        changed = self.scale * ((1 - self.intensity) * directions.variances + self.intensity * directions.mean)
        covariance: Floats = (directions.axes * changed) @ directions.axes.T
        return covariance


@dataclass(frozen=True)
class HeldOutUser:
    """A user's ratings, and what the weights' mean and items' own effects say of them.

    Args:
        support: Item codes, shape (support,).
        rest: The support's ratings around what is said of them, shape (support,).
        query: Item codes, shape (query,).
        mean: What is said of the query, shape (query,).
        value: The query's ratings, shape (query,).
    """

    support: Codes
    rest: Floats
    query: Codes
    mean: Floats
    value: Floats


def best_shrinkage(users: Sequence[HeldOutUser], design: Values, directions: Directions, noise: float) -> Shrinkage:
    """Returns the shrinkage under which held-out users' queries are ordered best; none without such users.

    Args:
        users: The users.
        design: The features of all items and a last one that is 1, shape (items, width).
        directions: Of the covariance of users' weights.
        noise: Variance of a rating around its prediction.
    """
    none = Shrinkage(0.0)
    tried = [none, *(Shrinkage(intensity, scale) for intensity, scale in product(_INTENSITIES, _SCALES))]
    turned = design.astype(np.float64) @ directions.axes
    losses = [_losses(user, turned, directions, noise, tried) for user in users if np.ptp(user.value) > 0]
    if len(losses) < _FEWEST:
        return none
    return tried[int(np.argmin(np.mean(losses, 0).min(1)))]


def _losses(
    user: HeldOutUser, turned: Floats, directions: Directions, noise: float, tried: Sequence[Shrinkage]
) -> Floats:
    """Returns the mean logistic loss of a query's pairs with different ratings, shape (tried, sharpness)."""
    support, query = turned[user.support], turned[user.query]
    intensity = np.array([one.intensity for one in tried])[:, None, None]
    scale = np.array([one.scale for one in tried])[:, None, None]
    within, across = (
        scale * ((1 - intensity) * (items * directions.variances @ support.T) + intensity * even)
        for items, even in ((items, directions.mean * (items @ support.T)) for items in (support, query))
    )
    dual = np.linalg.solve(within + noise * np.eye(len(support)), user.rest[None, :, None])
    scores = user.mean + (across @ dual)[..., 0]
    higher = user.value[:, None] > user.value
    gaps = (scores[:, :, None] - scores[:, None, :])[:, higher]
    losses: Floats = np.stack([np.logaddexp(0.0, -sharpness * gaps).mean(1) for sharpness in _SHARPNESS], 1)
    return losses
