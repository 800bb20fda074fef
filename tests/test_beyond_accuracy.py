"""Metrics beyond a ranking's accuracy, against answers known by hand: lists, probabilities, groups of users."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ran, known_interactions
from sklearn.metrics import f1_score
from small_recommenders import NO_MODEL
from small_tasks import BASE
from torch import Tensor

from metarec.bench.report import table
from metarec.config import RunConfig, validated
from metarec.data import task_data
from metarec.data.interactions import Catalog
from metarec.data.side import SideColumns
from metarec.data.task import Task
from metarec.data.task_data import TaskData, load_task_data
from metarec.data.user_groups import user_groups
from metarec.errors import DataError, EvaluationError
from metarec.evaluation.evaluate import evaluate, evaluate_on
from metarec.evaluation.metric_names import BEYOND, check_metric
from metarec.evaluation.metrics import log_loss, table_interval, table_metric
from metarec.evaluation.recommended_lists import (
    best_lists,
    catalog_facts,
    coverage,
    diversity,
    gini,
    novelty,
    of_all_users,
    popularity,
    token_vectors,
)
from metarec.evaluation.report import Report
from metarec.recommender import MetaRecommender
from metarec.scorer import Request

DATA = known_interactions()
TRUTH = {(DATA.users[u], int(i)): float(r) for u, i, r in zip(DATA.user, DATA.item, DATA.rating, strict=True)}


@dataclass(frozen=True)
class Fixed:
    name: str
    give: Callable[[Request], Tensor]
    bytes_per_user: int = 0

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        return [self.give(asked) for asked in requests]


CONSTANT = Fixed("constant", lambda asked: torch.zeros(len(asked.candidates)))
FIRST = Fixed("first", lambda asked: -torch.from_numpy(asked.candidates).float())
ORACLE = Fixed("oracle", lambda asked: torch.tensor([TRUTH.get((asked.user, int(i)), 3) / 7 for i in asked.candidates]))


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> TaskData:
    monkeypatch.setattr(task_data, "read_source", lambda *_: DATA)
    return load_task_data(validated(Task, BASE, "test"), 0)


def report(data: TaskData, *metrics: str) -> Report:
    scorers, episodes = [CONSTANT, FIRST, ORACLE], data.episodes("test")[0]
    return evaluate_on(data, scorers, episodes, seed=0, baseline="constant", left_out={}, metrics=metrics)


def test_a_list_of_one_genre_has_no_diversity_and_one_of_different_genres_has_all() -> None:
    genres = ("a", "a", "a", "b", "c", "a|b", "a|b|c", "a", "b", "b|c", "b", "c", "c", "b|c", "a|c")
    catalog = Catalog(tuple(map(str, range(15))), {"title": ("x",) * 15, "genres": genres})
    vectors = token_vectors(catalog)
    found = diversity(np.array([[0, 1, 2], [0, 3, 4], [0, 5, 3]]), vectors)
    apart = 1 - 1 / np.sqrt(2)  # of {a} and {a, b}
    assert found == pytest.approx([0.0, 1.0, (apart + 1 + apart) / 3])


def test_a_catalog_without_categories_is_told_apart_by_words() -> None:
    catalog = Catalog(("0", "1", "2"), {"title": ("red road", "road, red!", "blue sea")})
    assert diversity(np.array([[0, 1], [0, 2]]), token_vectors(catalog)) == pytest.approx([0.0, 1.0])


def test_novelty_is_in_bits_and_popularity_in_times_the_catalogs_mean() -> None:
    raters = np.array([7, 3, 1, 0, 1])
    assert novelty(np.array([[0, 1], [2, 3]]), raters, 7) == pytest.approx([0.5, 2.5])
    assert popularity(np.array([[0, 1], [2, 4]]), raters) == pytest.approx([5 / 2.4, 1 / 2.4])


def test_coverage_and_gini_of_counts_known_by_hand() -> None:
    assert coverage(np.array([2, 0, 1, 0])) == 0.5
    assert gini(np.array([3, 3, 3, 3])) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 12])) == pytest.approx(0.75)
    counts = np.array([4, 1, 0, 9, 2])
    by_pairs = np.abs(counts[:, None] - counts).sum() / (2 * len(counts) * counts.sum())
    assert gini(counts) == pytest.approx(by_pairs)


def test_the_interval_of_a_coverage_is_the_jackknifes() -> None:
    lists = np.array([[0, 1], [0, 2], [0, 3], [0, 1]])
    value, (low, high) = of_all_users("coverage", lists, 10)
    without = np.array([0.4, 0.3, 0.3, 0.4])  # only the second and the third user cover an item alone
    error = np.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum())
    assert (value, low, high) == pytest.approx((0.4, 0.4 - 1.96 * error, 0.4 + 1.96 * error))


def test_lists_hold_no_item_of_the_support_and_ties_follow_no_order(data: TaskData) -> None:
    facts, episodes = catalog_facts(data), data.episodes("test")[0]
    for codes, episode in zip(best_lists(FIRST, episodes, 5, 10, facts, 0), episodes, strict=True):
        unrated = np.setdiff1d(np.arange(len(facts.ids)), episode.support.head(5).items)
        assert codes.tolist() == unrated[:10].tolist()
    tied = best_lists(CONSTANT, episodes, 0, 10, facts, 0)
    assert (tied == tied[0]).all()
    assert tied[0].tolist() != sorted(tied[0].tolist())
    assert (best_lists(CONSTANT, episodes, 0, 10, facts, 1) != tied).any()


def test_what_test_users_rated_makes_no_item_popular(data: TaskData) -> None:
    trained = np.isin(DATA.user, data.parts["train"])
    assert catalog_facts(data).raters.tolist() == np.bincount(DATA.item[trained], minlength=40).tolist()
    moved = replace(data, interactions=replace(DATA, item=np.where(trained, DATA.item, 0)))
    assert catalog_facts(moved).raters.tolist() == catalog_facts(data).raters.tolist()


def test_a_report_has_lists_with_intervals_and_the_rest_is_what_it_is_without(data: TaskData) -> None:
    found, plain = report(data, "coverage@5", "gini@5", "diversity@5", "novelty@5", "popularity@5"), report(data)
    cells = {(cell.method, cell.shots): cell for cell in found.cells()}
    users = cells["first", 0].users
    assert cells["first", 0].means["coverage@5"] == 5 / 40
    assert cells["first", 0].means["gini@5"] == pytest.approx(1 - 5 / 40)
    facts = catalog_facts(data)
    assert cells["first", 0].means["popularity@5"] == pytest.approx(facts.raters[:5].mean() / facts.raters.mean())
    assert cells["oracle", 0].means["coverage@5"] > 5 / 40
    assert cells["oracle", 0].means["diversity@5"] < cells["first", 0].means["diversity@5"]  # each likes two genres
    for metric, (low, high) in cells["oracle", 5].intervals.items():
        assert low < cells["oracle", 5].means[metric] < high, metric
    assert found.values("oracle", 5).equals(plain.values("oracle", 5))
    row = found.to_json()["rows"][0]
    assert {"coverage@5", "coverage@5_low", "novelty@5_high"} <= set(row)
    assert users == len(data.episodes("test")[0])


def test_probabilities_are_measured_by_what_happened(data: TaskData) -> None:
    cells = {(cell.method, cell.shots): cell for cell in report(data, "log_loss", "accuracy", "f1").cells()}
    liked = np.concatenate([episode.query.likes(3.5) for episode in data.episodes("test")[0]])
    base = max(liked.mean(), 1 - liked.mean())
    assert cells["constant", 0].means["accuracy"] == pytest.approx(base, abs=0.1)
    assert cells["constant", 0].means["log_loss"] == pytest.approx(np.log(2), abs=0.02)
    assert cells["oracle", 0].means["accuracy"] == 1
    assert cells["oracle", 0].means["f1"] == 1
    assert cells["oracle", 0].means["log_loss"] < 0.35


def test_f1_and_log_loss_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import log_loss as reference

    generator = np.random.default_rng(0)
    chance, liked = generator.random(60), generator.random(60) < 0.4
    users = [f"u{code % 7}" for code in range(60)]
    value = table_metric("f1", chance, liked, users)
    assert value == pytest.approx(f1_score(liked, chance >= 0.5))
    low, high = table_interval("f1", chance, liked, users, 0)
    assert low < (value or 0) < high
    assert table_metric("f1", np.zeros(3), np.zeros(3, bool), ["a"] * 3) == 0
    assert log_loss(chance, liked) == pytest.approx(reference(liked, chance))
    assert np.isfinite(log_loss(np.array([0.0]), np.array([True])))


def test_the_auc_of_a_group_is_that_of_its_users(data: TaskData) -> None:
    episodes = data.episodes("test")[0]
    found = report(data, "auc_by_mainstream")
    groups = user_groups("mainstream", data, episodes)
    facts = catalog_facts(data)
    mean = {episode.user: facts.raters[episode.support.items].mean() for episode in episodes}
    ordered = [groups.of_user[user] for user in sorted(mean, key=lambda user: mean[user])]
    assert ordered == sorted(ordered, key=groups.labels.index), "groups follow the popularity"
    values = found.values("oracle", 5)
    for label in groups.labels:
        users = [user for user, group in groups.of_user.items() if group == label]
        cell = next(cell for cell in found.cells() if (cell.method, cell.shots) == ("oracle", 5))
        assert cell.means[f"auc_by_mainstream:{label}"] == pytest.approx(values.loc[values.index.isin(users)].mean())


def test_users_of_the_same_activity_are_in_one_group(data: TaskData) -> None:
    groups = user_groups("activity", data, data.episodes("test")[0])
    assert set(groups.of_user.values()) == {"few"}, "everybody rated 24 items"
    with pytest.raises(DataError, match=r"users cannot be grouped by 'activty'\. Did you mean 'activity'"):
        user_groups("activty", data, [])


def test_the_auc_of_users_with_a_value_is_theirs_alone(data: TaskData) -> None:
    users = data.interactions.users
    about = {
        "gender": np.array(["", *(["f", "m"] * len(users))][: len(users)], object),
        "age": np.array([str(20 + code) for code in range(len(users))], object),
        "town": np.array([f"town {code}" for code in range(len(users))], object),
    }
    told = replace(data, interactions=replace(data.interactions, side=SideColumns(about)))
    code = {user: at for at, user in enumerate(users)}
    found = report(told, "auc_by_gender", "auc_by_age")
    cell = next(cell for cell in found.cells() if (cell.method, cell.shots) == ("first", 5))
    values = found.values("first", 5)
    for label in "fm":
        own = [user for user in values.index if about["gender"][code[user]] == label]
        assert 0 < len(own) < len(values)
        assert cell.means[f"auc_by_gender:{label}"] == pytest.approx(values.loc[own].mean())
    ages = user_groups("age", told, told.episodes("test")[0])
    assert len(ages.labels) == 3
    assert all(20 + code[user] <= float(label.removeprefix("to ")) for user, label in ages.of_user.items())
    with pytest.raises(DataError, match=r"grouped by 'town': it has \d+ values"):
        user_groups("town", told, told.episodes("test")[0])
    with pytest.raises(DataError, match=r"Did you mean 'gender'"):
        user_groups("gendre", told, [])


@pytest.mark.parametrize("name", ["coverage", "coverage@0", "auc_by_", "loglos"])
def test_a_metric_that_there_is_not_is_refused(name: str) -> None:
    with pytest.raises(EvaluationError, match="no metric is called"):
        check_metric(name)


@pytest.mark.parametrize(("metric", "said"), [("coverage@5", "facts"), ("auc_by_activity", "groups"), ("f1", "f1")])
def test_what_a_metric_lacks_is_named(metric: str, said: str, data: TaskData) -> None:
    with pytest.raises(EvaluationError, match=said):
        evaluate(
            [CONSTANT], data.episodes("test")[0], [0], DATA.catalog, threshold=3.5, seed=0, baseline="constant",
            left_out={}, metrics=[metric],
        )  # fmt: skip


def test_the_printed_report_names_them_and_the_command_takes_them(
    metarec: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: TaskData
) -> None:
    run = tmp_path / "runs" / "mine"
    recommender = MetaRecommender(None, validated(RunConfig, NO_MODEL, "test")).fit(data)
    recommender.save_pretrained(run / "model")
    monkeypatch.setattr(MetaRecommender, "task_data", lambda *_: data)
    done = metarec("evaluate", run, "--beyond-accuracy", "--json")
    assert done.status == 0, done.err
    row: dict[str, Any] = json.loads(done.out)["rows"][-1]
    assert {name for name in BEYOND if not name.startswith("auc_by")} <= set(row)
    assert {f"auc_by_activity:{group}" for group in ("few", "some", "many")} <= set(row)
    assert row["auc_by_activity:many"] is None
    shown = metarec("evaluate", run, "--metric", "gini@5").out
    assert "gini@5" in shown
    assert "coverage" not in shown
    wrong = metarec("evaluate", run, "--metric", "ginni@5")
    assert (wrong.status, "gini@5" in wrong.err) == (2, True)
    assert table(recommender.evaluate(metrics=["f1"])).row_count == 3
