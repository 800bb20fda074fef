"""Fine-tuning as one call: a model for all users becomes a checkpoint, and a recommender that reads it.

The checkpoint is a directory that transformers loads, so that it is a backbone like any other: of `metarec train`, to
meta-learn adapters on top of it, or of another program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metarec.config import FineTuneConfig, RunConfig, merged, validated
from metarec.files.artifacts import load_json
from metarec.lm.backbone import Backbone
from metarec.lm.loading import load_backbone, load_classifier, save_backbone
from metarec.lm.rating_classes import RatingClasses
from metarec.meta.inner_loop import MetaState
from metarec.recommender import MetaRecommender
from metarec.scorers.language.fine_tuning import FINE_TUNING, fine_tune
from metarec.scorers.language.trainable_copy import Recipe
from metarec.scorers.term import weight_name
from metarec.training.fitting import Fitted, calibrated, open_backbone, prepare

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData
    from metarec.scorers.language.finetuned import FineTuned

_HISTORY, _PER_USER = ("item mean", "history"), ("item mean", "prompt", "adapter")
# Every validation user's ratings are read with a history of their own.
_CALIBRATION_USERS = 16


def fine_tune_settings(values: dict[str, Any], where: str = "settings") -> FineTuneConfig:
    """Returns settings over those that suit a LoRA, or with ``trainable: all`` the whole model.

    Args:
        values: Settings as sections; these win.
        where: What they came from, for errors.

    Raises:
        ConfigError: A key is unknown or a value does not fit.
    """
    known = FINE_TUNING["all" if values.get("trainable") == "all" else "lora"]
    merged_values = merged(known.model_dump(), values)
    # What nobody set gives way to what was set: fewer steps, or a shorter query.
    most = {
        "validate_every": merged_values["steps"],
        "warmup": merged_values["steps"],
        "min_query": merged_values["max_query"],
    }
    for key, limit in most.items():
        if key not in values and isinstance(limit, int):
            merged_values[key] = min(merged_values[key], limit)
    return validated(FineTuneConfig, merged_values, where)


def fine_tuned_recommender(
    data: TaskData,
    settings: FineTuneConfig,
    config: RunConfig,
    directory: Path | str,
    *,
    checkpoint: Path | str | None = None,
    resume: bool = False,
    clear: Callable[[], None] | None = None,
) -> MetaRecommender:
    """Fine-tunes a model on a task's meta-training users; returns the recommender that reads it.

    Args:
        data: The task's data.
        settings: How it is fine-tuned.
        config: The recommender's settings: its backbone is fine-tuned, its seed and device are used throughout.
        directory: Where the fine-tuned model goes.
        checkpoint: Where the training state is kept; None keeps it in a temporary directory.
        resume: Goes on from `checkpoint` if it is there.
        clear: See `metarec.meta.outer_loop.train`.

    Raises:
        MetarecError: The model, the task or the settings do not fit each other.
    """
    directory, checkpoint = Path(directory), None if checkpoint is None else Path(checkpoint)
    backbone = open_to_train(data, settings, config)
    plain = prepare(data, config.model_copy(update={"score": ("item mean",)}), None).fitted
    tuned = fine_tune(
        backbone,
        data.task.template,
        data.interactions,
        data.parts["train"],
        plain.prior,
        validation=data.evaluated("validation")[0],
        threshold=data.task.like_threshold,
        recipe=Recipe(
            settings.trainable,
            settings.rank,
            settings.alpha,
            settings.targets,
            config.seed,
            settings.form,
            settings.dropout,
        ),
        config=settings,
        limit=settings.history,
        seed=config.seed,
        checkpoint=checkpoint,
        resume=resume,
        clear=clear,
    )
    save_backbone(directory, tuned.context.backbone)
    run = _run_config(settings, config, directory)
    reread = open_backbone(run)
    fitted = _weighted(prepare(data, run, reread).fitted, tuned, settings)
    return MetaRecommender(reread, run, calibrated(fitted, run, data))


def open_to_train(data: TaskData, settings: FineTuneConfig, config: RunConfig) -> Backbone:
    """Returns the model that is fine-tuned, in float32: with classes of ratings where the settings name some."""
    if settings.classes is None:
        return load_backbone(config.backbone, device=config.device, dtype=torch.float32)
    scale, threshold = data.interactions.scale, data.task.like_threshold
    classes = RatingClasses.even(settings.classes, scale.low, scale.high, threshold)
    return load_classifier(config.backbone, classes, device=config.device, seed=config.seed)


def _run_config(settings: FineTuneConfig, config: RunConfig, directory: Path) -> RunConfig:
    """Returns the settings of the recommender that reads a fine-tuned model."""
    changed: dict[str, Any] = {
        "backbone": str(directory),
        "score": _PER_USER if settings.per_user else _HISTORY,
        "history": settings.history,
        "train": {"validation_users": _CALIBRATION_USERS},
    }
    layers = int(load_json(directory / "config.json").get("num_hidden_layers", config.adapter.layers))
    changed["adapter"] = {"layers": min(config.adapter.layers, layers)}
    if not settings.per_user:
        changed["meta"] = {"inner_steps": 0}
    return validated(RunConfig, merged(config.model_dump(), changed), "settings")


def _weighted(fitted: Fitted, tuned: FineTuned, settings: FineTuneConfig) -> Fitted:
    """Returns what was fitted with the weight of the model's log-odds that fine-tuning learned."""
    name = weight_name("prompt" if settings.per_user else "history")
    init = {**fitted.meta.init, name: fitted.meta.init[name].new_tensor(tuned.weight)}
    summary = {
        **{key: value for key, value in tuned.training.items() if key != "history"},
        "history": list(tuned.training["history"]),
        "fine_tuned": settings.model_dump(mode="json"),
        "trained_parameters": tuned.parameters,
    }
    return replace(fitted, meta=MetaState(init, fitted.meta.log_rate), training=summary)
