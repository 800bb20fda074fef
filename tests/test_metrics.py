"""Metrics on answers that can be worked out by hand, and on scores that must not win anything."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from metarec.errors import EvaluationError
from metarec.evaluation.metric_names import RANKING
from metarec.evaluation.metrics import (
    at_cutoff,
    auc,
    bootstrap_interval,
    calibrated,
    calibration_error,
    check_scores,
    leaders,
    ndcg,
    paired_p_value,
    rank_order,
    recbole_ndcg,
)

LABELS = np.array([True, False, True, False])
ITEMS = ["a", "b", "c", "d"]


def test_auc_counts_pairs() -> None:
    assert auc(np.array([3.0, 2.0, 1.0, 0.0]), LABELS) == 0.75
    assert auc(np.array([1.0, 0.0, 1.0, 0.0]), LABELS) == 1.0


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.5, 2.0])), min_size=2, max_size=40))
def test_auc_is_that_of_scikit_learn(rated: list[tuple[bool, float]]) -> None:
    liked, scores = np.array([like for like, _ in rated]), np.array([score for _, score in rated], np.float32)
    assume(liked.any() and not liked.all())
    assert auc(scores, liked) == pytest.approx(roc_auc_score(liked, scores), abs=1e-12)


def test_ndcg_matches_the_formula() -> None:
    gain = ndcg(np.array([3.0, 2.0, 1.0, 0.0]), LABELS, ITEMS, 10, 0)
    assert gain == pytest.approx((1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3)))


@given(st.lists(st.booleans(), min_size=2, max_size=40), st.floats(-10, 10))
def test_a_constant_score_gets_exactly_chance(labels: list[bool], constant: float) -> None:
    liked = np.array(labels)
    expected = None if liked.all() or not liked.any() else 0.5
    assert auc(np.full(len(liked), constant), liked) == expected


def test_a_constant_score_ranks_like_chance() -> None:
    # Likes come first in every list: a method that leaked the input's order would get 1.
    labels = np.arange(20) < 5
    gains = [ndcg(np.zeros(20), labels, [f"{user}-{item}" for item in range(20)], 10, 0) for user in range(400)]
    generator = np.random.default_rng(0)
    chance = [ndcg(generator.random(20), labels, [str(item) for item in range(20)], 10, 0) for _ in range(400)]
    error = np.std(chance) / math.sqrt(400)
    assert abs(np.mean(gains) - np.mean(chance)) < 4 * error


def test_ties_do_not_follow_the_input_order() -> None:
    order = rank_order(np.zeros(4), ITEMS, 0)
    turned = rank_order(np.zeros(4), ITEMS[::-1], 0)
    assert [ITEMS[place] for place in order] == [ITEMS[::-1][place] for place in turned]
    assert any(not np.array_equal(rank_order(np.zeros(4), ITEMS, seed), order) for seed in range(20))


def test_leaders_hold_the_first_places_of_the_whole_order() -> None:
    generator = np.random.default_rng(0)
    items = [f"item {number}" for number in range(40)]
    for scores in (generator.integers(0, 6, 40).astype(np.float32), np.zeros(40), generator.normal(size=40)):
        for few in (np.where(generator.random(40) < 0.2, np.nan, scores), scores):
            for k in (1, 3, 39, 40, 50):
                front = leaders(few, k)
                order = front[rank_order(few[front], [items[place] for place in front], 7)][:k]
                np.testing.assert_array_equal(order, rank_order(few, items, 7)[:k])
    assert len(leaders(np.arange(40.0), 3)) == 3


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_one_class_has_no_value(labels: list[bool]) -> None:
    assert auc(np.array([1.0, 2.0]), np.array(labels)) is None
    assert ndcg(np.array([1.0, 2.0]), np.array(labels), ["a", "b"], 10, 0) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_numbers_are_refused(value: float) -> None:
    with pytest.raises(EvaluationError, match=r"method 'x', K = 5: score .* of candidate 1 is not a finite number"):
        check_scores(np.array([0.0, value]), "method 'x', K = 5")


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(generator.normal(0.3, 1.0, 60), trial)
        covered += low <= 0.3 <= high
    assert 175 <= covered <= 198


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert bootstrap_interval(np.full(5, 0.25), 0) == (0.25, 0.25)


def test_ranking_measures_match_their_formulas() -> None:
    scores = np.array([3.0, 2.0, 1.0, 0.0])
    labels = np.array([False, True, True, False])
    values = {measure: at_cutoff(measure, scores, labels, ITEMS, 2, 0) for measure in RANKING}
    gain = (1 / math.log2(3)) / (1 + 1 / math.log2(3))
    assert values == pytest.approx({"ndcg": gain, "precision": 0.5, "recall": 0.5, "hit": 1.0, "mrr": 0.5})


def test_recboles_rules_match_ours_where_nothing_is_tied() -> None:
    scores = np.arange(10.0)[::-1].copy()
    ratings = np.array([9.0, 2, 8, 1, 7, 0, 6, 3, 5, 4])
    top = ratings >= np.sort(ratings)[-5]
    assert recbole_ndcg(scores, ratings, 5, clicks=False) == pytest.approx(ndcg(scores, top, list("abcdefghij"), 5, 0))
    assert recbole_ndcg(scores, top.astype(float), 5, clicks=True) == pytest.approx(
        ndcg(scores, top, list("abcdefghij"), 5, 0)
    )


def test_recboles_rules_pay_a_constant_score_more_than_chance() -> None:
    generator = np.random.default_rng(0)
    ratings = [generator.choice([1.0, 2, 3, 4, 5], 10, p=[0.06, 0.11, 0.27, 0.34, 0.22]) for _ in range(400)]
    constant = np.mean([recbole_ndcg(np.zeros(10), each, 5, clicks=False) for each in ratings])
    chance = np.mean([recbole_ndcg(generator.random(10), each, 5, clicks=False) for each in ratings])
    assert constant > chance + 0.03
    names = [str(item) for item in range(10)]
    sound = [ndcg(np.zeros(10), each >= 4, names, 5, 0) for each in ratings]
    random = [ndcg(generator.random(10), each >= 4, names, 5, 0) for each in ratings]
    difference = np.array(
        [one - two for one, two in zip(sound, random, strict=True) if one is not None and two is not None]
    )
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(difference))


def test_recboles_rules_rank_nan_and_pay_nothing_where_nobody_clicked() -> None:
    assert recbole_ndcg(np.full(10, np.nan), np.arange(10.0), 5, clicks=False) >= 0
    assert recbole_ndcg(np.arange(10.0), np.zeros(10), 5, clicks=True) == 0.0


def test_calibration_error_is_the_gap_between_what_was_said_and_what_happened() -> None:
    liked = np.arange(300) % 2 == 0
    assert calibration_error(liked.astype(float), liked) == 0.0
    assert calibration_error(np.full(300, 0.9), liked, bins=1) == pytest.approx(0.4)
    assert calibration_error(np.where(liked, 0.7, 0.3), liked, bins=10) == pytest.approx(0.3)


def test_scores_become_probabilities_by_what_other_people_did() -> None:
    generator = np.random.default_rng(0)
    people = [f"u{code // 40}" for code in range(400)]
    odds = generator.normal(size=400)
    liked = generator.random(400) < 1 / (1 + np.exp(-3 * odds - 1))
    chance = calibrated(100 * odds, liked, people)
    assert calibration_error(chance, liked, bins=5) < 0.08
    turned = np.where(np.array(people) == "u3", ~liked, liked)
    again = calibrated(100 * odds, turned, people)
    own = np.array(people) == "u3"
    np.testing.assert_allclose(again[own], chance[own])
    assert not np.allclose(again[~own], chance[~own])


def test_one_persons_scores_cannot_be_calibrated() -> None:
    with pytest.raises(EvaluationError, match="one person"):
        calibrated(np.arange(4.0), LABELS, ["u"] * 4)


def test_an_interval_over_people_is_wider_than_one_over_their_copies() -> None:
    values = np.random.default_rng(0).normal(size=50)
    copies, people = np.repeat(values, 4), np.repeat(np.arange(50), 4).tolist()
    np.testing.assert_allclose(bootstrap_interval(copies, 0, people), bootstrap_interval(values, 0), atol=1e-9)
    low, high = bootstrap_interval(copies, 0)
    wide = bootstrap_interval(copies, 0, people)
    assert wide[0] < low < high < wide[1]
    assert bootstrap_interval(copies, 0, ["one"] * 200) == (pytest.approx(values.mean()), pytest.approx(values.mean()))


def test_the_paired_test_is_wilcoxons() -> None:
    assert paired_p_value(np.zeros(9)) == 1.0
    assert paired_p_value(np.array([0.0, 0.25, 0.0])) == 1.0, "of one difference, either sign is as likely"
    assert paired_p_value(np.arange(1.0, 9.0)) == pytest.approx(2 / 2**8)
    generator = np.random.default_rng(0)
    for count in (2, 5, 12, 13, 40, 80):
        for values in (generator.normal(size=count), generator.integers(-2, 4, count), np.ones(count)):
            assert paired_p_value(values) == pytest.approx(stats.wilcoxon(values).pvalue), values


def test_people_without_a_difference_do_not_change_the_paired_test() -> None:
    moved = np.array([1.0, 2.0, 2.0, -1.0, 3.0, 4.0])
    assert paired_p_value(np.concatenate([moved, np.zeros(100)])) == paired_p_value(moved)
