"""How a task's data become a fitted recommender: item means, collaborative predictor, meta-parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metarec.config import RunConfig
from metarec.data.episodes import Episode, training_batch
from metarec.data.interactions import Catalog, RatingScale
from metarec.data.task import Task
from metarec.data.task_data import TaskData
from metarec.data.templates import PromptTemplate
from metarec.errors import ConfigError
from metarec.evaluate import evaluate, mean_auc
from metarec.lm.answer_model import AnswerModel, open_answer_model
from metarec.lm.backbone import Backbone, load_backbone
from metarec.lm.placement import default_placement
from metarec.lm.tokenized import tokenize_catalog
from metarec.meta import learn2learn
from metarec.meta.algorithms import ALGORITHMS, MetaGradient, closed_form
from metarec.meta.inner_loop import Loss, MetaState
from metarec.meta.outer_loop import Trained, train
from metarec.scorers.collaborative.features import Features, item_features, state_vectors, unrated_features
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.stack import CrossFitted, Stacked
from metarec.scorers.collaborative.text import unit_vectors
from metarec.scorers.language.adapted import InnerLoop, MetaScorer
from metarec.scorers.language.item_vectors import hidden_state_vectors, text_vectors
from metarec.scorers.language.score import Batch, Head, collate, head_solver, pairwise_loss, support_loss

PRIOR_COLUMNS = ("total", "count", "centre")
PRIOR_NUMBERS = ("mean", "scale", "strength", "silent")
TASTE = "taste"
# Where a task asks about items that nobody rated, a fifth is hidden from every fold too, as in `split.out_of_fold`.
HIDDEN_SHARE = 0.2


@dataclass(frozen=True)
class Fitted:
    """What fitting a task leaves behind: everything a recommender needs to serve without the dataset.

    Args:
        task: The task, with its prompt and label rule.
        catalog: The items.
        scale: The rating scale.
        prior: Shrunk item means smoothed by text: an input of the score.
        taste: What users of like taste say: another input; without members it says what the prior says.
        meta: The meta-parameters.
        answer_model: The language model, reading this catalog.
        training: A JSON-able summary of the training.
    """

    task: Task
    catalog: Catalog
    scale: RatingScale
    prior: ItemPrior
    taste: Stacked
    meta: MetaState
    answer_model: AnswerModel
    training: dict[str, Any]


def meta_train(
    data: TaskData,
    prepared: Fitted,
    out_of_fold: CrossFitted,
    config: RunConfig,
    identity: dict[str, Any],
    checkpoint: Path,
    resume: bool,
) -> Trained:
    """Meta-trains on a task's meta-training users; see `metarec.meta.outer_loop.train`."""
    answer_model = prepared.answer_model
    threshold = data.task.like_threshold
    episodes = data.episodes("validation")[0][: config.train.validation_users]
    one_by_one = config.meta.engine == "learn2learn"
    if one_by_one and config.meta.algorithm not in ("fomaml", "maml"):
        raise ConfigError(
            f"meta.algorithm '{config.meta.algorithm}' is not one learn2learn has", "Set meta.engine to 'batched'"
        )
    cold = any(fold.hidden.any() for fold in out_of_fold.folds)

    # Prior and stack are those of a fold that has not seen the user, as they are for any new one: what has seen a
    # user's ratings would teach the adapter that nothing is left to learn.
    def support_of(batch: Sequence[Episode]) -> Batch:
        folds = [out_of_fold.without(episode.user) for episode in batch]
        return collate(
            [episode.support for episode in batch],
            prepared.prior,
            answer_model,
            threshold,
            means=[fold.prior.values(episode.support.items) for fold, episode in zip(folds, batch, strict=True)],
            expected=[fold.taste.leave_one_out(episode.support) for fold, episode in zip(folds, batch, strict=True)],
        )

    def inner(batch: Sequence[Episode]) -> Loss:
        return support_loss(
            support_of(batch),
            answer_model,
            shrinkage=config.meta.shrinkage,
            user_bias_damping=config.meta.user_bias_damping,
        )

    def outer(batch: Sequence[Episode]) -> Loss:
        folds = [out_of_fold.without(episode.user) for episode in batch]
        query = collate(
            [episode.query for episode in batch],
            prepared.prior,
            answer_model,
            threshold,
            means=[fold.prior.values(episode.query.items) for fold, episode in zip(folds, batch, strict=True)],
            expected=[
                fold.taste.posterior_mean(episode.support, episode.query.items)
                for fold, episode in zip(folds, batch, strict=True)
            ],
        )
        return pairwise_loss(query, answer_model, sharpness=config.train.sharpness)

    def gradient_at(meta: MetaState, step: int) -> MetaGradient:
        batch = training_batch(
            data.interactions,
            data.parts["train"],
            batch_users=config.train.users,
            shots=config.train.shots,
            max_query=config.train.max_query,
            min_query=config.train.min_query,
            seed=config.seed,
            step=step,
            hidden=(lambda user: out_of_fold.without(user).hidden) if cold else None,
        )
        steps = config.meta.inner_steps
        head = closed_form_head(config)
        if head is not None:
            solve = head_solver(support_of(batch), answer_model, head, user_bias_damping=config.meta.user_bias_damping)
            return closed_form(meta, solve, outer(batch), len(batch))
        if one_by_one:
            losses = [(inner([episode]), outer([episode])) for episode in batch]
            return learn2learn.meta_gradient(meta, losses, steps, second_order=config.meta.algorithm == "maml")
        return ALGORITHMS[config.meta.algorithm](meta, inner(batch), outer(batch), len(batch), steps)

    def validate(meta: MetaState) -> float:
        scorer = meta_scorer(replace(prepared, meta=meta), config)
        shots = [count for count in data.task.shots if count > 0] or list(data.task.shots)
        report = evaluate(
            [scorer],
            episodes,
            shots,
            data.interactions.catalog,
            threshold=threshold,
            seed=config.seed,
            baseline=scorer.name,
            left_out={},
            short_supports=data.task.short_supports,
        )
        return mean_auc(report, scorer.name, shots)

    return train(
        prepared.meta,
        gradient_at,
        validate,
        config.train,
        checkpoint=checkpoint,
        identity=identity,
        resume=resume,
    )


