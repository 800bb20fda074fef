"""A user's ratings as a Gaussian process over items: posterior and leave-one-out predictions in closed form.

A rating is the item's mean, plus the user's bias, plus the product of the user's weights with the item's features and
with factors that are learned with their uncertainty, plus noise. A new user's weights are the posterior given the
support, by one small linear system. How it is learned: `metarec.scorers.collaborative.gp_fitting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from metarec.data.interactions import Codes, Ratings, Values
from metarec.scorer import Request, score_each
from metarec.scorers.collaborative.item_mean import taken
from metarec.scorers.collaborative.residuals import Floats, solved_without_each


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
