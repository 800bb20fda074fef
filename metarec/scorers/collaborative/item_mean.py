"""Item means: a prediction of an item's rating that does not depend on the user.

The shrunk mean of the meta-training users' ratings predicts better than item text alone, so it enters the score as an
input. The mean of an item with few ratings or none is shrunk towards a prediction from its text. Only ratings of
meta-training users are used; the item mean for such a user leaves out that user's own rating.

Source: empirical Bayes shrinkage, Efron and Morris 1975; variances by the method of moments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from metarec.data.interactions import Codes, Interactions, Ratings, Values
from metarec.errors import DataError
from metarec.system.threads import one_thread

# Imported where it fits something: a saved recommender serves without it.
if TYPE_CHECKING:
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

_RIDGE_PENALTIES = np.logspace(2, 6, 9)
_FOLDS = 5
# Width of the kernel in `predict_unrated`, tuned on splits that no table reports. The kernel of `features` has another
# width, since it is approximated by a thousand landmarks.
_UNRATED_MEAN_GAMMA = 0.4
# Variance of item means that text does not explain, relative to the variance that it explains.
_UNEXPLAINED_VARIANCE = 0.5
# `predict_unrated` fits the items with most ratings, at most so many.
_MOST_RATED = 12_000


Rows = TypeVar("Rows", bound=NDArray[Any])


def taken(rows: Rows, codes: Codes) -> Rows:
    """Returns some rows; without a copy where they follow each other, as where a whole catalog is scored."""
    count = len(codes)
    if count and codes[-1] - codes[0] == count - 1 and bool((np.diff(codes) == 1).all()):
        return cast("Rows", rows[codes[0] : codes[0] + count])
    return cast("Rows", rows[codes])


@dataclass(frozen=True)
class ItemPrior:
    """Shrunk item means in units of the rating scale's standard deviation around the global mean.

    Args:
        mean: Global mean rating.
        scale: Standard deviation of ratings.
        total: Sum of each item's standardized ratings, shape (items,).
        count: Number of each item's ratings, shape (items,).
        centre: What each item's mean is shrunk towards, standardized, shape (items,).
        strength: Damping: pseudo-ratings that shrink a mean to its centre.
        zero_mean: Whether every item's prior is 0 instead.
    """

    mean: float
    scale: float
    total: Values
    count: Values
    centre: Values
    strength: float
    zero_mean: bool = False

    def without_text(self) -> ItemPrior:
        """Returns the means shrunk towards the global mean: the baseline."""
        return replace(self, centre=np.zeros_like(self.centre), zero_mean=False)

    def with_zero_mean(self) -> ItemPrior:
        """Returns the same scale with a prior of 0 for every item; `without_text` still gives the means."""
        return replace(self, zero_mean=True)

    def standardize(self, ratings: Values) -> Values:
        """Returns ratings in the prior's units."""
        return ((ratings - self.mean) / self.scale).astype(np.float32)

    def values(self, items: Codes) -> Values:
        """Returns the prior of some items for a user whose ratings are not in it, shape (items,)."""
        return self._shrunk(items, taken(self.total, items), taken(self.count, items))

    def values_without(self, own: Ratings) -> Values:
        """Returns the prior of rated items, fitted without these ratings, shape (ratings,)."""
        return self._shrunk(own.items, self.total[own.items] - self.standardize(own.values), self.count[own.items] - 1)

    def _shrunk(self, items: Codes, total: Values, count: Values) -> Values:
        shrunk: Values = (total + self.strength * taken(self.centre, items)) / (count + self.strength)
        return np.zeros(len(items), np.float32) if self.zero_mean else shrunk.astype(np.float32)


def fit_item_mean(interactions: Interactions, users: Codes) -> ItemPrior:
    """Fits item means shrunk towards the global mean.

    Args:
        interactions: The dataset.
        users: The meta-training users; only their ratings are used.

    Raises:
        DataError: The users have no ratings, or all the same one.
    """
    kept = np.isin(interactions.user, users)
    items, ratings = interactions.item[kept], interactions.rating[kept].astype(np.float64)
    if len(ratings) == 0 or ratings.std() == 0:
        raise DataError(
            f"{len(users)} meta-training users gave {len(ratings)} ratings, all the same", "There is nothing to learn"
        )
    standardized = (ratings - ratings.mean()) / ratings.std()
    count = np.bincount(items, minlength=len(interactions.catalog)).astype(np.float64)
    total = np.bincount(items, standardized, minlength=len(count))
    centre = np.zeros_like(count)
    return ItemPrior(
        mean=float(ratings.mean()),
        scale=float(ratings.std()),
        total=total.astype(np.float32),
        count=count.astype(np.float32),
        centre=centre.astype(np.float32),
        strength=_strength(standardized, items, count, centre),
    )


def _strength(ratings: np.ndarray, items: np.ndarray, count: np.ndarray, centre: np.ndarray) -> float:
    """Returns the ratio of the variance within items to the variance of true item means around their centres."""
    rated = count >= 2
    mean = np.divide(
        np.bincount(items, ratings, minlength=len(count)), count, where=count > 0, out=np.zeros_like(count)
    )
    squares = np.bincount(items, (ratings - mean[items]) ** 2, minlength=len(count))
    freedom = (count[rated] - 1).sum()
    within = float(squares[rated].sum() / freedom) if freedom else 1.0
    weight = count[rated]
    if not len(weight):
        return 1.0
    spread = float((weight * (mean[rated] - centre[rated]) ** 2).sum() / weight.sum())
    noise = within * len(weight) / float(weight.sum())
    return float(np.clip(within / max(spread - noise, 1e-3), 0.5, 1e3))


