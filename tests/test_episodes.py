"""Splits are disjoint, nested and independent of who else is there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import known_interactions
from hypothesis import given, settings
from hypothesis import strategies as st

from metarec.data.episodes import Episode, evaluation_episodes, split_users, training_batch
from metarec.data.interactions import Interactions
from metarec.errors import ConfigError, DataError
from metarec.scorer import request

DATA = known_interactions()
ALL = np.arange(len(DATA.users))
SIZES = {"max_support": 8, "max_query": 10, "min_query": 3}


def cut(data: Interactions, users: np.ndarray = ALL, order: str = "random", seed: int = 0) -> list[Episode]:
    return evaluation_episodes(data, users, order=order, seed=seed, **SIZES)[0]  # type: ignore[arg-type]


@given(st.integers(0, 2**31), st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25)]))
@settings(max_examples=30)
def test_parts_are_disjoint_and_complete(seed: int, fractions: tuple[float, float, float]) -> None:
    parts = split_users(DATA, fractions, seed)
    together = np.concatenate(list(parts.values()))
    assert sorted(together.tolist()) == ALL.tolist()
    assert [len(parts[name]) for name in ("validation", "test")] == [round(60 * share) for share in fractions[1:]]


@pytest.mark.parametrize("order", ["random", "time"])
def test_support_and_query_never_overlap_and_hold_the_users_own_ratings(order: str) -> None:
    for episode in cut(DATA, order=order):
        user = DATA.users.index(episode.user)
        own = DATA.ratings(DATA.rows_of_user[user])
        truth = dict(zip(own.items.tolist(), own.values.tolist(), strict=True))
        assert not set(episode.support.items) & set(episode.query.items)
        for part in (episode.support, episode.query):
            assert all(truth[item] == value for item, value in zip(part.items, part.values, strict=True))


def test_every_k_has_the_same_query_and_a_nested_support() -> None:
    episode = cut(DATA)[0]
    small, large = request(episode, 3), request(episode, 8)
    assert np.array_equal(small.candidates, large.candidates)
    assert np.array_equal(small.support.items, large.support.items[:3])


def test_a_request_carries_no_query_label() -> None:
    episode = cut(DATA)[0]
    fields = vars(request(episode, 3))
    assert set(fields) == {"user", "support", "candidates"}
    assert np.issubdtype(fields["candidates"].dtype, np.integer)


def test_a_users_split_does_not_depend_on_other_users() -> None:
    alone = cut(DATA, np.array([7]))[0]
    among = next(episode for episode in cut(DATA) if episode.user == alone.user)
    assert np.array_equal(alone.query.items, among.query.items)


def test_order_by_time_puts_the_earliest_ratings_into_the_support() -> None:
    shuffled = replace(DATA, timestamp=np.random.default_rng(0).permutation(len(DATA)))
    for episode in cut(shuffled, order="time"):
        user = shuffled.users.index(episode.user)
        rows = shuffled.rows_of_user[user]
        assert shuffled.timestamp is not None
        when = dict(zip(shuffled.item[rows].tolist(), shuffled.timestamp[rows].tolist(), strict=True))
        assert max(when[item] for item in episode.support.items) < min(when[item] for item in episode.query.items)


def test_order_by_time_needs_timestamps() -> None:
    with pytest.raises(DataError, match="no timestamps"):
        cut(replace(DATA, timestamp=None), order="time")


def test_users_with_too_few_ratings_are_counted() -> None:
    episodes, left_out = evaluation_episodes(
        DATA, ALL, max_support=20, max_query=10, min_query=5, order="random", seed=0
    )
    assert (len(episodes), left_out) == (0, 60)


def test_a_training_batch_is_a_function_of_seed_and_step() -> None:
    def items(seed: int, step: int) -> list[int]:
        batch = training_batch(
            DATA, ALL[:30], batch_users=4, shots=(5, 8), max_query=6, min_query=3, seed=seed, step=step
        )
        assert len({len(episode.support) for episode in batch}) == 1
        assert len({episode.user for episode in batch}) == 4
        assert all(DATA.users.index(episode.user) < 30 for episode in batch)
        return [int(item) for episode in batch for item in (*episode.support.items, *episode.query.items)]

    assert items(0, 3) == items(0, 3)
    assert items(0, 3) != items(0, 4)
    assert items(0, 3) != items(1, 3)


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.2), (1.0, 0.0, 0.0)])
def test_fractions_that_do_not_divide_are_refused(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        split_users(DATA, fractions, 0)


def test_too_few_users_are_refused() -> None:
    with pytest.raises(DataError, match="leave none for"):
        split_users(known_interactions(users=4), (0.8, 0.1, 0.1), 0)


def test_hidden_items_are_all_that_a_training_query_asks_about_and_no_support_holds_one() -> None:
    hidden = np.arange(len(DATA.catalog)) % 3 == 0
    settings = {"batch_users": 6, "shots": (5,), "max_query": 4, "min_query": 3, "seed": 0}
    batch = training_batch(DATA, ALL, **settings, step=1, hidden=lambda user: hidden)  # type: ignore[arg-type]
    assert len(batch) == 6
    for episode in batch:
        assert hidden[episode.query.items].all()
        assert not hidden[episode.support.items].any()
        assert len(episode.support) == 5
        assert 3 <= len(episode.query) <= 4
    with pytest.raises(DataError, match="hidden items"):
        training_batch(DATA, ALL, **settings, step=1, hidden=lambda user: ~hidden & hidden)  # type: ignore[arg-type]
