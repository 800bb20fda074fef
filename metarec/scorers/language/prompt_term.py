"""The score term of the frozen language model's answer about an item, the same for every user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metarec.data.interactions import Codes, Ratings, Values
from metarec.lm.answer_model import AnswerModel
from metarec.scorers.term import AddedItems, CrossFitted, ScoreTerm, TermContext, same_without_each


@dataclass(frozen=True)
class PromptTerm:
    """The frozen model's log-odds of the positive answer, minus their mean over a sample of the training catalog."""

    answer_model: AnswerModel

    def values(self, supports: Sequence[Ratings], items: Sequence[Codes]) -> list[Values]:
        """See `Term.values`."""
        return [self._centred(codes) for codes in items]

    def leave_one_out(self, supports: Sequence[Ratings]) -> list[Values]:
        """See `Term.leave_one_out`."""
        return [self._centred(support.items) for support in supports]

    def without_each(self, support: Ratings, items: Codes) -> tuple[Values, Values]:
        """See `LeavesOut.without_each`."""
        return same_without_each(self, support, items)

    def _centred(self, codes: Codes) -> Values:
        values: Values = (self.answer_model.frozen_log_odds(codes) - self.answer_model.frozen_mean).cpu().numpy()
        return values

    def extended(self, added: AddedItems) -> PromptTerm:
        """See `Term.extended`."""
        return PromptTerm(added.answer_model)


def _fit(context: TermContext) -> CrossFitted:
    return CrossFitted(PromptTerm(context.answer_model))


PROMPT = ScoreTerm(_fit, start=0.0, needs_model=True)
