"""Residuals of ratings from the item prior, which the fold-in methods are fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from metarec.data.interactions import Codes, Interactions, Ratings
from metarec.scorers.collaborative.item_mean import ItemPrior

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Residuals:
    """Meta-training ratings minus the item prior, one entry per rating, in the prior's units.

    Args:
        user: Row of the rating's user among the meta-training users, shape (ratings,).
        item: Item code, shape (ratings,).
        value: Residual, shape (ratings,).
        shape: Number of meta-training users, number of items.
    """

    user: Codes
    item: Codes
    value: Floats
    shape: tuple[int, int]

    def centred(self, damping: float) -> Residuals:
        """Returns the residuals around each user's bias, see `user_bias`."""
        count = np.bincount(self.user, minlength=self.shape[0])
        bias = np.bincount(self.user, self.value, self.shape[0]) / (count + damping)
        return Residuals(self.user, self.item, self.value - bias[self.user], self.shape)

    @property
    def count(self) -> Codes:
        """Number of residuals of each item, shape (items,)."""
        return np.bincount(self.item, minlength=self.shape[1]).astype(np.int64)

    def of_items(self, items: Codes) -> Residuals:
        """Returns the residuals of a catalog of these items alone.

        Args:
            items: Item codes, ascending; every item that has a residual is among them.
        """
        return Residuals(self.user, np.searchsorted(items, self.item), self.value, (self.shape[0], len(items)))

    def matrix(self) -> csr_array:
        """Returns the residuals as a sparse matrix, shape (users, items)."""
        from scipy.sparse import csr_array

        return csr_array((self.value, (self.user, self.item)), self.shape)


def training_residuals(interactions: Interactions, users: Codes, prior: ItemPrior) -> Residuals:
    """Returns the residuals of the meta-training users, each from the prior without that rating.

    Args:
        interactions: The dataset.
        users: The meta-training users that `prior` was fitted on; only their ratings are used.
        prior: The item prior.
    """
    kept = np.isin(interactions.user, users)
    own = Ratings(interactions.item[kept], interactions.rating[kept])
    value = prior.standardize(own.values).astype(np.float64) - prior.values_without(own)
    rows = np.searchsorted(np.sort(users), interactions.user[kept])
    return Residuals(rows, own.items, value, (len(users), len(interactions.catalog)))


def support_residuals(prior: ItemPrior, support: Ratings) -> Floats:
    """Returns a new user's ratings minus the item prior, shape (ratings,)."""
    return prior.standardize(support.values).astype(np.float64) - prior.values(support.items)


def user_bias(residuals: Floats, damping: float) -> float:
    """Returns a user's bias: the mean residual, shrunk as if there were `damping` more residuals of 0."""
    return float(residuals.sum() / (len(residuals) + damping)) if len(residuals) else 0.0


def centred_residuals(prior: ItemPrior, support: Ratings, damping: float) -> Floats:
    """Returns a new user's residuals around the user's bias, see `user_bias`."""
    residuals = support_residuals(prior, support)
    return residuals - user_bias(residuals, damping)


def solved_without_each(inverse: NDArray[np.floating], right: Floats) -> Floats:
    """Solves a symmetric system without each of its equations in turn, and with all.

    Args:
        inverse: The whole system's inverse, shape (equations, equations).
        right: Right sides, shape (equations + 1, equations), the last one of the whole system.

    Returns:
        Shape (equations + 1, equations); 0 where the equation is left out.

    Source: the inverse of a block, as in Rasmussen and Williams 2006, eq. A.12.
    """
    kept = right.copy()
    np.fill_diagonal(kept, 0.0)
    found: Floats = np.asarray(kept @ inverse, np.float64)
    found[:-1] -= inverse * (np.diag(found) / np.diag(inverse))[:, None]
    np.fill_diagonal(found, 0.0)
    return found
