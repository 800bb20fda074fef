"""Presets: what they set, and what wins over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Ran
from small_recommenders import known_task

import metarec
from metarec import MetaRecommender
from metarec.bench.methods import METHODS
from metarec.config import RunConfig, validated
from metarec.data.task_files import load_task
from metarec.errors import ConfigError
from metarec.presets import PRESETS, with_preset
from metarec.training.fitting import needs_model
from metarec.training.task_features import for_task


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_made_of_settings_that_there_are(name: str) -> None:
    validated(RunConfig, with_preset(name, {}), name)


def test_help_says_what_every_preset_is_for(metarec: Callable[..., Ran]) -> None:
    said = metarec("train", "--help").out
    assert [name for name in PRESETS if f"{name}:" not in said] == []


def test_a_preset_is_settings_in_python_too() -> None:
    settings = metarec.preset("quick", {"train": {"steps": 7}})
    assert settings == validated(RunConfig, with_preset("quick", {"train": {"steps": 7}}), "quick")
    with pytest.raises(ConfigError, match="stepz"):
        metarec.preset("quick", {"train": {"stepz": 7}})


def test_fast_reads_no_language_model_and_standard_is_the_default() -> None:
    assert not needs_model(validated(RunConfig, with_preset("fast", {}), "fast"))
    assert needs_model(validated(RunConfig, with_preset("quick", {}), "quick"))
    assert validated(RunConfig, with_preset("standard", {}), "standard") == RunConfig()


def test_a_files_settings_win_over_a_preset_and_leave_the_others_of_their_section() -> None:
    values = with_preset("quick", {"train": {"steps": 7}})
    assert values["train"]["steps"] == 7
    assert values["train"]["validate_every"] == PRESETS["quick"]["train.validate_every"]


def test_a_misspelt_preset_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="fast"):
        with_preset("fats", {})


def test_presets_are_methods_of_the_benchmark() -> None:
    presets = {"metarec", "metarec, no language model", "metarec, quick", "metarec, text"}
    assert presets <= set(METHODS.names())


@pytest.mark.parametrize(("name", "states"), [("movielens/user-cold", False), ("movielens/item-cold", True)])
def test_hidden_states_are_read_by_default_only_where_nobody_rated_the_items(name: str, states: bool) -> None:
    settings = metarec.preset("standard", {"score": ["item mean", "collaborative"]})
    assert needs_model(for_task(settings, load_task(name))) is states
    fixed = metarec.preset("fast", {"collaborative": {"features": ["text", "fields"]}})
    assert for_task(fixed, load_task(name)) == fixed == for_task(metarec.preset("fast"), load_task(name))


@pytest.mark.parametrize("name", ["fast", "quick", "text", "standard"])
def test_every_preset_reads_vectors_of_items_where_there_are_any(name: str) -> None:
    settings, plain = validated(RunConfig, with_preset(name, {}), name), load_task("movielens/user-cold")
    options = plain.dataset.options.model_copy(update={"item_graph": "graph.csv"})
    told = plain.model_copy(update={"dataset": plain.dataset.model_copy(update={"options": options})})
    without, found = (for_task(settings, task).collaborative.features or () for task in (plain, told))
    assert found == (*without, "vectors")


def test_the_full_preset_trains_adapts_and_evaluates(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path))
    posterior = {"steps": 1, "users": 4, "max_query": 8, "layers": 1, "rank": 2, "validate_every": 1}
    tuning = {"steps": 1, "pairs": 8, "rank": 2, "validate_every": 1, "posterior": posterior}
    small = {
        "collaborative": {"encoder": str(model_dir("encoder")), "tuning": tuning, "kernel": {"steps": 2}},
        "adapter": {"layers": 1},
        "train": {"steps": 1, "users": 4, "validate_every": 1, "validation_users": 2},
    }
    settings = validated(RunConfig, with_preset("full", small), "test")
    recommender = MetaRecommender.from_pretrained(str(model_dir("llama")), settings).fit(data := known_task())
    assert len(recommender.adapt({"m0": 5.0, "m1": 1.0}).recommend(3)) == 3
    assert np.isfinite(recommender.evaluate(data).values("metarec, adapted", 10)).all()
