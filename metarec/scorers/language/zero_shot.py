"""Methods that use the frozen language model's answer about an item and ignore the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metarec.data.interactions import Catalog
from metarec.data.templates import PromptTemplate, content_free
from metarec.lm.answer_model import AnswerModel
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.tokenized import tokenize_catalog
from metarec.scorer import Request, check_codes, items_of


@dataclass(frozen=True)
class ZeroShot:
    """Scores an item by the frozen model's log-odds of the yes word, for every user alike.

    Args:
        answer_model: The language model over the catalog's prompts.
        name: How the method is called in tables.
        bytes_per_user: See `Scorer`.
        bias: Log-odds that are subtracted from every item's.
    """

    answer_model: AnswerModel
    name: str = "zero-shot prompt"
    bytes_per_user: int = 0
    bias: float = 0.0

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        check_codes(requests, len(self.answer_model.prompts.tokens))
        if requests:
            self.answer_model.read(items_of(requests))
        return [
            self.answer_model.log_odds(self.answer_model.gather(torch.from_numpy(request.candidates)[None]), None)[
                0
            ].cpu()
            - self.bias
            for request in requests
        ]

    def prompt_text(self, request: Request, candidate: int) -> str:
        """Returns the text that is read to score a candidate."""
        return self.answer_model.prompts.texts[candidate]

    def tokens_read(self, request: Request) -> int:
        """Returns the number of tokens that scoring a request reads without caches; a common prefix counts once."""
        prompts = self.answer_model.prompts
        shared = prompts.prefix if self.answer_model.backbone.kind == "causal" and len(request.candidates) else 0
        return shared + sum(len(prompts.tokens[code]) - shared for code in request.candidates)


@torch.no_grad()
def calibrated_zero_shot(answer_model: AnswerModel, template: PromptTemplate, catalog: Catalog) -> ZeroShot:
    """Returns a zero-shot scorer minus the log-odds after a prompt without content, in which every field is ``N/A``.

    The same number is subtracted from every item: the order of a user's items does not change, only the calibration of
    the scores as log-odds of a like.

    Args:
        answer_model: The language model over the catalog's prompts.
        template: The template of the answer model's prompts.
        catalog: The items, for the names of their fields.

    Source: Zhao et al. 2021, "Calibrate Before Use", section 5; with two answer words their diagonal W is a shift of
    the log-odds.
    """
    backbone, placement = answer_model.backbone, answer_model.placement
    empty = tokenize_catalog(backbone, template, content_free(catalog))
    blank = AnswerModel(backbone, empty, placement, ReferenceForward(backbone, empty, placement))
    bias = float(blank.log_odds(blank.gather(torch.zeros(1, 1, dtype=torch.long)), None))
    return ZeroShot(answer_model, "zero-shot, calibrated", bias=bias)
