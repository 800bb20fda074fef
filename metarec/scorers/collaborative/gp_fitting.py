"""Learns a Gaussian process over items from the meta-training users: item means, and a covariance of items.

All variances are learned by empirical Bayes or are settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from metarec.data.interactions import Codes, Interactions
from metarec.scorers.collaborative.features import Features, all_components
from metarec.scorers.collaborative.gp import GaussianProcess
from metarec.scorers.collaborative.item_mean import ItemPrior, fit_item_mean, smooth_by_text
from metarec.scorers.collaborative.residuals import Floats, Residuals
from metarec.system.threads import one_thread

_MEAN_DAMPING = 4.0
_BIAS_SWEEPS = 6
_BIAS_DAMPING = 3.0
_SPREAD_DAMPING = 5.0
_FIRST_VARIANCE = 0.05


@one_thread()
def fit_gp(
    interactions: Interactions,
    users: Codes,
    features: Mapping[str, Floats],
    *,
    smooth: Callable[[ItemPrior], ItemPrior] | None = None,
    factors: int = 16,
    noise: float = 0.6,
    level_variance: float = 0.2,
    factor_variance: float = 0.02,
    components: int = 48,
    sweeps: int = 8,
    selection_effect: float = 4.0,
    selection_damping: float = 3.0,
    mean_damping: float = _MEAN_DAMPING,
    seed: int = 0,
    centred: CentredRatings | None = None,
    principal: Mapping[str, Floats] | None = None,
) -> GaussianProcess:
    """Learns the items' means and covariance by variational expectation maximization.

    Args:
        interactions: The dataset.
        users: The meta-training users; only their ratings are used.
        features: Blocks of item features, each of shape (items, width), e.g. text vectors, genres, year.
        smooth: Shrinks item means towards a prediction. None predicts them from the blocks and from the number of an
            item's ratings, which is of no use where unrated items are queried.
        factors: How many factors are learned beside the features.
        noise: Variance of a rating around its prediction.
        level_variance: Variance of user biases.
        factor_variance: Initial variance of the loadings of each learned factor.
        components: Wider blocks of features are reduced to so many principal components.
        sweeps: Rounds of expectation and maximization; few, for early stopping regularizes.
        selection_effect: See `GaussianProcess`; the same for all loadings but the bias.
        selection_damping: See `GaussianProcess`.
        mean_damping: Damping: pseudo-ratings that shrink an item's mean to its prediction.
        seed: Seed of the first loadings and of the folds that predict item means.
        centred: What `centre_ratings` returns for the same arguments, where several processes are fitted.
        principal: All principal components of the blocks, for the same reason.

    Raises:
        DataError: The users have no ratings, or all the same one.

    Source: the model is a Bayesian factor analysis with covariates (Bishop 1999, "Variational principal components",
    with automatic relevance of factors), used as a Gaussian process after Rasmussen and Williams 2006, section 2.2.
    """
    centred = centred or centre_ratings(
        interactions, users, features, smooth=smooth, mean_damping=mean_damping, seed=seed
    )
    baseline, residuals, mean = centred.baseline, centred.residuals, centred.mean
    count = residuals.count
    blocks = [
        *_feature_loadings(features, principal or {}, count, components),
        np.full((len(count), 1), np.sqrt(level_variance)),
    ]
    loadings, spread = _factor_analysis(residuals, blocks, factors, noise, factor_variance, sweeps, seed)
    effects = np.full(loadings.shape[1], selection_effect)
    effects[-1] = 0.0
    return GaussianProcess(
        mean_rating=baseline.mean,
        scale=baseline.scale,
        mean=mean,
        loadings=loadings,
        noise=noise + spread,
        centre=count @ loadings / count.sum(),
        selection_effect=effects,
        selection_damping=selection_damping,
    )


@dataclass(frozen=True)
class CentredRatings:
    """The part of a process's fit that depends neither on its factors nor on its components.

    Args:
        baseline: Mean and spread of the ratings.
        residuals: Ratings around user bias and item mean, each without that rating.
        mean: Expected rating of each item by an unknown user, shape (items,).
    """

    baseline: ItemPrior
    residuals: Residuals
    mean: Floats


@one_thread()
def centre_ratings(
    interactions: Interactions,
    users: Codes,
    features: Mapping[str, Floats],
    *,
    smooth: Callable[[ItemPrior], ItemPrior] | None = None,
    mean_damping: float = _MEAN_DAMPING,
    seed: int = 0,
) -> CentredRatings:
    """Returns ratings around user biases and item means; see `fit_gp` for the arguments."""
    baseline = fit_item_mean(interactions, users)
    smooth = smooth or partial(_smooth_by_blocks, features, seed)
    return CentredRatings(baseline, *_centred_means(interactions, users, baseline, smooth, mean_damping))


def _smooth_by_blocks(features: Mapping[str, Floats], seed: int, prior: ItemPrior) -> ItemPrior:
    """Returns item means shrunk towards a regression on the blocks and on the number of an item's ratings."""
    log_count = np.log1p(prior.count.astype(np.float64))[:, None]
    return smooth_by_text(prior, np.concatenate([*features.values(), log_count, log_count**2], 1), seed)


