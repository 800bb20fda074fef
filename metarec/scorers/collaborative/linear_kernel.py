"""A Gaussian process that is linear in items' features, with mean and covariance of users' weights learned from many.

`metarec.scorers.collaborative.gp` learns the scale of a block of features, and factors beside it. This learns how the
weights of all features vary together, so that a support says something about features that it does not have. Of items
that nobody rated, features are all there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.sparse import csr_array

from metarec.data.interactions import Codes, Interactions
from metarec.scorers.collaborative.gp import GaussianProcess
from metarec.scorers.collaborative.item_mean import fit_item_mean
from metarec.scorers.collaborative.residuals import Floats
from metarec.threads import one_thread

# Expectation maximization comes down to small variances in a few sweeps, and takes many to come up to large ones.
_FIRST_VARIANCE = 0.3
_FIRST_NOISE = 0.6
_LEAST_NOISE = 1e-3
_CHUNK = 256


@one_thread()
def fit_linear_kernel(
    interactions: Interactions,
    users: Codes,
    features: Floats,
    *,
    name: str,
    sweeps: int = 12,
    damping: float = 1.0,
    item_damping: float = 4.0,
) -> GaussianProcess:
    """Learns the mean and covariance of users' weights on items' features by expectation maximization.

    Args:
        interactions: The dataset.
        users: The meta-training users; only their ratings are used.
        features: A vector of each item, shape (items, width); a few hundred wide at most.
        name: How the method is called in tables.
        sweeps: Rounds of expectation and maximization.
        damping: Damping: pseudo-users for each feature, of independent weights, that shrink the covariance.
        item_damping: Damping: pseudo-ratings that shrink what an item's mean has beyond its features to 0.

    Raises:
        DataError: The users have no ratings, or all the same one.

    Source: Dempster, Laird and Rubin 1977, section 4.5 (random effects); the posterior as in Rasmussen and Williams
    2006, section 2.1.
    """
    baseline = fit_item_mean(interactions, users)
    wide = np.asarray(features, np.float64)
    unit = wide / np.sqrt(max((wide**2).sum(1).mean(), 1e-12))
    # The last weight is the user's bias.
    design = np.concatenate([unit, np.ones((len(unit), 1))], 1)
    kept = np.isin(interactions.user, users)
    order = np.argsort(interactions.user[kept], kind="stable")
    user = np.searchsorted(np.sort(users), interactions.user[kept][order])
    value = baseline.standardize(interactions.rating[kept][order]).astype(np.float64)
    rows = _Rows(user, interactions.item[kept][order], value, len(users))
    learned = _expectation_maximization(rows, design, sweeps, damping, item_damping)
    # The last column of a lower triangle is a single number, so that the bias's loading is constant.
    loadings = design @ np.linalg.cholesky(learned.covariance)
    return GaussianProcess(
        mean_rating=baseline.mean,
        scale=baseline.scale,
        mean=design @ learned.weights + learned.items,
        loadings=loadings,
        noise=np.full(len(unit), learned.noise),
        centre=loadings[rows.item].mean(0),
        selection_effect=np.zeros(loadings.shape[1]),
        selection_damping=1.0,
        name=name,
    )


@dataclass(frozen=True)
class _Rows:
    """Ratings in the order of their users: row of the user, item code, standardized value; number of users."""

    user: Codes
    item: Codes
    value: Floats
    users: int

    def moments(self, design: Floats) -> torch.Tensor:
        """Returns the inner products of every user's features, shape (users, width, width)."""
        bounds = np.searchsorted(self.user, np.arange(self.users + 1)).tolist()
        rated = (design[self.item[start:end]] for start, end in pairwise(bounds))
        return torch.from_numpy(np.stack([some.T @ some for some in rated]).astype(np.float32))

    def totals(self, values: Floats, design: Floats) -> Floats:
        """Returns every user's sum of features, each times the rating's value, shape (users, width)."""
        sums: Floats = csr_array((values, (self.user, self.item)), (self.users, len(design))) @ design
        return sums


@dataclass(frozen=True)
class _Learned:
    """Mean and covariance of users' weights, items' means beyond their features, and the variance of a rating."""

    weights: Floats
    covariance: Floats
    items: Floats
    noise: float


def _expectation_maximization(
    rows: _Rows, design: Floats, sweeps: int, damping: float, item_damping: float
) -> _Learned:
    width, features = design.shape[1], design[rows.item]
    grams, count = rows.moments(design), np.bincount(rows.item, minlength=len(design))
    found = _Learned(np.zeros(width), np.eye(width) * _FIRST_VARIANCE, np.zeros(len(design)), _FIRST_NOISE)
    for _ in range(sweeps):
        # Users: the posterior of their weights.
        rest = rows.value - found.items[rows.item] - features @ found.weights
        targets = rows.totals(rest, design) / found.noise
        precision = torch.from_numpy(np.linalg.inv(found.covariance))
        away = np.empty((rows.users, width))
        spread, unsure = np.zeros((width, width)), 0.0
        for start in range(0, rows.users, _CHUNK):
            some = slice(start, start + _CHUNK)
            gram = grams[some].double()
            posterior = torch.cholesky_inverse(torch.linalg.cholesky(precision + gram / found.noise))
            away[some] = (posterior @ torch.from_numpy(targets[some, :, None]))[..., 0].numpy()
            spread += posterior.sum(0).numpy()
            unsure += float((gram * posterior).sum())
        # Everybody: mean and covariance of the weights, items' means beyond their features, and the noise.
        mean = away.mean(0)
        moments = spread + (away - mean).T @ (away - mean)
        even = np.trace(moments) / width / rows.users * np.eye(width)
        left = rest + found.items[rows.item] - np.einsum("ij,ij->i", features, away[rows.user])
        items = np.bincount(rows.item, left, len(design)) / (count + item_damping)
        error = ((left - items[rows.item]) ** 2).sum() + unsure
        found = _Learned(
            weights=found.weights + mean,
            covariance=(moments + damping * width * even) / (rows.users + damping * width),
            items=items,
            noise=max(float(error) / len(rows.value), _LEAST_NOISE),
        )
    return found
