"""The score terms without a language model: item means, and the difference of the stack's prediction to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metarec.data.interactions import Codes, Ratings, Values
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.stack import Stacked
from metarec.scorers.term import AddedItems, CrossFitted, ScoreTerm, TermContext
from metarec.threads import one_thread


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

    def extended(self, added: AddedItems) -> ItemMeanTerm:
        """See `Term.extended`."""
        return ItemMeanTerm(added.prior)


@dataclass(frozen=True)
class CollaborativeTerm:
    """The stack's prediction minus the item mean; 0 for a stack without members.

    Args:
        stack: The collaborative predictors.
    """

    stack: Stacked

    @one_thread(scipy=False)
    def values(self, supports: Sequence[Ratings], items: Sequence[Codes]) -> list[Values]:
        """See `Term.values`."""
        return [
            self.stack.posterior_mean(support, codes) - self.stack.prior.values(codes)
            for support, codes in zip(supports, items, strict=True)
        ]

    @one_thread(scipy=False)
    def leave_one_out(self, supports: Sequence[Ratings]) -> list[Values]:
        """See `Term.leave_one_out`."""
        return [self.stack.leave_one_out(support) - self.stack.prior.values(support.items) for support in supports]

    def extended(self, added: AddedItems) -> CollaborativeTerm:
        """See `Term.extended`."""
        return CollaborativeTerm(self.stack.extended(added.prior))


def _fit_item_mean(context: TermContext) -> CrossFitted:
    fitted = context.stack
    folds = tuple(ItemMeanTerm(fold.prior) for fold in fitted.out_of_fold.folds)
    return CrossFitted(ItemMeanTerm(fitted.prior), folds, fitted.out_of_fold.fold)


def _fit_collaborative(context: TermContext) -> CrossFitted:
    fitted = context.stack
    folds = tuple(CollaborativeTerm(fold.stack) for fold in fitted.out_of_fold.folds)
    return CrossFitted(CollaborativeTerm(fitted.stack), folds, fitted.out_of_fold.fold)


ITEM_MEAN = ScoreTerm(_fit_item_mean, adapted=True)
COLLABORATIVE = ScoreTerm(_fit_collaborative)
