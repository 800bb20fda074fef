"""People who are in two data sets: what they rated in one tells what they like in the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_shop import PLAIN, USERS, write_two_shops
from small_tasks import BASE

from metarec import MetaRecommender
from metarec.config import RunConfig, validated
from metarec.data.task import Task
from metarec.data.task_data import TaskData, load_task_data
from metarec.errors import ConfigError


def mixed(dataset: dict[str, Any], **changes: Any) -> Task:
    values = {
        **BASE,
        "dataset": dataset,
        "split": {"fractions": [0.6, 0.2, 0.2], "cross": {"support": "movies", "query": "books"}},
        "shots": [0, 10],
        "query": {"max": 20, "min": 4},
        **changes,
    }
    return validated(Task, values, "test")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    return load_task_data(mixed(write_two_shops(tmp_path_factory.mktemp("mix"))), 0)


def test_an_id_in_both_parts_is_one_person(data: TaskData) -> None:
    assert len(data.interactions.users) == USERS
    assert "u7" in data.interactions.users
    domains = np.array(data.interactions.catalog.fields["domain"])
    rows = data.interactions.rows_of_user[data.interactions.users.index("u7")]
    assert set(domains[data.interactions.item[rows]]) == {"movies", "books"}


def test_supports_are_of_one_part_and_queries_of_the_other(data: TaskData) -> None:
    domains = np.array(data.interactions.catalog.fields["domain"])
    for part in ("validation", "test"):
        episodes, _ = data.episodes(part)
        assert episodes
        assert {name for episode in episodes for name in domains[episode.support.items]} == {"movies"}
        assert {name for episode in episodes for name in domains[episode.query.items]} == {"books"}
    assert data.leaks() == []


def test_taste_in_movies_ranks_books(data: TaskData) -> None:
    settings = validated(RunConfig, {**PLAIN, "train": {**PLAIN["train"], "shots": [10]}}, "test")
    recommender = MetaRecommender.from_pretrained("smollm2-135m-instruct", settings).fit(data)
    frame = recommender.evaluate(data).to_frame()
    none, ten = frame[frame["method"] == "metarec, adapted"]["auc"]
    assert ten > none + 0.08


def test_what_does_not_fit_a_cross_split_is_refused(tmp_path: Path) -> None:
    mix = write_two_shops(tmp_path)
    with pytest.raises(ConfigError, match="names two parts"):
        mixed(mix, split={"cross": {"support": "movies", "query": "games"}})
    with pytest.raises(ConfigError, match="split by user"):
        mixed(mix, split={"by": "item", "unseen": 0.2, "cross": {"support": "movies", "query": "books"}})
    with pytest.raises(ConfigError, match="'shared_users' is of source 'mix'"):
        mixed({"source": "embedded-movielens", "shared_users": True}, split={})


def test_people_of_one_part_alone_are_nobody_to_ask(tmp_path: Path) -> None:
    data = load_task_data(mixed(write_two_shops(tmp_path, shared=False)), 0)
    assert len(data.interactions.users) == 2 * USERS
    assert data.episodes("test")[0] == []
