"""Recommendations that are less alike, of chosen items alone: in Python and on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Ran
from small_recommenders import NO_MODEL, known_task

from metarec.config import RunConfig, validated
from metarec.errors import ConfigError
from metarec.evaluation.recommended_lists import diversity
from metarec.recommender import MetaRecommender
from metarec.recommending.reranking import ItemVectors, mmr, pool_size

SCORES = np.array([1.0, 0.9, 0.8, 0.2, 0.0])
# The first three are alike, the fourth is another thing, the fifth is half of each.
VECTORS = [np.array([[1, 0], [1, 0], [1, 0], [0, 1], [np.sqrt(0.5), np.sqrt(0.5)]])]


@pytest.mark.parametrize(
    ("weight", "order"),
    [
        (0.0, [0, 1, 2]),
        # Second: .7 * .9 - .3 * 1 = .33 of the twin, .7 * .2 - 0 = .14 of the other thing.
        (0.3, [0, 1, 2]),
        # Second: .4 - .5 against .1; third: .4 - .5 = -.1 of a twin against 0 - .35 of the half.
        (0.5, [0, 3, 1]),
        # The half is as near to either, and nearer to neither than a twin is to the first.
        (1.0, [0, 3, 4]),
    ],
)
def test_mmr_is_what_arithmetic_by_hand_gives(weight: float, order: list[int]) -> None:
    assert mmr(SCORES, VECTORS, 3, weight).tolist() == order


def test_mmr_of_equal_scores_or_few_items() -> None:
    assert mmr(np.zeros(5), VECTORS, 2, 0.5).tolist() == [0, 3]
    assert mmr(SCORES, VECTORS, 9, 0.5).tolist() == [0, 3, 1, 2, 4]
    assert mmr(SCORES[:0], [VECTORS[0][:0]], 3, 0.5).tolist() == []
    assert pool_size(1) == 100
    assert pool_size(50) == 250


@pytest.fixture(scope="module")
def recommender() -> MetaRecommender:
    settings = {
        **NO_MODEL,
        "score": ["item mean", "collaborative"],
        "collaborative": {"features": ["fields"], "members": "gp"},
    }
    return MetaRecommender(None, validated(RunConfig, settings, "test")).fit(known_task())


RATED = [("m0", 5.0), ("m4", 4.5), ("m1", 2.0), ("m2", 1.0)]


def test_more_diversity_gives_lists_that_are_less_alike(recommender: MetaRecommender) -> None:
    me, catalog = recommender.adapt(RATED), recommender.fitted.catalog
    vectors = ItemVectors(recommender.fitted).of(np.arange(len(catalog)))[-1]
    lists = [[catalog.find(entry.item) for entry in me.recommend(6, diversity=weight)] for weight in (0.0, 0.4, 1.0)]
    spread = [float(diversity(np.array([codes]), vectors)[0]) for codes in lists]
    assert spread[0] < spread[1] <= spread[2]
    assert lists[0][0] == lists[1][0] == lists[2][0], "the best one stays first"
    scores = {entry.item: entry.score for entry in me.recommend(36)}
    assert all(entry.score == scores[entry.item] for entry in me.recommend(6, diversity=1.0))
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="diversity is"):
            me.recommend(3, diversity=wrong)


def test_filters_and_blocks_leave_the_order_of_the_others(recommender: MetaRecommender) -> None:
    me = recommender.adapt(RATED)
    everything = [entry.item for entry in me.recommend(36)]
    drama = [item for item in everything if int(item[1:]) % 4 == 0]
    assert [entry.item for entry in me.recommend(len(drama), where="genres == 'drama'")] == drama
    kept = [item for item in everything if item not in (drama[0], drama[1]) and int(item[1:]) % 4 != 2]
    blocked = me.recommend(len(kept), block=[drama[0], drama[1], "genres=action"])
    assert [entry.item for entry in blocked] == kept
    with pytest.raises(ConfigError, match=f"There are {len(drama)} items to recommend"):
        me.recommend(len(drama) + 1, where="genres == 'drama'")


def test_the_command_line_takes_them(recommender: MetaRecommender, tmp_path: Path, metarec: Callable[..., Ran]) -> None:
    run = tmp_path / "runs" / "mine"
    recommender.save_pretrained(run / "model")
    rated = [part for item, rating in RATED for part in ("--rating", f"{item}={rating}")]
    asked = {"diversity": 0.5, "where": "'drama' in genres or 'horror' in genres", "block": ["m8"]}
    options = ["--diversity", 0.5, "--where", asked["where"], "--block", "m8"]
    done = metarec("recommend", run, *rated, "-k", 5, *options, "--json")
    assert done.status == 0, done.err
    expected = recommender.adapt(RATED).recommend(5, diversity=0.5, where=str(asked["where"]), block=["m8"])
    assert [entry["item"] for entry in json.loads(done.out)] == [entry.item for entry in expected]
    wrong = metarec("recommend", run, *rated, "--where", "yaer > 1")
    assert (wrong.status, "no field of an item" in wrong.err) == (2, True)
    explained = metarec("recommend", run, *rated, "-k", 2, "--explain")
    assert " for " in explained.out
