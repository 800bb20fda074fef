"""A new run for some users first: who is served by which model, what is compared, and what a promotion changes."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Ran
from serving import LOVES_DRAMA, small_recommender
from small_recommenders import known_task

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
from fastapi import FastAPI
from starlette.testclient import TestClient

from metarec.data.task import Task
from metarec.errors import ArtifactError, ConfigError
from metarec.files.run_directory import deployed_run, recommender_dir
from metarec.meta.inner_loop import MetaState
from metarec.recommender import MetaRecommender
from metarec.serve.app import create_app
from metarec.serve.canary import Canary, user_of
from metarec.serve.deployment import (
    DeployedRun,
    Deployment,
    change_deployment,
    compare,
    create_deployment,
    models_name,
    read_deployment,
)
from metarec.serve.engine import Engine
from metarec.serve.prequential import GROUPS, Sums
from metarec.serve.records import Feedback
from metarec.serve.service import ServeSettings
from metarec.serve.store import AdapterStore
from metarec.serve.watch import add_sums
from metarec.serve.worker import Job

OLD, NEW = DeployedRun("/runs/old", "0" * 64), DeployedRun("/runs/new", "1" * 64)


@pytest.fixture(scope="session")
def runs(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of one task, whose second one scores the other way round."""
    folder = tmp_path_factory.mktemp("runs")
    first = small_recommender(model_dir("llama"))
    fitted = first.fitted
    init = {name: -value if name.startswith("score.") else value for name, value in fitted.meta.init.items()}
    second = MetaRecommender(
        first.backbone, first.config, replace(fitted, meta=MetaState(init, dict(fitted.meta.log_rate)))
    )
    for name, recommender in (("old", first), ("new", second)):
        recommender.save_pretrained(folder / name / "model")
    return {name: folder / name for name in ("old", "new")}


@pytest.fixture
def live(runs: dict[str, Path], tmp_path: Path) -> Path:
    create_deployment(tmp_path / "live", DeployedRun.of(runs["old"]))
    return tmp_path / "live"


@pytest.fixture
def serve(live: Path) -> Iterator[Callable[[], tuple[TestClient, Canary]]]:
    opened = []

    def open_app(run: Path) -> FastAPI:
        engine = Engine(MetaRecommender.from_pretrained(run), AdapterStore(live / "store"))
        return create_app(engine, ServeSettings())

    def start() -> tuple[TestClient, Canary]:
        canary = Canary(live, open_app)
        client = TestClient(canary, "http://localhost", False)  # type: ignore[arg-type]
        opened.append(client.__enter__())
        return opened[-1], canary

    yield start
    for client in opened:
        client.__exit__(None, None, None)


def begin(live: Path, runs: dict[str, Path], share: float = 0.5) -> Deployment:
    candidate = DeployedRun.of(runs["new"])
    return change_deployment(live, lambda before: before.started(candidate, share))


def follow(client: TestClient, canary: Canary) -> None:
    """Takes the deployment's file at once instead of within a second."""
    assert client.portal is not None
    client.portal.call(canary.refresh)


def rate(client: TestClient, user: str, ratings: tuple[tuple[str, float], ...] = LOVES_DRAMA) -> None:
    said = {"ratings": [{"item": item, "rating": rating} for item, rating in ratings]}
    answer = client.post(f"/v1/users/{user}/feedback", json=said)
    assert answer.status_code == 200, answer.text


def scores(client: TestClient, user: str) -> list[float]:
    answer = client.post(f"/v1/users/{user}/score", json={"items": ["m8", "m6", "m10", "m12"]})
    assert answer.status_code == 200, answer.text
    found: list[float] = answer.json()["scores"]
    return found


# Who is in a canary.


def test_a_share_of_users_is_in_the_canary_and_they_stay_in_it_when_it_grows() -> None:
    small, large = (Deployment(OLD).started(NEW, share) for share in (0.1, 0.3))
    users = [f"{user:032x}" for user in range(4000)]
    few, many = ({user for user in users if one.in_canary(user)} for one in (small, large))
    assert len(few) == pytest.approx(400, abs=60)
    assert len(many) == pytest.approx(1200, abs=90)
    assert few < many
    other = Deployment(OLD).started(DeployedRun("/runs/other", "2" * 64), 0.1)
    both = few & {user for user in users if other.in_canary(user)}
    assert len(both) < 80
    assert not any(Deployment(OLD).in_canary(user) for user in users)


