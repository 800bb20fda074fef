"""What ratings say beyond the item prior: the common ground of the methods that fold a user in.

Knows nothing of how a method turns residuals into scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from metarec.errors import UnknownItemError
from metarec.interactions import Codes, Interactions, Ratings
from metarec.priors import ItemPrior
from metarec.scorer import Request

Floats = NDArray[np.float64]
Scores = NDArray[np.floating]


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

    def centred(self, strength: float) -> Residuals:
        """Returns the residuals around each user's own level, see `level`."""
        count = np.bincount(self.user, minlength=self.shape[0])
        levels = np.bincount(self.user, self.value, self.shape[0]) / (count + strength)
        return Residuals(self.user, self.item, self.value - levels[self.user], self.shape)

    @property
    def count(self) -> Codes:
        """How many residuals each item has, shape (items,)."""
        return np.bincount(self.item, minlength=self.shape[1]).astype(np.int64)

    def matrix(self) -> csr_array:
        """Returns them as a sparse matrix, shape (users, items)."""
        return csr_array((self.value, (self.user, self.item)), self.shape)


def training_residuals(interactions: Interactions, users: Codes, prior: ItemPrior) -> Residuals:
    """Returns the residuals of the meta-training users, each against the prior without that very rating.

    Args:
        interactions: The dataset.
        users: The meta-training users that `prior` was fitted on; nobody else's ratings are looked at.
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


def level(residuals: Floats, strength: float) -> float:
    """Returns a user's own level: the mean residual, shrunk as if `strength` more had been zero."""
    return float(residuals.sum() / (len(residuals) + strength)) if len(residuals) else 0.0


def centred_residuals(prior: ItemPrior, support: Ratings, strength: float) -> Floats:
    """Returns a new user's residuals around their own level, see `level`."""
    residuals = support_residuals(prior, support)
    return residuals - level(residuals, strength)


def check_codes(requests: Sequence[Request], items: int) -> None:
    """Refuses requests that name a code outside the catalog.

    Args:
        requests: The requests.
        items: How many items the method knows.

    Raises:
        UnknownItemError: A candidate's or a support's code is negative or too large.
    """
    for request in requests:
        for where, codes in (("candidate", request.candidates), ("support", request.support.items)):
            unknown = codes[(codes < 0) | (codes >= items)]
            if len(unknown):
                raise UnknownItemError(
                    f"{where} item code {unknown[0]} is not one of the {items} items the method was fitted on",
                    "Fit again with the catalog that holds it",
                )


def score_each(requests: Sequence[Request], items: int, values: Callable[[Request], Scores]) -> list[Tensor]:
    """Scores requests one by one.

    Args:
        requests: The requests.
        items: How many items the method knows.
        values: Scores of one request's candidates.

    Raises:
        UnknownItemError: See `check_codes`.
    """
    check_codes(requests, items)
    return [torch.from_numpy(np.asarray(values(request), np.float32)) for request in requests]