def meta_scorer(
    fitted: Fitted,
    config: RunConfig,
    *,
    rate_scale: float = 1.0,
    steps: int | None = None,
    name: str = "metarec, adapted",
) -> MetaScorer:
    """Returns a fitted recommender as a `Scorer`."""
    inner = InnerLoop(
        steps=config.meta.inner_steps if steps is None else steps,
        shrinkage=config.meta.shrinkage,
        user_bias_damping=config.meta.user_bias_damping,
        head=closed_form_head(config),
        storage=getattr(torch, config.adapter.storage),
    )
    return MetaScorer(
        fitted.meta,
        fitted.answer_model,
        fitted.prior,
        fitted.taste,
        inner,
        fitted.task.like_threshold,
        rate_scale=rate_scale,
        name=name,
    )


def closed_form_head(config: RunConfig) -> Head | None:
    """Returns which head the settings fit in closed form, None where users take gradient steps."""
    algorithm = config.meta.algorithm
    return algorithm if algorithm == "ridge" or algorithm == "prototypes" else None


def open_backbone(config: RunConfig) -> Backbone:
    """Loads the backbone that the settings name."""
    return load_backbone(
        config.backbone, device=config.device, dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    )


def catalog_answer_model(
    backbone: Backbone, config: RunConfig, template: PromptTemplate, catalog: Catalog
) -> AnswerModel:
    """Returns the language model over a catalog's prompts, with adapters where the settings want them."""
    prompts = tokenize_catalog(backbone, template, catalog)
    adapter = config.adapter
    placement = default_placement(
        backbone,
        prompts,
        layers=adapter.layers,
        targets=adapter.targets,
        rank=adapter.rank,
        alpha=adapter.alpha,
        active_tokens=adapter.active_tokens,
        kind=adapter.kind,
        rslora=adapter.rslora,
        virtual_tokens=adapter.virtual_tokens,
    )
    return open_answer_model(backbone, prompts, placement, torch.bfloat16 if config.dtype == "mixed" else None)


def collaborative_features(answer_model: AnswerModel, catalog: Catalog, encoder: str | None, task: Task) -> Features:
    """Returns what the collaborative predictor knows of items."""
    if task.hidden_states and answer_model.backbone.kind == "causal":
        read = {"llm": hidden_state_vectors(answer_model.backbone, catalog, task.hidden_states)}
    else:
        # Where ratings tell of items, the states behind the prompt's answer will do, which is read anyway.
        read = {"llm": state_vectors(answer_model.states)}
    if encoder is not None:
        read["text"] = text_vectors(catalog, encoder)
    fields = item_features(catalog)
    if task.split.asks_unrated:
        return unrated_features(read, fields)
    beside = np.concatenate([unit_vectors(vectors) for vectors in read.values()], 1)
    return Features({**read, **fields}, beside)
