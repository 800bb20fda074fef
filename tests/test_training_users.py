"""Meta-training takes its episodes' sizes from the task, and says whom they leave out."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import known_interactions
from small_recommenders import TASK, known_task
from test_python_api import FAST

from metarec.config import RunConfig, TrainConfig, validated
from metarec.data.episodes import training_batch
from metarec.data.task import Task
from metarec.data.task_data import TaskData
from metarec.data.task_files import load_task
from metarec.data.training_users import EpisodeSizes, episode_sizes, refuse_small_data, users_by_shots
from metarec.errors import ConfigError, DataError
from metarec.recommender import MetaRecommender


def uneven(**changes: object) -> TaskData:
    """The known task where user u keeps 4 + u mod 20 ratings."""
    data = known_task()
    place = np.concatenate([np.arange(len(rows)) for rows in data.interactions.rows_of_user])
    kept = place < 4 + data.interactions.user % 20
    return replace(data, task=validated(Task, {**TASK, **changes}, "x"), interactions=data.interactions.subset(kept))


def test_sizes_come_from_the_task_unless_they_are_set() -> None:
    assert episode_sizes(load_task("movielens/user-cold"), TrainConfig()) == EpisodeSizes((5, 10, 20), 5, False)
    task = validated(Task, {**TASK, "shots": [0, 3], "query": {"max": 9, "min": 1}, "short_supports": True}, "x")
    assert episode_sizes(task, TrainConfig()) == EpisodeSizes((3,), 2, True)
    assert episode_sizes(task, TrainConfig(shots=(7,), min_query=4)) == EpisodeSizes((7,), 4, True)
    only_zero = validated(Task, {**TASK, "shots": [0], "query": {"max": 50, "min": 30}}, "x")
    assert episode_sizes(only_zero, TrainConfig()) == EpisodeSizes((0,), 20, False)
    for wrong in ({"shots": [-1]}, {"shots": []}, {"min_query": 30}):
        with pytest.raises(ConfigError):
            validated(RunConfig, {"train": wrong}, "x")


@pytest.mark.parametrize("short", [False, True])
def test_fit_and_validate_count_the_same_users(short: bool) -> None:
    data = uneven(shots=[0, 5, 10], short_supports=short)
    found = users_by_shots(data, episode_sizes(data.task, TrainConfig()))
    assert list(found) == [5, 10]
    for shots, counts in found.items():
        assert data.enough(shots)["train"] == (counts["enough"], counts["left_out"])
    assert (found[5]["enough"] == found[10]["enough"]) == short


def test_a_support_size_that_nobody_has_is_refused_with_all_counts() -> None:
    data = uneven(shots=[0, 5, 25])
    few = users_by_shots(data, EpisodeSizes((5,), 5, False))[5]["enough"]
    said = (
        f"no meta-training user has 30 ratings, which K = 25 and a query of 5 take: the most are 23. Enough have {few}"
    )
    with pytest.raises(DataError) as caught:
        refuse_small_data(data, TrainConfig())
    assert str(caught.value).startswith(f"{said} for K = 5, 0 for K = 25. Set train.shots to [5], or lower")
    with pytest.raises(DataError, match="K = 100"):
        refuse_small_data(data, TrainConfig(shots=(100,)))


def test_users_left_out_are_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    refuse_small_data(uneven(shots=[0, 5, 17]), TrainConfig())
    levels = {record.getMessage()[:28]: record.levelname for record in caplog.records}
    assert levels == {"meta-training with K = 5 lea": "INFO", "meta-training with K = 17 le": "WARNING"}


def test_users_without_enough_hidden_items_are_counted_out() -> None:
    data = known_task()
    half = np.arange(40) % 2 == 0
    nothing = np.zeros(40, bool)
    sizes = EpisodeSizes((5,), 5, False)
    first = data.interactions.users[data.parts["train"][0]]
    found = users_by_shots(data, sizes, lambda user: nothing if user == first else half)
    assert found == {5: {"enough": len(data.parts["train"]) - 1, "left_out": 1}}
    with pytest.raises(DataError, match="a query of 5 of hidden items"):
        users_by_shots(data, sizes, lambda _: nothing)


@pytest.mark.parametrize("hide", [False, True])
def test_short_supports_are_drawn_from_whoever_has_a_support_and_a_query(hide: bool) -> None:
    data = known_interactions()
    hidden = np.arange(40) % 2 == 0
    batch = training_batch(
        data,
        np.arange(60),
        batch_users=60,
        shots=(30,),
        max_query=8,
        min_query=4,
        seed=0,
        step=0,
        hidden=(lambda _: hidden) if hide else None,
        short_supports=True,
    )
    assert len(batch) == 60
    for episode in batch:
        assert len(episode.query) >= 4
        assert not set(episode.query.items) & set(episode.support.items)
        assert len(episode.support) == 20 if not hide else 1 <= len(episode.support) < 24


def unset() -> MetaRecommender:
    """A recommender that reads no language model and takes the sizes of its episodes from the task."""
    settings = {**FAST, "train": {**FAST["train"], "shots": None}}
    return MetaRecommender.from_pretrained("no-model-is-read", validated(RunConfig, settings, "test"))


def few(path: Path, items: int) -> Path:
    """Sixty people who rated all of a few items, those of one kind higher."""
    rows = [f"u{user},i{item},{5 - (user + item) % 2 * 3},T{item}" for user in range(60) for item in range(items)]
    path.write_text("\n".join(["user,item,rating,title", *rows]) + "\n")
    return path


def test_a_catalog_of_two_items_is_refused_with_what_training_takes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the most are 2\..* takes users with 3 rated items at least"):
        unset().fit(few(tmp_path / "two.csv", 2))


@pytest.mark.parametrize("items", [3, 4, 5, 6, 8])
def test_a_catalog_of_a_few_items_is_trained_and_ranked(items: int, tmp_path: Path) -> None:
    recommender = unset().fit(few(tmp_path / "few.csv", items), label="rating >= 3")
    assert len(recommender.adapt({"T0": 5}).recommend(items - 1)) == items - 1
    assert recommender.evaluate().per_user["auc"].notna().any()


def test_two_items_are_ranked_by_a_task_without_shots(tmp_path: Path) -> None:
    task = {"shots": [0], "query": {"max": 2, "min": 2}, "label": "rating >= 3"}
    recommender = unset().fit(few(tmp_path / "two.csv", 2), **task)
    assert [entry.title for entry in recommender.adapt({}).recommend(2)]


@pytest.mark.parametrize(("most", "cure"), [(7, "train.shots to [2]"), (5, "train.min_query=4"), (2, "3 rated items")])
def test_the_cure_for_too_few_ratings_is_one_that_helps(most: int, cure: str, tmp_path: Path) -> None:
    choices = {"shots": [0, 5], "query": {"max": 10, "min": 5}}
    with pytest.raises(DataError, match=re.escape(cure)):
        unset().fit(few(tmp_path / "few.csv", most), **choices)
