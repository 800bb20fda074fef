"""What is said of a served model by feedback: known answers of made feedback, and that no user is in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import LOVES_DRAMA, LOVES_HORROR, small_recommender

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
from starlette.testclient import TestClient
from typer.testing import CliRunner

from metarec.cli import app
from metarec.data.interactions import RatingScale
from metarec.evaluation.calibration import Calibration
from metarec.recommender import MetaRecommender
from metarec.serve import watch as watching
from metarec.serve.app import create_app
from metarec.serve.drift import Reference, popularity_bins, recent_drift
from metarec.serve.engine import Engine
from metarec.serve.prequential import (
    GROUPS,
    Sums,
    difference,
    log_loss,
    ordered,
    range_of,
    stability_index,
)
from metarec.serve.service import ServeSettings
from metarec.serve.store import AdapterStore
from metarec.serve.watch import report, sums_name


@pytest.fixture(scope="session")
def recommender(model_dir: Callable[[str], Path]) -> MetaRecommender:
    return small_recommender(model_dir("llama"))


@pytest.fixture
def start(recommender: MetaRecommender, tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    clients = []

    def make(model: MetaRecommender = recommender, **changed: Any) -> TestClient:
        engine = Engine(model, AdapterStore(tmp_path / "store"))
        client = TestClient(create_app(engine, ServeSettings(**changed)), "http://localhost", False)
        clients.append(client.__enter__())
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)


def rate(client: TestClient, user: str, ratings: tuple[tuple[str, float], ...], **headers: str) -> Any:
    said = {"ratings": [{"item": item, "rating": rating} for item, rating in ratings]}
    answer = client.post(f"/v1/users/{user}/feedback", json=said, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def sums_of(client: TestClient) -> Sums:
    """Returns the sums of the served model, when the worker has done what it was given."""
    service = client.app.state.service  # type: ignore[attr-defined]
    service.worker.submit(watching_nothing()).result(20)
    return service.worker.watch.model(service.engine).sums.copy()


def watching_nothing() -> Any:
    from metarec.serve.worker import Job

    return Job(lambda *_: None, alone=True)


def scores_of(client: TestClient, user: str, items: list[str]) -> dict[str, float]:
    answer = client.post(f"/v1/users/{user}/score", json={"items": items}).json()
    return dict(zip(items, answer["scores"], strict=True))


def test_ratings_are_judged_by_the_scores_that_were_served_before_they_came(
    start: Callable[..., TestClient], recommender: MetaRecommender
) -> None:
    client = start()
    items = [item for item, _ in LOVES_DRAMA]
    before = scores_of(client, "ann", items)
    rate(client, "ann", LOVES_DRAMA)
    found = sums_of(client)
    likes = {item: rating >= 3.5 for item, rating in LOVES_DRAMA}
    pairs = [(before[up], before[down]) for up in items for down in items if likes[up] and not likes[down]]
    assert found.pairs == len(pairs) == 6
    assert found.auc == pytest.approx(np.mean([(up > down) + 0.5 * (up == down) for up, down in pairs]))
    chances = recommender.adapt([]).predict_proba(items)
    expected = np.mean([log_loss(chance, likes[item]) for item, chance in zip(items, chances, strict=True)])
    assert found.log_loss == pytest.approx(expected, rel=1e-4)
    assert [row["ratings"] for row in found.by_range()] == [5, 0, 0, 0, 0]


def test_the_next_ratings_are_judged_by_the_adapter_of_those_before(start: Callable[..., TestClient]) -> None:
    client = start()
    rate(client, "ann", LOVES_DRAMA)
    first = sums_of(client)
    later = (("m8", 5.0), ("m6", 1.0), ("m10", 1.0))
    before = scores_of(client, "ann", [item for item, _ in later])
    rate(client, "ann", later)
    found = (sums_of(client) - first).within(range_of(5))
    assert found.ratings == 3
    # The three among themselves, and with those of the other kind that were rated before.
    assert found.pairs == 2 + 2 + 3 * 2
    alone = [before["m8"] > before["m6"], before["m8"] > before["m10"]]
    assert found.auc is not None
    assert found.auc * found.pairs >= sum(alone)


def test_what_the_adapter_has_seen_judges_nothing(start: Callable[..., TestClient]) -> None:
    client = start()
    rate(client, "ann", LOVES_DRAMA, **{"Idempotency-Key": "1"})
    first = sums_of(client)
    rate(client, "ann", LOVES_DRAMA, **{"Idempotency-Key": "1"})
    rate(client, "ann", LOVES_HORROR)
    assert sums_of(client).ratings == first.ratings
    assert sums_of(client).pairs == first.pairs


def test_one_rating_at_a_time_is_compared_with_the_users_earlier_ones_and_no_other_users(
    start: Callable[..., TestClient],
) -> None:
    client = start()
    for user in ("ann", "bob"):
        for rating in LOVES_DRAMA:
            rate(client, user, (rating,))
    found = sums_of(client)
    assert found.pairs == 2 * 6
    assert [row["ratings"] for row in found.by_range()] == [2, 8, 0, 0, 0]


def test_a_share_of_zero_judges_nobody_and_shifts_are_seen_all_the_same(start: Callable[..., TestClient]) -> None:
    client = start(watch=0.0)
    rate(client, "ann", LOVES_DRAMA)
    assert sums_of(client).ratings == 0
    assert 'metarec_feedback_items_total{model="' in client.get("/metrics").text
    service = client.app.state.service  # type: ignore[attr-defined]
    assert service.worker.watch.model(service.engine).sums.arrays["came"][0] == 5


def test_feedback_is_stored_and_answered_where_it_cannot_be_judged(
    start: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    client = start()
    monkeypatch.setattr(watching, "_likes", broken)
    assert rate(client, "ann", LOVES_DRAMA)["accepted"] == 5
    assert sums_of(client).ratings == 0
    assert "metarec_watch_failures_total 1.0" in client.get("/metrics").text


def test_the_store_holds_the_sums_of_all_servers(start: Callable[..., TestClient], tmp_path: Path) -> None:
    for user in ("ann", "bob"):
        client = start()
        rate(client, user, LOVES_DRAMA)
        client.__exit__(None, None, None)
    store = AdapterStore(tmp_path / "store")
    engine = client.app.state.service.engine  # type: ignore[attr-defined]
    text = store.fact(sums_name("always", engine.digest))
    assert text is not None
    found = Sums.from_json(json.loads(text))
    assert (found.ratings, found.pairs) == (10, 12)
    assert found.arrays["adapted"].tolist() == [2, 0]
    assert not re.search("ann|bob|m0", text)
    (row,) = report(store)
    assert (row["model"], row["feedback"], row["diverged"], row["item_drift"]) == (engine.digest, 10, 0, None)
    assert row["by_shots"][0] == {"shots": "0", **found.values()}
    store.close()
    done = CliRunner().invoke(app, ["store", "quality", str(tmp_path / "store"), "--json"])
    assert json.loads(done.stdout)["models"] == [row]
    said = CliRunner().invoke(app, ["store", "quality", str(tmp_path / "store")]).stdout
    assert engine.digest in said
    assert f"{found.auc:.3f}" in said


def test_an_erased_users_scores_are_forgotten_and_metrics_name_nobody(start: Callable[..., TestClient]) -> None:
    client = start()
    rate(client, "ann", LOVES_DRAMA)
    sums_of(client)
    watch = client.app.state.service.worker.watch  # type: ignore[attr-defined]
    assert len(watch._latest) == 1
    text = client.get("/metrics").text
    assert client.delete("/v1/users/ann").status_code == 200
    assert len(watch._latest) == 0
    labels = set(re.findall(r'(\w+)="', text)) - {"method", "route", "status", "le"}
    assert labels == {"model", "k", "tenth", "popularity"}


def test_memory_is_bounded_by_users_and_scores(
    start: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_USERS", 2)
    client = start()
    for user in ("ann", "bob", "cem"):
        rate(client, user, LOVES_DRAMA)
    sums_of(client)
    assert len(client.app.state.service.worker.watch._latest) == 2  # type: ignore[attr-defined]


def made_world(probability: float, likes: float, ratings: int = 1000) -> Sums:
    found = Sums.empty()
    for place in range(ratings):
        found.count_rating(0, place % GROUPS, probability, place < likes * ratings)
    return found


def test_a_calibrated_world_has_no_calibration_error_and_a_miscalibrated_one_its_distance() -> None:
    assert made_world(0.3, 0.3).calibration_error == pytest.approx(0)
    assert made_world(0.9, 0.6).calibration_error == pytest.approx(0.3)
    calibrated, wrong = made_world(0.6, 0.6).log_loss, made_world(0.9, 0.6).log_loss
    assert calibrated == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)))
    assert wrong == pytest.approx(-(0.6 * math.log(0.9) + 0.4 * math.log(0.1)))


def test_a_served_model_of_wrong_probabilities_is_found_out(
    start: Callable[..., TestClient], recommender: MetaRecommender
) -> None:
    sure = tuple(replace(at, like=(20.0, 0.0, 0.0)) for at in recommender.fitted.calibration)
    assert all(isinstance(at, Calibration) for at in sure)
    wrong = MetaRecommender(recommender.backbone, recommender.config, replace(recommender.fitted, calibration=sure))
    client = start(wrong)
    rate(client, "ann", LOVES_DRAMA)
    assert sums_of(client).calibration_error == pytest.approx(2 / 5, abs=1e-3)


def test_values_of_nothing_are_none_and_ranges_are_those_that_are_named() -> None:
    assert list(Sums.empty().values().values()) == [0, 0, None, None, None]
    assert [range_of(count) for count in (0, 1, 4, 5, 9, 10, 19, 20, 500)] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [ordered(*pair) for pair in ((2.0, True, 1.0), (2.0, False, 1.0), (1.0, True, 1.0))] == [1.0, 0.0, 0.5]


def test_sums_come_back_from_json_and_those_of_another_shape_count_nothing() -> None:
    found = made_world(0.5, 0.5)
    again = Sums.from_json(json.loads(json.dumps(found.to_json())))
    assert again.values() == found.values()
    assert not Sums.from_json({"pairs": [1, 2, 3], "more": 1})


def made_pairs(chance: float, seed: int, users: int = 640) -> Sums:
    """Returns pairs of made users, ten each, that are in order by a known chance, which differs between users."""
    generator = np.random.default_rng(seed)
    found = Sums.empty()
    for user in range(users):
        own = np.clip(chance + generator.normal(0, 0.1), 0, 1)
        for value in generator.random(10) < own:
            found.count_pair(1, user % GROUPS, float(value))
    return found


def test_the_interval_of_a_difference_covers_the_true_one_as_often_as_it_says() -> None:
    held, widths = 0, []
    for seed in range(60):
        found = difference(made_pairs(0.75, 2 * seed), made_pairs(0.70, 2 * seed + 1), "pairs")
        assert found is not None
        held += found[1] <= 0.05 <= found[2]
        widths.append(found[2] - found[1])
    assert 52 <= held <= 60
    # Of 640 users with ten pairs each: their own spread and the coins', of both sides.
    assert np.mean(widths) == pytest.approx(2 * 1.96 * math.sqrt(2 * (0.1**2 + 0.7 * 0.3 / 10) / 640), rel=0.15)
    assert difference(Sums.empty(), made_pairs(0.7, 0), "pairs") is None


def test_drift_is_zero_where_nothing_moved_and_large_where_it_did() -> None:
    assert stability_index(np.array([500.0, 500.0]), np.array([0.5, 0.5])) == pytest.approx(0)
    moved = stability_index(np.array([900.0, 100.0]), np.array([0.5, 0.5]))
    assert moved == pytest.approx(0.4 * math.log(1.8) - 0.4 * math.log(0.2), rel=0.01)
    place, shares = popularity_bins(np.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], np.float32))
    assert place.tolist() == list(range(11))
    assert shares.tolist() == [0.0, *[0.1] * 10]
    reference = Reference(place, shares, np.full(10, 0.1), RatingScale(0, 10), 5.0)
    same = [(1 + step % 10, step % 10, step % 10 + 0.5) for step in range(200)]
    assert recent_drift(reference, same) == pytest.approx(
        {"item_drift": 0, "rating_drift": 0, "rating_shift": 0}, abs=1e-3
    )
    others = recent_drift(reference, [(0, 9, 9.5)] * 200)
    assert others["item_drift"] is not None
    assert others["item_drift"] > 1
    assert others["rating_drift"] is not None
    assert others["rating_drift"] > 1
    assert others["rating_shift"] == pytest.approx(4.5)
    assert set(recent_drift(reference, same[:50]).values()) == {None}


def test_a_recommender_knows_the_ratings_it_was_trained_on(recommender: MetaRecommender) -> None:
    reference = Reference.of(recommender.fitted)
    assert reference.ratings is not None
    assert reference.ratings.sum() == pytest.approx(1)
    assert reference.items.sum() == pytest.approx(1)


def test_ratings_of_added_items_are_unknown_to_the_model(start: Callable[..., TestClient]) -> None:
    client = start()
    client.post("/v1/items", json={"id": "new", "fields": {"title": "the dead river"}})
    rate(client, "ann", (("new", 5.0), ("m0", 4.0)))
    sums_of(client)
    metrics = client.get("/metrics").text
    assert re.search(r'metarec_feedback_unknown_items_total\{model="\w+"\} 1\.0', metrics)
    assert re.search(r'metarec_feedback_items_total\{model="\w+",popularity="0"\} 1\.0', metrics)
