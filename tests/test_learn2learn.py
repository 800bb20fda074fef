"""Our meta-gradients are learn2learn's. Skips, and says so, where learn2learn is not installed."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_losses import QUERIES, RATES, TARGETS, USERS, bent, meta_state
from small_recommenders import SETTINGS, known_task

from metarec.config import RunConfig, validated
from metarec.errors import ConfigError
from metarec.meta.algorithms import maml
from metarec.meta.inner_loop import initial_meta_state
from metarec.meta.learn2learn import meta_gradient
from metarec.recommender import MetaRecommender
from metarec.system.doctor import LEARN2LEARN

needs_learn2learn = pytest.mark.skipif(
    importlib.util.find_spec("learn2learn") is None, reason="learn2learn is not installed: make learn2learn"
)

ONE_BY_ONE = [(bent(TARGETS[user : user + 1]), bent(QUERIES[user : user + 1])) for user in range(USERS)]


@needs_learn2learn
@pytest.mark.parametrize("second_order", [False, True], ids=["first order", "second order"])
@pytest.mark.parametrize("rates", ["tensor", "number"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_maml_and_meta_sgd_are_learn2learns(steps: int, rates: str, second_order: bool) -> None:
    meta = initial_meta_state(meta_state().init, ["w"], 0.1, **RATES[rates])
    theirs = meta_gradient(meta, ONE_BY_ONE, steps, second_order=second_order)
    ours = maml(meta, bent(TARGETS), bent(QUERIES), USERS, steps, second_order=second_order)
    torch.testing.assert_close(ours.loss, theirs.loss)
    for name, gradient in theirs.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient)


@needs_learn2learn
def test_the_gradient_is_zero_where_all_users_diverge() -> None:
    nowhere = torch.full((1, 2), torch.nan, dtype=torch.float64)
    found = meta_gradient(meta_state(), [(bent(nowhere), bent(nowhere))] * 2, 3, second_order=True)
    assert found.diverged.all()
    for name, value in meta_state().tensors().items():
        torch.testing.assert_close(found.gradients[name], torch.zeros_like(value))


def test_rates_per_step_are_refused() -> None:
    meta = initial_meta_state(meta_state().init, ["w"], 0.1, steps=3)
    with pytest.raises(ConfigError, match="no rates per step"):
        meta_gradient(meta, ONE_BY_ONE, 3, second_order=True)


@needs_learn2learn
@pytest.mark.parametrize("algorithm", ["fomaml", "maml"])
def test_training_through_learn2learn_ends_at_the_same_weights(
    algorithm: str, model_dir: Callable[[str], Path]
) -> None:
    trained = []
    for engine in ("batched", "learn2learn"):
        settings = {
            **SETTINGS,
            "meta": SETTINGS["meta"] | {"engine": engine, "algorithm": algorithm},
            "train": SETTINGS["train"] | {"steps": 3, "users": 3, "validate_every": 3},
        }
        model = MetaRecommender.from_pretrained(model_dir("llama"), validated(RunConfig, settings, "test"))
        trained.append(model.fit(known_task()))
    ours, theirs = (model.scorer().meta.tensors() for model in trained)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-4, rtol=1e-3)


def test_algorithms_that_learn2learn_lacks_are_refused(model_dir: Callable[[str], Path]) -> None:
    settings = {**SETTINGS, "meta": SETTINGS["meta"] | {"engine": "learn2learn", "algorithm": "reptile"}}
    model = MetaRecommender.from_pretrained(model_dir("llama"), validated(RunConfig, settings, "test"))
    with pytest.raises(ConfigError, match="'reptile' is not one learn2learn has"):
        model.fit(known_task())


def test_a_missing_learn2learn_is_said_before_data_are_read(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "meta": SETTINGS["meta"] | {"engine": "learn2learn"}}
    model = MetaRecommender.from_pretrained(model_dir("llama"), validated(RunConfig, settings, "test"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(MetaRecommender, "task_data", lambda *_: pytest.fail("data were read"))
    with pytest.raises(ConfigError, match=r"learn2learn is not installed. Run: pip install Cython"):
        model.fit(known_task())


def test_pip_users_are_told_what_make_runs() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    rule = re.search(r"^learn2learn:.*\n((?:\t.*\n)+)", makefile, re.M)
    assert rule
    assert " && ".join(rule[1].split("\n\t")).strip().replace("$(PIP)", "pip install") == LEARN2LEARN
