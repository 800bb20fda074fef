"""metarec itself, without some of its parts, and with other algorithms and adapters: runs with other settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from metarec.bench.context import Method, MethodContext, MethodRow
from metarec.lm.answer_model import AnswerModel
from metarec.recommender import MetaRecommender
from metarec.scorer import Request


def _recommender(context: MethodContext, options: Mapping[str, Any]) -> MetaRecommender:
    """Returns a recommender trained on the context's data, or the one that was trained there before."""
    model = context.workspace / "model"
    if (model / "recommender.json").exists():
        return MetaRecommender.from_pretrained(model)
    config = context.configured(options)
    recommender = MetaRecommender.from_pretrained(config.backbone, config)
    recommender.fit(context.task_data, checkpoint=context.workspace / "checkpoint", resume=True)
    recommender.save_pretrained(model)
    return recommender


def _metarec(context: MethodContext, *, name: str = "metarec", **options: Any) -> Sequence[MethodRow]:
    """Returns metarec adapted; the default also not adapted, without the language model, and step by step."""
    recommender = _recommender(context, options)
    answer_model, meta = recommender.fitted.answer_model, recommender.fitted.meta
    parameters = sum(value.numel() for value in meta.tensors().values())
    read = tokens_read(answer_model)

    def row(steps: int | None, called: str, step: int | None = None) -> MethodRow:
        return MethodRow(
            recommender.scorer(steps=steps, name=called), parameters, read, item_prompt(recommender), step=step
        )

    rows = [row(None, name)]
    if name == "metarec":
        rows += [row(0, "metarec, no adaptation")]
        taste = recommender.fitted.taste
        rows += [MethodRow(replace(taste, name="metarec, no LLM"), taste.weights.size)]
        # The steps in between are a picture, not a row: one split is enough for it.
        between = range(1, recommender.config.meta.inner_steps) if context.seed == 0 else ()
        rows += [row(step, f"metarec, step {step}", step) for step in between]
    return rows


def tokens_read(answer_model: AnswerModel) -> Callable[[Request], int]:
    """Returns a function from a request to the tokens that answer it; what all prompts share counts once."""
    shared = answer_model.prompts.prefix
    own = np.array([len(ids) - shared for ids in answer_model.prompts.tokens])
    return lambda request: shared + int(own[request.support.items].sum() + own[request.candidates].sum())


def item_prompt(recommender: MetaRecommender) -> Callable[[Request, int], str]:
    """Returns a function from a request and an item's code to the prompt of that item."""
    fitted, special = recommender.fitted, recommender.backbone.special_tokens
    return lambda _, code: fitted.task.template.render(fitted.catalog, code, special)


# Without the stack, which would have the last word on what little they differ by: name, group, in words, settings.
_VARIANTS: tuple[tuple[str, str, str, Mapping[str, Any]], ...] = (
    ("MAML", "algorithm", "meta-trained by second-order MAML", {"meta.algorithm": "maml"}),
    ("MAML++", "algorithm", "meta-trained by MAML with a loss after every step", {"meta.algorithm": "maml++"}),
    ("iMAML", "algorithm", "meta-trained by implicit gradients", {"meta.algorithm": "imaml"}),
    ("Reptile", "algorithm", "meta-trained by Reptile", {"meta.algorithm": "reptile"}),
    ("ANIL", "algorithm", "adapted in the topmost block alone", {"meta.adapt": "top"}),
    ("Meta-SGD", "algorithm", "with an inner rate per number", {"meta.rates": "number"}),
    ("ridge head", "algorithm", "a ridge regression in closed form in place of steps", {"meta.algorithm": "ridge"}),
    ("prototypes", "algorithm", "prototypes in place of steps", {"meta.algorithm": "prototypes"}),
    ("rank 8", "adapter", "adapters of rank 8", {"adapter.rank": 8, "adapter.alpha": 16}),
    ("12 layers", "adapter", "adapters in the twelve topmost blocks", {"adapter.layers": 12}),
    ("biases", "adapter", "biases in place of low-rank updates", {"adapter.kind": "bias"}),
    ("prefix", "adapter", "virtual tokens in place of low-rank updates", {"adapter.kind": "prefix"}),
    ("every token", "adapter", "adapters that every token of a prompt carries", {"adapter.active_tokens": None}),
)
RECOMMENDERS = {
    "metarec": Method(_metarec, "meta", "the default: item prior, stack and adapted language model"),
    **{
        f"metarec, no stack, {called}": Method(
            _metarec,
            group,
            f"prior and language model, {how}",
            {"name": f"metarec, no stack, {called}", "taste": "none", **options},
        )
        for called, group, how, options in _VARIANTS
    },
    "metarec, no stack": Method(
        _metarec, "ablation", "prior and adapted language model", {"name": "metarec, no stack", "taste": "none"}
    ),
    "metarec, no prior": Method(
        _metarec, "ablation", "no item means at all", {"name": "metarec, no prior", "prior": "none"}
    ),
    "metarec, text only": Method(
        _metarec,
        "ablation",
        "the adapted language model alone",
        {"name": "metarec, text only", "prior": "none", "taste": "none"},
    ),
}
