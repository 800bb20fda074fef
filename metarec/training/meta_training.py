"""Meta-training on a task: from a batch of its users to a meta-gradient, and the outer loop over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from metarec.config import RunConfig, flattened
from metarec.data.episodes import Episode, items_in, training_batch
from metarec.data.training_users import episode_sizes, summary, users_by_shots
from metarec.errors import DataError
from metarec.evaluation.evaluate import validation_auc
from metarec.lm.backbone import Backbone
from metarec.meta import learn2learn
from metarec.meta.algorithms import MetaGradient, closed_form
from metarec.meta.distributed import ALONE, Ranks, mean_over_ranks
from metarec.meta.heads import ClosedFormHead, takes_steps
from metarec.meta.inner_loop import Loss, MetaState
from metarec.meta.losses import smoothed
from metarec.meta.outer_loop import Trained, train
from metarec.meta.private import check_private, private_gradient, statement
from metarec.registries import ALGORITHMS, LOSSES
from metarec.scorers.language.score import (
    Batch,
    collate,
    head_solver,
    posterior_support_loss,
    query_loss,
    support_loss,
    with_shifted_head,
)
from metarec.system.tensors import AdapterState
from metarec.system.threads import one_thread
from metarec.training.continual import OldRun, pulled, start_from, with_replay
from metarec.training.fitting import Fitted, Prepared, adapted_model, half_life_of, head_of, meta_scorer
from metarec.training.half_life import chosen, folded, learns_by_gradient, started

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData


def training_identity(data: TaskData, config: RunConfig, backbone: Backbone | None) -> dict[str, Any]:
    """Returns by name all that a training's result depends on, but for its number of steps and the device.

    Args:
        data: The task's data.
        config: The settings.
        backbone: The language model; None where none is read.
    """
    # A task and a backbone are what they hold, wherever they lie.
    left_out = {"task", "backbone", "device", "train.steps"}
    settings = flattened(config.model_dump(mode="json"))
    return {
        **{key: value for key, value in settings.items() if key not in left_out},
        "task": data.task.digest,
        "backbone": None if backbone is None else backbone.fingerprint,
        "catalog": data.interactions.catalog.digest,
        "data": data.hashes["data"],
        "split": data.hashes["split"],
        # As long as it was chosen from a few values alone, no checkpoint held it.
        **({"half-life": "by gradient"} if config.meta.half_life == "learned" else {}),
    }


def meta_train(
    data: TaskData,
    prepared: Prepared,
    config: RunConfig,
    identity: dict[str, Any],
    checkpoint: Path,
    resume: bool,
    ranks: Ranks = ALONE,
    old: OldRun | None = None,
    watch: Callable[[float], None] | None = None,
    clear: Callable[[], None] | None = None,
) -> Fitted:
    """Meta-trains on a task's meta-training users, a share of them on each rank; see `metarec.meta.outer_loop.train`.

    Args:
        data: The task's data.
        prepared: What was fitted before meta-training.
        config: The settings.
        identity: See `training_identity`.
        checkpoint: Directory of the training state.
        resume: Goes on from it.
        ranks: The processes that train together.
        old: The run that meta-training goes on from; None where it starts afresh.
        watch: Called with the value of every validation; what it raises ends the training.
        clear: See `metarec.meta.outer_loop.train`.

    Returns:
        What was prepared, with the meta-parameters of the best validation and a summary of the training.
    """
    check_private(config.private, config.meta.algorithm, ranks.size, config.train.replay)
    if old is not None:
        prepared = replace(
            prepared, fitted=replace(prepared.fitted, meta=start_from(prepared.fitted.meta, old.fitted.meta))
        )

    sizes = episode_sizes(data.task, config.train)
    enough = users_by_shots(data, sizes, prepared.context.hidden)

    def batch_at(step: int, users: int = config.train.users) -> list[Episode]:
        return _batch(data, prepared, config, step, users)

    def worth(fitted: Fitted) -> float:
        return validation_auc_of(data, fitted, config, ranks)

    model = adapted_model(config, prepared.fitted.answer_model)
    if model is not None:
        # What the steps before the second validation ask for is read at once, with one estimate of the time left.
        early = range(min(config.train.validate_every, config.train.steps))
        trained_on = [episode for step in early for episode in ranks.share(batch_at(step))]
        model.read(items_in([*ranks.share(_validation_episodes(data, config)), *trained_on]))
    fitted = started(prepared.fitted, worth) if learns_by_gradient(config, prepared.fitted.meta) else prepared.fitted
    anchor = fitted.meta.tensors()

    def mean_gradient(prepared: Prepared, batch: list[Episode], meta: MetaState) -> MetaGradient:
        own = ranks.share(batch)
        with one_thread(adapted_model(config, fitted.answer_model) is None):
            gradient = _meta_gradient(prepared, config, meta, own) if own else None
        return mean_over_ranks(gradient, meta, len(batch), ranks)

    def gradient_at(meta: MetaState, step: int) -> MetaGradient:
        if config.private.on:
            gradient = _private_gradient(data, prepared, config, meta, step)
        elif old is None or old.replayed is None or not config.train.replay:
            gradient = mean_gradient(prepared, batch_at(step), meta)
        else:
            theirs, before = old.replayed
            gradient = with_replay(
                lambda users: mean_gradient(prepared, batch_at(step, users), meta),
                lambda users: mean_gradient(before, _batch(theirs, before, config, step, users), meta),
                config.train.users,
                config.train.replay,
            )
        return gradient if old is None else pulled(gradient, meta, anchor, config.train.anchor)

    def validate(meta: MetaState) -> float:
        value = worth(folded(replace(fitted, meta=meta)))
        if watch is not None:
            watch(value)
        return value

    trained = train(
        fitted.meta,
        gradient_at,
        validate,
        config.train,
        checkpoint=checkpoint,
        identity=identity,
        resume=resume,
        ranks=ranks,
        clear=clear,
    )
    found = replace(
        fitted, meta=trained.best, training={**training_summary(trained), "users_by_shots": summary(enough)}
    )
    if config.private.on:
        rate = _sample_rate(data, config)
        found = replace(found, training={**found.training, "privacy": statement(trained.steps, rate, config.private)})
    return chosen(folded(found), worth) if config.meta.half_life == "learned" else found


def _batch(data: TaskData, prepared: Prepared, config: RunConfig, step: int, users: int) -> list[Episode]:
    """Returns the episodes of a step's meta-training users."""
    sizes = episode_sizes(data.task, config.train)
    return training_batch(
        data.interactions,
        data.parts["train"],
        batch_users=users,
        shots=sizes.shots,
        max_query=config.train.max_query,
        min_query=sizes.min_query,
        seed=config.seed,
        step=step,
        hidden=prepared.context.hidden,
        short_supports=sizes.short_supports,
    )