@pytest.mark.parametrize(
    ("raw", "query", "cookie", "user"),
    [
        (b"/v1/users/ann/feedback", b"", b"", "ann"),
        (b"/v1/users/a%2Fb", b"", b"", "a/b"),
        (b"/v1/users/%61nn/score?x=1", b"", b"", "ann"),
        (b"/v1/search", b"q=x&user=ann", b"", "ann"),
        (b"/v1/search", b"q=x", b"", None),
        (b"/v1/items", b"", b"", None),
        (b"/", b"", b"metarec_visitor=page-1; other=2", "page-1"),
        (b"/", b"", b"\xff;;=", None),
    ],
)
def test_a_request_names_its_user_by_path_query_or_cookie(
    raw: bytes, query: bytes, cookie: bytes, user: str | None
) -> None:
    scope = {"type": "http", "path": "/", "raw_path": raw, "query_string": query, "headers": [(b"cookie", cookie)]}
    assert user_of(scope) == user


# The file.


def test_a_deployment_goes_through_a_canary_a_promotion_and_back(live: Path, runs: dict[str, Path]) -> None:
    first = read_deployment(live)
    assert first.period == "always"
    canary = begin(live, runs)
    assert canary.candidate == DeployedRun.of(runs["new"])
    assert begin(live, runs, 0.7).period != canary.period
    promoted = change_deployment(live, Deployment.promoted)
    assert (promoted.current, promoted.candidate, promoted.previous) == (canary.candidate, None, first.current)
    back = change_deployment(live, Deployment.rolled_back)
    assert (back.current, back.previous) == (first.current, canary.candidate)
    begin(live, runs)
    assert change_deployment(live, Deployment.rolled_back).candidate is None
    assert read_deployment(live).current == first.current


def test_a_deployments_directory_stands_for_its_current_run(live: Path, runs: dict[str, Path]) -> None:
    assert deployed_run(live) == runs["old"]
    assert recommender_dir(live) == runs["old"] / "model"
    begin(live, runs)
    change_deployment(live, Deployment.promoted)
    assert recommender_dir(live) == runs["new"] / "model"
    assert deployed_run(runs["old"]) == runs["old"]


