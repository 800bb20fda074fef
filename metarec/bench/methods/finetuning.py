"""Fine-tuning: one model for all users, by LoRA or whole; or a LoRA per user from a fresh one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

from metarec.bench.context import ENCODER, LANGUAGE_MODEL, Method, MethodContext, MethodRow
from metarec.bench.methods.prompts import prompted
from metarec.bench.methods.recommenders import NO_STACK, answer_model_of, item_prompt, tokens_read
from metarec.files.artifacts import recover_dir

if TYPE_CHECKING:
    from metarec.config import FineTuneConfig
    from metarec.data.interactions import Catalog
    from metarec.lm.backbone import Backbone
    from metarec.scorers.language.finetuned import FineTuned
    from metarec.scorers.language.trainable_copy import Trainable


def _fine_tuned(
    context: MethodContext,
    *,
    trainable: Trainable,
    lr: float | None = None,
    longer: int = 1,
    name: str | None = None,
    blocks: int | Literal["all"] | None = None,
    draw: int = 0,
    masked: bool = False,
    **settings: Any,
) -> Sequence[MethodRow]:
    """Returns one model for all users, after `longer` times the steps; a whole model also with a LoRA per user.

    Args:
        context: The split.
        trainable: What is trained.
        lr: Its rate; None takes the usual one.
        longer: Factor on the number of steps.
        name: How the row is called; None names what is trained.
        blocks: Fine-tunes the sentence encoder in place of the language model: its lowest so many blocks, or all.
        draw: Changes what training draws, and a new head.
        masked: The sentence encoder becomes a masked model with a new head, and prompts end in a blank.
        **settings: More settings of `metarec.config.FineTuneConfig`. With `classes`, the sentence encoder becomes a
            classifier of ratings, and is fine-tuned in place of the language model.
    """
    from metarec.scorers.language.finetuned import then_per_user_lora
    from metarec.scorers.serialization import load_scorer, save_scorer

    seed = context.seed + _DRAWS * draw
    base = context.backbone if blocks is None else _encoder(context, settings.get("classes"), blocks, seed, masked)
    if masked:
        context = _with_blank(context)
    path = context.workspace / "model"
    if recover_dir(path):
        tuned = cast("FineTuned", load_scorer(path, backbone=base))
    else:
        tuned = _train(context, base, _settings(trainable, lr, longer, settings), seed)
        tuned = tuned if name is None else replace(tuned, name=name)
        save_scorer(path, tuned)
        # Four copies of a whole model are worth keeping only as long as they can be resumed from.
        shutil.rmtree(context.workspace / "checkpoint")
    rows = [prompted(tuned)]
    if trainable == "all" and context.train_users is None and blocks is None:
        adapted = then_per_user_lora(tuned, seed=context.seed)
        assert adapted.answer_model is not None
        rows += [MethodRow(adapted, tuned.parameters, tokens_read(adapted.answer_model))]
    return rows


def _mean_of_two(context: MethodContext, *, name: str, **options: Any) -> Sequence[MethodRow]:
    """Returns the mean of two fine-tunings that draw other users, items and heads."""
    from metarec.scorers.ensemble import Ensemble

    places = [context.workspace / str(draw) for draw in range(2)]
    rows = [
        _fine_tuned(replace(context, workspace=place), name=f"{name} {draw}", draw=draw, **options)[0]
        for draw, place in enumerate(places)
    ]
    parameters = sum(row.parameters for row in rows)
    tokens = [row.tokens for row in rows]
    members = tuple(row.scorer for row in rows)
    return [MethodRow(Ensemble(members, name), parameters, lambda request: sum(count(request) for count in tokens))]


def _with_blank(context: MethodContext) -> MethodContext:
    """Returns the context with a prompt that ends in a blank."""
    task = context.data.task
    prompt = task.prompt.model_copy(update={"text": f"{task.prompt.text} {{{{ mask }}}}."})
    return replace(context, data=replace(context.data, task=task.model_copy(update={"prompt": prompt})))


def _encoder(
    context: MethodContext, classes: int | None, blocks: int | Literal["all"], seed: int, masked: bool
) -> Backbone:
    """Returns the sentence encoder, or its lowest blocks, with a new layer of so many classes; None: without one."""
    import torch

    from metarec.lm.loading import load_backbone, load_classifier
    from metarec.lm.rating_classes import RatingClasses
    from metarec.lm.smaller import with_blocks

    config, scale = context.config, context.interactions.scale
    name = config.collaborative.encoder
    if masked:
        from metarec.lm.masked_head import masked_from_encoder

        whole = masked_from_encoder(load_backbone(name, device=config.device, dtype=torch.float32), seed)
    elif classes is None:
        whole = load_backbone(name, device=config.device, dtype=torch.float32)
    else:
        named = RatingClasses.even(classes, scale.low, scale.high, context.threshold)
        whole = load_classifier(name, named, device=config.device, seed=seed)
    return whole if blocks == "all" else with_blocks(whole, range(blocks))


def _settings(trainable: Trainable, lr: float | None, longer: int, more: Mapping[str, Any]) -> FineTuneConfig:
    from metarec.config import FineTuneConfig, merged, validated
    from metarec.scorers.language.fine_tuning import FINE_TUNING

    config = FINE_TUNING[trainable]
    changed = {
        "lr": config.lr if lr is None else lr,
        "steps": longer * config.steps,
        "validate_every": longer * config.validate_every,
    }
    return validated(FineTuneConfig, merged(config.model_dump(), {**changed, **more}), "method options")


def _train(context: MethodContext, base: Backbone, config: FineTuneConfig, seed: int) -> FineTuned:
    from metarec.scorers.language.fine_tuning import fine_tune
    from metarec.scorers.language.trainable_copy import Recipe

    data = context.interactions
    if config.augment.rewrites == _REWRITTEN and _REWRITTEN not in data.catalog.fields:
        data = replace(data, catalog=with_rewrites(data.catalog))
    return fine_tune(
        base,
        context.data.task.template,
        data,
        context.users,
        context.prior,
        validation=context.validation,
        threshold=context.threshold,
        recipe=Recipe(config.trainable, config.rank, config.alpha, config.targets, seed, config.form, config.dropout),
        config=config,
        limit=config.history,
        seed=seed,
        checkpoint=context.workspace / "checkpoint",
        resume=True,
    )


def _per_user_lora(context: MethodContext, *, inner_lr: float, steps: int) -> Sequence[MethodRow]:
    """Returns every user's own LoRA from a fresh one, by plain gradient steps: what meta-training saves."""
    from metarec.recommender import MetaRecommender

    config = context.configured(
        {"score": NO_STACK, "meta.inner_lr": inner_lr, "meta.inner_steps": steps, "meta.shrinkage": 0.0}
    )
    recommender = MetaRecommender(context.backbone, config).prepare(context.task_data)
    scorer = recommender.scorer(name="per-user LoRA")
    return [MethodRow(scorer, 0, tokens_read(answer_model_of(recommender)), item_prompt(recommender))]


