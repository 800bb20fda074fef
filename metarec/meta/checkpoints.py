"""Checkpoints of a training: its whole state as safetensors and JSON, to be gone on from bit for bit."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metarec.errors import ArtifactError, TrainingError, shown
from metarec.files.artifacts import MANIFEST, dump_json, load_json, recover_dir, replace_dir, verify_dir
from metarec.meta.algorithms import MetaGradient
from metarec.system.tensors import read_tensors, write_tensors

AFTER_STEP = "after_step.safetensors"
_STATE = "state.json"
# Training stops where more than this share of the users of the last steps diverged, so many steps at most.
_MOST, _LAST_STEPS = 0.5, 10
_ADVICE = "Lower meta.inner_lr or meta.inner_steps, or train.lr where it began late"
# So many names of settings a message about another run shows.
_SHOWN = 2
_LOG = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a training is: the part of its state that is not tensors; JSON-able."""

    step: int = 0
    best_step: int = 0
    best_value: float = -math.inf
    diverged: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    history: tuple[tuple[int, float | None, float], ...] = ()
    last_steps: tuple[tuple[int, int], ...] = ()  # of each the users that diverged, and all of them

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {**asdict(self), "best_value": None if math.isinf(self.best_value) else self.best_value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Progress:
        """Inverts `to_json`."""
        kept = {name: value for name, value in values.items() if name != "best_value" or value is not None}
        for name in ("history", "last_steps"):
            kept[name] = tuple(tuple(entry) for entry in kept.get(name, ()))
        return cls(**kept)

    def count(self, gradient: MetaGradient) -> None:
        """Counts a step, with the losses of the users that did not diverge; warns of the first that did."""
        lost, users = int(gradient.diverged.sum()), len(gradient.diverged)
        self.step += 1
        if lost and not self.diverged:
            _LOG.warning(
                "%d of the %d inner loops of step %d diverged and are left out. %s", lost, users, self.step, _ADVICE
            )
        self.diverged += lost
        self.last_steps = (*self.last_steps, (lost, users))[-_LAST_STEPS:]
        self.loss_sum += float(gradient.loss[~gradient.diverged].sum())
        self.loss_count += users - lost

    def refuse_divergence(self, *, at_end: bool = False) -> None:
        """Stops a training of whose last steps' users most diverged.

        Raises:
            TrainingError: They did.
        """
        lost, users = (sum(counts) for counts in zip(*self.last_steps, strict=True)) if self.last_steps else (0, 0)
        if lost > _MOST * users and (at_end or len(self.last_steps) == _LAST_STEPS):
            raise TrainingError(
                f"{lost} of the {users} inner loops of the last {len(self.last_steps)} steps diverged, "
                f"at step {self.step}: what is trained on the others is of no use",
                _ADVICE,
            )

    def record(self, value: float, *, keep_last: bool = False) -> bool:
        """Records a validation value, and returns whether what it is of is kept: the best so far, or the last."""
        loss = self.loss_sum / self.loss_count if self.loss_count else None
        self.history = (*self.history, (self.step, loss, value))
        self.loss_sum, self.loss_count = 0.0, 0
        improved = keep_last or value > self.best_value
        if improved:
            self.best_value, self.best_step = value, self.step
        return improved


def save_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor],
    best: Mapping[str, Tensor],
    optimizer: torch.optim.AdamW,
    at: Progress,
    identity: Mapping[str, Any],
    after_step: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the whole state of a training; an older one is exchanged for it in one step.

    Args:
        path: Directory of the checkpoint.
        tensors: The meta-parameters by name.
        best: Those that were best on validation users.
        optimizer: With its moments.
        at: How far the training is.
        identity: What it is a function of, as JSON values.
        after_step: The state of what changes the meta-parameters after a step; see `metarec.meta.outer_loop.AfterStep`.
    """
    moments = {
        f"{index}/{key}": value
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    with replace_dir(path, "checkpoint") as directory:
        write_tensors(directory / "meta.safetensors", tensors)
        write_tensors(directory / "best.safetensors", best)
        write_tensors(directory / "optimizer.safetensors", moments)
        if after_step is not None:
            write_tensors(directory / AFTER_STEP, after_step)
        (directory / _STATE).write_text(dump_json({"identity": dict(identity), **at.to_json()}), encoding="utf-8")


def refuse_overwriting(path: Path, *, resume: bool) -> None:
    """Refuses to train over a checkpoint that nobody said to go on from.

    Raises:
        ArtifactError: There is one, or something else; an empty directory is nothing.
    """
    if recover_dir(path) and not resume and not (path.is_dir() and not any(path.iterdir())):
        raise ArtifactError(
            f"'{path}' holds a checkpoint already",
            "Go on with resume=True, train anew with fresh=True, or choose another directory",
        )


def refuse_what_is_no_checkpoint(path: Path) -> None:
    """Refuses a path that holds something else than a checkpoint; nothing, or an empty directory, is no hindrance.

    Raises:
        ArtifactError: It does.
    """
    if recover_dir(path) and not (path.is_dir() and not any(path.iterdir())) and not (path / MANIFEST).exists():
        raise ArtifactError(f"'{path}' was not written by metarec", "Move it, or choose another directory")


def clear_checkpoint(path: Path) -> None:
    """Deletes a checkpoint, if there is one.

    Raises:
        ArtifactError: Something else is there.
    """
    refuse_what_is_no_checkpoint(path)
    if (path / MANIFEST).exists():
        shutil.rmtree(path)


def check_checkpoint(path: Path, identity: Mapping[str, Any], steps: int) -> None:
    """Refuses a checkpoint that a run cannot go on from; see `metarec.meta.outer_loop.train`.

    Args:
        path: Directory of the checkpoint.
        identity: See `metarec.meta.outer_loop.train`.
        steps: The outer loop's number of steps.

    Raises:
        ArtifactError: It is damaged, of another run, or has taken more steps.
    """
    verify_dir(path, "checkpoint")
    state = load_json(path / _STATE)
    found = state["identity"]
    differ = [key for key, value in identity.items() if key not in found or found[key] != value]
    if differ:
        said = [f"its {key} is {shown(found.get(key))}, not {shown(identity[key])}" for key in differ[:_SHOWN]]
        more = f" ({len(differ) - _SHOWN} more differ)" if len(differ) > _SHOWN else ""
        raise ArtifactError(
            f"the checkpoint '{path}' is of another run: {' and '.join(said)}{more}",
            "Resume with the same data and settings, train anew, or choose another run name",
        )
    if state["step"] > steps:
        raise ArtifactError(
            f"the checkpoint '{path}' has taken {state['step']} steps, and train.steps is {steps}",
            "Set train.steps to as many at least, or choose another run name",
        )


def load_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], optimizer: torch.optim.AdamW, identity: Mapping[str, Any], steps: int
) -> tuple[Progress, dict[str, Tensor]]:
    """Returns how far a training is, and the best meta-parameters; sets the tensors and the optimizer's moments.

    Args:
        path: Directory of the checkpoint.
        tensors: The meta-parameters by name; they are set in place.
        optimizer: Its moments are set.
        identity: See `check_checkpoint`.
        steps: See `check_checkpoint`.

    Raises:
        ArtifactError: See `check_checkpoint`.
    """
    check_checkpoint(path, identity, steps)
    state = load_json(path / _STATE)
    del state["identity"]
    for name, value in read_tensors(path / "meta.safetensors").items():
        tensors[name].copy_(value)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in read_tensors(path / "optimizer.safetensors").items():
        index, _, key = name.partition("/")
        moments.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    best = read_tensors(path / "best.safetensors")
    return Progress.from_json(state), {name: value.to(tensors[name].device) for name, value in best.items()}
