"""Preferences are Bayes' rule, their intervals hold what they say, and informative items lower the variance most."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from serving import LOVES_DRAMA, recommender_without_model

from metarec.data.interactions import Catalog, Ratings
from metarec.errors import ConfigError
from metarec.recommending import preferences
from metarec.recommending.preferences import INTERVAL, PreferenceModel
from metarec.scorers.collaborative.gp import GaussianProcess
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.stack import Stacked
from metarec.scorers.collaborative.terms import CollaborativeTerm

ITEMS, WIDTH, SCALE = 40, 4, 1.5


def made(loadings: Floats | None = None, count: Floats | None = None) -> tuple[GaussianProcess, PreferenceModel]:
    """A process over items of four genres, each of them one of the weights but for some noise; the last is a bias."""
    generator = np.random.default_rng(0)
    genre = np.arange(ITEMS) % WIDTH
    if loadings is None:
        own = np.eye(WIDTH)[genre] + generator.normal(scale=0.2, size=(ITEMS, WIDTH))
        loadings = np.concatenate([own, np.full((ITEMS, 1), 0.4)], 1)
    count = np.ones(ITEMS) if count is None else count
    nothing = np.zeros(ITEMS, np.float32)
    process = GaussianProcess(
        3.0, SCALE, np.zeros(ITEMS), loadings, np.full(ITEMS, 0.5), loadings.mean(0), np.zeros(WIDTH + 1), 3.0
    )
    prior = ItemPrior(3.0, SCALE, nothing, count.astype(np.float32), nothing, 4.0)
    term = CollaborativeTerm(Stacked(prior, (process,), (0,), np.ones((1, 1))))
    ids = tuple(f"i{code}" for code in range(ITEMS))
    catalog = Catalog(ids, {"title": ids, "genres": tuple("abcd"[at] for at in genre)})
    return process, PreferenceModel(catalog, term)


def rated(items: list[int], values: list[float]) -> Ratings:
    return Ratings(np.array(items, np.int64), np.array(values, np.float32))


def test_the_weights_posterior_is_the_textbooks() -> None:
    process, _ = made()
    support = rated([0, 5, 9], [5.0, 1.0, 4.0])
    rows, noise = process.loadings[support.items], np.diag(1 / process.noise[support.items])
    covariance = np.linalg.inv(np.eye(WIDTH + 1) + rows.T @ noise @ rows)
    found = process.weight_posterior(support)
    assert found.covariance == pytest.approx(covariance)
    assert found.mean == pytest.approx(covariance @ rows.T @ noise @ (support.values - 3.0) / SCALE)
    nothing = process.weight_posterior(rated([], []))
    assert nothing.covariance == pytest.approx(np.eye(WIDTH + 1))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    process, model = made()
    generator, inside = np.random.default_rng(1), []
    directions = [process.loadings[at::WIDTH].mean(0) - process.loadings.mean(0) for at in range(WIDTH)]
    for _ in range(400):
        weights = generator.normal(size=WIDTH + 1)
        items = generator.choice(ITEMS, 5, replace=False)
        noise = generator.normal(scale=np.sqrt(0.5), size=5)
        values = 3.0 + SCALE * (process.loadings[items] @ weights + noise)
        for one in model.knowledge(Ratings(items, values.astype(np.float32))).preferences:
            truth = SCALE * directions["abcd".index(one.category)] @ weights
            inside.append(one.low <= truth <= one.high)
    assert np.mean(inside) == pytest.approx(INTERVAL, abs=0.03)


def test_who_loves_one_genre_is_believed_to_and_more_surely_with_each_rating() -> None:
    _, model = made()
    before = model.knowledge(rated([], []))
    assert before.known == 0.0
    assert [one.mean for one in before.preferences] == [0.0] * WIDTH
    assert [one.high for one in before.preferences] == pytest.approx([one.spread for one in before.preferences])
    known, width = [0.0], [before.preferences[0].high]
    for count in (1, 2, 3, 4):
        found = model.knowledge(rated([0, 4, 1, 8][:count], [5.0, 5.0, 1.0, 5.0][:count]))
        known.append(found.known)
        width.append(found.preferences[0].high - found.preferences[0].mean)
    loved = {one.category: one.mean for one in found.preferences}
    assert max(loved, key=lambda name: loved[name]) == "a"
    assert min(loved, key=lambda name: loved[name]) == "b"
    assert np.all(np.diff(known) > 0)
    assert np.all(np.diff(width) < 0)


def left_over(process: GaussianProcess, items: list[int], share: Floats) -> float:
    """The variance of a person's differences between items, after some ratings, the long way round."""
    covariance = process.weight_posterior(rated(items, [3.0] * len(items))).covariance
    among = process.loadings @ covariance @ process.loadings.T
    return float(share @ np.diag(among) - share @ among @ share)