def _sample_rate(data: TaskData, config: RunConfig) -> float:
    """Returns the probability with which a meta-training user takes part in a step of private meta-training."""
    return min(1.0, config.train.users / len(data.parts["train"]))


def _private_gradient(
    data: TaskData, prepared: Prepared, config: RunConfig, meta: MetaState, step: int
) -> MetaGradient:
    """Returns the meta-gradient of a step that users take part in by independent draws; see `metarec.meta.private`."""
    rate = _sample_rate(data, config)
    deltas = user_deltas(data, prepared, config, meta, step, rate)
    return private_gradient(
        meta, deltas, config.private, rate * len(data.parts["train"]), noise_generator(config.seed, step)
    )


def noise_generator(seed: int, step: int) -> torch.Generator:
    """Returns what draws the noise of a step of private meta-training."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step, 2]).generate_state(1)[0]))


def user_deltas(
    data: TaskData, prepared: Prepared, config: RunConfig, meta: MetaState, step: int, rate: float, place: int = 0
) -> list[MetaGradient]:
    """Returns each user's own meta-gradient at a step that users take part in by independent draws.

    Args:
        data: Its meta-training users may take part.
        prepared: What was fitted before meta-training.
        config: The settings.
        meta: The meta-parameters.
        step: Number of the step.
        rate: The probability with which each takes part.
        place: Which of several clients this is; each draws for its own users.
    """
    users = data.parts["train"]
    drawn = np.random.default_rng([config.seed, step, 1, *([place] if place else [])]).random(len(users))
    taking_part = users[drawn < rate]
    there = replace(data, parts={**data.parts, "train": taking_part})
    try:
        batch = _batch(there, prepared, config, step, max(1, len(taking_part)))
    except DataError:  # nobody who was drawn has ratings enough
        return []
    with one_thread(adapted_model(config, prepared.fitted.answer_model) is None):
        return [_meta_gradient(prepared, config, meta, [episode]) for episode in batch]


def _meta_gradient(prepared: Prepared, config: RunConfig, meta: MetaState, batch: Sequence[Episode]) -> MetaGradient:
    """Returns the meta-gradient of a batch of meta-training users, by the algorithm that the settings name."""
    adapted = adapted_model(config, prepared.fitted.answer_model)
    damping = config.meta.user_bias_damping
    loss = smoothed(LOSSES.get(config.train.loss), config.train.label_smoothing)

    def inner(some: Sequence[Episode]) -> Loss:
        support = _out_of_fold_batch(prepared, some, config, support=True)
        return support_loss(
            support,
            adapted,
            shrinkage=config.meta.shrinkage,
            user_bias_damping=damping,
            half_life=half_life_of(config, prepared.fitted),
        )

    def outer(some: Sequence[Episode]) -> Loss:
        query = _out_of_fold_batch(prepared, some, config, support=False)
        return query_loss(query, adapted, loss, sharpness=config.train.sharpness)

    head = head_of(config)
    if head is not None and adapted is not None:
        return _through_head(prepared, config, meta, batch, head, outer(batch))
    steps = config.meta.inner_steps if meta.log_rate else 0
    if config.meta.engine == "learn2learn":
        losses = [(inner([episode]), outer([episode])) for episode in batch]
        return learn2learn.meta_gradient(meta, losses, steps, second_order=config.meta.algorithm == "maml")
    found: MetaGradient = ALGORITHMS.get(config.meta.algorithm)(meta, inner(batch), outer(batch), len(batch), steps)
    return found


def _through_head(
    prepared: Prepared,
    config: RunConfig,
    meta: MetaState,
    batch: Sequence[Episode],
    head: ClosedFormHead,
    query: Loss,
) -> MetaGradient:
    """Returns the meta-gradient where users have a head in closed form, after gradient steps where they take some."""
    adapted = adapted_model(config, prepared.fitted.answer_model)
    assert adapted is not None
    support = _out_of_fold_batch(prepared, batch, config, support=True)
    shift = prepared.head_shift([episode.user for episode in batch])
    fit = head_solver(support, adapted, head, user_bias_damping=config.meta.user_bias_damping)

    def solve(state: AdapterState) -> AdapterState:
        return fit(with_shifted_head(state, shift))

    if not takes_steps(config.meta.algorithm):
        return closed_form(meta, solve, query, len(batch))
    errors = posterior_support_loss(support, adapted, shrinkage=config.meta.shrinkage)
    found: MetaGradient = ALGORITHMS.get(config.meta.algorithm)(
        meta,
        lambda state: errors(with_shifted_head(state, shift)),
        lambda state: query(solve(state)),
        len(batch),
        config.meta.inner_steps,
    )
    return found


def training_summary(trained: Trained) -> dict[str, Any]:
    """Returns what is kept of an outer loop, as JSON values."""
    return {
        "best_step": trained.best_step,
        "best_validation_auc": trained.best_value,
        "steps": trained.steps,
        "diverged_inner_loops": trained.diverged,
        "history": [
            {"step": step, "query_loss": loss, "validation_auc": value} for step, loss, value in trained.history
        ],
    }


def _out_of_fold_batch(prepared: Prepared, batch: Sequence[Episode], config: RunConfig, *, support: bool) -> Batch:
    """Pads meta-training users' supports or queries.

    Every term is that of a fold that has not seen the user, as it is for any new one: a term that has seen a user's
    ratings would teach the adapter that nothing is left to learn.
    """
    fitted = prepared.fitted
    values = {
        name: [
            crossed.without(episode.user).leave_one_out([episode.support])[0]
            if support
            else crossed.without(episode.user).values([episode.support], [episode.query.items])[0]
            for episode in batch
        ]
        for name, crossed in prepared.crossed.items()
    }
    return collate(
        [episode.support if support else episode.query for episode in batch],
        values,
        fitted.prior,
        adapted_model(config, fitted.answer_model),
        prepared.context.threshold,
        config.device,
    )


def _validation_episodes(data: TaskData, config: RunConfig) -> Sequence[Episode]:
    return data.evaluated("validation")[0][: config.train.validation_users]


def validation_auc_of(data: TaskData, fitted: Fitted, config: RunConfig, ranks: Ranks = ALONE) -> float:
    """Returns the mean AUC of a task's first validation users over its K above 0."""
    episodes = _validation_episodes(data, config)
    shots = [count for count in data.task.shots if count > 0] or list(data.task.shots)
    return validation_auc(meta_scorer(fitted, config), episodes, shots, data.task.like_threshold, ranks)
