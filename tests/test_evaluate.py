"""The evaluation under label rules of every kind: errors in rating units, users of one class, hashes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import known_interactions
from sklearn.metrics import roc_auc_score
from small_tasks import BASE
from torch import Tensor

from metarec.bench.report import findings
from metarec.config import validated
from metarec.data import task_data
from metarec.data.episodes import SplitPart
from metarec.data.task import Task
from metarec.data.task_data import TaskData, load_task_data
from metarec.errors import DataError, EvaluationError
from metarec.evaluation.evaluate import beside_pooled, evaluate, validation_auc
from metarec.evaluation.report import Report
from metarec.scorer import Request, Scorer

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
ORACLE = Fixed("oracle", lambda asked: torch.tensor([TRUTH[asked.user, int(item)] / 7 for item in asked.candidates]))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TaskData]:
    def load(**changes: Any) -> TaskData:
        monkeypatch.setattr(task_data, "read_source", lambda *_: DATA)
        return load_task_data(validated(Task, BASE | changes, "test"), 0)

    return load


def report(data: TaskData, *scorers: Scorer, shots: Sequence[int] = (0, 5)) -> Report:
    return evaluate(
        [*scorers, *beside_pooled(data.task, data.interactions.catalog)],
        data.episodes("test")[0],
        shots,
        data.interactions.catalog,
        threshold=data.task.like_threshold,
        seed=0,
        baseline=scorers[0].name,
        left_out={},
        metrics=data.task.metrics,
        calibration=data.episodes("validation")[0],
        hashes=data.hashes,
    )


def test_errors_are_in_the_ratings_units_whatever_the_scores_are(loaded: Callable[..., TaskData]) -> None:
    data = loaded(label="rating", metrics=["mae", "rmse"])
    cells = {(cell.method, cell.shots): cell.means for cell in report(data, CONSTANT, ORACLE).cells()}
    spread = np.concatenate([episode.query.values for episode in data.episodes("test")[0]])
    assert cells["oracle", 5]["rmse"] == pytest.approx(0, abs=1e-5)
    assert cells["constant", 0]["mae"] == pytest.approx(np.abs(spread - spread.mean()).mean(), rel=0.05)
    assert cells["constant", 0]["mae"] <= cells["constant", 0]["rmse"]


def test_a_support_tells_a_generous_user_from_a_strict_one(loaded: Callable[..., TaskData]) -> None:
    shift = np.where(np.arange(60) % 2 == 0, 1.0, -1.0)[DATA.user] * 0.75
    moved = np.clip(3 + (DATA.rating - 3) * 0.3 + shift, 0.5, 5).astype(np.float32)
    data = loaded(label="rating", metrics=["mae"])
    from dataclasses import replace

    whole = replace(data.interactions, rating=moved)
    cells = {(c.method, c.shots): c.means for c in report(replace(data, interactions=whole), CONSTANT).cells()}
    assert cells["constant", 5]["mae"] < 0.8 * cells["constant", 0]["mae"]


def test_errors_need_validation_users(loaded: Callable[..., TaskData]) -> None:
    data = loaded(label="rating", metrics=["mae"])
    with pytest.raises(EvaluationError, match="need validation users"):
        evaluate(
            [CONSTANT], data.episodes("test")[0], [0], data.interactions.catalog, threshold=0.0, seed=0,
            baseline="constant", left_out={}, metrics=["mae"],
        )  # fmt: skip


def test_users_of_one_class_count_for_errors_but_not_for_rankings(loaded: Callable[..., TaskData]) -> None:
    strict = loaded(label="rating >= 4.8", metrics=["recbole-click-ndcg@5"], query={"max": 3, "min": 3})
    both = report(strict, CONSTANT, ORACLE)
    everybody = len(strict.episodes("test")[0])
    assert len(both.values("oracle", 5, "recbole-click-ndcg@5")) == everybody
    assert len(both.values("oracle", 5)) == everybody - both.left_out["query of one class"] < everybody
    plain = report(loaded(label="rating >= 4.8", query={"max": 3, "min": 3}), CONSTANT, ORACLE)
    assert plain.values("oracle", 5).equals(both.values("oracle", 5))


def test_a_report_carries_the_hashes_of_what_it_is_of(loaded: Callable[..., TaskData]) -> None:
    data = loaded()
    assert report(data, CONSTANT).to_json()["hashes"] == data.hashes


def test_labels_come_from_the_rule_and_not_from_a_threshold(loaded: Callable[..., TaskData]) -> None:
    data = loaded(label="rating > user mean")
    means = {cell.method: cell.means["auc"] for cell in report(data, CONSTANT, ORACLE).cells()}
    assert means == {"constant": 0.5, "oracle": 1.0}


def test_unrated_candidates_are_ranked_with_the_rest(loaded: Callable[..., TaskData]) -> None:
    data = loaded(query={"max": 14, "min": 2, "candidates": "full"}, metrics=["hit@5", "recall@5"])
    known = Fixed(
        "known", lambda asked: torch.tensor([TRUTH.get((asked.user, int(item)), 0.0) for item in asked.candidates])
    )
    cells = {cell.method: cell.means for cell in report(data, CONSTANT, known).cells()}
    assert cells["known"]["auc"] == 1.0
    assert cells["known"]["hit@5"] == 1.0
    assert cells["constant"]["auc"] == 0.5


def test_the_validation_auc_is_the_mean_of_a_report(loaded: Callable[..., TaskData]) -> None:
    data = loaded()
    noisy = Fixed("noisy", lambda asked: ORACLE.give(asked) + torch.tensor(asked.candidates % 5) / 3)
    found = report(data, noisy)
    means = [found.values("noisy", count).mean() for count in (0, 5)]
    assert 0.5 < found.values("noisy", 5).mean() < 1.0
    episodes = data.episodes("test")[0]
    assert validation_auc(noisy, episodes, (0, 5), data.task.like_threshold) == np.mean(means)


def test_a_pooled_auc_rewards_telling_users_apart_and_a_users_auc_does_not(loaded: Callable[..., TaskData]) -> None:
    """A score that is one number per user orders nobody's items, yet the pooled AUC takes it for something."""
    data = loaded(metrics=["pooled_auc", "uauc", "uauc_weighted"])
    liked = {episode.user: float(episode.query.likes(3.5).mean()) for episode in data.episodes("test")[0]}
    generous = Fixed("generous", lambda asked: torch.full((len(asked.candidates),), liked[asked.user]))
    found = {cell.method: cell.means for cell in report(data, generous, ORACLE, shots=(5,)).cells()}
    assert found["generous"]["pooled_auc"] > 0.52
    assert found["generous"]["auc"] == found["generous"]["uauc"] == found["generous"]["uauc_weighted"] == 0.5
    assert found["oracle"]["pooled_auc"] == found["oracle"]["uauc"] == 1


