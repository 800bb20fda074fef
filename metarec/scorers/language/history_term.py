"""The score term of a language model that reads the user's ratings in its prompt, as fine-tuned ones do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from metarec.data.interactions import Codes, Ratings, Values
from metarec.lm.answer_model import AnswerModel
from metarec.scorer import Request
from metarec.scorers.language.in_context import History, InContext
from metarec.scorers.term import AddedItems, CrossFitted, ScoreTerm, TermContext


@dataclass(frozen=True)
class HistoryTerm:
    """The model's log-odds of the positive answer after the user's ratings as solved examples.

    Args:
        answer_model: The language model over the catalog, of which the model alone is used.
        history: Writes a user's ratings into the prompt.
    """

    answer_model: AnswerModel
    history: History

    def values(self, supports: Sequence[Ratings], items: Sequence[Codes]) -> list[Values]:
        """See `Term.values`."""
        return [self._values(support, codes) for support, codes in zip(supports, items, strict=True)]

    def leave_one_out(self, supports: Sequence[Ratings]) -> list[Values]:
        """See `Term.leave_one_out`; every rating has a prompt of its own, with the others as its history."""
        return [self._without_each(support) for support in supports]

    def _without_each(self, support: Ratings) -> Values:
        found = np.zeros(len(support), np.float32)
        for row in range(len(support)):
            others = support.rows(np.delete(np.arange(len(support)), row))
            if support.side is not None and others.side is not None:
                # The question is asked in the moment in which it was answered.
                moment = {name: column[row : row + 1] for name, column in support.side.rated.items()}
                others = replace(others, side=others.side.asking(moment))
            found[row] = self._values(others, support.items[row : row + 1])[0]
        return found

    @torch.no_grad()
    def _values(self, support: Ratings, items: Codes) -> Values:
        reader = InContext(self.answer_model.backbone, self.history)
        values: Values = reader.log_odds(Request("", support.unlabelled(), items)).float().cpu().numpy()
        return values

    def extended(self, added: AddedItems) -> HistoryTerm:
        """See `Term.extended`."""
        return HistoryTerm(added.answer_model, replace(self.history, catalog=added.catalog))


def _fit(context: TermContext) -> CrossFitted:
    assert context.template is not None
    catalog = context.interactions.catalog
    history = History(context.template, catalog, context.threshold, context.history_limit, context.seed)
    return CrossFitted(HistoryTerm(context.answer_model, history))


HISTORY = ScoreTerm(_fit, start=0.2, needs_model=True, reads_person=True, classes=(HistoryTerm,))
