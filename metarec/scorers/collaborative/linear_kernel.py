"""A Gaussian process that is linear in items' features, with mean and covariance of users' weights learned from many.

`metarec.scorers.collaborative.gp_fitting` learns the scale of a block of features, and factors beside it. This learns
how the weights of all features vary together, so that a support says something about features that it does not have. Of
items that nobody rated, features are all there is; how far the learned covariance is believed of them is chosen by
held-out users and items (`metarec.scorers.collaborative.shrinkage`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from metarec.data.interactions import Codes, Flags, Interactions, Ratings, Values
from metarec.scorers.collaborative.gp import GaussianProcess
from metarec.scorers.collaborative.item_mean import ItemPrior, fit_item_mean
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.shrinkage import Directions, HeldOutUser, Shrinkage, best_shrinkage
from metarec.system.progress import progress
from metarec.system.threads import map_each, one_thread

# Expectation maximization comes down to small variances in a few sweeps, and takes many to come up to large ones.
_FIRST_VARIANCE = 0.3
_FIRST_NOISE = 0.6
_LEAST_NOISE = 1e-3
_LEAST_LENGTH = 1e-12
# Loadings kept at most: directions in which users differ most.
_LOADINGS = 256
# Users whose ratings' features are in memory at once.
_CHUNK = 256
# To choose the shrinkage: parts of users and of items, one of which is held out, users at most, and their ratings.
_PARTS, _HELD_OUT, _SUPPORTS, _QUERY, _MIN_QUERY = 5, 1000, (5, 10, 20), 20, 2


@dataclass(frozen=True)
class RatedRows:
    """Ratings in the order of their users.

    Args:
        bounds: Where each user's ratings start, and where the last one's end, shape (users + 1,).
        item: Item codes, shape (ratings,).
        value: What the weights explain: standardized ratings, or what is left of them, shape (ratings,).
    """

    bounds: Codes
    item: Codes
    value: Floats

    def of(self, users: Codes, items: Flags) -> RatedRows:
        """Returns the ratings that some users gave some items; users without any stay, with none.

        Args:
            users: Places of the users.
            items: Which items, shape (items,).
        """
        kept = [np.arange(self.bounds[user], self.bounds[user + 1]) for user in users]
        kept = [some[items[self.item[some]]] for some in kept]
        rows = np.concatenate([np.zeros(0, np.int64), *kept])
        return RatedRows(np.cumsum([0, *map(len, kept)]), self.item[rows], self.value[rows])


@dataclass(frozen=True)
class LearnedWeights:
    """Mean and covariance of users' weights, items' means beyond their features, and the variance of a rating.

    See `LinearPrior` for the fields.
    """

    weights: Floats
    covariance: Floats
    items: Floats
    noise: float

    @cached_property
    def root(self) -> Floats:
        """A matrix whose product with its transpose is nearest the covariance, shape (width + 1, loadings)."""
        return _root(self.covariance, _LOADINGS)


@dataclass(frozen=True)
class LinearPrior(LearnedWeights):
    """What meta-training users' weights on items' features are draws from, with what else explains a rating.

    Args:
        baseline: Item means; ratings are in its units.
        rated: Number of ratings of each item, shape (items,).
        weights: Mean of users' weights, the last one the user's bias, shape (width + 1,).
        covariance: Their covariance, shape (width + 1, width + 1).
        items: What an item's mean has beyond its features, shape (items,).
        noise: Variance of a rating around its prediction.
    """

    baseline: ItemPrior
    rated: Codes


def with_bias(features: Floats) -> Values:
    """Returns features scaled to a mean squared length of one beside a constant, shape (items, width + 1)."""
    wide = np.asarray(features, np.float64)
    unit = wide / np.sqrt(max((wide**2).sum(1).mean(), _LEAST_LENGTH))
    return np.concatenate([unit, np.ones((len(unit), 1))], 1).astype(np.float32)


@one_thread()
def fit_linear_kernel(
    interactions: Interactions,
    users: Codes,
    features: Floats,
    *,
    name: str,
    sweeps: int = 8,
    damping: float = 20.0,
    item_damping: float = 4.0,
    shrinkage: float | None = None,
    unrated: bool = False,
) -> GaussianProcess:
    """Returns the process whose users' weights have the mean and covariance that `fit_linear_prior` learns.

    Args:
        interactions: The dataset.
        users: The meta-training users; only their ratings are used.
        features: A vector of each item, shape (items, width).
        name: How the method is called in tables.
        sweeps: See `fit_linear_prior`.
        damping: See `fit_linear_prior`.
        item_damping: See `fit_linear_prior`.
        shrinkage: See `fit_linear_prior`.
        unrated: See `fit_linear_prior`.

    Raises:
        DataError: The users have no ratings, or all the same one.
    """
    found = fit_linear_prior(
        interactions,
        users,
        features,
        name=name,
        sweeps=sweeps,
        damping=damping,
        item_damping=item_damping,
        shrinkage=shrinkage,
        unrated=unrated,
    )
    return linear_process(found, with_bias(features), name)


def linear_process(prior: LinearPrior, design: Values, name: str) -> GaussianProcess:
    """Returns the process of a mean and covariance of users' weights.

    Args:
        prior: The mean and covariance.
        design: The features of all items, see `with_bias`.
        name: How the method is called in tables.
    """
    loadings = design.astype(np.float64) @ prior.root
    return GaussianProcess(
        mean_rating=prior.baseline.mean,
        scale=prior.baseline.scale,
        mean=design @ prior.weights + prior.items,
        loadings=loadings,
        noise=np.full(len(design), prior.noise),
        centre=prior.rated @ loadings / prior.rated.sum(),
        selection_effect=np.zeros(loadings.shape[1]),
        selection_damping=1.0,
        name=name,
    )


@one_thread()
def fit_linear_prior(
    interactions: Interactions,
    users: Codes,
    features: Floats,
    *,
    name: str = "linear kernel",
    sweeps: int = 8,
    damping: float = 20.0,
    item_damping: float = 4.0,
    shrinkage: float | None = None,
    unrated: bool = False,
) -> LinearPrior:
    """Learns the mean and covariance of users' weights on items' features by expectation maximization.

    Args:
        interactions: The dataset.
        users: The meta-training users; only their ratings are used.
        features: A vector of each item, shape (items, width).
        name: What is fitted, for the progress that is shown.
        sweeps: Rounds of expectation and maximization.
        damping: Damping: pseudo-users of independent weights that shrink the covariance.
        item_damping: Damping: pseudo-ratings that shrink what an item's mean has beyond its features to 0.
        shrinkage: Intensity of the covariance's shrinkage; None takes that which orders held-out users' ratings best,
            which costs a second fit.
        unrated: Whether held-out users are asked about items that the fit has not met.

    Raises:
        DataError: The users have no ratings, or all the same one.

    Source: Dempster, Laird and Rubin 1977, section 4.5 (random effects); the posterior as in Rasmussen and Williams
    2006, section 2.2, so that a sweep takes time quadratic in the width and memory that does not grow with users.
    """
    baseline = fit_item_mean(interactions, users)
    design = with_bias(features)
    rows = rated_rows(interactions, users, lambda ratings: baseline.standardize(ratings.values))

    def learn(rows: RatedRows, name: str) -> LearnedWeights:
        return learn_weights(rows, design, name=name, sweeps=sweeps, damping=damping, item_damping=item_damping)

    found = learn(rows, name)
    if shrinkage is None:
        chosen = _chosen_shrinkage(rows, design, lambda part: learn(part, f"{name}, to choose its shrinkage"), unrated)
    else:
        chosen = Shrinkage(shrinkage)
    count = np.bincount(rows.item, minlength=len(design))
    covariance = chosen.of(Directions.of(found.covariance, _LOADINGS))
    return LinearPrior(found.weights, covariance, found.items, found.noise, baseline, count)


def _chosen_shrinkage(
    rows: RatedRows, design: Values, learn: Callable[[RatedRows], LearnedWeights], unrated: bool
) -> Shrinkage:
    """Returns the shrinkage under which what the others' ratings say orders those of a part of the users best.

    Args:
        rows: All users' ratings.
        design: See `learn_weights`.
        learn: Learns mean and covariance from ratings.
        unrated: See `fit_linear_prior`.
    """
    generator = np.random.default_rng(0)
    users = len(rows.bounds) - 1
    hidden = generator.permutation(len(design)) % _PARTS == 0 if unrated else np.zeros(len(design), bool)
    held_out = generator.permutation(users)[: min(users // _PARTS, _HELD_OUT)]
    rest = np.setdiff1d(np.arange(users), held_out)
    shown = rows.of(rest, ~hidden)
    if len(held_out) == 0 or len(shown.item) == 0:
        return Shrinkage(0.0)
    found = learn(shown)
    asked = [one for user in held_out if (one := _episode(rows, user, hidden, found, design, unrated, generator))]
    return best_shrinkage(asked, design, Directions.of(found.covariance, _LOADINGS), found.noise)


def _episode(
    rows: RatedRows,
    user: int,
    hidden: Flags,
    found: LearnedWeights,
    design: Values,
    unrated: bool,
    generator: np.random.Generator,
) -> HeldOutUser | None:
    """Returns a user's ratings in a support and a query; None if there are too few."""
    start, end = rows.bounds[user], rows.bounds[user + 1]
    order = start + generator.permutation(end - start)
    cold = hidden[rows.item[order]]
    support, query = (order[~cold], order[cold]) if unrated else (order, order)
    size = int(generator.choice(_SUPPORTS))
    if not unrated:
        size = min(size, len(order) - _MIN_QUERY)
        query = order[max(size, 0) :]
    support, query = support[: max(size, 0)], query[:_QUERY]
    if len(support) == 0 or len(query) < _MIN_QUERY:
        return None
    said = [found.items[rows.item[part]] + design[rows.item[part]] @ found.weights for part in (support, query)]
    return HeldOutUser(
        support=rows.item[support],
        rest=rows.value[support] - said[0],
        query=rows.item[query],
        mean=said[1],
        value=rows.value[query],
    )


