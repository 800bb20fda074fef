"""The rating that the frozen language model expects, over one answer word per rating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metarec.data.interactions import Catalog, RatingScale
from metarec.data.templates import PromptTemplate
from metarec.errors import ConfigError
from metarec.lm.answer_model import AnswerModel
from metarec.scorer import Request, check_codes


@dataclass(frozen=True)
class ExpectedRating:
    """Scores an item by the rating that the frozen model expects, for every user alike.

    Args:
        expected: Every item's expected rating, shape (catalog,).
        name: How the method is called in tables.
    """

    expected: Tensor
    name: str = "expected rating, prompt"
    bytes_per_user: int = 0

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        check_codes(requests, len(self.expected))
        return [self.expected[torch.from_numpy(request.candidates)] for request in requests]


@torch.no_grad()
def expected_rating(
    answer_model: AnswerModel, template: PromptTemplate, catalog: Catalog, words: Sequence[str], scale: RatingScale
) -> ExpectedRating:
    """Returns the mean rating under the probabilities of the answer words after every item's prompt.

    Args:
        answer_model: The language model over the catalog's prompts.
        template: The prompt, after which the words are tokenized.
        catalog: The items.
        words: Answer words for evenly spaced ratings, ascending.
        scale: The rating scale; the words run from 1, or its lowest rating where that is higher, to its highest.

    Raises:
        ConfigError: There are fewer than two words, or the model has no answer words.
        BackboneError: A word is not one token.
    """
    backbone = answer_model.backbone
    if len(words) < 2 or backbone.kind == "encoder":
        raise ConfigError(f"{len(words)} rating words for a model of kind '{backbone.kind}'", "Set prompt.ratings")
    mask = backbone.tokenizer.mask_token if backbone.kind == "masked" else ""
    prompt = template.render(catalog, 0, backbone.special_tokens, mask)
    tokens = [backbone.answer_token(prompt, word) for word in words]
    logits = backbone.word_logits(answer_model.states, tokens)
    ratings = np.linspace(max(1.0, scale.low), scale.high, len(words))
    return ExpectedRating((logits.softmax(-1) @ logits.new_tensor(ratings)).float().cpu())
