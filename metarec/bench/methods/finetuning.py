"""Fine-tuning: one model for all users, by LoRA or whole; or a LoRA per user from a fresh one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from metarec.artifacts import recover_dir
from metarec.bench.context import ENCODER, LANGUAGE_MODEL, Method, MethodContext, MethodRow
from metarec.bench.methods.prompts import prompted
from metarec.bench.methods.recommenders import NO_STACK, answer_model_of, item_prompt, tokens_read

if TYPE_CHECKING:
    from metarec.config import FineTuneConfig
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
    **settings: Any,
) -> Sequence[MethodRow]:
    """Returns one model for all users, after `longer` times the steps; a whole model also with a LoRA per user.

    Args:
        context: The split.
        trainable: What is trained.
        lr: Its rate; None takes the usual one.
        longer: Factor on the number of steps.
        name: How the row is called; None names what is trained.
        **settings: More settings of `metarec.config.FineTuneConfig`. With `classes`, the sentence encoder becomes a
            classifier of ratings, and is fine-tuned in place of the language model.
    """
    from metarec.scorers.language.finetuned import then_per_user_lora
    from metarec.scorers.serialization import load_scorer, save_scorer

    base = _classifier(context, settings["classes"]) if settings.get("classes") else context.backbone
    path = context.workspace / "model"
    if recover_dir(path):
        tuned = cast("FineTuned", load_scorer(path, backbone=base))
    else:
        tuned = _train(context, base, _settings(trainable, lr, longer, settings))
        tuned = tuned if name is None else replace(tuned, name=name)
        save_scorer(path, tuned)
        # Four copies of a whole model are worth keeping only as long as they can be resumed from.
        shutil.rmtree(context.workspace / "checkpoint")
    rows = [prompted(tuned)]
    if trainable == "all" and context.train_users is None and base.kind != "classifier":
        adapted = then_per_user_lora(tuned, seed=context.seed)
        assert adapted.answer_model is not None
        rows += [MethodRow(adapted, tuned.parameters, tokens_read(adapted.answer_model))]
    return rows


def _classifier(context: MethodContext, classes: int) -> Backbone:
    """Returns the sentence encoder with a new layer of so many classes."""
    from metarec.lm.backbone import load_classifier
    from metarec.lm.rating_classes import RatingClasses

    scale = context.interactions.scale
    named = RatingClasses.even(classes, scale.low, scale.high, context.threshold)
    return load_classifier(context.config.collaborative.encoder, named, device=context.config.device, seed=context.seed)


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


def _train(context: MethodContext, base: Backbone, config: FineTuneConfig) -> FineTuned:
    from metarec.scorers.language.fine_tuning import fine_tune
    from metarec.scorers.language.trainable_copy import Recipe

    return fine_tune(
        base,
        context.data.task.template,
        context.interactions,
        context.users,
        context.prior,
        validation=context.validation,
        threshold=context.threshold,
        recipe=Recipe(
            config.trainable, config.rank, config.alpha, config.targets, context.seed, config.form, config.dropout
        ),
        config=config,
        limit=config.history,
        seed=context.seed,
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


# A classifier of five ratings over the sentence encoder, short enough to be measured with every aid.
_CLASSES: dict[str, Any] = {
    "trainable": "all",
    "classes": 5,
    "class_loss": 1.0,
    "lr": 1e-4,
    "steps": 20,
    "validate_every": 20,
    "max_query": 6,
    "min_query": 6,
    "history": 4,
}
_AIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "no class loss": ("metarec's loss on the score alone", {"class_loss": 0.0}),
    "linear schedule": ("the rate falls along a line", {"schedule": "linear"}),
    "label smoothing": ("a tenth of the loss at the opposite labels", {"label_smoothing": 0.1}),
    "dropout": ("a tenth of all dropout layers' inputs", {"dropout": 0.1}),
    "FGM": ("adversarial steps on words' embeddings", {"fgm": 1.0}),
    "InfoNCE": ("pairs of items that a user likes", {"contrastive": 0.1}),
    "augmented": ("dropped and shuffled fields", {"augment": {"drop_fields": 0.3, "shuffle_fields": True}}),
    "LoRA": ("a LoRA in place of all parameters", {"trainable": "lora", "lr": 1e-3}),
    "DoRA": ("a DoRA in place of all parameters", {"trainable": "lora", "lr": 1e-3, "form": "dora"}),
}


def _with_aids() -> dict[str, Method]:
    """Returns the classifier of ratings, plain and with every aid of fine-tuning."""
    plain = "rating classes"
    rows: dict[str, tuple[str, dict[str, Any]]] = {plain: ("a sentence encoder fine-tuned to classes of ratings", {})}
    rows |= {f"{plain}, {name}": aid for name, aid in _AIDS.items()}
    return {
        name: Method(_fine_tuned, "classes", about, {**_CLASSES, **options, "name": name}, ("device", *ENCODER))
        for name, (about, options) in rows.items()
    }


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
    "per-user LoRA": Method(
        _per_user_lora,
        "fine-tuning",
        "a fresh LoRA per user, item prior as offset",
        {"inner_lr": 0.3, "steps": 10},
        (*LANGUAGE_MODEL, "collaborative.features", *ENCODER, "adapter"),
    ),
}
