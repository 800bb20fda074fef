"""Methods that represent an item by a vector of its text: ridge, logistic regression, two-tower cosine.

The vectors come from a sentence encoder or are a language model's states. Each user's regression is solved over the
support alone, in closed form or by Newton's method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metarec.data.interactions import Codes, Interactions, Ratings
from metarec.scorer import Request, ScoreArray, score_each
from metarec.scorers.collaborative.item_mean import ItemPrior, taken
from metarec.scorers.collaborative.residuals import Floats, solved_without_each, support_residuals, user_bias

_NEWTON_STEPS = 30


def unit_vectors(vectors: Floats) -> Floats:
    """Returns vectors around their mean, scaled to length one; a vector that equals the mean becomes zero."""
    centred = vectors - vectors.mean(0)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    unit: Floats = np.divide(centred, length, out=np.zeros_like(centred), where=length > 1e-9)
    return unit


@dataclass(frozen=True, kw_only=True)
class _OnVectors(ABC):
    """What every method here has: unit vectors of the items, and one vector of that width per user.

    Args:
        vectors: Unit vectors of the items, shape (items, features).
        name: How the method is called in tables.
    """

    vectors: Floats
    name: str

    @property
    def bytes_per_user(self) -> int:
        """The user's coefficients, or vector, in float32."""
        return 4 * int(self.vectors.shape[1])

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_each(requests, len(self.vectors), self._values)

    @abstractmethod
    def _values(self, request: Request) -> ScoreArray:
        """Returns the candidates' scores."""


@dataclass(frozen=True, kw_only=True)
class TextRidge(_OnVectors):
    """Ridge regression of the support's ratings on item vectors.

    Args:
        prior: The item prior.
        penalty: Ridge penalty.
        user_bias_damping: Damping: pseudo-ratings that shrink the user bias to 0.
        offset: Regresses the residuals from the prior and adds the prediction to it; otherwise the prior is not used.
    """

    prior: ItemPrior
    penalty: float
    user_bias_damping: float
    offset: bool

    def _values(self, request: Request) -> ScoreArray:
        support = request.support
        base = self.prior.values(request.candidates) * self.offset
        target = support_residuals(self.prior, support)
        if not self.offset:
            target = target + self.prior.values(support.items)
        rated = self.vectors[support.items]
        gram: Floats = rated @ rated.T + self.penalty * np.eye(len(support))
        dual = np.linalg.solve(gram, target - user_bias(target, self.user_bias_damping))
        return base + taken(self.vectors, request.candidates) @ (rated.T @ dual)

    def without_each(self, support: Ratings, candidates: Codes) -> Floats:
        """Scores items without each rating of a support in turn, and with all; see `GaussianProcess.without_each`.

        Returns:
            Shape (ratings + 1, candidates); the last row is with all.
        """
        base = self.prior.values(candidates) * self.offset
        target = support_residuals(self.prior, support)
        if not self.offset:
            target = target + self.prior.values(support.items)
        sums = np.append(target.sum() - target, target.sum())
        left = np.append(np.full(len(support), len(support) - 1.0), len(support))
        bias = np.divide(sums, left + self.user_bias_damping, out=np.zeros_like(sums), where=left > 0)
        rated = self.vectors[support.items]
        inverse = np.linalg.inv(rated @ rated.T + self.penalty * np.eye(len(support)))
        dual = solved_without_each(inverse, target - bias[:, None])
        scores: Floats = base + (dual @ rated) @ self.vectors[candidates].T
        return scores


def fit_text_ridge(
    prior: ItemPrior, vectors: Floats, *, offset: bool = True, penalty: float = 3.0, user_bias_damping: float = 2.0
) -> TextRidge:
    """Prepares a ridge regression per user.

    Args:
        prior: The item prior.
        vectors: A vector of each item's text, shape (items, features).
        offset: See `TextRidge`.
        penalty: Ridge penalty, for ratings in the prior's units.
        user_bias_damping: Damping: pseudo-ratings that shrink the user bias to 0.
    """
    name = "text ridge" if offset else "text ridge, no prior"
    return TextRidge(
        vectors=unit_vectors(vectors),
        name=name,
        prior=prior,
        penalty=penalty,
        user_bias_damping=user_bias_damping,
        offset=offset,
    )


