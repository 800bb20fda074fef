"""Collaborative filtering that folds a new user in by closed form: ALS, EASE, item-kNN and user-kNN.

Each is fitted to the residuals of the meta-training users' ratings from the item prior. A score is the prior plus a
prediction from the residuals of the user's support; without a support it is the prior.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from metarec.data.interactions import Codes, Interactions
from metarec.errors import DataError
from metarec.scorer import Request, ScoreArray, score_each
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.residuals import Floats, centred_residuals, training_residuals

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True, kw_only=True)
class _FoldIn(ABC):
    """Scores by the prior plus what a method makes of the residuals of the user's support.

    Args:
        prior: The item prior.
        user_bias_damping: Damping: pseudo-ratings that shrink the user bias to 0.
    """

    prior: ItemPrior
    user_bias_damping: float

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_each(requests, len(self.prior.count), self._values)

    def _values(self, request: Request) -> ScoreArray:
        prior = self.prior.values(request.candidates)
        if len(request.support) == 0:
            return prior
        residual = centred_residuals(self.prior, request.support, self.user_bias_damping)
        return prior + self._contribution(residual, request.support.items, request.candidates)

    @abstractmethod
    def _contribution(self, residual: Floats, rated: Codes, candidates: Codes) -> Floats:
        """Returns what the residuals of the rated items add to each candidate's prior, shape (candidates,)."""


@dataclass(frozen=True, kw_only=True)
class ALS(_FoldIn):
    """Matrix factorization of residuals; a new user's factors are a ridge regression on the support.

    Args:
        factors: Item factors, shape (items, factors).
        penalty: Ridge penalty of the user's factors.
        penalty_per_rating: What every rating of the support adds to the penalty.
        name: How the method is called in tables.
    """

    factors: Floats
    penalty: float
    penalty_per_rating: float = 0.0
    name: str = "ALS"

    @property
    def bytes_per_user(self) -> int:
        """The user's factors in float32."""
        return 4 * int(self.factors.shape[1])

    def _contribution(self, residual: Floats, rated: Codes, candidates: Codes) -> Floats:
        known = self.factors[rated]
        penalty = self.penalty + self.penalty_per_rating * len(residual)
        user_factors = np.linalg.solve(known.T @ known + penalty * np.eye(known.shape[1]), known.T @ residual)
        contribution: Floats = self.factors[candidates] @ user_factors
        return contribution


def fit_als(
    interactions: Interactions,
    users: Codes,
    prior: ItemPrior,
    *,
    factors: int = 16,
    item_penalty: float = 10.0,
    user_penalty: float = 3.0,
    penalty_per_rating: float = 0.03,
    user_bias_damping: float = 2.0,
    sweeps: int = 8,
    seed: int = 0,
) -> ALS:
    """Fits item factors by alternating least squares.

    Args:
        interactions: The dataset.
        users: The meta-training users.
        prior: The item prior, fitted on the same users.
        factors: Number of factors.
        item_penalty: Ridge penalty of items' factors.
        user_penalty: Ridge penalty of users' factors.
        penalty_per_rating: What every rating of a user, or of an item, adds to its penalty: the factors on the other
            side are estimates, and each brings its own error. Without it, more ratings fit more of the errors.
        user_bias_damping: Damping: pseudo-ratings that shrink the user bias to 0.
        sweeps: Rounds of solving for users and items.
        seed: Seed of the first item factors.

    Source: Zhou et al. 2008, "Large-scale parallel collaborative filtering for the Netflix prize", section 3.1, whose
    penalty grows with the number of ratings; with a constant part beside it.
    """
    residuals = training_residuals(interactions, users, prior).centred(user_bias_damping)
    by_user = residuals.matrix()
    by_item = by_user.T.tocsr()
    item_factors = np.random.default_rng(seed).normal(scale=factors**-0.5, size=(residuals.shape[1], factors))
    for _ in range(sweeps):
        user_factors = _ridge(by_user, item_factors, user_penalty, penalty_per_rating)
        item_factors = _ridge(by_item, user_factors, item_penalty, penalty_per_rating)
    return ALS(
        prior=prior,
        user_bias_damping=user_bias_damping,
        factors=item_factors,
        penalty=user_penalty,
        penalty_per_rating=penalty_per_rating,
    )