def _centred_means(
    interactions: Interactions,
    users: Codes,
    baseline: ItemPrior,
    smooth: Callable[[ItemPrior], ItemPrior],
    strength: float,
) -> tuple[Residuals, Floats]:
    """Returns residuals of ratings from user bias and item mean, each without that rating, and the item means.

    Ratings are scaled by each user's damped spread first. Without this and the biases, the mean of an item would depend
    on whether generous or strict users happened to rate it.
    """
    kept = np.isin(interactions.user, users)
    user = np.searchsorted(np.sort(users), interactions.user[kept])
    item = interactions.item[kept]
    rating = baseline.standardize(interactions.rating[kept]).astype(np.float64)
    count, length = np.bincount(item, minlength=len(baseline.count)), np.bincount(user, minlength=len(users))
    bias = np.zeros(len(users))
    for _ in range(_BIAS_SWEEPS):
        means = np.bincount(item, rating - bias[user], len(count)) / (count + strength)
        bias = np.bincount(user, rating - means[item], len(users)) / (length + _BIAS_DAMPING)
    centred = rating - bias[user]
    squares = np.bincount(user, centred**2, len(users))
    centred /= np.sqrt((squares + _SPREAD_DAMPING) / (length + _SPREAD_DAMPING))[user]
    total = np.bincount(item, centred, len(count)).astype(np.float32)
    prior = smooth(replace(baseline, total=total, strength=strength))
    without = (total[item] - centred + strength * prior.centre[item]) / (count[item] - 1 + strength)
    residuals = Residuals(user, item, centred - without, (len(users), len(count)))
    return residuals, prior.values(np.arange(len(count))).astype(np.float64)


def _feature_loadings(
    features: Mapping[str, Floats], principal: Mapping[str, Floats], count: Codes, components: int
) -> list[Floats]:
    """Returns every block scaled to `_FIRST_VARIANCE`, and the log number of an item's ratings as one more block."""
    blocks = []
    log_count = np.log1p(count)[:, None] - np.log1p(count).mean()
    for name, block in (*features.items(), ("number of ratings", log_count)):
        narrow = np.asarray(block, np.float64)
        if narrow.shape[1] > components:
            found = principal[name] if name in principal else all_components(block)
            narrow = found[:, :components]
        blocks.append(narrow * np.sqrt(_FIRST_VARIANCE / max((narrow**2).sum(1).mean(), 1e-12)))
    return blocks