def with_rewrites(catalog: Catalog) -> Catalog:
    """Returns the catalog with a column of titles as somebody may write them: in lower case, no subtitles, brackets."""
    from metarec.data.titles import article_first

    def rewritten(title: str) -> str:
        short = re.split(r": | - ", re.sub(r"[(\[].*?[)\]]", " ", title))[0]
        return " ".join(article_first(short.strip()).lower().split())

    return replace(catalog, fields={**catalog.fields, _REWRITTEN: tuple(map(rewritten, catalog.fields["title"]))})


_REWRITTEN = "rewritten"
# Between the seeds of a split's first and second draw.
_DRAWS = 1000
# A LoRA in two blocks of the sentence encoder: short enough to be measured with every aid.
_SHORT: dict[str, Any] = {
    "blocks": 2,
    "trainable": "lora",
    "adapter_weight": 1.0,
    "lr": 3e-3,
    "warmup": 2,
    "steps": 16,
    "validate_every": 16,
    "shots": [4],
    "max_query": 6,
    "min_query": 4,
    "history": 4,
}
# The whole sentence encoder, until the loss of validation users turns: minutes of one core.
_WHOLE: dict[str, Any] = {
    "blocks": "all",
    "adapter_weight": 1.0,
    "users": 4,
    "shots": [0, 4, 8],
    "max_query": 6,
    "min_query": 4,
    "steps": 64,
    "warmup": 8,
    "validate_every": 8,
    "patience": 2,
}
_AIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear schedule": ("the rate falls along a line", {"schedule": "linear"}),
    "label smoothing": ("a tenth of the loss at the opposite labels", {"label_smoothing": 0.1}),
    "dropout": ("a tenth of all dropout layers' inputs", {"dropout": 0.1}),
    "FGM": ("adversarial steps on words' embeddings", {"fgm": 1.0}),
    "InfoNCE": ("pairs of items that a user likes", {"contrastive": 0.1}),
    "augmented": ("dropped and shuffled fields", {"augment": {"drop_fields": 0.3, "shuffle_fields": True}}),
    "paraphrased": (
        "the prompt in other words half the time",
        {"augment": {"prompts": ["{{ title }}: worth it? Answer:"]}},
    ),
    "rewritten": (
        "half the time titles in lower case, without subtitles and brackets: a column by a rule",
        {"augment": {"rewrites": _REWRITTEN}},
    ),
    "all parameters": ("all parameters in place of a LoRA", {"trainable": "all", "lr": 3e-4}),
    "DoRA": ("a DoRA in place of a LoRA", {"form": "dora"}),
    "AdaLoRA": ("an AdaLoRA in place of a LoRA", {"form": "adalora"}),
    "classes": ("a new layer of five ratings in place of the answers", {"classes": 5, "class_loss": 1.0}),
    "masked": (
        "as a masked model, its new head and all parameters trained: the weights bring none",
        {"masked": True, "trainable": "all", "lr": 3e-4},
    ),
}


