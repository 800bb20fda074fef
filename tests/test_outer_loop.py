"""The outer loop resumes exactly, stops early, and keeps its state through a kill."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metarec.config import TrainConfig
from metarec.errors import ArtifactError, TrainingError
from metarec.meta.algorithms import MetaGradient, fomaml
from metarec.meta.inner_loop import MetaState, initial_meta_state
from metarec.meta.outer_loop import Trained, train
from metarec.system.tensors import AdapterState

CONFIG = TrainConfig(steps=30, validate_every=10, warmup=3, patience=99)


def start() -> MetaState:
    init = {"w": torch.linspace(-1, 1, 6).view(2, 3), "bias": torch.tensor(0.3)}
    return initial_meta_state(init, ["w"], 0.1)


def gradient_at(meta: MetaState, step: int) -> MetaGradient:
    target = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(step))

    def loss(state: AdapterState) -> Tensor:
        return (state["w"] + state["bias"][:, None, None] - target).square().sum((1, 2))

    return fomaml(meta, loss, loss, 4, 2)


def validate(meta: MetaState) -> float:
    return -float(meta.init["w"].square().sum())


def run(path: Path, *, resume: bool = False, at: Callable[[int], None] = lambda _: None) -> Trained:
    def gradient(meta: MetaState, step: int) -> MetaGradient:
        at(step)
        return gradient_at(meta, step)

    return train(start(), gradient, validate, CONFIG, checkpoint=path, identity={"seed": 0}, resume=resume)


def test_the_last_step_is_kept_where_settings_say_so_however_good_it_is(tmp_path: Path) -> None:
    worth = iter([0.9, 0.8, 0.7, 0.6])
    config = CONFIG.model_copy(update={"keep": "last", "patience": 1})
    arguments = {"identity": {}, "resume": False}
    last = train(start(), gradient_at, lambda _: next(worth), config, checkpoint=tmp_path / "last", **arguments)  # type: ignore[arg-type]
    assert (last.steps, last.best_step, last.best_value) == (30, 30, 0.6), "nothing is stale"
    assert any(not torch.equal(value, start().tensors()[name]) for name, value in last.best.tensors().items())
    worth = iter([0.9, 0.8, 0.7, 0.6])
    best = train(start(), gradient_at, lambda _: next(worth), CONFIG, checkpoint=tmp_path / "best", **arguments)  # type: ignore[arg-type]
    assert all(torch.equal(value, start().tensors()[name]) for name, value in best.best.tensors().items())
    assert "keep" not in CONFIG.model_dump(mode="json"), "identities are those of before there was a choice"


def same(first: Trained, second: Trained) -> bool:
    tensors = first.best.tensors()
    return first.history == second.history and all(
        torch.equal(tensors[name], value) for name, value in second.best.tensors().items()
    )


@pytest.mark.parametrize("stop", [1, 10, 17, 29])
def test_ctrl_c_loses_nothing_and_resume_gives_the_same_weights(stop: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")

    def press(step: int) -> None:
        if step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", at=press)
    steps: list[int] = []
    resumed = run(tmp_path / "part", resume=True, at=steps.append)
    assert steps == list(range(stop + 1, 30)), "no finished step is repeated"
    assert same(whole, resumed)


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        from test_outer_loop import run
        run(Path({str(tmp_path / "part")!r}), at=lambda step: step == 17 and os.kill(os.getpid(), signal.SIGKILL))
        """
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    steps: list[int] = []
    assert same(whole, run(tmp_path / "part", resume=True, at=steps.append))
    assert steps[0] == 10, "it went on from the last checkpoint"


def test_resume_finds_a_checkpoint_that_a_killed_process_had_put_aside(tmp_path: Path) -> None:
    whole = run(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / ".run.0123456789abcdef.old")
    steps: list[int] = []
    assert same(whole, run(tmp_path / "run", resume=True, at=steps.append))
    assert steps == [], "it started anew"


def test_resuming_a_finished_run_takes_no_step(tmp_path: Path) -> None:
    whole = run(tmp_path / "run")
    steps: list[int] = []
    assert same(whole, run(tmp_path / "run", resume=True, at=steps.append))
    assert steps == []


def test_resuming_keeps_the_best_state_on_the_device_of_the_run(tmp_path: Path) -> None:
    run(tmp_path / "run")
    # A device that every machine has: its tensors have a shape and no numbers, and none are read here.
    elsewhere = MetaState.from_tensors({name: value.to("meta") for name, value in start().tensors().items()})
    resumed = train(
        elsewhere, gradient_at, validate, CONFIG, checkpoint=tmp_path / "run", identity={"seed": 0}, resume=True
    )
    assert {value.device.type for value in resumed.best.tensors().values()} == {"meta"}