def test_metrics_of_a_table_are_those_of_scikit_learn(loaded: Callable[..., TaskData]) -> None:
    data = loaded(metrics=["pooled_auc", "uauc", "uauc_weighted"])
    noise = np.random.default_rng(0)
    drawn = Fixed(
        "drawn", lambda asked: torch.from_numpy(noise.integers(0, 4, len(asked.candidates)).astype(np.float32))
    )
    made = report(data, drawn, shots=(5,))
    (cell, _) = made.cells()
    rows = made.predictions[made.predictions["method"] == "drawn"]
    assert cell.means["pooled_auc"] == pytest.approx(roc_auc_score(rows["liked"], rows["score"]))
    users = [group for _, group in rows.groupby("user") if group["liked"].nunique() == 2]
    areas = [roc_auc_score(group["liked"], group["score"]) for group in users]
    assert cell.means["uauc"] == pytest.approx(np.mean(areas))
    assert cell.means["uauc_weighted"] == pytest.approx(np.average(areas, weights=[len(group) for group in users]))
    for metric, (low, high) in cell.intervals.items():
        assert low < cell.means[metric] < high


def test_the_own_like_share_stands_beside_a_pooled_metric(loaded: Callable[..., TaskData]) -> None:
    pooled, plain = (report(loaded(metrics=metrics), CONSTANT) for metrics in (["pooled_auc"], ["uauc"]))
    assert [cell.method for cell in pooled.cells() if cell.shots == 5] == ["constant", "own like share"]
    assert {cell.method for cell in plain.cells()} == {"constant"}
    share = next(cell for cell in pooled.cells() if cell.method == "own like share" and cell.shots == 5)
    assert share.means["auc"] == 0.5
    assert any("own share of likes" in line for line in findings(pooled, "constant", "constant"))


def test_queries_of_one_item_count_in_the_pooled_auc(loaded: Callable[..., TaskData]) -> None:
    """Nobody's own AUC is defined there; everybody's items together have one."""
    data = loaded(metrics=["pooled_auc"], query={"max": 1, "min": 1})
    made = report(data, ORACLE, shots=(5,))
    oracle = next(iter(made.cells()))
    assert oracle.users == len(data.episodes("test")[0])
    assert oracle.means["pooled_auc"] == 1
    assert np.isnan(oracle.means["auc"])
    row = made.to_json()["rows"][0]
    assert (row["auc"], row["auc_gain"], row["pooled_auc_low"]) == (None, None, 1)
    assert "nan" not in " ".join(findings(made, "oracle", "oracle"))
    assert validation_auc(ORACLE, data.episodes("validation")[0], (5,), 3.5) == 1


def test_without_a_pooled_metric_queries_of_one_item_say_what_to_do(loaded: Callable[..., TaskData]) -> None:
    with pytest.raises(EvaluationError, match="pooled_auc"):
        report(loaded(query={"max": 1, "min": 1}), ORACLE)


def test_users_of_one_opinion_are_counted_by_it(loaded: Callable[..., TaskData]) -> None:
    data = loaded(label="rating >= 0.5")
    said = r"none of 12 users .* in the query: 12 like all of it, 0 nothing. Raise query.max"
    with pytest.raises(EvaluationError, match=said):
        report(data, CONSTANT)
    with pytest.raises(EvaluationError, match=said):
        validation_auc(CONSTANT, data.episodes("test")[0], (0, 5), data.task.like_threshold)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_too_few_ratings_are_counted_with_the_keys_to_lower(part: SplitPart, loaded: Callable[..., TaskData]) -> None:
    with pytest.raises(DataError) as caught:
        loaded(shots=[0, 20], query={"max": 14, "min": 5}).evaluated(part)
    assert str(caught.value) == (
        f"none of 12 {part} users has the 20 + 5 ratings that 20 shots and a query need: they have 24 to 24 "
        "(median 24). Lower 'shots' or 'query.min' in the task, or set 'short_supports: true'"
    )
    assert len(loaded(shots=[0, 20], query={"max": 14, "min": 4}).evaluated(part)[0]) == 12


def test_an_evaluation_of_nobody_says_who_was_left_out() -> None:
    with pytest.raises(EvaluationError, match="there is no user to evaluate: 7 with too few ratings"):
        evaluate(
            [CONSTANT], [], [0], DATA.catalog, threshold=3, seed=0, baseline="constant",
            left_out={"too few ratings": 7},
        )  # fmt: skip
