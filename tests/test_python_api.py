"""What people expect in Python: short reprs, DataFrames, pickling that says what to do, data without YAML."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_recommenders import SETTINGS, known_task

import metarec
from metarec.adapted_user import AdaptedUser
from metarec.config import RunConfig, validated
from metarec.errors import ArtifactError, ConfigError, RatingError
from metarec.evaluation.calibration import Calibration, _fit_logistic, at_count
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


def test_one_persons_ratings_are_pairs_a_dict_or_a_frame(prepared: MetaRecommender) -> None:
    pairs = [("m1", 5.0), ("m2", 1.0)]
    expected = prepared.adapt(pairs).score(["m5"])
    frame = pd.DataFrame(pairs, columns=["item", "rating"])
    for given in (dict(pairs), frame, frame.set_index("item")["rating"], iter(pairs), frame.assign(user="ann")):
        assert prepared.adapt(given).score(["m5"]) == expected
    assert len(prepared.adapt({}).support) == 0
    for wrong in ("m1=5", 7, None, frame.drop(columns="rating"), frame.assign(user=["a", "b"])):
        with pytest.raises(RatingError, match=r"Give \(title or id, rating\) pairs, a dict|one user at a time"):
            prepared.adapt(wrong)  # type: ignore[arg-type]


def test_columns_of_ratings_that_nothing_reads_are_named(
    prepared: MetaRecommender, caplog: pytest.LogCaptureFixture
) -> None:
    prepared.adapt(pd.DataFrame({"item": ["m1"], "rating": [5.0], "mood": ["good"]}))
    assert "nothing reads: mood" in caplog.text


def test_recommendations_and_scores_are_frames_on_request(person: AdaptedUser) -> None:
    best, frame = person.recommend(4), person.recommend(4, as_frame=True)
    assert list(frame.columns) == ["item", "title", "score"]
    assert list(frame.itertuples(index=False, name=None)) == [(one.item, one.title, one.score) for one in best]
    scored = person.score([one.item for one in best], as_frame=True)
    assert list(scored["item"]) == list(frame["item"])
    assert list(person.score([], as_frame=True).columns) == ["item", "title", "score"]
    with pytest.raises(ConfigError, match="Give a list"):
        person.score("m1")


def test_predictions_are_ratings_and_probabilities_in_the_order_of_scores(
    prepared: MetaRecommender, tmp_path: Path
) -> None:
    items, given = [f"m{code}" for code in range(40)], {f"m{code}": (4.5, 2.0)[code % 4 > 1] for code in range(10)}
    person = prepared.adapt(given)
    scores, ratings, chances = person.score(items), person.predict_rating(items), person.predict_proba(items)
    assert np.array_equal(np.argsort(chances), np.argsort(scores))
    assert (np.diff(np.array(ratings)[np.argsort(scores)]) >= 0).all()
    assert all(0.5 <= rating <= 5 for rating in ratings)
    assert all(0 < chance < 1 for chance in chances)
    assert person.predicted_ratings(scores) == pytest.approx(ratings)
    prepared.save_pretrained(tmp_path / "model")
    loaded = MetaRecommender.from_pretrained(tmp_path / "model")
    assert loaded.fitted.calibration == prepared.fitted.calibration
    assert loaded.adapt(given).predict_rating(items) == ratings


def test_evaluation_reads_the_calibration_that_predictions_read(prepared: MetaRecommender) -> None:
    data = known_task()
    data = replace(data, task=data.task.model_copy(update={"metrics": ("auc", "ndcg@10", "mae", "rmse")}))
    recommender = fresh().prepare(data)
    report = recommender.evaluate(data)
    episode = data.episodes("test")[0][0]
    ids = data.interactions.catalog.ids
    five = episode.support.head(5)
    person = recommender.adapt([(ids[code], float(value)) for code, value in zip(five.items, five.values, strict=True)])
    predicted = person.predict_rating([ids[code] for code in episode.query.items])
    error = float(np.abs(np.array(predicted) - episode.query.values).mean())
    assert report.values("metarec, adapted", 5, "mae")[episode.user] == pytest.approx(error, abs=1e-5)


def test_predictions_that_cannot_be_made_say_why(prepared: MetaRecommender, person: AdaptedUser) -> None:
    likes = person.fitted.task.model_copy(update={"label": "implicit"})
    only_likes = replace(person, fitted=replace(person.fitted, task=likes))
    with pytest.raises(ConfigError, match="predict_proba"):
        only_likes.predict_rating(["m1"])
    assert only_likes.predict_proba(["m4"]) == person.predict_proba(["m4"])
    none = replace(person, fitted=replace(person.fitted, calibration=()))
    with pytest.raises(ConfigError, match="no calibration"):
        none.predict_proba(["m1"])
    assert none.predicted_ratings([1.0]) is None


def test_the_explanation_is_what_leaving_a_rating_out_changes(prepared: MetaRecommender, person: AdaptedUser) -> None:
    given = {"m1": 5.0, "m2": 1.0, "m3": 4.0}
    reasons = person.explain("m7")
    assert {reason.item for reason in reasons} == set(given)
    for reason in reasons:
        without = {item: rating for item, rating in given.items() if item != reason.item}
        expected = person.score(["m7"])[0] - prepared.adapt(without).score(["m7"])[0]
        assert reason.moved == pytest.approx(expected, abs=1e-5)
    assert [abs(reason.moved) for reason in reasons] == sorted((abs(one.moved) for one in reasons), reverse=True)
    assert prepared.adapt([]).explain("m7") == []
    assert len(person.explain("m7", most=1)) == 1


def test_between_two_numbers_of_ratings_calibrations_are_interpolated() -> None:
    low, high = (Calibration(shots, 3.0, 1.0, 5.0, (shots,) * 3, (2.0 * shots,) * 3) for shots in (0, 10))
    for count, expected in ((0, 0.0), (4, 4.0), (10, 10.0), (99, 10.0)):
        found = at_count([low, high], count)
        assert found.rating == (expected,) * 3
        assert found.like == (2 * expected,) * 3


def test_the_logistic_part_of_a_calibration_stays_finite_where_scores_separate_all_likes() -> None:
    scores = np.linspace(-1, 1, 40)
    rows = np.stack([np.ones(40), scores, np.zeros(40)], 1)
    weights = _fit_logistic(rows, scores > 0)
    assert np.isfinite(weights).all()
    assert weights[1] > 1
