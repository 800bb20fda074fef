"""Terms of the score: what is summed, each times a weight, to say how much a user will like an item.

A term gives numbers for supports and items and knows nothing of adapters. The outer loop learns its weight. A term that
learned from meta-training users is cross-fitted: each of these users sees it as a new user would, from a fit without
them. One term is one `ScoreTerm` and one name in `metarec.registries.TERMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from metarec.data.interactions import Catalog, Codes, Flags, Interactions, Ratings, Values
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.stack import FittedStack

# The name of the term whose values depend on a user's adapter; see `metarec.scorers.language.score`.
ADAPTER_TERM = "adapter"


@dataclass(frozen=True)
class AddedItems:
    """A catalog that has grown since training, the new items last.

    Args:
        catalog: All items.
        prior: The item means of all items.
        answer_model: The language model over all items; None where no term reads one.
    """

    catalog: Catalog
    prior: ItemPrior
    answer_model: Any


class Term(Protocol):
    """One part of a score, in standard deviations of the rating."""

    def values(self, supports: Sequence[Ratings], items: Sequence[Codes]) -> list[Values]:
        """Returns each user's value of each item that is asked about.

        Args:
            supports: What is known of each user; may be empty.
            items: Item codes, one array per user.

        Returns:
            One array per user, of the shape of its items.
        """
        ...

    def leave_one_out(self, supports: Sequence[Ratings]) -> list[Values]:
        """Returns each user's value of each rated item, as it is without that rating."""
        ...

    def extended(self, added: AddedItems) -> Term:
        """Returns the term for a catalog that has grown; values of the items that it knew do not change."""
        ...


@dataclass(frozen=True)
class ItemValues:
    """A term that gives an item the same value whoever asks; items added later get 0.

    Args:
        table: Value of every item, shape (items,).
    """

    table: Values

    def values(self, supports: Sequence[Ratings], items: Sequence[Codes]) -> list[Values]:
        """See `Term.values`."""
        return [self.table[codes] for codes in items]

    def leave_one_out(self, supports: Sequence[Ratings]) -> list[Values]:
        """See `Term.leave_one_out`."""
        return [self.table[support.items] for support in supports]

    def extended(self, added: AddedItems) -> ItemValues:
        """See `Term.extended`."""
        new = np.zeros(len(added.catalog) - len(self.table), self.table.dtype)
        return replace(self, table=np.concatenate([self.table, new]))


@dataclass(frozen=True)
class CrossFitted:
    """A term for new users, and for each meta-training user one that was fitted without them.

    Args:
        term: For users that no fit has seen.
        folds: Fits without each fold of the meta-training users; none where the term learned from nobody.
        fold: Which fold each meta-training user is in, by user id.
    """

    term: Term
    folds: tuple[Term, ...] = ()
    fold: Mapping[str, int] = field(default_factory=dict)

    def without(self, user: str) -> Term:
        """Returns the term as a meta-training user may see it."""
        return self.folds[self.fold[user]] if self.folds else self.term


@dataclass(frozen=True)
class TermContext:
    """What a term is fitted from.

    Args:
        interactions: The dataset; only the ratings of `users` may be looked at.
        users: Codes of the meta-training users.
        threshold: Ratings from here on are likes, see `Ratings.likes`.
        seed: Seed of everything a fit draws.
        score: Names of all terms of the score.
        stack: Item means and collaborative predictors, of all meta-training users and without each fold of them.
        answer_model: The language model over the catalog; None where the score reads none.
    """

    interactions: Interactions
    users: Codes
    threshold: float
    seed: int
    score: tuple[str, ...]
    stack: FittedStack
    answer_model: Any = None

    @property
    def hidden(self) -> Callable[[str], Flags] | None:
        """What says of a meta-training user which items their fold has not seen; None where all have been."""
        folds = self.stack.out_of_fold
        return (lambda user: folds.without(user).hidden) if any(fold.hidden.any() for fold in folds.folds) else None


@dataclass(frozen=True)
class ScoreTerm:
    """How a term comes about.

    Args:
        fit: Fits it; None for the adapter, whose values depend on a user's state.
        start: Its weight before meta-training.
        adapted: Whether the inner loop moves its weight for each user.
        needs_model: Whether it reads the language model.
        classes: Classes of the fitted term and its parts, where `metarec.scorers.serialization` does not list them.
    """

    fit: Callable[[TermContext], CrossFitted] | None
    start: float = 1.0
    adapted: bool = False
    needs_model: bool = False
    classes: tuple[type[Any], ...] = ()


def weight_name(term: str) -> str:
    """Returns the name of a term's weight among a state's tensors."""
    return f"score.{term}"


def weighted_sum(state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
    """Sums terms, each times its user's weight.

    Args:
        state: Tensors with a user dimension.
        values: Every term's values by its name, shape (users, items).

    Returns:
        Shape (users, items).
    """
    return torch.stack([state[weight_name(name)][:, None] * part for name, part in values.items()]).sum(0)