def test_what_cannot_be_is_refused(live: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is what is served already"):
        change_deployment(live, lambda before: before.started(before.current, 0.1))
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="--share is"):
            begin(live, runs, share)
    with pytest.raises(ConfigError, match="no candidate to promote"):
        change_deployment(live, Deployment.promoted)
    with pytest.raises(ConfigError, match="nothing to roll back to"):
        change_deployment(live, Deployment.rolled_back)
    with pytest.raises(ConfigError, match="holds a deployment already"):
        create_deployment(live, OLD)
    with pytest.raises(ConfigError, match="holds no trained recommender"):
        DeployedRun.of(live)
    with pytest.raises(ConfigError, match="holds no deployment"):
        read_deployment(tmp_path)
    begin(live, runs)
    with pytest.raises(ConfigError, match="is in a canary already"):
        change_deployment(live, lambda before: before.started(NEW, 0.1))


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": 2}', "{", '{"format": 1, "current": null}'])
def test_a_damaged_file_is_refused(text: str, live: Path) -> None:
    (live / "deployment.json").write_text(text)
    with pytest.raises(ArtifactError):
        read_deployment(live)


def test_a_run_that_was_trained_anew_is_not_the_one_that_was_deployed(live: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not the run that was deployed"):
        replace(read_deployment(live).current, content="0" * 64).check()


@pytest.mark.parametrize("call", ["replace", "fsync", "open"])
def test_a_failure_while_the_file_is_written_leaves_the_old_deployment(
    call: str, live: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_deployment(live)

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(5, "input/output error")

    owner = Path if call == "replace" else os
    with monkeypatch.context() as patched:
        patched.setattr(owner, call, broken)
        with pytest.raises(OSError, match="input/output"):
            begin(live, runs)
    assert read_deployment(live) == before


# Serving.


def test_users_of_the_canary_are_served_by_the_candidate_and_all_others_as_before(
    serve: Callable[[], tuple[TestClient, Canary]], live: Path, runs: dict[str, Path]
) -> None:
    client, canary = serve()
    users = [f"user {number}" for number in range(16)]
    for user in users:
        rate(client, user)
    before = {user: scores(client, user) for user in users}
    deployment = begin(live, runs)
    follow(client, canary)
    store = canary._served[deployment.current.content].service.engine.store
    chosen = {user for user in users if deployment.in_canary(store.pseudonym(user))}
    assert 0 < len(chosen) < 16
    during = {user: scores(client, user) for user in users}
    assert {user for user in users if during[user] != before[user]} == chosen
    expected = MetaRecommender.from_pretrained(runs["new"]).adapt(list(LOVES_DRAMA))
    for user in chosen:
        assert during[user] == pytest.approx(expected.score(["m8", "m6", "m10", "m12"]), abs=1e-3)
    change_deployment(live, Deployment.rolled_back)
    follow(client, canary)
    assert {user: scores(client, user) for user in users} == before
    begin(live, runs)
    change_deployment(live, Deployment.promoted)
    follow(client, canary)
    after = {user: scores(client, user) for user in users}
    assert all(after[user] == during[user] for user in chosen)
    assert len({tuple(values) for values in after.values()}) == 1
    assert len(canary._served) == 1


def test_feedback_of_a_canary_is_counted_by_model_and_metrics_show_both(
    serve: Callable[[], tuple[TestClient, Canary]], live: Path, runs: dict[str, Path], metarec: Callable[..., Ran]
) -> None:
    deployment = begin(live, runs)
    client, canary = serve()
    for number in range(12):
        rate(client, f"user {number}")
    for served in canary._served.values():  # feedback is counted after it is answered, and stored every few seconds
        worker = served.service.worker
        worker.submit(Job(lambda *_, worker=worker: worker._save_sums(now=True), alone=True)).result(20)
    metrics = client.get("/metrics").text
    counted = re.findall(r'^metarec_feedback_ratings_total\{model="(\w+)"\} ([\d.]+)', metrics, re.M)
    assert len(counted) == 2
    assert sum(float(count) for _, count in counted) == 60
    assert metrics.count("# TYPE metarec_requests_total counter") == 1
    assert re.search(r'metarec_requests_total\{.*feedback",status="200"\} 12\.0', metrics)
    assert "metarec_items 40.0" in metrics
    assert client.get("/readyz").json() == {"status": "ready"}
    with closing(AdapterStore(live / "store")) as store:
        named = json.loads(store.fact(models_name(deployment.period)) or "{}")
    assert {named["current"], named["candidate"]} == {digest for digest, _ in counted}
    said = metarec("deploy", "status", live, "--json")
    assert said.status == 0, said.err
    facts = json.loads(said.out)
    assert facts["models"]["current"]["ratings"] + facts["models"]["candidate"]["ratings"] == 60
    assert facts["comparison"]["verdict"] == "undecided"
    assert "user 1" not in said.out


def test_who_is_erased_is_forgotten_by_both_models(
    serve: Callable[[], tuple[TestClient, Canary]], live: Path, runs: dict[str, Path]
) -> None:
    begin(live, runs)
    client, canary = serve()
    users = [f"user {number}" for number in range(6)]
    for user in users:
        rate(client, user)
        assert client.delete(f"/v1/users/{user}").json() == {"erased": True}
        assert client.get(f"/v1/users/{user}").status_code == 404
    for served in canary._served.values():
        served.service.engine.forget_erased()
        assert len(served.service.engine.hot) == 0
        assert not served.service.worker.watch._latest


def test_items_that_are_added_or_removed_are_so_for_both_models(
    serve: Callable[[], tuple[TestClient, Canary]], live: Path, runs: dict[str, Path]
) -> None:
    begin(live, runs)
    client, _ = serve()
    assert client.post("/v1/items", json={"id": "new", "fields": {"title": "the dead river"}}).json()["added"] == 1
    assert client.delete("/v1/items/m8").json()["removed"]
    for number in range(6):
        ranked = client.get(f"/v1/users/user {number}/recommendations?k=100").json()["items"]
        items = {entry["item"] for entry in ranked}
        assert "new" in items
        assert "m8" not in items


def test_a_candidate_that_cannot_be_loaded_changes_nothing(
    serve: Callable[[], tuple[TestClient, Canary]], live: Path
) -> None:
    client, canary = serve()
    rate(client, "ann")
    before = scores(client, "ann")
    change_deployment(live, lambda now: now.started(NEW, 0.5))
    follow(client, canary)
    assert "metarec_deployment_failed 1.0" in client.get("/metrics").text
    assert scores(client, "ann") == before
    change_deployment(live, Deployment.rolled_back)
    follow(client, canary)
    assert "metarec_deployment_failed 0.0" in client.get("/metrics").text


def test_alerts_and_dashboard_watch_metrics_that_there_are_and_every_failure_has_an_alert(
    serve: Callable[[], tuple[TestClient, Canary]],
) -> None:
    client, _ = serve()
    client.get("/healthz")  # so that there is an answer to count
    text = client.get("/metrics").text
    folder = Path(__file__).parents[1] / "deploy"
    alerts, dashboard = ((folder / name).read_text() for name in ("prometheus/alerts.yml", "grafana/metarec.json"))
    watched, alerted = (set(re.findall(r"metarec_\w+", said)) for said in (alerts + dashboard, alerts))
    assert len(watched) > 10
    assert watched <= set(re.findall(r"^(metarec_\w+)", text, re.M))
    told = re.findall(r"^# HELP (metarec_\w+) (.*)", text, re.M)
    bad = re.compile("fail|damaged|diverged|could not|unsaved")
    failures = {name for name, what in told if bad.search(f"{name} {what}") and not name.endswith("_created")}
    assert {"metarec_deployment_failed", "metarec_unsaved_adapters_total"} < failures
    assert failures <= alerted


def test_a_server_does_not_start_with_a_run_that_is_not_the_deployed_one(
    serve: Callable[[], tuple[TestClient, Canary]], live: Path
) -> None:
    change_deployment(live, lambda now: now.started(NEW, 0.5))
    with pytest.raises(ArtifactError, match="is not the run that was deployed"):
        serve()


def test_requests_that_are_being_answered_are_answered_by_the_model_that_goes(
    serve: Callable[[], tuple[TestClient, Canary]], live: Path, runs: dict[str, Path]
) -> None:
    client, canary = serve()
    old = canary._served[read_deployment(live).current.content]
    old.running += 1  # as a request that takes long
    begin(live, runs)
    change_deployment(live, Deployment.promoted)
    follow(client, canary)
    assert old.service.worker.alive
    old.running -= 1
    assert client.portal is not None
    client.portal.call(lambda: _set(old.idle))
    old.service.worker._thread.join(20)
    assert not old.service.worker.alive


async def _set(event: asyncio.Event) -> None:
    event.set()


# What decides.


def judged(chance: float, seed: int, *, likely: float = 0.7, users: int = 640, diverged: int = 0) -> Sums:
    """Returns what is known of a made model: ten pairs and ten ratings of every user; seven of ten are likes."""
    generator = np.random.default_rng(seed)
    found = Sums.empty()
    for user in range(users):
        for value in generator.random(10) < chance:
            found.count_pair(1, user % GROUPS, float(value))
        for value in generator.random(10) < 0.7:
            found.count_rating(1, user % GROUPS, likely, bool(value))
            found.count_came(1, 5, 4.0, unknown=False)
    found.count_adapted(users, diverged)
    return found


@pytest.mark.parametrize(
    ("current", "candidate", "verdict", "because"),
    [
        (judged(0.7, 0), judged(0.8, 1), "better", "AUC is above 0"),
        (judged(0.8, 0), judged(0.7, 1), "worse", "AUC is below 0"),
        (judged(0.7, 0), judged(0.8, 1, likely=0.99), "worse", "log-loss is above 0"),
        (judged(0.75, 0), judged(0.9, 1, diverged=100), "worse", "16% more of its adaptations diverge"),
        (judged(0.7, 0), judged(0.7, 1, users=12), "undecided", "and 200 from 10 are needed"),
        (judged(0.75, 0, users=100), judged(0.75, 3, users=40), "undecided", "may be more than 0.01 lower"),
        (judged(0.75, 4, users=6400), judged(0.75, 4, users=6400), "not worse", "at most 0.01 lower"),
        (Sums.empty(), Sums.empty(), "undecided", "the candidate has 0 ratings"),
    ],
)
def test_the_verdict_follows_from_intervals(current: Sums, candidate: Sums, verdict: str, because: str) -> None:
    found = compare(current, candidate)
    assert (found.verdict, because in found.because) == (verdict, True), found


def canary_of(live: Path, deployment: Deployment, current: Sums, candidate: Sums) -> None:
    """Writes what servers would have counted."""
    with closing(AdapterStore(live / "store")) as store:
        store.set_fact(models_name(deployment.period), json.dumps({"current": "a", "candidate": "b"}))
        add_sums(store, deployment.period, "a", current)
        add_sums(store, deployment.period, "b", candidate)


def test_verbs_promote_what_is_better_and_refuse_what_is_not(
    live: Path, runs: dict[str, Path], metarec: Callable[..., Ran]
) -> None:
    assert metarec("deploy", "start", live, "--run", runs["new"], "--share", "0.3").status == 0
    canary_of(live, read_deployment(live), judged(0.8, 0), judged(0.7, 1))
    shown = metarec("deploy", "status", live)
    assert "verdict: worse: the interval of its AUC is below 0" in shown.out
    assert re.search(r"AUC of the candidate: -0\.\d{4} \[-0\.\d{4} -0\.\d{4}\]", shown.out)
    refused = metarec("deploy", "promote", live)
    assert refused.status == 2
    assert "the candidate is not promoted, it is worse" in refused.err
    assert read_deployment(live).candidate is not None
    assert metarec("deploy", "rollback", live).status == 0
    metarec("deploy", "start", live, "--run", runs["new"], "--share", "0.3")
    canary_of(live, read_deployment(live), judged(0.7, 0), judged(0.8, 1))
    promoted = metarec("deploy", "promote", live, "--json")
    assert promoted.status == 0, promoted.err
    assert json.loads(promoted.out)["deployment"]["current"]["run"] == str(runs["new"])
    metarec("deploy", "start", live, "--run", runs["old"], "--share", "0.3")
    undecided = metarec("deploy", "promote", live)
    assert undecided.status == 2
    assert metarec("deploy", "promote", live, "--anyway").status == 0
    assert read_deployment(live).current.run == str(runs["old"])


def test_the_task_over_what_was_collected_is_the_current_runs(
    live: Path, runs: dict[str, Path], metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    done = metarec("deploy", "task", live, "--out", tmp_path / "again.yaml")
    assert done.status == 0, done.err
    found = Task.model_validate(yaml.safe_load((tmp_path / "again.yaml").read_text()))
    before = MetaRecommender.from_pretrained(runs["old"]).fitted.task
    assert found.dataset.source == "store"
    assert (found.dataset.path, found.dataset.options) == (
        live / "store",
        found.dataset.options.model_copy(update={"items": str(runs["old"])}),
    )
    assert found.model_copy(update={"dataset": before.dataset}) == before


def test_a_candidate_of_another_scale_is_refused(
    live: Path, runs: dict[str, Path], metarec: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metarec.serve import deployment

    real = deployment.load_json

    def changed(path: Path) -> Any:
        facts = real(path)
        return {**facts, "scale": [0, 10]} if path.parent == runs["new"] / "model" and "scale" in facts else facts

    monkeypatch.setattr(deployment, "load_json", changed)
    refused = metarec("deploy", "start", live, "--run", runs["new"])
    assert refused.status == 2
    assert "the scale of" in refused.err


def test_the_loop_from_feedback_to_a_candidate_that_is_trained_on_it(
    metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    data = known_task().interactions
    rows = list(zip(data.user.tolist(), data.item.tolist(), data.rating.tolist(), strict=True))
    lines = [f"u{user},m{item},{rating},title {item}" for user, item, rating in rows]
    (tmp_path / "ratings.csv").write_text("\n".join(["user,item,rating,title", *lines]))
    plain = ["--runs", tmp_path / "runs", "--json"]
    for setting in ("train.steps=4", "train.validate_every=2", "train.warmup=1", "score=[item mean]"):
        plain += ["--set", setting]
    plain += ["--set", "collaborative.features=[]", "--set", "collaborative.members=none"]
    old, new, live = tmp_path / "runs" / "old", tmp_path / "runs" / "new", tmp_path / "live"
    done = metarec("train", tmp_path / "ratings.csv", "--name", "old", *plain)
    assert done.status == 0, done.err
    assert metarec("deploy", "create", live, "--run", old).status == 0
    with closing(AdapterStore(live / "store")) as store:
        store.append([Feedback(f"served {user}", ((f"m{item}", rating),)) for user, item, rating in rows])
        store.add_items([("n1", {"title": "new"})])
        store.append([Feedback(f"served {user}", (("n1", 4.0),)) for user in range(5)])
    assert metarec("deploy", "task", live, "--out", tmp_path / "again.yaml").status == 0
    done = metarec("train", tmp_path / "again.yaml", "--from", live, "--name", "new", *plain)
    assert done.status == 0, done.err
    done = metarec("deploy", "start", live, "--run", new, "--share", "0.2")
    assert done.status == 0, done.err
    assert done.err == ""
    assert read_deployment(live).candidate == DeployedRun.of(new)
    facts = json.loads((new / "model" / "catalog.json").read_text())
    assert "n1" in facts["ids"]