def _with_aids() -> dict[str, Method]:
    """Returns the fine-tuned sentence encoder, plain and with every aid of fine-tuning."""
    plain, read = "tuned encoder", ("device", *ENCODER)
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        plain: ("two blocks of a sentence encoder, fine-tuned to be nearer to one answer than to the other", {})
    }
    rows |= {f"{plain}, {name}": aid for name, aid in _AIDS.items()}
    found = {
        name: Method(_fine_tuned, "fine-tuning aids", about, {**_SHORT, **options, "name": name}, read)
        for name, (about, options) in rows.items()
    }
    both = f"{plain}, mean of two"
    about = "the mean of two fine-tunings that draw otherwise"
    return {**found, both: Method(_mean_of_two, "fine-tuning aids", about, {**_SHORT, "name": both}, read)}


FINE_TUNED = {
    **_with_aids(),
    "joint LoRA": Method(
        _fine_tuned,
        "fine-tuning",
        "one LoRA for all users, history in the prompt (TALLRec; in-context meta-training)",
        {"trainable": "lora"},
        (*LANGUAGE_MODEL, *ENCODER),
    ),
    "full fine-tuning": Method(
        _fine_tuned,
        "fine-tuning",
        "every parameter of the model, history in the prompt; then a LoRA per user",
        {"trainable": "all"},
        (*LANGUAGE_MODEL, *ENCODER),
    ),
    "encoder, joint LoRA": Method(
        _fine_tuned,
        "fine-tuning",
        "the sentence encoder with one LoRA for all users, history in the prompt",
        {**_WHOLE, "trainable": "lora", "lr": 5e-4, "name": "encoder, joint LoRA"},
        ("device", *ENCODER),
    ),
    "encoder, full fine-tuning": Method(
        _fine_tuned,
        "fine-tuning",
        "every parameter of the sentence encoder, history in the prompt",
        {**_WHOLE, "trainable": "all", "lr": 5e-5, "name": "encoder, full fine-tuning"},
        ("device", *ENCODER),
    ),
    "per-user LoRA": Method(
        _per_user_lora,
        "fine-tuning",
        "a fresh LoRA per user, item prior as offset",
        {"inner_lr": 0.3, "steps": 10},
        (*LANGUAGE_MODEL, "collaborative.features", *ENCODER, "adapter"),
    ),
}