def _ridge(ratings: csr_array, factors: Floats, penalty: float, penalty_per_rating: float) -> Floats:
    """Solves every row's ridge regression of its entries on the factors of their columns."""
    from scipy.sparse import csr_array

    size = factors.shape[1]
    squares = (factors[:, :, None] * factors[:, None]).reshape(len(factors), -1)
    rated = csr_array((np.ones_like(ratings.data), ratings.indices, ratings.indptr), ratings.shape)
    penalties = penalty + penalty_per_rating * np.diff(ratings.indptr)
    gram = (rated @ squares).reshape(-1, size, size) + penalties[:, None, None] * np.eye(size)
    solved: Floats = np.linalg.solve(gram, (ratings @ factors)[:, :, None])[:, :, 0]
    return solved


@dataclass(frozen=True, kw_only=True)
class EASE(_FoldIn):
    """A linear autoencoder of residuals over the items that have enough ratings.

    Args:
        weights: Weight of the row's residual in the column's score, over kept items, shape (kept, kept).
        place: Each item's row in `weights`, -1 where it is not kept, shape (items,).
        name: How the method is called in tables.
        bytes_per_user: 0, since only the ratings are kept.
    """

    weights: Floats
    place: Codes
    name: str = "EASE"
    bytes_per_user: int = 0

    def _contribution(self, residual: Floats, rated: Codes, candidates: Codes) -> Floats:
        rows, columns = self.place[rated], self.place[candidates]
        contribution = residual[rows >= 0] @ self.weights[rows[rows >= 0]][:, columns]
        return np.where(columns >= 0, contribution, 0.0)


def fit_ease(
    interactions: Interactions,
    users: Codes,
    prior: ItemPrior,
    *,
    min_ratings: int = 10,
    max_items: int = 4000,
    penalty: float = 30.0,
    user_bias_damping: float = 2.0,
) -> EASE:
    """Fits the item-item weights in closed form.

    Args:
        interactions: The dataset.
        users: The meta-training users.
        prior: The item prior, fitted on the same users.
        min_ratings: Items with fewer are scored by the prior alone.
        max_items: At most so many items are kept, those with most ratings; memory grows with its square.
        penalty: Ridge penalty.
        user_bias_damping: Damping: pseudo-ratings that shrink the user bias to 0.

    Raises:
        DataError: No item has `min_ratings` ratings.

    Source: Steck 2019, "Embarrassingly shallow autoencoders for sparse data", eq. 8, on residuals instead of clicks.
    """
    from scipy.sparse import csc_array

    residuals = training_residuals(interactions, users, prior).centred(user_bias_damping)
    count = residuals.count
    kept = np.flatnonzero(count >= min_ratings)
    kept = np.sort(kept[np.argsort(-count[kept], kind="stable")][:max_items])
    if not len(kept):
        raise DataError(f"no item has {min_ratings} ratings of meta-training users", "Lower min_ratings")
    rated = csc_array(residuals.matrix())[:, kept]
    inverse = np.linalg.inv((rated.T @ rated).toarray() + penalty * np.eye(len(kept)))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    place = np.full(len(count), -1, np.int64)
    place[kept] = np.arange(len(kept))
    return EASE(prior=prior, user_bias_damping=user_bias_damping, weights=weights.astype(np.float32), place=place)


@dataclass(frozen=True, kw_only=True)
class _Neighbours(_FoldIn):
    """What both neighbourhood methods have: residuals to compare, and damping.

    Args:
        ratings: Centred residuals, sparse.
        shrinkage: Damping: common raters or items of similarity 0 that shrink a similarity to 0.
        strength: Damping: total similarity that shrinks the score to the prior.
        bytes_per_user: 0, since only the ratings are kept.
    """

    ratings: csr_array
    shrinkage: float
    strength: float
    bytes_per_user: int = 0


@dataclass(frozen=True, kw_only=True)
class ItemKNN(_Neighbours):
    """Predicts a candidate's residual from those of rated items, weighted by similarity of the items' ratings.

    Its `ratings` have the shape (items, users).
    """

    name: str = "item-kNN"

    def _contribution(self, residual: Floats, rated: Codes, candidates: Codes) -> Floats:
        alike = similarity(self.ratings[candidates], self.ratings[rated], self.shrinkage)
        contribution: Floats = alike @ residual / (np.abs(alike).sum(1) + self.strength)
        return contribution