def rated_rows(interactions: Interactions, users: Codes, values: Callable[[Ratings], Values]) -> RatedRows:
    """Returns some users' ratings.

    Args:
        interactions: The dataset.
        users: The users.
        values: What the weights explain of one user's ratings, of their shape.
    """
    ratings = [interactions.ratings(interactions.rows_of_user[user]) for user in users]
    return RatedRows(
        np.cumsum([0, *map(len, ratings)]),
        np.concatenate([one.items for one in ratings]),
        np.concatenate([values(one) for one in ratings]).astype(np.float64),
    )


def learn_weights(
    rows: RatedRows, design: Values, *, name: str, sweeps: int, damping: float, item_damping: float
) -> LearnedWeights:
    """Learns the mean and covariance of the weights that explain users' ratings; see `fit_linear_prior`.

    Args:
        rows: The users' ratings.
        design: Each item's features and a last one that is 1, shape (items, width + 1).
        name: See `fit_linear_prior`.
        sweeps: See `fit_linear_prior`.
        damping: See `fit_linear_prior`.
        item_damping: See `fit_linear_prior`; infinity leaves items' own means at 0.
    """
    width, workers = design.shape[1], torch.get_num_threads()
    found = LearnedWeights(np.zeros(width), np.eye(width) * _FIRST_VARIANCE, np.zeros(len(design)), _FIRST_NOISE)
    with one_thread(), progress(f"fitting the {name}", sweeps, after=2.0) as advance:
        for sweep in range(sweeps):
            found = _sweep(rows, design, found, damping, item_damping, workers)
            advance(sweep + 1)
    return found


