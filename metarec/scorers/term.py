"""Terms of the score, which is a weighted sum of them.

A term maps supports and items to numbers. The outer loop learns its weight. A term that is fitted on meta-training
users is cross-fitted: its values for one of these users come from a fit without that user. A term is one `ScoreTerm`
and one name in `metarec.registries.TERMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from metarec.data.interactions import Catalog, Codes, Flags, Interactions, Ratings, Values
from metarec.data.templates import PromptTemplate
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.side_fitting import FittedSide
from metarec.scorers.collaborative.stack import FittedStack

# The term whose values depend on a user's adapter; see `metarec.scorers.language.score`.
ADAPTER_TERM = "adapter"


@dataclass(frozen=True)
class AddedItems:
    """A catalog that has grown since training, the new items last.

    Args:
        catalog: All items.
        prior: The item means of all items.
        answer_model: The language model over all items; None where no term uses one.
    """

    catalog: Catalog
    prior: ItemPrior
    answer_model: Any


class Term(Protocol):
    """One part of a score, in standard deviations of the rating."""

    def values(self, supports: Sequence[Ratings], items: Sequence[Codes]) -> list[Values]:
        """Returns each user's value of each queried item.

        Args:
            supports: Each user's ratings; may be empty.
            items: Item codes, one array per user.

        Returns:
            One array per user, of the shape of its items.
        """
        ...

    def leave_one_out(self, supports: Sequence[Ratings]) -> list[Values]:
        """Returns each user's value of each rated item, computed without that rating."""
        ...

    def extended(self, added: AddedItems) -> Term:
        """Returns the term for a catalog that has grown; values of the old items do not change."""
        ...


@runtime_checkable
class LeavesOut(Protocol):
    """A term that has its values without each rating of a support in closed form; others are computed one by one."""

    def without_each(self, support: Ratings, items: Codes) -> tuple[Values, Values]:
        """Returns the values without each rating in turn, and with all.

        Args:
            support: One user's ratings, one at least.
            items: The queried items.

        Returns:
            What `Term.leave_one_out` says of the ratings that are left, shape (ratings + 1, ratings), anything at the
            one that is left out; what `Term.values` says of the items, shape (ratings + 1, items). The last rows are
            with all ratings.
        """
        ...


def same_without_each(term: Term, support: Ratings, items: Codes) -> tuple[Values, Values]:
    """Returns what `LeavesOut.without_each` does for a term whose values do not depend on what was rated."""
    rated, asked = term.leave_one_out([support])[0], term.values([support], [items])[0]
    rows = len(support) + 1
    return np.broadcast_to(rated, (rows, len(rated))), np.broadcast_to(asked, (rows, len(asked)))


@dataclass(frozen=True)
class ItemValues:
    """A term that does not depend on the user; items added later get 0.

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

    def without_each(self, support: Ratings, items: Codes) -> tuple[Values, Values]:
        """See `LeavesOut.without_each`."""
        return same_without_each(self, support, items)

    def extended(self, added: AddedItems) -> ItemValues:
        """See `Term.extended`."""
        new = np.zeros(len(added.catalog) - len(self.table), self.table.dtype)
        return replace(self, table=np.concatenate([self.table, new]))


@dataclass(frozen=True)
class CrossFitted:
    """A term for new users, and one fitted without each fold of the meta-training users.

    Args:
        term: Fitted on all meta-training users, for new users.
        folds: Fitted without each fold; none where the term is not fitted on users.
        fold: The fold of each meta-training user, by user id.
    """

    term: Term
    folds: tuple[Term, ...] = ()
    fold: Mapping[str, int] = field(default_factory=dict)

    def without(self, user: str) -> Term:
        """Returns the term that was fitted without a meta-training user."""
        return self.folds[self.fold[user]] if self.folds else self.term


@dataclass(frozen=True)
class TermContext:
    """The inputs of fitting a term.

    Args:
        interactions: The dataset; only the ratings of `users` may be used.
        users: Codes of the meta-training users.
        threshold: Ratings from here on are likes, see `Ratings.likes`.
        seed: Seed of all random numbers.
        score: Names of all terms of the score.
        stack: Item means and collaborative predictors, fitted on all meta-training users and without each fold of them.
        answer_model: The language model over the catalog; None where the score has none.
        side: The effects of side information, in the same folds; None where the data have none. The stack's ratings
            lack them.
        template: The task's prompt.
        history_limit: How many of a user's ratings a prompt shows at most.
    """

    interactions: Interactions
    users: Codes
    threshold: float
    seed: int
    score: tuple[str, ...]
    stack: FittedStack
    answer_model: Any = None
    side: FittedSide | None = None
    template: PromptTemplate | None = None
    history_limit: int = 8

    @property
    def hidden(self) -> Callable[[str], Flags] | None:
        """Returns the items hidden from a user id's fold, shape (items,); None where no fold hides items."""
        folds = self.stack.out_of_fold
        return (lambda user: folds.without(user).hidden) if any(fold.hidden.any() for fold in folds.folds) else None


@dataclass(frozen=True)
class ScoreTerm:
    """How a term is fitted and used.

    Args:
        fit: Fits it; None for the adapter, whose values depend on a user's state.
        start: Its weight before meta-training.
        adapted: Whether the inner loop moves its weight for each user.
        needs_model: Whether it uses the language model.
        reads_person: Whether the language model reads every item again for every user, so that no catalog is gone
            through for one of them.
        classes: Classes of the fitted term and its parts, where `metarec.scorers.serialization` does not list them.
    """

    fit: Callable[[TermContext], CrossFitted] | None
    start: float = 1.0
    adapted: bool = False
    needs_model: bool = False
    reads_person: bool = False
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