@dataclass(frozen=True, kw_only=True)
class TextLogistic(_OnVectors):
    """Logistic regression of the support's likes on item vectors.

    Args:
        prior: The item prior.
        penalty: Ridge penalty of the coefficients.
        slope: Log-odds of a like per unit of the prior; 0 leaves the prior out.
        intercept: Log-odds of a like where the prior is zero.
        threshold: See `Ratings.likes`.
    """

    prior: ItemPrior
    penalty: float
    slope: float
    intercept: float
    threshold: float

    def _values(self, request: Request) -> ScoreArray:
        support = request.support
        rated = self.vectors[support.items]
        dual = logistic_dual(
            rated @ rated.T + 1.0,  # the added one is the user's intercept
            support.likes(self.threshold),
            self.slope * self.prior.values(support.items) + self.intercept,
            self.penalty,
        )
        contribution = self.vectors[request.candidates] @ (rated.T @ dual)
        return self.slope * self.prior.values(request.candidates) + contribution


def logistic_dual(kernel: Floats, liked: NDArray[np.bool_], offset: ScoreArray, penalty: float) -> Floats:
    """Fits logistic regression with a ridge penalty and an offset over few examples of many features.

    Args:
        kernel: Inner products of the examples' features, shape (examples, examples).
        liked: Truth, shape (examples,).
        offset: Log-odds without the regression, shape (examples,).
        penalty: Ridge penalty.

    Returns:
        Weight of every example in the coefficients, shape (examples,).

    Source: Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", algorithm 3.1.
    """
    from scipy.special import expit

    dual = np.zeros(len(kernel))
    kernel = kernel / penalty
    for _ in range(_NEWTON_STEPS):
        latent = kernel @ dual
        chance = expit(latent + offset)
        curvature = np.maximum(chance * (1 - chance), 1e-9)
        target = curvature * latent + liked - chance
        root = np.sqrt(curvature)
        inner = np.eye(len(kernel)) + root[:, None] * kernel * root
        moved = target - root * np.linalg.solve(inner, root * (kernel @ target))
        # Half a step where Newton's step is large; the objective is convex, so it still converges.
        dual, before = (moved if np.abs(kernel @ (moved - dual)).max(initial=0) < 5 else (moved + dual) / 2), dual
        if np.abs(dual - before).max(initial=0) < 1e-9:
            break
    return dual / penalty


def fit_text_logistic(
    interactions: Interactions,
    users: Codes,
    prior: ItemPrior,
    vectors: Floats,
    *,
    threshold: float,
    offset: bool = True,
    penalty: float = 3.0,
) -> TextLogistic:
    """Prepares a logistic regression per user; with the prior as offset, fits the prior's slope.

    Args:
        interactions: The dataset.
        users: The meta-training users that `prior` was fitted on.
        prior: The item prior.
        vectors: A vector of each item's text, shape (items, features).
        threshold: See `Ratings.likes`.
        offset: Uses the prior as offset; otherwise the prior is not used.
        penalty: Ridge penalty of the coefficients.
    """
    slope = intercept = 0.0
    if offset:
        from sklearn.linear_model import LogisticRegression

        kept = np.isin(interactions.user, users)
        own = Ratings(interactions.item[kept], interactions.rating[kept])
        model = LogisticRegression(C=1e6).fit(prior.values_without(own)[:, None], interactions.likes(threshold)[kept])
        slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    name = "text logistic" if offset else "text logistic, no prior"
    return TextLogistic(
        vectors=unit_vectors(vectors),
        name=name,
        prior=prior,
        penalty=penalty,
        slope=slope,
        intercept=intercept,
        threshold=threshold,
    )


@dataclass(frozen=True, kw_only=True)
class TwoTower(_OnVectors):
    """Scores by the cosine of an item's vector and the user's: the mean of liked items minus the mean of the others.

    All scores are 0 without a support, or if the user's vector is zero.

    Args:
        threshold: See `Ratings.likes`.
    """

    threshold: float

    def _values(self, request: Request) -> ScoreArray:
        liked = request.support.likes(self.threshold)
        user = np.zeros(self.vectors.shape[1])
        for side, sign in ((liked, 1.0), (~liked, -1.0)):
            if side.any():
                user += sign * self.vectors[request.support.items[side]].mean(0)
        length = np.linalg.norm(user)
        return self.vectors[request.candidates] @ (user / length if length > 1e-9 else user)


def fit_two_tower(vectors: Floats, *, threshold: float, name: str = "two-tower cosine") -> TwoTower:
    """Prepares the item vectors.

    Args:
        vectors: A vector of each item's text, shape (items, features).
        threshold: See `Ratings.likes`.
        name: How the method is called in tables.
    """
    return TwoTower(vectors=unit_vectors(vectors), name=name, threshold=threshold)