def _root(covariance: Floats, rank: int) -> Floats:
    """Returns a matrix whose product with its transpose is nearest a covariance, shape (width, rank or fewer)."""
    values, vectors = np.linalg.eigh(covariance)
    root: Floats = vectors[:, ::-1][:, :rank] * np.sqrt(np.clip(values[::-1][:rank], 0.0, None))
    return root


@dataclass(frozen=True)
class _Posteriors:
    """What the expectation step leaves of some users.

    Args:
        away: Posterior mean of each user's weights around the mean of all, shape (users, width).
        reduction: Sum of the differences between the covariance and each user's posterior one, shape (width, width).
        unexplained: Each rating around its posterior mean, shape (ratings,).
        unsure: Sum of the posterior variances of the ratings' predictions.
    """

    away: Floats
    reduction: Floats
    unexplained: Floats
    unsure: float


def _sweep(
    rows: RatedRows, design: Values, found: LearnedWeights, damping: float, item_damping: float, workers: int
) -> LearnedWeights:
    """Returns the parameters after one round of expectation and maximization."""
    users = len(rows.bounds) - 1
    rest = rows.value - found.items[rows.item] - (design @ found.weights)[rows.item]
    spread = design @ found.covariance.astype(np.float32)
    chunks = [slice(first, min(first + _CHUNK, users)) for first in range(0, users, _CHUNK)]
    parts = map_each(lambda some: _posteriors(rows, design, spread, found.noise, rest, some), chunks, workers)
    away = np.concatenate([part.away for part in parts])
    mean = away.mean(0)
    moments = users * found.covariance - sum(part.reduction for part in parts) + (away - mean).T @ (away - mean)
    even = np.diag(moments).copy()
    even[:-1] = even[:-1].mean() if len(even) > 1 else 0.0
    covariance = (moments + damping * np.diag(even / users)) / (users + damping)
    left = np.concatenate([part.unexplained for part in parts]) + found.items[rows.item]
    count = np.bincount(rows.item, minlength=len(design))
    items = np.bincount(rows.item, left, len(design)) / (count + item_damping)
    error = float(((left - items[rows.item]) ** 2).sum()) + sum(part.unsure for part in parts)
    return LearnedWeights(
        weights=found.weights + mean,
        covariance=(covariance + covariance.T) / 2,
        items=items,
        noise=max(error / len(rows.value), _LEAST_NOISE),
    )


