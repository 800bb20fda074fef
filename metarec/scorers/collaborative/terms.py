"""The score terms without a language model: item means, and the difference of the stack's prediction to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metarec.data.interactions import Codes, Ratings, Values
from metarec.scorers.collaborative.gp import GaussianProcess, WeightPosterior
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.side_effects import SideEffects, no_effects
from metarec.scorers.collaborative.stack import Stacked
from metarec.scorers.term import AddedItems, CrossFitted, ScoreTerm, TermContext, same_without_each
from metarec.system.threads import one_thread


@dataclass(frozen=True)
class ItemMeanTerm:
    """An item's shrunk mean rating."""

    prior: ItemPrior

    def values(self, supports: Sequence[Ratings], items: Sequence[Codes]) -> list[Values]:
        """See `Term.values`."""
        return [self.prior.values(codes) for codes in items]

    def leave_one_out(self, supports: Sequence[Ratings]) -> list[Values]:
        """See `Term.leave_one_out`; the item means were fitted without the users' ratings."""
        return [self.prior.values(support.items) for support in supports]

    def without_each(self, support: Ratings, items: Codes) -> tuple[Values, Values]:
        """See `LeavesOut.without_each`."""
        return same_without_each(self, support, items)

    def extended(self, added: AddedItems) -> ItemMeanTerm:
        """See `Term.extended`."""
        return ItemMeanTerm(added.prior)


@dataclass(frozen=True)
class CollaborativeTerm:
    """The stack's prediction minus the item mean; 0 for a stack without members.

    Args:
        stack: The collaborative predictors.
        side: The effects of side information, which the stack's ratings lack; None where there are none.
    """

    stack: Stacked
    side: SideEffects | None = None

    @one_thread(scipy=False)
    def values(self, supports: Sequence[Ratings], items: Sequence[Codes]) -> list[Values]:
        """See `Term.values`."""
        return [
            self.stack.posterior_mean(self._bare(support), codes) - self.stack.prior.values(codes)
            for support, codes in zip(supports, items, strict=True)
        ]

    @one_thread(scipy=False)
    def leave_one_out(self, supports: Sequence[Ratings]) -> list[Values]:
        """See `Term.leave_one_out`."""
        return [
            self.stack.leave_one_out(self._bare(support)) - self.stack.prior.values(support.items)
            for support in supports
        ]

    @property
    def process(self) -> GaussianProcess | None:
        """The stack's first member, where there is one and it is a Gaussian process."""
        first = next(iter(self.stack.members), None)
        return first if isinstance(first, GaussianProcess) else None

    @one_thread(scipy=False)
    def weight_posterior(self, support: Ratings) -> WeightPosterior:
        """Returns what `process` believes of a user's weights.

        Raises:
            ValueError: There is no process.
        """
        if self.process is None:
            raise ValueError("the stack has no Gaussian process")
        return self.process.weight_posterior(self._bare(support))

    @one_thread(scipy=False)
    def without_each(self, support: Ratings, items: Codes) -> tuple[Values, Values]:
        """See `LeavesOut.without_each`."""
        rated, asked = self.stack.without_each(self._bare(support), items)
        prior = self.stack.prior.values
        return (rated - prior(support.items)).astype(np.float32), (asked - prior(items)).astype(np.float32)

    def _bare(self, support: Ratings) -> Ratings:
        """Returns a support whose ratings lack the effects of side information."""
        return support if self.side is None else self.side.without(support, self.stack.prior.scale)

    def extended(self, added: AddedItems) -> CollaborativeTerm:
        """See `Term.extended`."""
        side = None if self.side is None else self.side.extended(len(added.catalog))
        return CollaborativeTerm(self.stack.extended(added.prior), side)


@dataclass(frozen=True)
class SideTerm:
    """What is known of a user and of the moment, times what is known of an item; 0 where nothing is known.

    Args:
        effects: The effects.
    """

    effects: SideEffects

    def values(self, supports: Sequence[Ratings], items: Sequence[Codes]) -> list[Values]:
        """See `Term.values`."""
        return [self.effects.asked(support.side, codes) for support, codes in zip(supports, items, strict=True)]

    def leave_one_out(self, supports: Sequence[Ratings]) -> list[Values]:
        """See `Term.leave_one_out`; the effects were fitted without the users' ratings."""
        return [self.effects.rated(support) for support in supports]

    def without_each(self, support: Ratings, items: Codes) -> tuple[Values, Values]:
        """See `LeavesOut.without_each`."""
        return same_without_each(self, support, items)

    def extended(self, added: AddedItems) -> SideTerm:
        """See `Term.extended`."""
        return SideTerm(self.effects.extended(len(added.catalog)))


def _fit_item_mean(context: TermContext) -> CrossFitted:
    fitted = context.stack
    folds = tuple(ItemMeanTerm(fold.prior) for fold in fitted.out_of_fold.folds)
    return CrossFitted(ItemMeanTerm(fitted.prior), folds, fitted.out_of_fold.fold)


def _fit_collaborative(context: TermContext) -> CrossFitted:
    fitted = context.stack
    side = context.side
    if side is None:
        folds = tuple(CollaborativeTerm(fold.stack) for fold in fitted.out_of_fold.folds)
        return CrossFitted(CollaborativeTerm(fitted.stack), folds, fitted.out_of_fold.fold)
    parts = zip(fitted.out_of_fold.folds, side.folds, strict=True)
    crossed = tuple(CollaborativeTerm(fold.stack, effects) for fold, effects in parts)
    return CrossFitted(CollaborativeTerm(fitted.stack, side.whole), crossed, fitted.out_of_fold.fold)


def _fit_side(context: TermContext) -> CrossFitted:
    side = context.side
    if side is None:
        return CrossFitted(SideTerm(no_effects(len(context.interactions.catalog))))
    return CrossFitted(SideTerm(side.whole), tuple(map(SideTerm, side.folds)), side.fold)


ITEM_MEAN = ScoreTerm(_fit_item_mean, adapted=True)
COLLABORATIVE = ScoreTerm(_fit_collaborative)
SIDE = ScoreTerm(_fit_side)
