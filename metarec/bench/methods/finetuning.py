"""Fine-tuning: one model for all users, by LoRA or whole; or a LoRA per user from a fresh one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from metarec.artifacts import recover_dir
from metarec.bench.context import ENCODER, LANGUAGE_MODEL, Method, MethodContext, MethodRow
from metarec.bench.methods.prompts import prompted
from metarec.bench.methods.recommenders import NO_STACK, answer_model_of, item_prompt, tokens_read

if TYPE_CHECKING:
    from metarec.scorers.language.finetuned import FineTuned
    from metarec.scorers.language.trainable_copy import Trainable


def _fine_tuned(
    context: MethodContext, *, trainable: Trainable, lr: float | None = None, longer: int = 1
) -> Sequence[MethodRow]:
    """Returns one model for all users, after `longer` times the steps; a whole model also with a LoRA per user."""
    from metarec.scorers.language.finetuned import then_per_user_lora
    from metarec.scorers.serialization import load_scorer, save_scorer

    path = context.workspace / "model"
    if recover_dir(path):
        tuned = cast("FineTuned", load_scorer(path, backbone=context.backbone))
    else:
        tuned = _train(context, trainable, lr, longer)
        save_scorer(path, tuned)
        # Four copies of a whole model are worth keeping only as long as they can be resumed from.
        shutil.rmtree(context.workspace / "checkpoint")
    rows = [prompted(tuned)]
    if trainable == "all" and context.train_users is None:
        adapted = then_per_user_lora(tuned, seed=context.seed)
        assert adapted.answer_model is not None
        rows += [MethodRow(adapted, tuned.parameters, tokens_read(adapted.answer_model))]
    return rows


def _train(context: MethodContext, trainable: Trainable, lr: float | None, longer: int) -> FineTuned:
    from metarec.scorers.language.fine_tuning import FINE_TUNING, fine_tune
    from metarec.scorers.language.trainable_copy import Recipe

    config = FINE_TUNING[trainable]
    config = config.model_copy(
        update={
            "lr": config.lr if lr is None else lr,
            "steps": longer * config.steps,
            "validate_every": longer * config.validate_every,
        }
    )
    return fine_tune(
        context.backbone,
        context.data.task.template,
        context.interactions,
        context.users,
        context.prior,
        validation=context.validation,
        threshold=context.threshold,
        recipe=Recipe(trainable, seed=context.seed),
        config=config,
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


FINE_TUNED = {
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