def _posteriors(
    rows: RatedRows, design: Values, spread: Values, noise: float, rest: Floats, some: slice
) -> _Posteriors:
    """Returns the posteriors of some users' weights, by systems as large as their numbers of ratings.

    Args:
        rows: All users' ratings.
        design: See `learn_weights`.
        spread: Covariance of every item's value with the weights, shape (items, width + 1).
        noise: Variance of a rating around its prediction.
        rest: What the weights' mean and the items' own means leave of the ratings, shape (ratings,).
        some: The users.
    """
    bounds = rows.bounds[some.start : some.stop + 1]
    items = rows.item[bounds[0] : bounds[-1]]
    whitened, away = np.empty((len(items), design.shape[1]), np.float32), np.empty((len(bounds) - 1, design.shape[1]))
    unexplained, unsure = np.empty(len(items)), 0.0
    for user, (start, end) in enumerate(pairwise((bounds - bounds[0]).tolist())):
        own = spread[items[start:end]]
        covariance = (own @ design[items[start:end]].T).astype(np.float64)
        covariance[np.diag_indices(end - start)] += noise
        # The inverse of the lower triangle: its transpose times itself is the inverse of the covariance.
        whitening = np.linalg.inv(np.linalg.cholesky((covariance + covariance.T) / 2))
        dual = whitening.T @ (whitening @ rest[bounds[user] : bounds[user + 1]])
        whitened[start:end] = whitening.astype(np.float32) @ own
        away[user] = own.T @ dual
        unexplained[start:end] = noise * dual
        unsure += noise * (end - start) - noise**2 * float((whitening**2).sum())
    return _Posteriors(away, (whitened.T @ whitened).astype(np.float64), unexplained, unsure)
