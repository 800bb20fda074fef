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
from metarec.data.interactions import Ratings
from metarec.lm.answer_model import AnswerModel
from metarec.recommender import MetaRecommender
from metarec.scorers.collaborative.gp import GaussianProcess
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.stack import Stacked
from metarec.scorers.collaborative.terms import CollaborativeTerm
from metarec.scorers.collaborative.text import TextRidge, unit_vectors
from metarec.scorers.language.adapted import MetaScorer
from metarec.scorers.language.left_out import scores_without_each, slopes_of
from metarec.scorers.language.score import score_adapted
from metarec.scorers.term import LeavesOut
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


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("offset", [True, False])
def test_a_stack_without_each_rating_is_the_stack_asked_again(count: int, offset: bool) -> None:
    stack, support = made_stack(offset), made_support(count)
    term = CollaborativeTerm(stack)
    rated, asked = term.without_each(support, CODES)
    for row in range(count + 1):
        left = np.delete(np.arange(count), row) if row < count else np.arange(count)
        fewer = support.rows(left)
        np.testing.assert_allclose(asked[row], term.values([fewer], [CODES])[0], atol=2e-6)
        np.testing.assert_allclose(rated[row, left], term.leave_one_out([fewer])[0], atol=2e-6)


def test_every_term_of_the_default_score_has_its_values_without_each_rating_in_closed_form(
    recommender: MetaRecommender,
) -> None:
    assert all(isinstance(term, LeavesOut) for term in recommender.scorer().terms.values())


def made_stack(offset: bool) -> Stacked:
    generator = np.random.default_rng(1)
    loadings = generator.normal(size=(40, 5))
    prior = ItemPrior(3.5, 1.2, generator.normal(size=40), np.full(40, 3.0), np.zeros(40), 4.0)
    process = GaussianProcess(
        mean_rating=3.5,
        scale=1.2,
        mean=generator.normal(size=40),
        loadings=loadings,
        noise=generator.uniform(0.3, 0.9, 40),
        centre=loadings.mean(0),
        selection_effect=np.full(5, 0.7),
        selection_damping=3.0,
    )
    ridge = TextRidge(
        vectors=unit_vectors(loadings), name="ridge", prior=prior, penalty=3.0, user_bias_damping=2.0, offset=offset
    )
    return Stacked(prior, (process, ridge), (0, 5, 10), np.array([[0.2, 0.9], [0.6, 0.4], [0.8, 0.1]]))


def made_support(count: int) -> Ratings:
    generator = np.random.default_rng(2)
    return Ratings(generator.choice(10, count, replace=False), generator.integers(1, 6, count).astype(np.float32))
