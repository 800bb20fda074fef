"""Scorers over a fine-tuned language model; `metarec.scorers.language.fine_tuning` trains one.

The prompt is a user's history as solved examples (`metarec.scorers.language.in_context`), then an item. The score is
the item prior plus a learned weight times the log-odds. A constant in all log-odds would not change an order, so none
is subtracted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from metarec.files.artifacts import content_hash
from metarec.lm.answer_model import open_answer_model
from metarec.lm.backbone import Backbone
from metarec.lm.placement import default_placement
from metarec.lm.tokenized import tokenize_catalog
from metarec.scorer import Request
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.terms import ITEM_MEAN, ItemMeanTerm
from metarec.scorers.language.adapted import InnerLoop, MetaScorer
from metarec.scorers.language.in_context import History, InContext, score_one_by_one
from metarec.scorers.language.prompt_term import PROMPT, PromptTerm
from metarec.scorers.language.score import ADAPTER, initial_state
from metarec.scorers.language.trainable_copy import Recipe, Trainable, trainable_copy
from metarec.scorers.term import ADAPTER_TERM, weight_name

NAMES: dict[Trainable, str] = {"lora": "joint LoRA", "all": "full fine-tuning"}


@dataclass(frozen=True)
class WeightedLogOdds:
    """Scores a candidate by ``prior + weight * log-odds`` of a model that reads the user's history.

    Args:
        context: The model, during or after training, and the history.
        prior: The item prior.
        weight: Weight of the log-odds.
        name: How the method is called in tables.
        bytes_per_user: See `Scorer`.
    """

    context: InContext
    prior: ItemPrior
    weight: float
    name: str
    bytes_per_user: int = 0

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_one_by_one(self.name, requests, len(self.prior.count), self._score)

    def _score(self, request: Request) -> Tensor:
        odds = self.context.log_odds(request)
        return torch.from_numpy(self.prior.values(request.candidates)).to(odds.device) + self.weight * odds


@dataclass(frozen=True)
class FineTuned:
    """Scores a candidate by ``prior + weight * log-odds`` of a fine-tuned model that reads the user's history.

    Args:
        base: The model before fine-tuning, which does not change.
        history: Writes a user's ratings into the prompt.
        prior: The item prior.
        weight: Weight of the log-odds.
        recipe: What was trained.
        trained: The trained tensors by name.
        training: A JSON-able summary of the training.
        name: How the method is called in tables.
        bytes_per_user: See `Scorer`; 0, since only the ratings are kept.

    Raises:
        ConfigError: The base is of low precision and all of it was trained.
    """

    base: Backbone
    history: History
    prior: ItemPrior
    weight: float
    recipe: Recipe
    trained: Mapping[str, Tensor]
    training: Mapping[str, Any]
    name: str
    bytes_per_user: int = 0

    def __post_init__(self) -> None:
        _ = self.context  # computed now, so that errors appear here and not in the first request

    @property
    def parameters(self) -> int:
        """Number of trained numbers, which all users share."""
        return sum(tensor.numel() for tensor in self.trained.values()) + 1

    @cached_property
    def context(self) -> InContext:
        """The fine-tuned model, which shares untrained parameters with the base, and the history."""
        student = trainable_copy(self.base, self.recipe)
        student.take(self.trained)
        student.finish()
        digest = hashlib.sha256()
        for key, tensor in sorted(self.trained.items()):
            digest.update(key.encode() + tensor.cpu().numpy().tobytes())
        fingerprint = content_hash([self.base.fingerprint, asdict(self.recipe), digest.hexdigest()])
        name = f"{self.base.name}, {NAMES[self.recipe.trainable]}"
        return InContext(replace(student.backbone, name=name, fingerprint=fingerprint), self.history)

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return WeightedLogOdds(self.context, self.prior, self.weight, self.name).score(requests)

    def prompt_text(self, request: Request, candidate: int) -> str:
        """Returns the text that is read to score a candidate."""
        return self.context.prompt_text(request, candidate)

    def tokens_read(self, request: Request) -> int:
        """Returns the number of tokens that scoring a request reads; tokens that its prompts share count once."""
        return self.context.tokens_read(request)


def then_per_user_lora(
    tuned: FineTuned,
    *,
    layers: int = 4,
    rank: int = 1,
    alpha: float = 2.0,
    steps: int = 5,
    inner_lr: float = 0.3,
    shrinkage: float = 5.0,
    seed: int = 0,
    name: str | None = None,
) -> MetaScorer:
    """Gives every user a fresh LoRA on a fine-tuned model, fitted to the support by plain gradient steps.

    Prompts are about one item, without history. The score starts as ``prior + weight * log-odds`` of the fine-tuned
    model, with the log-odds around the catalog's mean. Opening it reads the whole catalog once.

    Args:
        tuned: The fine-tuned model.
        layers: Number of topmost blocks that carry the adapter.
        rank: Of the adapter.
        alpha: The adapter is scaled by ``alpha / rank``.
        steps: Gradient steps per user.
        inner_lr: Rate of the steps, the same for all tensors.
        shrinkage: Pseudo-count in the support loss's denominator.
        seed: Of the adapter's A.
        name: How the method is called in tables; None adds to the fine-tuned model's name.
    """
    backbone, history = tuned.context.backbone, tuned.context.history
    prompts = tokenize_catalog(backbone, history.template, history.catalog)
    placement = default_placement(
        backbone, prompts, layers=layers, targets=None, rank=rank, alpha=alpha, active_tokens="auto"
    )
    answer_model = open_answer_model(backbone, prompts, placement)
    score = {"item mean": ITEM_MEAN, "prompt": PROMPT, ADAPTER_TERM: ADAPTER}
    meta = initial_state(score, answer_model, inner_lr=inner_lr, adapter_weight=1.0, seed=seed, device=backbone.device)
    prompt_weight = weight_name("prompt")
    return MetaScorer(
        replace(meta, init={**meta.init, prompt_weight: meta.init[prompt_weight].new_tensor(tuned.weight)}),
        {"item mean": ItemMeanTerm(tuned.prior), "prompt": PromptTerm(answer_model)},
        tuned.prior,
        answer_model,
        InnerLoop(steps, shrinkage, user_bias_damping=1.0, storage=torch.float16),
        history.threshold,
        name=name or f"{tuned.name}, then per-user LoRA",
    )