@pytest.mark.parametrize("by_raters", [0.0, 0.5, 1.0])
def test_each_informative_item_is_the_one_that_an_exhaustive_search_finds(by_raters: float) -> None:
    count = np.random.default_rng(2).integers(1, 9, ITEMS).astype(float)
    process, model = made(count=count)
    share = count / count.sum()
    found = model.informative(rated([3], [4.0]), 3, np.ones(ITEMS, bool), by_raters=by_raters)
    chosen: list[int] = [3]
    whole = left_over(process, chosen, share)
    for one in found:
        now = left_over(process, chosen, share)
        gains = {item: now - left_over(process, [*chosen, item], share) for item in range(ITEMS) if item not in chosen}
        weighed = {item: gain * count[item] ** by_raters for item, gain in gains.items()}
        best = max(weighed, key=lambda item: weighed[item])
        assert one.item == f"i{best}"
        assert one.gain == pytest.approx(gains[best] / whole)
        chosen.append(best)


def test_items_that_are_alike_are_not_both_informative() -> None:
    loadings = np.zeros((ITEMS, WIDTH + 1))
    loadings[:, 0] = 1.0
    loadings[::2, 0] = -1.0  # two kinds of items, and one difference to learn
    loadings[0, 1], loadings[1, 1] = 3.0, 3.0
    _, model = made(loadings)
    found = model.informative(rated([], []), 2, np.ones(ITEMS, bool))
    assert {one.item for one in found} & {"i0", "i1"}
    assert {one.item for one in found} != {"i0", "i1"}


def test_items_that_are_not_allowed_that_nobody_rated_or_that_came_later_are_never_chosen() -> None:
    count = np.ones(ITEMS)
    count[7:] = 0
    _, model = made(count=count)
    allowed = np.ones(ITEMS + 5, bool)
    allowed[2] = False
    found = model.informative(rated([3, ITEMS + 1], [4.0, 5.0]), 50, allowed)
    assert {one.item for one in found} == {"i0", "i1", "i4", "i5", "i6"}


def test_large_catalogs_are_described_by_their_most_rated_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preferences, "_DESCRIBED", 30)
    count = np.where(np.arange(ITEMS) % 4 == 3, 1.0, 2.0)  # of genre d, few have raters
    _, model = made(count=count)
    found = model.knowledge(rated([0], [5.0])).preferences
    assert {one.category: one.items for one in found} == {"a": 10, "b": 10, "c": 10}
    assert len(model.informative(rated([], []), ITEMS, np.ones(ITEMS, bool))) == ITEMS


def test_a_person_has_preferences_and_informative_items() -> None:
    me = recommender_without_model().adapt(LOVES_DRAMA)
    found = {one.category: one for one in me.preferences().preferences}
    assert found["drama"].mean > 0 > found["horror"].mean
    first = me.informative(3, exclude=["m7"])
    assert len(first) == 3
    assert not {one.item for one in first} & {item for item, _ in (*LOVES_DRAMA, ("m7", 0))}
    assert 0 < me.preferences().known < 1


def test_a_score_without_a_process_has_no_preferences() -> None:
    me = recommender_without_model().adapt([])
    terms = {name: term for name, term in me.fitted.terms.items() if name != "collaborative"}
    with pytest.raises(ConfigError, match="no Gaussian process"):
        replace(me, fitted=replace(me.fitted, terms=terms)).preferences()
