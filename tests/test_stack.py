"""Stacking: weights learned on users that no member has seen, and what a fold may know."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from known import CANDIDATES, GENRE, ITEMS, SUPPORT, TEST, THRESHOLD, TRAIN, VECTORS, WORLD, episodes, ratings

from metarec.config import CollaborativeConfig, validated
from metarec.data.interactions import Interactions, Ratings
from metarec.evaluation.evaluate import evaluate
from metarec.scorers.collaborative.features import Features
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.stack import OutOfFold, Stacked, fit_stack
from metarec.scorers.collaborative.trivial import ItemMean

FEATURES = Features({"text": VECTORS, "genres": GENRE}, VECTORS)


def fit(data: Interactions, members: str = "stack", **more: float) -> tuple[ItemPrior, Stacked, OutOfFold]:
    settings = validated(CollaborativeConfig, {"members": members, "stack": {"folds": 2}}, "test")
    found = fit_stack(data, TRAIN, FEATURES, settings, threshold=THRESHOLD, **more)  # type: ignore[arg-type]
    return found.prior, found.stack, found.out_of_fold


@cache
def fitted() -> tuple[ItemPrior, Stacked, OutOfFold]:
    return fit(WORLD)


def test_one_member_counts_as_it_is_and_none_says_what_the_prior_says() -> None:
    _, alone, _ = fit(WORLD, "gp")
    (process,) = alone.members
    np.testing.assert_allclose(
        alone.posterior_mean(SUPPORT, CANDIDATES),
        process.posterior_mean(SUPPORT, CANDIDATES),  # type: ignore[union-attr]
        rtol=1e-5,
        atol=1e-6,
    )
    prior, nothing, _ = fit(WORLD, "none")
    np.testing.assert_allclose(nothing.posterior_mean(SUPPORT, CANDIDATES), prior.values(CANDIDATES))
    np.testing.assert_allclose(nothing.leave_one_out(SUPPORT), prior.values(SUPPORT.items))


def test_the_posterior_is_the_weighted_sum_of_what_members_add() -> None:
    prior, stack, _ = fitted()
    weights = np.arange(len(stack.members) * 4, dtype=float).reshape(4, -1) / 10
    some = replace(stack, weights=weights)
    support = SUPPORT.head(5)
    base = prior.values(CANDIDATES)
    from metarec.scorer import Request

    told = [member.score([Request("x", support, CANDIDATES)])[0].numpy() - base for member in stack.members]
    np.testing.assert_allclose(
        some.posterior_mean(support, CANDIDATES), base + weights[1] @ np.stack(told), rtol=1e-4, atol=1e-5
    )


def test_between_two_shots_weights_lie_between_and_beyond_the_last_they_stay() -> None:
    _, stack, _ = fitted()
    column = np.array([[0.0], [1.0], [3.0], [4.0]]) * np.ones((1, len(stack.members)))
    some = replace(stack, weights=column)
    assert some._weights(5)[0] == pytest.approx(1.0)
    assert 1.0 < some._weights(7)[0] < 3.0
    assert some._weights(400)[0] == pytest.approx(4.0)


def test_the_stack_is_at_least_as_good_as_its_first_member() -> None:
    prior, stack, _ = fitted()
    first = replace(stack.members[0], name="first")
    report = evaluate(
        [ItemMean(prior), stack, first],
        episodes(WORLD, TEST),
        (5, 10),
        WORLD.catalog,
        threshold=THRESHOLD,
        seed=0,
        baseline="item mean",
        left_out={},
    )
    assert report.values("stacked", 10).mean() > 0.95
    assert report.values("stacked", 5).mean() >= report.values("first", 5).mean() - 0.02


@pytest.mark.parametrize("members", ["none", "gp", "linear", "stack"])
def test_a_fold_does_not_change_with_the_users_it_has_not_seen(members: str) -> None:
    _, _, crossed = fitted() if members == "stack" else fit(WORLD, members)
    name = WORLD.users[TRAIN[0]]
    same_fold = [code for code in TRAIN if crossed.fold[WORLD.users[code]] == crossed.fold[name]]
    theirs = np.isin(WORLD.user, same_fold)
    turned = replace(WORLD, rating=np.where(theirs, 5.5 - WORLD.rating, WORLD.rating).astype(np.float32))
    changed = fit(turned, members)[2].without(name)
    same = crossed.without(name)
    np.testing.assert_array_equal(changed.prior.total, same.prior.total)
    # The weights are learned on all users; the members are not, but for the meta-learned kernel's gradient.
    first = 1 if members == "stack" else 0
    for before, after in zip(same.stack.members[first:], changed.stack.members[first:], strict=True):
        from metarec.scorer import Request

        asked = [Request("x", SUPPORT, CANDIDATES)]
        np.testing.assert_array_equal(before.score(asked)[0], after.score(asked)[0])
    assert set(crossed.fold) == {WORLD.users[code] for code in TRAIN}


def test_hidden_items_were_never_rated_as_far_as_a_fold_knows() -> None:
    prior, _, crossed = fit(WORLD, "gp", hide=0.3)
    assert prior.count[:40].min() > 0, "all users together still know every item"
    for fold in crossed.folds:
        assert 4 <= fold.hidden.sum() <= 20
        assert fold.prior.count[fold.hidden].sum() == 0
        assert (fold.prior.count[:40][~fold.hidden[:40]] > 0).all()


def test_without_means_only_taste_is_left() -> None:
    _, stack, crossed = fitted()
    silent = stack.with_zero_mean()
    np.testing.assert_array_equal(silent.posterior_mean(Ratings.empty(), np.arange(ITEMS)), np.zeros(ITEMS))
    assert np.abs(silent.posterior_mean(SUPPORT, CANDIDATES)).max() > 0.05
    assert all(fold.prior.zero_mean for fold in crossed.with_zero_mean().folds)


def test_new_items_get_their_prior_and_change_no_other_score() -> None:
    prior, stack, _ = fitted()
    longer = replace(
        prior,
        total=np.append(prior.total, np.float32(0)),
        count=np.append(prior.count, np.float32(0)),
        centre=np.append(prior.centre, np.float32(0.7)),
    )
    extended = stack.extended(longer)
    asked = np.append(CANDIDATES, ITEMS)
    scores = extended.posterior_mean(SUPPORT, asked)
    np.testing.assert_allclose(scores[:-1], stack.posterior_mean(SUPPORT, CANDIDATES), rtol=1e-5, atol=1e-6)
    assert scores[-1] == pytest.approx(0.7, abs=1e-5)
    with_new = Ratings(np.append(SUPPORT.items, ITEMS), np.append(SUPPORT.values, np.float32(5)))
    assert np.isfinite(extended.posterior_mean(with_new, asked)).all()
    assert len(extended.leave_one_out(ratings((0, 5.0), (ITEMS, 1.0)))) == 2