@one_thread()
def smooth_by_text(prior: ItemPrior, states: np.ndarray, seed: int) -> ItemPrior:
    """Shrinks item means towards a ridge regression on the items' text instead of towards the global mean.

    An item's own ratings never enter its own centre: rated items are predicted out of fold.

    Args:
        prior: The fitted item means.
        states: A vector of each item's text, shape (items, features).
        seed: Seed of the folds.
    """
    rated, shrunk, weight = _rated_means(prior)
    if len(rated) < 10 * _FOLDS:
        return prior
    from sklearn.model_selection import KFold, cross_val_predict

    scaler, model = _text_regression(prior, states)
    features = scaler.transform(states)
    folds = KFold(_FOLDS, shuffle=True, random_state=seed)
    centre = model.predict(features)
    centre[rated] = cross_val_predict(model, features[rated], shrunk, cv=folds, params={"sample_weight": weight})
    return replace(prior, centre=centre.astype(np.float32))


def predict_unrated(prior: ItemPrior, vectors: np.ndarray) -> ItemPrior:
    """Predicts the means of unrated items by Gaussian process regression; those of rated items do not change.

    An item's mean is a function of its vector with a Gaussian kernel, plus independent variance that the vector does
    not explain. The noise of a rating is the prior's `strength`, relative to the variance of the function.

    Args:
        prior: The fitted item means.
        vectors: A vector of each item's text and fields, shape (items, features), of length around one.

    Source: Rasmussen and Williams 2006, eq. 2.25, with the constant mean of section 2.7 by generalized least squares.
    """
    rated, unrated = np.flatnonzero(prior.count > 0), np.flatnonzero(prior.count == 0)
    if len(rated) < 10 * _FOLDS or not len(unrated):
        return prior
    rated = np.sort(rated[np.argsort(-prior.count[rated], kind="stable")][:_MOST_RATED])
    count = torch.from_numpy(prior.count[rated])
    read = torch.from_numpy(np.asarray(vectors, np.float32))
    known = read[rated]
    covariance = _gaussian_kernel(known, known) + torch.diag(_UNEXPLAINED_VARIANCE + prior.strength / count)
    means = torch.from_numpy(prior.total[rated]) / count
    ones = torch.ones_like(means)
    factor = torch.linalg.cholesky(covariance)
    weights, level = torch.cholesky_solve(torch.stack([means, ones], 1), factor).T
    mean = (ones @ weights) / (ones @ level)
    centre = prior.centre.copy()
    centre[unrated] = (mean + _gaussian_kernel(read[unrated], known) @ (weights - mean * level)).numpy()
    return replace(prior, centre=centre)


def _gaussian_kernel(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Returns the kernel of all pairs, shape (rows of one, rows of other)."""
    squares = one.square().sum(1)[:, None] + other.square().sum(1) - 2 * one @ other.T
    return torch.exp(-_UNRATED_MEAN_GAMMA * squares.clamp(min=0))


@one_thread()
def extend_by_text(prior: ItemPrior, states: np.ndarray, new: np.ndarray) -> ItemPrior:
    """Adds unrated items; their prior is the prediction of `smooth_by_text`.

    Args:
        prior: The prior of the items it was fitted on; their values do not change.
        states: A vector of each of those items' text, shape (items, features).
        new: A vector of each new item's text, shape (new items, features).
    """
    centre = np.zeros(len(new), np.float32)
    if len(_rated_means(prior)[0]) >= 10 * _FOLDS:
        scaler, model = _text_regression(prior, states)
        centre = model.predict(scaler.transform(new)).astype(np.float32)
    nothing = np.zeros_like(centre)
    return replace(
        prior,
        total=np.concatenate([prior.total, nothing]),
        count=np.concatenate([prior.count, nothing]),
        centre=np.concatenate([prior.centre, centre]),
    )


def _rated_means(prior: ItemPrior) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the rated items, their means shrunk to the global mean, and the regression weights of these."""
    rated = np.flatnonzero(prior.count > 0)
    shrunk = prior.total[rated] / (prior.count[rated] + prior.strength)
    return rated, shrunk, np.sqrt(prior.count[rated] / (prior.count[rated] + prior.strength))


def _text_regression(prior: ItemPrior, states: np.ndarray) -> tuple[StandardScaler, Ridge]:
    """Fits a ridge regression of item means on scaled text vectors."""
    from sklearn.linear_model import Ridge, RidgeCV
    from sklearn.preprocessing import StandardScaler

    rated, shrunk, weight = _rated_means(prior)
    scaler = StandardScaler().fit(states)
    features = scaler.transform(states[rated])
    penalty = RidgeCV(_RIDGE_PENALTIES).fit(features, shrunk, sample_weight=weight).alpha_
    return scaler, Ridge(penalty).fit(features, shrunk, sample_weight=weight)
