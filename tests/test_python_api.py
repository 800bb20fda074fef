"""What people expect in Python: short reprs, DataFrames, pickling that says what to do, data without YAML."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from small_recommenders import SETTINGS, known_task

import metarec
from metarec.adapted_user import AdaptedUser
from metarec.config import RunConfig, validated
from metarec.errors import ArtifactError, ConfigError
from metarec.recommender import MetaRecommender

# Needs no language model.
FAST: dict[str, Any] = SETTINGS | {
    "score": ["item mean", "collaborative"],
    "collaborative": {"features": ["fields"], "members": "gp", "gp": {"sweeps": 2, "factors": 2}},
    "train": {**SETTINGS["train"], "steps": 2, "validate_every": 2},
}


def fresh() -> MetaRecommender:
    return MetaRecommender.from_pretrained("no-model-is-read", validated(RunConfig, FAST, "test"))


@pytest.fixture(scope="module")
def prepared() -> MetaRecommender:
    return fresh().prepare(known_task())


@pytest.fixture(scope="module")
def person(prepared: MetaRecommender) -> AdaptedUser:
    return prepared.adapt([("m1", 5.0), ("m2", 1.0), ("m3", 4.0)])


def test_public_names_are_complete() -> None:
    assert {*metarec.__all__, "__version__"} <= set(dir(metarec))
    assert metarec.__version__.startswith("0.")
    for name in metarec.__all__:
        assert getattr(metarec, name) is not None


def test_what_people_hold_shows_itself_in_one_short_line(prepared: MetaRecommender, person: AdaptedUser) -> None:
    data, report = known_task(), prepared.evaluate(known_task())
    shown = [fresh(), prepared, person, prepared.fitted, prepared.fitted.catalog, data, data.interactions, report]
    shown += [person.support, data.episodes("test")[0][0], prepared._prepare(data)]
    for thing in shown:
        assert len(repr(thing)) < 400, type(thing)
        assert "\n" not in repr(thing)
        assert repr(thing).startswith(f"{type(thing).__name__}(")
    assert "test/known" in repr(prepared)
    assert "ratings=3" in repr(person)


def test_notebooks_show_tables_in_which_nothing_is_markup(prepared: MetaRecommender) -> None:
    report = prepared.evaluate(known_task())
    for thing in (fresh(), prepared, prepared.adapt([("m1", 5.0)]), report):
        assert "<table" in thing._repr_html_()
    assert "m1" in prepared.adapt([("m1", 5.0)])._repr_html_()
    assert list(report.to_frame()["method"]) == [cell.method for cell in report.cells()]
    odd = MetaRecommender(None, fresh().config.model_copy(update={"device": "<b>"}), prepared.fitted)
    assert "<b>" not in odd._repr_html_()


def test_pickling_says_to_pass_the_path(person: AdaptedUser) -> None:
    for thing in (fresh(), fresh().prepare(known_task()), person):
        with pytest.raises(ConfigError, match="path"):
            pickle.dumps(thing)


def test_a_saved_recommender_is_pickled_as_its_path(prepared: MetaRecommender, tmp_path: Path) -> None:
    saved = fresh().prepare(known_task())
    saved.save_pretrained(tmp_path / "model")
    expected = prepared.adapt([("m1", 5.0)]).score(["m2"])
    for sent in (saved, MetaRecommender.from_pretrained(tmp_path / "model")):
        message = pickle.dumps(sent)
        assert len(message) < 1000
        assert pickle.loads(message).adapt([("m1", 5.0)]).score(["m2"]) == expected
    saved.prepare(known_task(1))  # what lies there is no longer what it is
    with pytest.raises(ConfigError, match="save_pretrained"):
        pickle.dumps(saved)
    other = validated(RunConfig, FAST | {"score": ["item mean"]}, "test")
    MetaRecommender.from_pretrained("no-model-is-read", other).prepare(known_task()).save_pretrained(tmp_path / "model")
    with pytest.raises(ArtifactError, match="another recommender"):
        pickle.loads(message)


def test_a_run_directory_loads_in_python(prepared: MetaRecommender, tmp_path: Path) -> None:
    prepared.save_pretrained(tmp_path / "run" / "model")
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        assert MetaRecommender.from_pretrained(path).digest == prepared.digest
    with pytest.raises(ConfigError, match="own settings"):
        MetaRecommender.from_pretrained(tmp_path / "run", RunConfig())
