"""The outer loop: meta-training on episodes with validation, early stopping and exact resumption.

A step depends only on the seed, its number and the state before it, and checkpoints hold the whole state. A run that
was killed and resumed therefore ends with the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from metarec.config import TrainConfig
from metarec.errors import TrainingError, shown
from metarec.files.artifacts import dump_json, recover_dir
from metarec.meta.algorithms import MetaGradient
from metarec.meta.checkpoints import AFTER_STEP, Progress, load_checkpoint, refuse_overwriting, save_checkpoint
from metarec.meta.distributed import ALONE, Ranks
from metarec.meta.inner_loop import MetaState
from metarec.meta.tracking import track
from metarec.system.progress import progress
from metarec.system.tensors import read_tensors

MetaGradientAt = Callable[[MetaState, int], MetaGradient]
Validate = Callable[[MetaState], float]


class AfterStep(Protocol):
    """What changes the meta-parameters after the optimizer's step, by a state of its own that checkpoints keep."""

    def __call__(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Changes the tensors in place.

        Args:
            tensors: The meta-parameters by name, with the gradients of the step.
            step: How many steps have been taken.
        """

    def state(self) -> dict[str, Tensor]:
        """Returns its state as tensors by name."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Inverts `state`."""


@dataclass(frozen=True)
class Trained:
    """The result of an outer loop.

    Args:
        best: The meta-parameters with the best validation value; the last where the settings keep those.
        best_step: The number of steps after which they were reached; 0 is the untrained state.
        best_value: Their validation value, higher is better.
        steps: Number of steps taken.
        diverged: Number of inner loops with a non-finite loss.
        history: ``(step, mean query loss since the last validation, validation value)``; the loss is None where there
            was none, before the first step and where all users diverged.
    """

    best: MetaState
    best_step: int
    best_value: float
    steps: int
    diverged: int
    history: tuple[tuple[int, float | None, float], ...]


def train(
    initial: MetaState,
    gradient_at: MetaGradientAt,
    validate: Validate,
    config: TrainConfig,
    *,
    checkpoint: Path,
    identity: Mapping[str, Any],
    resume: bool,
    description: str = "meta-training",
    ranks: Ranks = ALONE,
    clear: Callable[[], None] | None = None,
    after_step: AfterStep | None = None,
) -> Trained:
    """Runs the outer loop with AdamW, warm-up and a schedule of rates, clipping and early stopping.

    A checkpoint is written at every validation, and when the loop is interrupted. Of several processes the first one
    moves the meta-parameters, decides and writes; the others hold copies of its meta-parameters, bit for bit.

    Args:
        initial: Meta-parameters to start from.
        gradient_at: The meta-gradient of a state at a step, over all ranks; a pure function.
        validate: A value to maximize.
        config: The outer loop's settings.
        checkpoint: Directory of the checkpoint.
        identity: Everything that the result of the run depends on but `config.steps`; a checkpoint of another run is
            refused. With more steps than before, a run goes on at its step of the longer schedule.
        resume: Continues from the checkpoint if there is one.
        description: Text of the progress bar.
        ranks: The processes that train together.
        clear: Deletes what training takes the place of, the checkpoint's directory with it. It is called once the first
            gradient is there, so that settings that cannot be trained cost nothing; None where nothing is in the way.
        after_step: Is called after every step of the optimizer, by the first process alone.

    Raises:
        ArtifactError: The checkpoint is damaged or of another run, or there is one and nobody said to go on from it.
        TrainingError: Most of the last steps' inner loops diverged, or the ranks were given different runs.
        RankError: Another rank failed.
        KeyboardInterrupt: After the checkpoint was written.
    """
    tensors = {name: value.detach().clone() for name, value in initial.tensors().items()}
    optimizer, schedule = _optimizer(tensors, config)
    best = {name: value.clone() for name, value in tensors.items()}
    at = Progress()
    if ranks.leads and clear is None:
        refuse_overwriting(checkpoint, resume=resume)
        if resume and recover_dir(checkpoint):
            at, best = load_checkpoint(checkpoint, tensors, optimizer, identity, config.steps)
            if after_step is not None:
                after_step.restore(read_tensors(checkpoint / AFTER_STEP))
    at = _agreed(ranks, at, {**identity, "train.steps": config.steps})
    ranks.copy_first([*tensors.values(), *(best[name] for name in tensors)])
    meta = MetaState.from_tensors(tensors)
    waiting = clear

    def begin() -> None:
        nonlocal waiting
        if waiting is not None and ranks.leads:
            waiting()
            refuse_overwriting(checkpoint, resume=False)
            waiting = None
            save()

    def check() -> None:
        nonlocal best
        value = torch.tensor(validate(meta), dtype=torch.float64)
        ranks.copy_first([value])
        if at.record(float(value), keep_last=config.keep == "last"):
            best = {name: tensor.clone() for name, tensor in tensors.items()}
        if ranks.leads:
            facts = {
                "validation AUC": float(value),
                "best validation AUC": at.best_value,
                "query loss": at.history[-1][1],
            }
            track(at.step, {**facts, "rate": schedule(at.step), "diverged inner loops": at.diverged})
        save()

    def save() -> None:
        if ranks.leads and waiting is None:
            after = None if after_step is None else after_step.state()
            save_checkpoint(checkpoint, tensors, best, optimizer, at, identity, after)

    with _deferred_interrupt() as interrupted, progress(description, config.steps) as advance:
        if not at.history:
            check()
        while at.step < config.steps and not _stale(at, config):
            gradient = _finite(gradient_at(meta, at.step))
            begin()
            if ranks.leads:
                _step(tensors, gradient, optimizer, schedule(at.step), config.clip)
                if after_step is not None:
                    after_step(tensors, at.step + 1)
            ranks.copy_first(tensors.values())
            at.count(gradient)
            at.refuse_divergence()
            if at.step % config.validate_every == 0 or at.step == config.steps:
                check()
            advance(at.step, f"validation AUC {at.history[-1][2]:.4f} (best {at.best_value:.4f})")
            if ranks.any(interrupted()):
                save()
                raise KeyboardInterrupt
    at.refuse_divergence(at_end=True)
    return Trained(MetaState.from_tensors(best), at.best_step, at.best_value, at.step, at.diverged, at.history)


def _agreed(ranks: Ranks, at: Progress, identity: Mapping[str, Any]) -> Progress:
    """Returns how far the first rank is, on every rank.

    Raises:
        TrainingError: This rank was given other data or settings than the first.
    """
    if ranks.size == 1:
        return at
    own = json.loads(dump_json(dict(identity)))
    first = json.loads(ranks.first_text(dump_json({"identity": own, "at": at.to_json()})))
    for key, value in first["identity"].items():
        if own.get(key) != value:
            raise TrainingError(
                f"the {key} of process {ranks.rank} is {shown(own.get(key))}, that of process 0 {shown(value)}",
                "Start all processes with the same data and settings",
            )
    return Progress.from_json(first["at"])


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Defers Ctrl-C until a step is done, because a run can only be resumed from a state between two steps.

    A second Ctrl-C interrupts at once. Outside the main thread signals are not changed.
    """
    pressed = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _stale(at: Progress, config: TrainConfig) -> bool:
    """Says whether validation has not improved for `patience` times."""
    return sum(step > at.best_step for step, _, _ in at.history) >= config.patience


def _optimizer(tensors: Mapping[str, Tensor], config: TrainConfig) -> tuple[torch.optim.AdamW, Callable[[int], float]]:
    """Returns AdamW over two groups (adapters; score weights and inner rates) and the schedule's factor by step."""

    def is_adapter(name: str) -> bool:
        return tensors[name].numel() > 1 and not name.startswith("log_rate/")

    adapters = [tensors[name] for name in tensors if is_adapter(name)]
    scalars = [tensors[name] for name in tensors if not is_adapter(name)]
    groups = [
        {"params": adapters, "lr": config.lr, "base_lr": config.lr, "weight_decay": config.weight_decay},
        {"params": scalars, "lr": config.score_lr, "base_lr": config.score_lr, "weight_decay": 0.0},
    ]

    def schedule(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        if config.schedule == "constant":
            return 1.0
        done = (step - config.warmup) / max(config.steps - config.warmup, 1)
        return 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.AdamW([group for group in groups if group["params"]]), schedule


def _finite(gradient: MetaGradient) -> MetaGradient:
    """Returns a gradient that can be followed: zero, and all users diverged, where its norm is not finite."""
    norms = [torch.linalg.vector_norm(value.float()) for value in gradient.gradients.values()]
    if torch.linalg.vector_norm(torch.stack(norms)).isfinite():
        return gradient
    zero = {name: torch.zeros_like(value) for name, value in gradient.gradients.items()}
    return MetaGradient(gradient.loss, zero, torch.ones_like(gradient.diverged))


def _step(
    tensors: Mapping[str, Tensor], gradient: MetaGradient, optimizer: torch.optim.AdamW, factor: float, clip: float
) -> None:
    for name, tensor in tensors.items():
        tensor.grad = gradient.gradients[name].to(tensor.dtype)
    torch.nn.utils.clip_grad_norm_(list(tensors.values()), clip, error_if_nonfinite=True)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    optimizer.step()