def test_training_stops_when_validation_gets_no_better(tmp_path: Path) -> None:
    impatient = CONFIG.model_copy(update={"patience": 2})
    values = iter([1.0, 3.0, 2.0, 2.5])
    result = train(
        start(), gradient_at, lambda _: next(values), impatient, checkpoint=tmp_path / "a", identity={}, resume=False
    )
    assert (result.best_step, result.best_value, result.steps) == (10, 3.0, 30)
    values = iter([3.0, 1.0, 2.0])
    result = train(
        start(), gradient_at, lambda _: next(values), impatient, checkpoint=tmp_path / "b", identity={}, resume=False
    )
    assert (result.best_step, result.steps) == (0, 20)
    assert torch.equal(result.best.init["w"], start().init["w"]), "the best is kept, not the last"


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run")
    with pytest.raises(ArtifactError, match="its seed is 0, not 1"):
        train(start(), gradient_at, validate, CONFIG, checkpoint=tmp_path / "run", identity={"seed": 1}, resume=True)


def test_a_refusal_names_two_differences_in_short(tmp_path: Path) -> None:
    known = {"train.lr": 0.1, "data": "abc", "score": ["x" * 100], "seed": 0}
    train(start(), gradient_at, validate, CONFIG, checkpoint=tmp_path / "run", identity=known, resume=False)
    other = {"seed": 0, "score": [], "train.lr": 0.2, "data": "def", "new": 1}
    with pytest.raises(ArtifactError) as caught:
        train(start(), gradient_at, validate, CONFIG, checkpoint=tmp_path / "run", identity=other, resume=True)
    said = str(caught.value)
    assert "another run: its score is ['xxxxx" in said
    assert "..., not [] and its train.lr is 0.1, not 0.2 (2 more differ). Resume with the same data" in said
    assert "x" * 90 not in said


def test_more_steps_go_on_from_where_it_was(tmp_path: Path) -> None:
    run(tmp_path / "run")
    steps: list[int] = []

    def gradient(meta: MetaState, step: int) -> MetaGradient:
        steps.append(step)
        return gradient_at(meta, step)

    longer = CONFIG.model_copy(update={"steps": 40})
    result = train(start(), gradient, validate, longer, checkpoint=tmp_path / "run", identity={"seed": 0}, resume=True)
    assert steps == list(range(30, 40))
    assert [step for step, _, _ in result.history] == [0, 10, 20, 30, 40]
    with pytest.raises(ArtifactError, match="has taken 40 steps"):
        run(tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["meta.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_truncated_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    run(tmp_path / "run")
    file = tmp_path / "run" / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ArtifactError):
        run(tmp_path / "run", resume=True)


def test_users_that_diverge_are_counted_and_left_out(tmp_path: Path) -> None:
    def half_diverged(meta: MetaState, step: int) -> MetaGradient:
        gradient = gradient_at(meta, step)
        flags = torch.tensor([True, False, True, False])
        return replace(gradient, diverged=flags, loss=gradient.loss.masked_fill(flags, float("nan")))

    result = train(start(), half_diverged, validate, CONFIG, checkpoint=tmp_path, identity={}, resume=False)
    assert result.diverged == 60
    assert [loss is None for _, loss, _ in result.history] == [True, False, False, False]
    assert all(math.isfinite(loss) for _, loss, _ in result.history if loss is not None)


def diverging(first: int, users: int = 4) -> Callable[[MetaState, int], MetaGradient]:
    """Returns what diverges for some users from a step on."""

    def gradient(meta: MetaState, step: int) -> MetaGradient:
        found = gradient_at(meta, step)
        flags = torch.arange(4) < (users if step >= first else 0)
        return replace(found, diverged=flags, loss=found.loss.masked_fill(flags, float("nan")))

    return gradient


def test_the_first_divergence_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(start(), diverging(4, users=1), validate, CONFIG, checkpoint=tmp_path, identity={}, resume=False)
    assert [record.getMessage() for record in caplog.records] == [
        "1 of the 4 inner loops of step 5 diverged and are left out. "
        "Lower meta.inner_lr or meta.inner_steps, or train.lr where it began late"
    ]


@pytest.mark.parametrize(("steps", "said"), [(30, "40 of the 40 inner loops of the last 10"), (3, "12 of the 12")])
def test_training_stops_where_most_users_diverge(steps: int, said: str, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"steps": steps})
    for resume in (False, True):
        with pytest.raises(TrainingError, match=f"{said}.*Lower meta.inner_lr"):
            train(start(), diverging(0), validate, config, checkpoint=tmp_path, identity={}, resume=resume)


def test_few_steps_that_diverge_stop_nothing(tmp_path: Path) -> None:
    late = diverging(26)
    assert train(start(), late, validate, CONFIG, checkpoint=tmp_path, identity={}, resume=False).steps == 30


@pytest.mark.parametrize("factor", [math.inf, 1e30])
def test_a_meta_gradient_without_a_finite_norm_is_not_followed(factor: float, tmp_path: Path) -> None:
    def overflowing(meta: MetaState, step: int) -> MetaGradient:
        found = gradient_at(meta, step)
        return replace(found, gradients={name: value * factor for name, value in found.gradients.items()})

    with pytest.raises(TrainingError, match="diverged"):
        train(start(), overflowing, validate, CONFIG, checkpoint=tmp_path, identity={}, resume=False)
