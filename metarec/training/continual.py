"""Meta-training that goes on from an old run: where it starts, what keeps it from forgetting, and what it forgot.

Two guards against forgetting: a share of every step's users is replayed from the old run's task, or the
meta-parameters are pulled back to the old ones.

Sources: Rolnick et al. 2019, "Experience Replay for Continual Learning", for the replay; Li, Grandvalet and Davoine
2018, "Explicit Inductive Bias for Transfer Learning", eq. 2 ("L2-SP"), for the pull.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metarec.config import RunConfig
from metarec.errors import ConfigError
from metarec.evaluation.evaluate import evaluate
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import MetaState
from metarec.training.fitting import Fitted, Prepared, meta_scorer, read_items

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData
    from metarec.evaluation.report import Report

_BEFORE, _AFTER = "before", "after"


@dataclass(frozen=True)
class OldRun:
    """What meta-training goes on from.

    Args:
        fitted: What the old run left behind.
        digest: Names it, in checkpoints.
        replayed: The old task's data, and its parts as meta-training users see them; None where nothing is replayed.
    """

    fitted: Fitted
    digest: str
    replayed: tuple[TaskData, Prepared] | None = None


def start_from(fresh: MetaState, old: MetaState) -> MetaState:
    """Returns fresh meta-parameters with the old ones in the place of those of the same name and shape.

    Raises:
        ConfigError: The old run's score has other terms, or its adapters sit elsewhere.
    """
    new, before = fresh.tensors(), old.tensors()
    reshaped = {name for name in new.keys() & before.keys() if new[name].shape != before[name].shape}
    differ = sorted((new.keys() ^ before.keys()) | reshaped)
    if differ:
        raise ConfigError(
            f"the old run's meta-parameters differ in {len(differ)} tensors, '{differ[0]}' among them",
            "Train with the old run's backbone, score, adapter and meta settings",
        )
    return MetaState.from_tensors({name: before[name].to(new[name]).clone() for name in new})


def pulled(gradient: MetaGradient, meta: MetaState, anchor: Mapping[str, Tensor], strength: float) -> MetaGradient:
    """Returns a meta-gradient with that of ``strength / 2 |meta - anchor|^2`` added; 0 returns it as it is."""
    if not strength:
        return gradient
    now = meta.tensors()
    moved = {
        name: value + strength * (now[name] - anchor[name]).detach().to(value)
        for name, value in gradient.gradients.items()
    }
    return replace(gradient, gradients=moved)


def with_replay(
    new: Callable[[int], MetaGradient], old: Callable[[int], MetaGradient], users: int, share: float
) -> MetaGradient:
    """Returns the meta-gradient of a step of which a share of the users is old.

    Args:
        new: Returns the mean meta-gradient of so many new users.
        old: Returns that of so many old ones.
        users: How many in all.
        share: The share of old users, of which there is one at least.
    """
    count = min(max(1, round(share * users)), users - 1)
    ours, theirs = new(users - count), old(count)
    weights = [len(part.loss) / (len(ours.loss) + len(theirs.loss)) for part in (ours, theirs)]
    gradients = {
        name: weights[0] * value + weights[1] * theirs.gradients[name] for name, value in ours.gradients.items()
    }
    return MetaGradient(torch.cat([ours.loss, theirs.loss]), gradients, torch.cat([ours.diverged, theirs.diverged]))


def forgetting(
    new: Fitted, new_data: TaskData, old: Fitted, old_data: TaskData, config: RunConfig, old_config: RunConfig
) -> list[dict[str, Any]]:
    """Returns what going on did to old and to new users: the AUC of test users of both tasks, before and after.

    Args:
        new: What meta-training left behind on the new task.
        new_data: Its data.
        old: What the old run left behind, with the old meta-parameters.
        old_data: Its data; its test users are those that nobody trained on.
        config: The settings.
        old_config: The old run's.

    Returns:
        One row for old users and one for new ones, at the largest K: AUC before and after, the paired difference and
        its interval.
    """
    rows = []
    for whose, fitted, data, settings in (
        ("old users", old, old.split.without_seen(old_data), old_config),
        ("new users", new, new_data, config),
    ):
        episodes, _ = data.evaluated("test")
        shots = max(data.task.shots)
        read_items(fitted, episodes)
        report = evaluate(
            [
                meta_scorer(replace(fitted, meta=old.meta), settings, name=_BEFORE),
                meta_scorer(replace(fitted, meta=new.meta), settings, name=_AFTER),
            ],
            episodes,
            [shots],
            data.interactions.catalog,
            threshold=data.task.like_threshold,
            seed=settings.seed,
            baseline=_BEFORE,
            left_out={},
            short_supports=data.task.short_supports,
        )
        rows.append({"users": whose, "task": data.task.name, "shots": shots, **_row(report, shots)})
    return rows


def _row(report: Report, shots: int) -> dict[str, Any]:
    before, after = (report.values(name, shots) for name in (_BEFORE, _AFTER))
    gain, (low, high) = report.difference(_AFTER, shots, _BEFORE, shots)
    return {
        "count": len(before),
        "auc_before": float(before.mean()),
        "auc_after": float(after.mean()),
        "difference": float(gain),
        "interval": [float(low), float(high)],
    }
