"""Gaussian process regression of a user's ratings, with a covariance of items learned from the meta-training users.

A rating is the item's mean, plus the user's bias, plus the product of the user's weights with the item's features and
with factors that are learned with their uncertainty, plus noise. A new user's weights are the posterior given the
support, in closed form by one small linear system. All variances are learned by empirical Bayes or are settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarec.data.interactions import Codes, Interactions, Ratings, Values
from metarec.scorer import Request, score_each
from metarec.scorers.collaborative.features import Features, all_components
from metarec.scorers.collaborative.item_mean import ItemPrior, fit_item_mean, smooth_by_text, taken
from metarec.scorers.collaborative.residuals import Floats, Residuals, solved_without_each
from metarec.system.threads import one_thread

_MEAN_DAMPING = 4.0
_BIAS_SWEEPS = 6
_BIAS_DAMPING = 3.0
_SPREAD_DAMPING = 5.0
_FIRST_VARIANCE = 0.05


@dataclass(frozen=True)
class WeightPosterior:
    """What is believed of a user's weights, which are normal.

    Args:
        mean: Shape (loadings,).
        covariance: Shape (loadings, loadings).
    """

    mean: Floats
    covariance: Floats


@dataclass(frozen=True)
class GaussianProcess:
    """A Gaussian process over items whose kernel is the inner product of their loadings.

    Args:
        mean_rating: Global mean rating.
        scale: Standard deviation of ratings; everything else is in its units around `mean_rating`.
        mean: Expected rating of each item by an unknown user, shape (items,).
        loadings: Each item's loadings, the last one constant for the user bias, shape (items, loadings).
        noise: Variance of a rating around its prediction: the noise and the loadings' uncertainty, shape (items,).
        centre: The loadings of an average rating, shape (loadings,).
        selection_effect: How far having rated an item, whatever the rating, moves the user's weights towards the item's
            loadings, shape (loadings,).
        selection_damping: Damping: pseudo-ratings that shrink the selection effect to 0.
        name: How the method is called in tables.
    """

    mean_rating: float
    scale: float
    mean: Floats
    loadings: Floats
    noise: Floats
    centre: Floats
    selection_effect: Floats
    selection_damping: float
    name: str = "GP"

    @property
    def bytes_per_user(self) -> int:
        """The posterior mean of the user's weights in float32."""
        return 4 * int(self.loadings.shape[1])

    def user_weights(self, support: Ratings) -> Floats:
        """Returns the posterior mean of a user's weights, shape (loadings,)."""
        if len(support) == 0:
            return np.zeros(self.loadings.shape[1])
        rated = self.loadings[support.items]
        expected, residual, covariance = self._conditions(support)
        posterior: Floats = expected + rated.T @ np.linalg.solve(covariance, residual)
        return posterior

    def weight_posterior(self, support: Ratings) -> WeightPosterior:
        """Returns mean and covariance of a user's weights; without ratings they are standard normal.

        Source: Rasmussen and Williams 2006, eqs. 2.23 and 2.24, for the weights of a linear kernel.
        """
        rated, unit = self.loadings[support.items], np.eye(self.loadings.shape[1])
        if len(support) == 0:
            return WeightPosterior(np.zeros(len(unit)), unit)
        covariance = rated @ rated.T + np.diag(self.noise[support.items])
        return WeightPosterior(self.user_weights(support), unit - rated.T @ np.linalg.solve(covariance, rated))

    def _conditions(self, support: Ratings) -> tuple[Floats, Floats, Floats]:
        """Returns the weights' prior mean, the ratings' residuals from its prediction, and the ratings' covariance.

        The prior mean depends on which items were rated, not on the ratings: that is the selection effect.
        """
        rated, count = self.loadings[support.items], len(support)
        expected = self.selection_effect * (rated.mean(0) - self.centre) * count / (count + self.selection_damping)
        residual = self._standardize(support) - self.mean[support.items] - rated @ expected
        return expected, residual, rated @ rated.T + np.diag(self.noise[support.items])

    def _standardize(self, support: Ratings) -> Floats:
        return (support.values.astype(np.float64) - self.mean_rating) / self.scale

    def posterior_mean(self, support: Ratings, candidates: Codes) -> Values:
        """Predicts ratings in the units of `ItemPrior`, the user bias included.

        Args:
            support: What is known of the user; may be empty.
            candidates: Item codes, shape (candidates,).

        Returns:
            Expected ratings, shape (candidates,).
        """
        values = taken(self.mean, candidates) + taken(self.loadings, candidates) @ self.user_weights(support)
        return values.astype(np.float32)

    def leave_one_out(self, support: Ratings) -> Values:
        """Predicts each rating of a support from the others, in the units of `ItemPrior`, shape (ratings,).

        Source: Rasmussen and Williams 2006, eq. 5.12.
        """
        if len(support) == 0:
            return np.zeros(0, np.float32)
        _, residual, covariance = self._conditions(support)
        inverse = np.linalg.inv(covariance)
        predicted: Values = (self._standardize(support) - inverse @ residual / np.diag(inverse)).astype(np.float32)
        return predicted

    def without_each(self, support: Ratings, candidates: Codes) -> tuple[Floats, Floats]:
        """Predicts ratings without each rating of a support in turn, and with all, by one inverse.

        Args:
            support: What is known of the user, one rating at least.
            candidates: Item codes, shape (candidates,).

        Returns:
            Every rating predicted from the others that are left, shape (ratings + 1, ratings), 0 for the one that is
            left out; the candidates' expected ratings, shape (ratings + 1, candidates). The last rows are with all.
        """
        rated, count = self.loadings[support.items], len(support)
        left = np.full((count + 1, 1), count - 1.0)
        left[-1] = count
        sums = np.vstack([rated.sum(0) - rated, rated.sum(0)])
        mean = sums / np.maximum(left, 1)
        expected = self.selection_effect * (mean - self.centre) * left / (left + self.selection_damping)
        expected[left[:, 0] == 0] = 0
        given = self._standardize(support)
        inverse = np.linalg.inv(rated @ rated.T + np.diag(self.noise[support.items]))
        dual = solved_without_each(inverse, given - self.mean[support.items] - expected @ rated.T)
        diagonal = np.vstack([np.diag(inverse) - inverse**2 / np.diag(inverse)[:, None], np.diag(inverse)])
        np.fill_diagonal(diagonal, 1.0)
        predicted = given - dual / diagonal
        np.fill_diagonal(predicted, 0.0)
        weights = expected + dual @ rated
        return predicted, self.mean[candidates] + weights @ self.loadings[candidates].T

    def with_zero_mean(self) -> GaussianProcess:
        """Returns the process with every item's mean set to 0."""
        return replace(self, mean=np.zeros_like(self.mean))

    def extended(self, mean: Values) -> GaussianProcess:
        """Returns the process with new items, whose loadings are 0.

        Args:
            mean: Expected rating of each new item by an unknown user, shape (new items,).
        """
        zeros = np.zeros((len(mean), self.loadings.shape[1]))
        noise = np.full(len(mean), self.noise.max())
        return replace(
            self,
            mean=np.concatenate([self.mean, mean]),
            loadings=np.concatenate([self.loadings, zeros]),
            noise=np.concatenate([self.noise, noise]),
        )

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_each(
            requests, len(self.mean), lambda request: self.posterior_mean(request.support, request.candidates)
        )


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
