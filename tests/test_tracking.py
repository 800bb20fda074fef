"""Trackers: one conformance suite for those whose packages are there, and what the trainings send to any of them."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran
from small_recommenders import NO_MODEL, known_task

from metarec.config import RunConfig, validated
from metarec.errors import ConfigError
from metarec.meta.tracking import TrackedRun, check_trackers, track, tracked
from metarec.recommender import MetaRecommender
from metarec.registries import TRACKERS
from metarec.training.tuning import Parameter, tune

OPENED: list[Fake] = []


class Fake:
    """A tracker of another package, named ``test_tracking:Fake``."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.sent: list[tuple[int, dict[str, float]]] = []
        self.closed: list[bool] = []
        OPENED.append(self)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.sent.append((step, dict(values)))

    def close(self, *, finished: bool) -> None:
        self.closed.append(finished)


class Broken(Fake):
    """A tracker whose server is down."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        super().log(step, values)
        raise OSError("no route to host")


@pytest.fixture(autouse=True)
def _nothing_opened() -> Iterator[None]:
    OPENED.clear()
    yield
    OPENED.clear()


FAKE, BROKEN = "test_tracking:Fake", "test_tracking:Broken"


def run_in(folder: Path) -> TrackedRun:
    return TrackedRun("mine", folder, {"train.lr": 0.01, "score": ["item mean"]})


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert "settings/text_summary" in events.Tags()["tensors"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def read_mlflow(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("metarec")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "mine"
    assert run.info.status == "FINISHED"
    assert run.data.params["train.lr"] == "0.01"
    names = run.data.metrics
    return {
        name: [(entry.step, entry.value) for entry in client.get_metric_history(run.info.run_id, name)]
        for name in names
    }


def read_trackio(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from trackio.sqlite_storage import SQLiteStorage

    found: dict[str, list[tuple[int, float]]] = {}
    for row in SQLiteStorage.get_logs("metarec", "mine"):
        for name, value in row.items():
            if name not in ("step", "timestamp"):
                found.setdefault(name, []).append((row["step"], value))
    return found


READERS: dict[str, Callable[[Path], dict[str, list[tuple[int, float]]]]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
    FAKE: lambda _: {name: [(step, values[name]) for step, values in OPENED[0].sent] for name in OPENED[0].sent[0][1]},
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_tracked_is_what_a_tracker_holds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name != FAKE and importlib.util.find_spec(name) is None:
        pytest.skip(f"the extra '{name}' is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    with tracked([name], run_in(tmp_path)):
        track(0, {"validation AUC": 0.5, "query loss": None})
        track(20, {"validation AUC": 0.75})
    assert READERS[name](tmp_path) == {"validation AUC": [(0, 0.5), (20, 0.75)]}
    assert capsys.readouterr().out == ""


def test_the_suite_covers_every_tracker() -> None:
    assert set(TRACKERS.names()) <= set(READERS)


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metarec.meta.tracking.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'metarec\[mlflow\]'"):
        check_trackers(["mlflow"])
    with pytest.raises(ConfigError, match=r"no tracker is called 'tensorbord'\. Did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])


def test_a_tracker_that_fails_is_left_out_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), tracked([BROKEN, FAKE], run_in(tmp_path)):
        track(0, {"x": 1.0})
        track(1, {"x": 2.0})
    broken, fake = OPENED
    assert (len(broken.sent), len(fake.sent)) == (1, 2)
    assert caplog.messages == ["the tracker Broken fails, and is left out: no route to host"]


def test_an_error_ends_the_run_as_failed_and_nothing_is_sent_outside(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), tracked([FAKE], run_in(tmp_path)):
        raise ZeroDivisionError
    assert OPENED[0].closed == [False]
    track(1, {"x": 1.0})
    assert OPENED[0].sent == []


def test_a_training_sends_its_history_and_its_weights_do_not_change(tmp_path: Path) -> None:
    plain, watched = (MetaRecommender(None, validated(RunConfig, NO_MODEL, "test")) for _ in range(2))
    plain.fit(known_task())
    with tracked([FAKE], run_in(tmp_path)):
        watched.fit(known_task())
    assert plain.digest == watched.digest
    (fake,) = OPENED
    history = watched.fitted.training["history"]
    assert [(step, values["validation AUC"]) for step, values in fake.sent] == [
        (row["step"], row["validation_auc"]) for row in history
    ]
    assert fake.closed == [True]


def test_no_rating_user_or_item_is_sent(tmp_path: Path) -> None:
    recommender = MetaRecommender(None, validated(RunConfig, NO_MODEL, "test"))
    with tracked([FAKE], run_in(tmp_path)):
        recommender.fit(known_task())
    data = known_task().interactions
    sent = json.dumps([OPENED[0].sent, {key: str(value) for key, value in OPENED[0].run.settings.items()}])
    assert {name for _, values in OPENED[0].sent for name in values} == {
        "validation AUC", "best validation AUC", "query loss", "rate", "diverged inner loops"
    }  # fmt: skip
    assert not any(f'"{name}"' in sent for name in [*data.users, *data.catalog.ids])


def test_every_trial_of_a_search_is_a_run_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra 'tune' is not installed")
    values = validated(RunConfig, NO_MODEL, "test").model_dump(mode="json")
    parameters = [Parameter.read("train.score_lr=0.01,0.02")]
    tune(known_task(), values, parameters, trials=2, storage=tmp_path / "search" / "study.db", trackers=[FAKE])
    assert [fake.run.name for fake in OPENED] == ["search-0", "search-1"]
    assert all(fake.run.settings["train.score_lr"] in ("0.01", "0.02") for fake in OPENED)
    assert all(fake.sent for fake in OPENED)


@pytest.mark.parametrize("verb", ["train", "finetune", "tune"])
def test_verbs_name_what_is_missing_before_they_load_anything(
    verb: str, metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    done = metarec(verb, "--tracker", "mlfow", "--runs", str(tmp_path))
    assert done.status == 2
    assert "no tracker is called 'mlfow'. Did you mean 'mlflow'" in done.err
    assert os.listdir(tmp_path) == []


def test_train_takes_a_tracker_by_name(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    table = tmp_path / "ratings.csv"
    data = known_task().interactions
    rows = zip(data.user.tolist(), data.item.tolist(), data.rating.tolist(), strict=True)
    lines = [f"u{user},m{item},{rating},title {item}" for user, item, rating in rows]
    table.write_text("\n".join(["user,item,rating,title", *lines]))
    settings: list[Any] = ["--set", "score=[item mean]", "--set", "collaborative.features=[]"]
    settings += ["--set", "train.steps=2", "--set", "train.validate_every=2", "--set", "train.warmup=1"]
    done = metarec("train", str(table), "--runs", str(tmp_path / "runs"), "--tracker", FAKE, "--json", *settings)
    assert done.status == 0, done.err
    (fake,) = OPENED
    assert fake.run.name == "default"
    assert fake.run.settings["train.steps"] == 2
    assert [step for step, _ in fake.sent] == [0, 2]
    assert fake.closed == [True]


def test_a_training_that_begins_again_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    for first, values in ((0, (0.1, 0.2, 0.3)), (20, (0.4,)), (0, (0.5,))):
        with tracked(["tensorboard"], run_in(tmp_path)):
            for place, value in enumerate(values):
                track(first + 10 * place, {"x": value})
        found = read_tensorboard(tmp_path)["x"]
        kept = [0.1, 0.2, 0.4] if first else list(values)
        assert [value for _, value in found] == pytest.approx(kept)