def fit_item_knn(
    interactions: Interactions,
    users: Codes,
    prior: ItemPrior,
    *,
    shrinkage: float = 100.0,
    strength: float = 1.0,
    user_bias_damping: float = 2.0,
) -> ItemKNN:
    """Prepares the ratings that item similarities are computed from; every rated item is a neighbour.

    Args:
        interactions: The dataset.
        users: The meta-training users.
        prior: The item prior, fitted on the same users.
        shrinkage: Damping: common raters of similarity 0 that shrink a similarity to 0.
        strength: Damping: total similarity that shrinks the score to the prior.
        user_bias_damping: Damping: pseudo-ratings that shrink the user bias to 0.

    Source: Koren 2010, "Factor in the neighbors", eq. 3 and 4.
    """
    residuals = training_residuals(interactions, users, prior).centred(user_bias_damping)
    return ItemKNN(
        prior=prior,
        user_bias_damping=user_bias_damping,
        ratings=residuals.matrix().T.tocsr(),
        shrinkage=shrinkage,
        strength=strength,
    )


def similarity(left: csr_array, right: csr_array, shrinkage: float) -> Floats:
    """Returns cosines over the columns that both rows have, shrunk by their number, shape (left rows, right rows)."""
    from scipy.sparse import csr_array

    def over(rows: csr_array, entries: Floats) -> csr_array:
        return csr_array((entries, rows.indices, rows.indptr), rows.shape)

    shown = [over(rows, np.ones_like(rows.data)) for rows in (left, right)]
    squares = [over(rows, rows.data**2) for rows in (left, right)]
    common = (shown[0] @ shown[1].T).toarray()
    norm = np.sqrt((squares[0] @ shown[1].T).toarray() * (shown[0] @ squares[1].T).toarray())
    cosine = np.divide((left @ right.T).toarray(), norm, out=np.zeros_like(norm), where=norm > 0)
    shrunk: Floats = cosine * common / (common + shrinkage)
    return shrunk


@dataclass(frozen=True, kw_only=True)
class UserKNN(_Neighbours):
    """Predicts a candidate's residual from those of meta-training users, weighted by similarity to the new user.

    Its `ratings` have the shape (users, items).

    Args:
        neighbours: Number of most similar users that are used.
    """

    name: str = "user-kNN"
    neighbours: int = 800

    def _contribution(self, residual: Floats, rated: Codes, candidates: Codes) -> Floats:
        from scipy.sparse import csr_array

        own_row = csr_array((residual, (np.zeros(len(rated), np.int64), rated)), (1, self.ratings.shape[1]))
        alike = np.maximum(similarity(own_row, self.ratings, self.shrinkage)[0], 0.0)
        nearest = np.argsort(-alike, kind="stable")[: self.neighbours]
        theirs = self.ratings[nearest][:, candidates].toarray()
        weight = alike[nearest]
        contribution: Floats = weight @ theirs / (weight @ (theirs != 0) + self.strength)
        return contribution


def fit_user_knn(
    interactions: Interactions,
    users: Codes,
    prior: ItemPrior,
    *,
    neighbours: int = 800,
    shrinkage: float = 60.0,
    strength: float = 1.0,
    user_bias_damping: float = 2.0,
) -> UserKNN:
    """Prepares the ratings that user similarities are computed from.

    Args:
        interactions: The dataset.
        users: The meta-training users.
        prior: The item prior, fitted on the same users.
        neighbours: Number of most similar users that are used.
        shrinkage: Damping: common items of similarity 0 that shrink a similarity to 0.
        strength: Damping: total similarity that shrinks the score to the prior.
        user_bias_damping: Damping: pseudo-ratings that shrink the user bias to 0.

    Source: Herlocker et al. 1999, "An algorithmic framework for performing collaborative filtering", sections 3 to 5.
    """
    residuals = training_residuals(interactions, users, prior).centred(user_bias_damping)
    return UserKNN(
        prior=prior,
        user_bias_damping=user_bias_damping,
        ratings=residuals.matrix(),
        shrinkage=shrinkage,
        strength=strength,
        neighbours=neighbours,
    )
