"""Reasons in one pass: scores without each rating, without running the language model for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from serving import LOVES_DRAMA, small_recommender
from small_recommenders import SETTINGS, known_task

from metarec.config import RunConfig, validated
from metarec.lm.answer_model import AnswerModel
from metarec.recommender import MetaRecommender
from metarec.scorers.language.adapted import MetaScorer
from metarec.scorers.language.left_out import scores_without_each, slopes_of
from metarec.scorers.language.score import score_adapted
from metarec.serve.engine import Engine
from metarec.serve.records import Feedback
from metarec.serve.store import AdapterStore

CODES = np.arange(10, 40)


@pytest.fixture(scope="session")
def recommender(model_dir: Callable[[str], Path]) -> MetaRecommender:
    return small_recommender(model_dir("llama"))


def exact(recommender: MetaRecommender, scorer: MetaScorer) -> NDArray[np.float32]:
    """Adapts again without each rating, and with all."""
    support = recommender.adapt(sorted(LOVES_DRAMA)).support
    rows = np.arange(len(support))
    supports = [support.rows(np.delete(rows, row)) for row in rows] + [support]
    states = scorer.adapt(supports).state
    codes = [CODES] * len(supports)
    found = score_adapted(states, supports, codes, scorer.terms, scorer.prior, scorer.answer_model)
    return np.stack([scores.numpy() for scores in found])


def moved(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    return scores[-1] - scores[:-1]


def both(recommender: MetaRecommender, scale: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    scorer = replace(recommender.scorer(), rate_scale=scale)
    support = recommender.adapt(sorted(LOVES_DRAMA)).support
    slopes = slopes_of(scorer, np.concatenate([support.items, CODES]))
    return scores_without_each(scorer, support, CODES, slopes), exact(recommender, scorer)


def test_near_the_start_scores_without_each_rating_are_those_of_adapting_again(recommender: MetaRecommender) -> None:
    found, expected = both(recommender, 0.02)
    np.testing.assert_allclose(moved(found), moved(expected), atol=0.002 * np.abs(moved(expected)).max())
    np.testing.assert_allclose(found[-1], expected[-1], atol=0.002)


def test_at_learned_rates_they_say_the_same_of_nearly_every_item(recommender: MetaRecommender) -> None:
    """A random model bends more than one that was trained on text."""
    found, expected = both(recommender, 1.0)
    largest = np.abs(moved(expected)).max()
    assert np.mean(np.abs(moved(found) - moved(expected)) < 0.1 * largest) > 0.75
    assert np.corrcoef(moved(found).ravel(), moved(expected).ravel())[0, 1] > 0.8


def test_without_a_language_model_nothing_is_approximate(model_dir: Callable[[str], Path]) -> None:
    settings = SETTINGS | {"score": ["item mean", "collaborative"]}
    fitted = MetaRecommender.from_pretrained(model_dir("llama"), validated(RunConfig, settings, "test"))
    recommender = fitted.fit(known_task())
    scorer = recommender.scorer()
    support = recommender.adapt(sorted(LOVES_DRAMA)).support
    found = scores_without_each(scorer, support, CODES, None)
    np.testing.assert_allclose(found, exact(recommender, scorer), atol=1e-5)
    assert np.abs(moved(found)).max() > 0.1


def test_an_explanation_runs_no_model_once_the_items_are_read(
    recommender: MetaRecommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(recommender, AdapterStore(tmp_path))
    engine.store.append([Feedback("ann", LOVES_DRAMA)])
    person = engine.people(["ann"])["ann"]
    read = engine.explain(person, CODES)  # nothing is kept of the items yet: they are read here
    engine.prepare()
    ran: list[object] = []
    last_states = AnswerModel.last_states
    monkeypatch.setattr(AnswerModel, "last_states", lambda *given: ran.append(given) or last_states(*given))
    kept = engine.explain(person, CODES)
    assert not ran
    for from_read, from_kept in zip(read, kept, strict=True):
        assert [reason.item for reason in from_kept] == [reason.item for reason in from_read]
        assert [reason.moved for reason in from_kept] == pytest.approx([r.moved for r in from_read], rel=0.02, abs=1e-3)
