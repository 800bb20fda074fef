"""`metarec tune`: searched by validation users alone, pruned by them, and resumed where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Ran
from small_recommenders import NO_MODEL, known_task

from metarec.data.task_data import TaskData
from metarec.errors import ConfigError
from metarec.training import tuning
from metarec.training.tuning import Parameter, tune, without_test_users

pytest.importorskip("optuna")
RATE = Parameter.read("train.score_lr=0.001..0.1")


def search(path: Path, trials: int, parameters: list[Parameter] | None = None, **settings: Any) -> tuning.Tuned:
    return tune(known_task(), NO_MODEL | settings, parameters or [RATE], trials=trials, storage=path / "study.db")


def test_parameters_are_read_as_they_are_written() -> None:
    assert Parameter.read("train.lr=log:1e-4..1e-2") == Parameter("train.lr", (), 1e-4, 1e-2, True, False)
    assert Parameter.read("meta.inner_steps=1..5") == Parameter("meta.inner_steps", (), 1.0, 5.0, False, True)
    assert Parameter.read("meta.algorithm=fomaml,reptile").choices == ("fomaml", "reptile")
    assert Parameter.read("train.shots=[5],[5, 10]").choices == ([5], [5, 10])
    for wrong in ("train.lr", "train.lr=5..1", "train.lr=log:0..1", "train.lr=["):
        with pytest.raises(ConfigError, match="--param"):
            Parameter.read(wrong)


def test_no_trial_sees_a_test_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the parts of the split, nor by a single rating."""
    data = known_task()
    seen: list[TaskData] = []

    def value(given: TaskData, *_: object) -> float:
        seen.append(given)
        return 0.5

    monkeypatch.setattr(tuning, "validation_value", value)
    search(tmp_path, 2)
    assert len(seen) == 2
    for given in seen:
        assert len(given.parts["test"]) == 0
        assert not np.isin(given.interactions.user, data.parts["test"]).any()
        assert len(given.interactions) < len(data.interactions)
        assert given.parts["validation"].tolist() == data.parts["validation"].tolist()
    assert without_test_users(without_test_users(data)).interactions.digest == seen[0].interactions.digest


def test_the_value_of_a_trial_is_that_of_validation_users_whatever_test_users_rated(tmp_path: Path) -> None:
    first = search(tmp_path, 2)
    assert [trial["state"] for trial in first.trials] == ["complete", "complete"]
    assert first.value == max(trial["validation_auc"] for trial in first.trials)
    assert 0.001 <= first.settings["train.score_lr"] <= 0.1


def test_a_search_goes_on_where_it_stopped_and_a_failed_trial_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def value(*_: object) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.5 + 0.01 * len(calls)

    monkeypatch.setattr(tuning, "validation_value", value)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, 4)
    found = search(tmp_path, 4)
    assert len(calls) == 5
    assert sum(trial["state"] == "complete" for trial in found.trials) == 4
    assert found.value == pytest.approx(0.55)
    search(tmp_path, 4)
    assert len(calls) == 5, "all trials were done"


@pytest.mark.parametrize(
    "text", ["meta.inner_steps=1,2,few", "meta.inner_steps=1.0..5.0", "meta.inner_steps=0..1000000"]
)
def test_values_that_do_not_fit_are_refused_before_the_first_trial(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--param: 'meta\.inner_steps' is"):
        search(tmp_path, 1, [Parameter.read(text)])
    assert not (tmp_path / "study.db").exists()


def test_trials_of_another_search_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "validation_value", lambda *_: 0.5)
    search(tmp_path, 1)
    for other in ({"parameters": [Parameter.read("train.score_lr=0.001,0.1")]}, {"seed": 3}):
        with pytest.raises(ConfigError, match="Choose another --name"):
            search(tmp_path, 2, **other)
    assert len(search(tmp_path, 2).trials) == 2


def test_a_trial_below_the_median_of_validation_is_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def value(_: object, config: Any, __: object, watch: Callable[[float], None]) -> float:
        good = 0.9 if len(steps) < 4 else 0.1
        steps.append(0)
        for _ in range(3):
            watch(good)
            steps[-1] += 1
        return good

    monkeypatch.setattr(tuning, "validation_value", value)
    found = search(tmp_path, 6)
    assert steps[:4] == [3, 3, 3, 3]
    assert steps[4] < 3
    assert [trial["state"] for trial in found.trials][4:] == ["pruned", "pruned"]
    assert found.value == 0.9


def test_the_verb_writes_settings_that_train_takes(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    arguments = ["--runs", tmp_path, "--name", "search", "--trials", 1, "--json", "--set", "score=[item mean]"]
    arguments += ["--set", "collaborative.features=[fields]", "--set", "collaborative.members=none"]
    arguments += ["--set", "train.steps=2", "--set", "train.validate_every=2", "--set", "train.validation_users=8"]
    ran = metarec("tune", *arguments, "--param", "train.score_lr=0.01,0.02")
    assert ran.status == 0, ran.err
    facts = json.loads(ran.out)
    assert facts["best"]["train.score_lr"] in (0.01, 0.02) or facts["best"]["train.score_lr"] in ("0.01", "0.02")
    trained = metarec("train", "--config", tmp_path / "search" / "best.yaml", "--runs", tmp_path, "--name", "mine")
    assert trained.status == 0, trained.err
    refused = metarec("tune", *arguments)
    assert "nothing is searched over" in refused.err
