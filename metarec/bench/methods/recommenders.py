"""metarec itself, without some of its parts, and with other algorithms and adapters: runs with other settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metarec.bench.context import Method, MethodContext, MethodRow
from metarec.errors import ConfigError
from metarec.files.artifacts import recover_dir
from metarec.presets import PRESETS

if TYPE_CHECKING:
    from metarec.config import RunConfig
    from metarec.data.task_data import TaskData
    from metarec.lm.answer_model import AnswerModel
    from metarec.recommender import MetaRecommender
    from metarec.scorer import Request, Scorer


def _measured(preset: str) -> dict[str, Any]:
    """Returns a preset's settings without `vectors`; `trained_recommender` reads them where the data bring any."""
    features = [name for name in PRESETS[preset]["collaborative.features"] if name != "vectors"]
    return {**PRESETS[preset], "collaborative.features": features}


def trained_recommender(context: MethodContext, options: Mapping[str, Any]) -> MetaRecommender:
    """Returns a recommender trained on the context's data, or the one that was trained there before."""
    from metarec.recommender import MetaRecommender

    model = context.workspace / "model"
    if recover_dir(model):
        return MetaRecommender.from_pretrained(model)
    config = with_brought_vectors(context.configured(options), context.data)
    recommender = MetaRecommender.from_pretrained(config.backbone, config)
    recommender.fit(context.task_data, checkpoint=context.workspace / "checkpoint", resume=True)
    recommender.save_pretrained(model)
    return recommender


def with_brought_vectors(config: RunConfig, data: TaskData) -> RunConfig:
    """Returns settings whose features include vectors where the data bring any; other data keep their cells' names."""
    features = config.collaborative.features
    if not data.interactions.item_vectors or features is None or "vectors" in features:
        return config
    collaborative = config.collaborative.model_copy(update={"features": (*features, "vectors")})
    return config.model_copy(update={"collaborative": collaborative})


def _metarec(context: MethodContext, *, name: str = "metarec", **options: Any) -> Sequence[MethodRow]:
    """Returns metarec adapted; the default also not adapted, and step by step."""
    recommender = trained_recommender(context, options)

    def row(steps: int | None, called: str, step: int | None = None) -> MethodRow:
        return recommender_row(recommender, recommender.scorer(steps=steps, name=called), step)

    rows = [row(None, name)]
    if name == "metarec":
        rows += [row(0, "metarec, no adaptation")]
        # The steps in between are a picture, not a row: one split is enough for it.
        between = range(1, recommender.config.meta.inner_steps) if context.seed == 0 else ()
        rows += [row(step, f"metarec, step {step}", step) for step in between]
    return rows


def recommender_row(recommender: MetaRecommender, scorer: Scorer, step: int | None = None) -> MethodRow:
    """Returns a scorer of a recommender as a row, with what it costs.

    Args:
        recommender: The recommender.
        scorer: One of its scorers.
        step: See `MethodRow`.
    """
    fitted = recommender.fitted
    parameters = sum(value.numel() for value in fitted.meta.tensors().values())
    # What reads no prompt per item costs no tokens and shows none, whatever else of the model its features hold.
    asks = bool({"prompt", "adapter"} & set(recommender.config.score)) and fitted.answer_model is not None
    read = tokens_read(answer_model_of(recommender)) if asks else lambda _: 0
    return MethodRow(scorer, parameters, read, item_prompt(recommender) if asks else None, step=step)


def answer_model_of(recommender: MetaRecommender) -> AnswerModel:
    """Returns the language model over a fitted recommender's catalog.

    Raises:
        ConfigError: Its settings read none.
    """
    model = recommender.fitted.answer_model
    if model is None:
        raise ConfigError("the settings read no language model, and this method asks one", "Add 'prompt' to score")
    return model


def tokens_read(answer_model: AnswerModel) -> Callable[[Request], int]:
    """Returns a function from a request to the tokens that answer it; what all prompts share counts once."""
    shared = answer_model.prompts.prefix
    own = answer_model.prompts.lengths - shared
    return lambda request: shared + int(own[request.support.items].sum() + own[request.candidates].sum())


def item_prompt(recommender: MetaRecommender) -> Callable[[Request, int], str]:
    """Returns a function from a request and an item's code to the prompt of that item."""
    fitted, special = recommender.fitted, recommender.backbone.special_tokens
    return lambda _, code: fitted.task.template.render(fitted.catalog, code, special)


# The default with one part less each time, each trained as it is: name, in words, settings.
_COLLABORATIVE = ["item mean", "collaborative"]
_PARTS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    (
        "no text model",
        "item means and stack over ratings and fields; no text is read",
        {"score": _COLLABORATIVE, "collaborative.features": ["fields"]},
    ),
    (
        "no language model",
        "item means and stack over ratings, fields and a sentence encoder's vectors of titles",
        _measured("fast"),
    ),
    (
        "+ hidden states",
        "no language model, and hidden states of the language model among the features",
        {"score": _COLLABORATIVE, "collaborative.features": ["text", "fields", "lm"]},
    ),
    (
        "+ prompt",
        "the default's features, and the frozen prompt's answer",
        {"score": [*_COLLABORATIVE, "prompt"]},
    ),
)
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
    (
        "bottleneck",
        "adapter",
        "narrow layers behind attention and MLP, no updates",
        {"adapter.kind": "bottleneck", "adapter.rank": 8},
    ),
    ("prefix", "adapter", "virtual tokens in place of low-rank updates", {"adapter.kind": "prefix"}),
    (
        "soft prompt",
        "adapter",
        "vectors in front of the embeddings (adapter.layers: all blocks)",
        {"adapter.kind": "soft-prompt", "adapter.active_tokens": None},
    ),
    ("every token", "adapter", "adapters that every token of a prompt carries", {"adapter.active_tokens": None}),
)
NO_STACK = ["item mean", "prompt", "adapter"]
RECOMMENDERS = {
    "metarec": Method(
        _metarec,
        "meta",
        "the default: item mean, stack, prompt, adapter",
    ),
    **{
        f"metarec, {called}": Method(_metarec, "parts", how, {"name": f"metarec, {called}", **options})
        for called, how, options in _PARTS
    },
    **{
        f"metarec, no stack, {called}": Method(
            _metarec,
            group,
            f"prior and language model, {how}",
            {"name": f"metarec, no stack, {called}", "score": NO_STACK, **options},
        )
        for called, group, how, options in _VARIANTS
    },
    "metarec, quick": Method(
        _metarec,
        "presets",
        "preset quick: item mean, stack, prompt and adapter; fewer steps",
        {"name": "metarec, quick", **_measured("quick")},
    ),
    "metarec, text": Method(
        _metarec,
        "presets",
        "preset text: item mean, kernel of words, encoder, LoRA, and a projection where better",
        {"name": "metarec, text", **_measured("text")},
    ),
    "metarec, no stack": Method(
        _metarec, "ablation", "prior and adapted language model", {"name": "metarec, no stack", "score": NO_STACK}
    ),
    "metarec, no prior": Method(
        _metarec,
        "ablation",
        "no item means at all",
        {"name": "metarec, no prior", "score": ["collaborative", "prompt", "adapter"]},
    ),
    "metarec, text only": Method(
        _metarec,
        "ablation",
        "the adapted language model alone",
        {"name": "metarec, text only", "score": ["prompt", "adapter"]},
    ),
}