def _factor_analysis(
    residuals: Residuals,
    blocks: Sequence[Floats],
    factors: int,
    noise: float,
    variance: float,
    sweeps: int,
    seed: int,
) -> tuple[Floats, Floats]:
    """Learns loadings beside blocks of given ones; the users' weights are standard normal.

    Of a given block only the scale is learned; the last block, the user bias, keeps its scale. Time and memory grow
    with the items that somebody rated: the others' learned loadings are 0, with the factors' variances.

    Returns:
        All loadings, the learned ones first, and the trace of the learned ones' covariance, shape (items,).
    """
    from scipy.sparse import csr_array

    every = np.concatenate(blocks, 1)
    known = np.flatnonzero(residuals.count)
    fixed = every[known]
    users, items = residuals.shape[0], len(known)
    ratings = residuals.of_items(known).matrix()
    rated = csr_array((np.ones_like(ratings.data), ratings.indices, ratings.indptr), ratings.shape)
    by_item, raters = ratings.T.tocsr(), rated.T.tocsr()
    bounds = np.cumsum([0, *(block.shape[1] for block in blocks)])
    learned = np.random.default_rng(seed).normal(scale=np.sqrt(variance), size=(len(every), factors))[known]
    covariance = np.zeros((items, factors, factors))
    variances = np.full(factors, variance)
    for _ in range(sweeps):
        loadings = np.concatenate([learned, fixed], 1)
        width = loadings.shape[1]
        # Users: the posterior of their weights, given the loadings and their uncertainty.
        precision = np.broadcast_to(np.eye(width), (users, width, width)).copy()
        for user, (start, end) in enumerate(zip(ratings.indptr[:-1], ratings.indptr[1:], strict=True)):
            theirs = loadings[ratings.indices[start:end]]
            precision[user] += theirs.T @ theirs / noise
        unsure = (rated @ covariance.reshape(items, -1)).reshape(users, factors, factors)
        precision[:, :factors, :factors] += unsure / noise
        posterior = _inverse(precision)
        weights = np.einsum("uij,uj->ui", posterior, ratings @ loadings / noise)
        moments = posterior[:, :factors] + weights[:, :factors, None] * weights[:, None]
        # Items: the posterior of their loadings, given users' weights.
        among = (raters @ moments[:, :, :factors].reshape(users, -1)).reshape(items, factors, factors)
        across = (raters @ moments[:, :, factors:].reshape(users, -1)).reshape(items, factors, -1)
        left = by_item @ weights[:, :factors] - np.einsum("iab,ib->ia", across, fixed)
        covariance = _inverse(among / noise + np.diag(1 / variances))
        learned = np.einsum("iab,ib->ia", covariance, left / noise)
        spread, unrated_spread = np.diagonal(covariance, axis1=1, axis2=2), variances.sum()
        variances = (learned**2 + spread).mean(0)
        # Blocks: their loadings take the variance of users' weights, which are standard normal again.
        squares = (np.diagonal(posterior, axis1=1, axis2=2) + weights**2).mean(0)[factors:]
        for start, end in pairwise(bounds[:-1].tolist()):
            scale = np.sqrt(squares[start:end].mean())
            fixed[:, start:end] *= scale
            every[:, start:end] *= scale
    loadings, trace = np.zeros((len(every), factors + every.shape[1])), np.full(len(every), unrated_spread)
    loadings[:, factors:] = every
    loadings[known, :factors], trace[known] = learned, spread.sum(1)
    return loadings, trace


def _inverse(matrices: Floats) -> Floats:
    """Inverts positive definite matrices, shape (matrices, width, width); by Cholesky, in a third of the time of LU."""
    inverse: Floats = torch.cholesky_inverse(torch.linalg.cholesky(torch.from_numpy(matrices))).numpy()
    return inverse


def fit_processes(
    interactions: Interactions, users: Codes, features: Features, *options: Mapping[str, Any], seed: int
) -> list[GaussianProcess]:
    """Fits Gaussian processes on features, one for each of the `options`, which are `fit_gp`'s."""
    smooth = None if features.unrated is None else partial(features.smoothed, seed=seed)
    centre = partial(centre_ratings, interactions, users, features.blocks, smooth=smooth, seed=seed)
    dampings = [one.get("mean_damping", _MEAN_DAMPING) for one in options]
    made = {damping: centre(mean_damping=damping) for damping in sorted(set(dampings))}
    return [
        fit_gp(
            interactions,
            users,
            features.blocks,
            seed=seed,
            centred=made[damping],
            principal=features.principal,
            **one,
        )
        for one, damping in zip(options, dampings, strict=True)
    ]


def fit_process(
    interactions: Interactions, users: Codes, features: Features, *, seed: int, **options: Any
) -> GaussianProcess:
    """Fits one Gaussian process on features; `options` are `fit_gp`'s."""
    return fit_processes(interactions, users, features, options, seed=seed)[0]
