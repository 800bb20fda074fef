"""The service over HTTP: its promises to clients, and what it keeps to itself."""

from __future__ import annotations

import base64
import json
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from serving import LOVES_DRAMA, LOVES_HORROR, small_recommender

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from metarec.recommender import MetaRecommender
from metarec.serve.app import create_app
from metarec.serve.engine import Engine
from metarec.serve.guard import JsonLines, RequestLimits
from metarec.serve.keys import ApiKey, new_key, read_keys
from metarec.serve.service import ServeSettings
from metarec.serve.store import AdapterStore
from metarec.serve.worker import BusyError, Job, Worker


@pytest.fixture(scope="session")
def recommender(model_dir: Callable[[str], Path]) -> MetaRecommender:
    return small_recommender(model_dir("llama"))


@pytest.fixture
def start(recommender: MetaRecommender, tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """Starts the service in this process."""
    clients = []

    def make(**changed: Any) -> TestClient:
        engine = Engine(recommender, AdapterStore(tmp_path / "store"))
        client = TestClient(create_app(engine, ServeSettings(**changed)), "http://localhost", False)
        clients.append(client.__enter__())
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(start: Callable[..., TestClient]) -> TestClient:
    return start()


def rate(client: TestClient, user: str, ratings: tuple[tuple[str, float], ...] = LOVES_DRAMA, **headers: str) -> Any:
    said = {"ratings": [{"item": item, "rating": rating} for item, rating in ratings]}
    return client.post(f"/v1/users/{user}/feedback", json=said, headers=headers)


def ranking(client: TestClient, user: str, **query: Any) -> Any:
    answer = client.get(f"/v1/users/{user}/recommendations", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_new_user_rates_five_things_and_is_served_by_their_own_adapter(
    client: TestClient, recommender: MetaRecommender
) -> None:
    before = ranking(client, "ann")
    assert before["adapter"]["version"] == 0
    said = rate(client, "ann").json()
    assert said["accepted"] == 5
    assert said["adapter"] == {"version": 5, "ratings": 5, "diverged": False, "stale": False}
    after = ranking(client, "ann", k=5)
    assert after["adapter"] == said["adapter"]
    person = recommender.adapt(sorted(LOVES_DRAMA))
    best = [entry.item for entry in person.recommend(5)]
    assert [entry["item"] for entry in after["items"]] == best
    assert [entry["predicted_rating"] for entry in after["items"]] == pytest.approx(
        person.predict_rating(best), abs=1e-4
    )
    one = client.post("/v1/users/ann/feedback", json={"item": "m9", "rating": 1}).json()
    assert one["adapter"]["version"] == 6
    scores = client.post("/v1/users/ann/score", json={"items": ["m5", "m9"]}).json()
    assert (len(scores["scores"]), scores["adapter"]["version"]) == (2, 6)
    assert len(scores["predicted_ratings"]) == 2
    reasons = ranking(client, "ann", k=2, explain=True)["items"][0]["because"]
    assert len(reasons) == 3
    assert {reason["item"] for reason in reasons} <= {"m0", "m1", "m2", "m3", "m4", "m9"}


def test_an_idempotency_key_counts_once_and_not_for_something_else(client: TestClient) -> None:
    first = rate(client, "ann", **{"Idempotency-Key": "k"}).json()
    again = rate(client, "ann", **{"Idempotency-Key": "k"}).json()
    assert (first["accepted"], again["accepted"], again["replayed"]) == (5, 0, True)
    assert again["adapter"]["version"] == 5
    assert rate(client, "ann", LOVES_HORROR, **{"Idempotency-Key": "k"}).status_code == 409


def test_export_and_erase(client: TestClient, tmp_path: Path) -> None:
    assert client.get("/v1/users/ann").status_code == 404
    assert client.delete("/v1/users/ann").status_code == 404
    rate(client, "ann@example.org")
    rate(client, "bob")
    held = client.get("/v1/users/ann@example.org").json()
    assert [(entry["item"], entry["rating"]) for entry in held["ratings"]] == list(LOVES_DRAMA)
    bobs = ranking(client, "bob")
    assert client.delete("/v1/users/ann@example.org").json() == {"erased": True}
    assert client.get("/v1/users/ann@example.org").status_code == 404
    assert ranking(client, "ann@example.org")["adapter"]["version"] == 0
    assert ranking(client, "bob") == bobs
    for file in (tmp_path / "store").rglob("*"):
        assert not file.is_file() or b"ann@example" not in file.read_bytes(), file
    assert len(list((tmp_path / "store" / "adapters").glob("*/*"))) == 1


def test_an_export_of_many_ratings_comes_in_pages_and_waits_for_nobody(client: TestClient) -> None:
    rate(client, "ann", **{"Idempotency-Key": "first"})
    worker: Worker = client.app.state.service.worker  # type: ignore[attr-defined]
    gate = threading.Event()
    worker.submit(Job(lambda *_: gate.wait(20), alone=True))
    first = client.get("/v1/users/ann", params={"limit": 3}).json()
    rest = client.get("/v1/users/ann", params={"limit": 3, "after": first["next"]}).json()
    gate.set()
    assert (first["next"], rest["next"], first["idempotency_keys"], rest["idempotency_keys"]) == (
        3,
        None,
        {},
        {"first": 5},
    )
    assert [entry["item"] for entry in [*first["ratings"], *rest["ratings"]]] == [item for item, _ in LOVES_DRAMA]


def test_a_cold_item_is_recommendable_and_found_at_once(client: TestClient) -> None:
    rate(client, "ann")
    before = ranking(client, "ann", k=35)["items"]
    new = {"id": "n1", "fields": {"title": "Night Train", "genres": "drama"}}
    assert client.post("/v1/items", json=new).json() == {"added": 1, "items": 41}
    assert client.post("/v1/items", json={"items": [new]}).json() == {"added": 0, "items": 41}
    assert client.post("/v1/items", json={"id": "n1", "fields": {"title": "Other"}}).status_code == 409
    after = ranking(client, "ann", k=36)["items"]
    assert [entry for entry in after if entry["item"] != "n1"] == before
    assert client.get("/v1/search", params={"q": "night train"}).json()["items"][0]["item"] == "n1"
    mine = client.get("/v1/search", params={"q": "night train", "user": "ann"}).json()
    assert mine["adapter"]["version"] == 5
    assert mine["items"][0]["score"] is not None


def test_an_item_is_removed_once_and_for_all(client: TestClient) -> None:
    rate(client, "ann")
    removed = client.delete("/v1/items/m8")
    assert (removed.status_code, removed.json()) == (200, {"removed": True, "items": 39})
    assert client.delete("/v1/items/m8").status_code == 404
    assert client.delete("/v1/items/a%2Fb").status_code == 404
    assert "m8" not in {entry["item"] for entry in ranking(client, "ann", k=100)["items"]}
    assert client.post("/v1/users/ann/feedback", json={"item": "m8", "rating": 3}).status_code == 422


def test_a_ranking_takes_filters_over_http(client: TestClient) -> None:
    rate(client, "ann")
    plain = [entry["item"] for entry in ranking(client, "ann", k=100)["items"]]
    drama = [item for item in plain if int(item[1:]) % 4 == 0]
    chosen = ranking(client, "ann", k=100, where="genres == 'drama'", block=[drama[0], drama[1]])
    assert [entry["item"] for entry in chosen["items"]] == drama[2:]
    diverse = [entry["item"] for entry in ranking(client, "ann", k=5, diversity=1)["items"]]
    assert diverse != plain[:5]
    assert diverse[0] == plain[0]
    for query, said in (({"where": "yaer > 1"}, "yaer"), ({"diversity": 2}, "diversity"), ({"block": "x"}, "x")):
        answer = client.get("/v1/users/ann/recommendations", params=query)
        assert answer.status_code == 422
        assert said in answer.json()["error"]["message"]


def test_operators_see_health_version_metrics_and_the_openapi_document(client: TestClient) -> None:
    rate(client, "ann")
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    assert client.get("/version").json()["task"] == "test/known v1"
    metrics = client.get("/metrics").text
    assert 'metarec_requests_total{method="POST",route="/v1/users/{user}/feedback",status="200"} 1.0' in metrics
    assert "metarec_adapted_users_total 1.0" in metrics
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/users/{user}/feedback", "/v1/items", "/v1/search"} <= set(paths)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/users/a/feedback", {"item": "nothing", "rating": 3}),
        ("POST", "/v1/users/a/feedback", {"item": "m1", "rating": 99}),
        ("POST", "/v1/users/a/feedback", {"ratings": []}),
        ("POST", "/v1/users/a/feedback", {"item": "m1", "rating": 3, "extra": 1}),
        ("POST", "/v1/users/a%0Ab/feedback", {"item": "m1", "rating": 3}),
        ("POST", f"/v1/users/{'x' * 257}/feedback", {"item": "m1", "rating": 3}),
        ("GET", "/v1/users/a/recommendations?k=0", None),
        ("GET", "/v1/users/a/recommendations?k=51&explain=true", None),
        ("POST", "/v1/users/a/score", {"items": ["nothing"]}),
        ("POST", "/v1/items", {"id": "n", "fields": {}}),
        ("POST", "/v1/items", {"id": "n", "fields": {"title": "x", "colour": "red"}}),
        ("GET", "/v1/search?q=", None),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_reason(method: str, path: str, body: Any, client: TestClient) -> None:
    answer = client.request(method, path, json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"]
    assert client.get("/v1/users/a").status_code == 404


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b'{"item":"m1","rating":NaN}', b'{"item":"\\ud800","rating":3}', b"[" * 5000]
)
def test_bodies_that_are_no_feedback_get_a_4xx(content: bytes, client: TestClient) -> None:
    answer = client.post("/v1/users/a/feedback", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)


@pytest.mark.parametrize("user", ["..", "..%2F..%2Fetc", "%2Fetc%2Fpasswd", "a%00b", "con", "'; DROP TABLE users;--"])
def test_ids_never_become_paths(user: str, client: TestClient, tmp_path: Path) -> None:
    answer = client.post(f"/v1/users/{user}/feedback", json={"item": "m1", "rating": 5})
    assert answer.status_code in (200, 404, 405, 422)
    names = [path.name for path in (tmp_path / "store").rglob("*")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"store"}


def test_an_id_is_any_text(client: TestClient) -> None:
    ids = ["a/b", "/", "a/recommendations", "a%2Fb", "a%b", "%", "what?", "#1", "a b", "Zoë 🎬", "x" * 256, "/" * 256]
    some = [(number, user, f"/v1/users/{quote(user, safe='')}") for number, user in enumerate(ids, start=1)]
    for number, _, where in some:
        for _ in range(number):
            assert client.post(f"{where}/feedback", json={"item": "m1", "rating": 5}).status_code == 200
    for number, user, where in some:
        held = client.get(where).json()
        assert (held["user"], held["version"]) == (user, number), "every id is a user of its own"
        assert client.get(f"{where}/recommendations?k=1").json()["adapter"]["version"] == number
        assert client.delete(where).json() == {"erased": True}


REFUSED = [
    ("GET", "/nothing", 404, "no such route"),
    ("GET", "/v1/users/a/b/recommendations", 404, "no such route"),
    ("GET", "/v1/users/", 404, "no such route"),
    ("POST", "/v1/users/a/feedback/", 404, "no such route"),
    ("GET", "/v1/users/nobody", 404, "no such user"),
    ("PUT", "/v1/users/a/feedback", 405, "does not take PUT"),
    ("GET", "/v1/users/a/feedback", 405, "does not take GET"),
    ("GET", "/v1/users/%FF", 400, "not UTF-8"),
    ("GET", f"/v1/users/{'x' * 257}", 422, "'user' of the path is not taken"),
    ("GET", "/ui/nothing", 404, "no such route"),
]


@pytest.mark.parametrize("ui", [False, True])
def test_every_error_is_a_json_problem(ui: bool, start: Callable[..., TestClient]) -> None:
    client = start(ui=ui)
    for method, path, status, message in REFUSED:
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()["error"]["status"]) == (status, status), path
        assert message in answer.json()["error"]["message"], path
        assert answer.json()["error"]["cure"], path


FAULTS = [
    ("feedback", '{"item": "m1"}', "'rating' of the body is missing", "Add it"),
    ("feedback", '{"item": "m1", "rating": "5"}', "'rating' of the body is a text", "It should be a valid number"),
    (
        "feedback",
        '{"item": 3, "rating": true}',
        "'item' of the body is a number; 'rating' of the body is true or false",
        "'item' of the body: It should be a valid string; 'rating' of the body: It should be a valid number",
    ),
    (
        "feedback",
        '{"item": "m1", "rating": 1, "more": 2}',
        "'more' of the body is unknown",
        "Leave it out; /openapi.json names every key",
    ),
    (
        "feedback",
        '{"ratings": []}',
        "'ratings' of the body is a list that is not taken",
        "It should have at least 1 item after validation, not 0",
    ),
    (
        "feedback",
        '{"ratings": [{"item": null, "rating": 5}]}',
        "'ratings.0.item' of the body is null",
        "It should be a valid string",
    ),
    (
        "feedback",
        '{"ratings": [{"item": "m1", "rating": null}]}',
        "'ratings.0.rating' of the body is missing",
        "Add it",
    ),
    ("feedback", '{"ratings": {"m1": 5}}', "'ratings' of the body is an object", "It should be a valid list"),
    ("feedback", "[1]", "the body is a list", "It should be a valid dictionary or object to extract fields from"),
    ("feedback", "", "the body is missing", "Add it"),
    ("feedback", "{", "the body is not JSON at character 1", "Send JSON"),
    ("score", '{"items": "m1"}', "'items' of the body is a text", "It should be a valid list"),
]


def test_a_fault_is_one_sentence_with_its_cure(client: TestClient) -> None:
    for path, content, message, cure in FAULTS:
        answer = client.post(f"/v1/users/a/{path}", content=content, headers={"Content-Type": "application/json"})
        assert answer.json() == {"error": {"status": 422, "message": message, "cure": cure}}, content


def test_faults_outside_the_body_have_a_cure_too(client: TestClient) -> None:
    plain = client.post("/v1/users/a/feedback", content='{"item": "m1", "rating": 5}').json()["error"]
    assert plain["message"] == "the body is not read as JSON"
    assert plain["cure"] == "Send JSON with the header Content-Type: application/json"
    new = client.post("/v1/items", json={"items": [{"id": "n1"}]}).json()["error"]
    assert new["message"] == "'items.0.fields' of the body is missing"
    many = client.get("/v1/users/a/recommendations?k=many").json()["error"]
    assert many["message"] == "'k' of the query is not taken"
    assert many["cure"] == "It should be a valid integer, unable to parse string as an integer"


def test_a_misspelt_parameter_of_the_query_is_refused(client: TestClient) -> None:
    misspelt = client.get("/v1/users/a/recommendations?diversty=0.5")
    assert misspelt.status_code == 422
    assert misspelt.json()["error"]["message"] == "'diversty' of the query is unknown"
    assert "diversity" in misspelt.json()["error"]["cure"]
    asked = client.post("/v1/users/a/score?k=3", json={"items": ["i0"]})
    assert asked.json()["error"]["cure"] == "This route has no query"
    assert [client.get(f"/{page}?from=here").status_code for page in ("docs", "healthz")] == [200, 200]


METHODS = st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD"])
TEXT = st.text(max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["m1", "m2", "title", "n1"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["item", "rating", "ratings", "items", "id", "fields", "title"]) | TEXT, inner, max_size=4
        )
    ),
    max_leaves=8,
)
PATHS = st.sampled_from(
    ["feedback", "recommendations", "score", "", "../items", "../search", "../../version", "../../metrics"]
)


@given(METHODS, TEXT, PATHS, VALUES, st.dictionaries(st.sampled_from(["k", "q", "user", "explain"]), TEXT, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_request_whatever_gets_a_5xx(
    client: TestClient, method: str, user: str, path: str, body: Any, query: dict[str, str]
) -> None:
    where = "/v1/users/" + quote(user, safe="") + ("/" + path if path else "")
    content = json.dumps(body).encode() if method == "POST" else None
    headers = {"Content-Type": "application/json"}
    answer = client.request(method, where, content=content, params=query, headers=headers)
    assert answer.status_code < 500, answer.text


@given(
    ratings=st.lists(
        st.fixed_dictionaries(
            {"item": st.sampled_from([f"m{code}" for code in range(40)]), "rating": st.sampled_from([0.5, 3.0, 5.0])}
        ),
        min_size=1,
        max_size=12,
    ),
    key=st.none() | st.sampled_from(["a", "b"]),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_well_formed_feedback_is_always_answered(client: TestClient, ratings: list[Any], key: str | None) -> None:
    headers = {"Idempotency-Key": key} if key else {}
    answer = client.post("/v1/users/fuzz/feedback", json={"ratings": ratings}, headers=headers)
    assert answer.status_code in (200, 409)
    assert all(math.isfinite(entry["score"]) for entry in ranking(client, "fuzz")["items"])


# Guards.


def test_a_body_over_the_limit_is_refused(start: Callable[..., TestClient]) -> None:
    client = start(limits=RequestLimits(body=2000))
    assert rate(client, "ann").status_code == 200
    large = {"item": "m1", "rating": 3, "pad": "x" * 2000}
    assert client.post("/v1/users/a/feedback", json=large).status_code == 413
    parts = (b"x" * 500 for _ in range(10))
    assert client.post("/v1/users/a/feedback", content=parts).status_code == 413


def test_without_a_key_nothing_but_health_is_answered(start: Callable[..., TestClient]) -> None:
    secret, key = new_key("shop")
    client = start(limits=RequestLimits(keys=lambda: (ApiKey("other", "0" * 64), key)))
    assert client.get("/healthz").status_code == 200
    assert client.get("/version").status_code == 401
    assert client.get("/v1/users/a", headers={"Authorization": f"Bearer {secret}x"}).status_code == 401
    assert client.get("/version", headers={"Authorization": "Basic !!"}).status_code == 401
    basic = base64.b64encode(f"me:{secret}".encode()).decode()
    for headers in ({"Authorization": f"Bearer {secret}"}, {"X-API-Key": secret}, {"Authorization": f"Basic {basic}"}):
        assert client.get("/version", headers=headers).status_code == 200


def test_a_key_that_asks_too_often_waits_and_another_does_not(start: Callable[..., TestClient]) -> None:
    (one, first), (two, second) = new_key("one"), new_key("two")
    client = start(limits=RequestLimits(keys=lambda: (first, second), rate=0.1, burst=3))
    codes = [client.get("/version", headers={"X-API-Key": one}).status_code for _ in range(4)]
    assert codes == [200, 200, 200, 429]
    refused = client.get("/version", headers={"X-API-Key": one})
    assert 1 <= int(refused.headers["Retry-After"]) <= 10
    assert client.get("/version", headers={"X-API-Key": two}).status_code == 200


def test_pages_of_other_sites_cannot_ask(client: TestClient) -> None:
    said = {"item": "m1", "rating": 5}
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Host": "evil.example:8000"}):
        assert client.post("/v1/users/a/feedback", json=said, headers=headers).status_code == 403
    assert client.post("/v1/users/a/feedback", json=said, headers={"Origin": "http://localhost"}).status_code == 200


def test_whatever_is_refused_before_the_application_sees_it_has_a_cure(start: Callable[..., TestClient]) -> None:
    (one, first), (two, second) = new_key("one"), new_key("two", ["read"])
    client = start(limits=RequestLimits(keys=lambda: (first, second), body=2000, rate=0.001, burst=6))
    said, mine = {"item": "m1", "rating": 5}, {"X-API-Key": one}
    address = "/v1/users/a/feedback"
    refused = [
        (client.post(address, json=said), 401),
        (client.post(address, json=said, headers={"X-API-Key": two}), 403),
        (client.post(address, json=said, headers=mine | {"Origin": "http://evil.example"}), 403),
        (client.post(address, json=said | {"pad": "x" * 2000}, headers=mine), 413),
        (client.post(address, content=b'{"item": "m1", "item": "m2", "rating": 5}', headers=mine), 422),
        (client.get("/v1/users/%ff", headers=mine), 400),
        (client.get("/v1/users/a", headers=mine), 404),
        (client.delete("/v1/items/a", headers=mine), 404),
        *((client.get("/version", headers=mine), status) for status in (200, 429)),
        (start().get("/version", headers={"Host": "evil.example"}), 403),
    ]
    assert [answer.status_code for answer, _ in refused] == [status for _, status in refused]
    for answer, status in refused:
        assert status == 200 or answer.json()["error"]["cure"], answer.json()


def test_keys_are_kept_as_hashes(tmp_path: Path) -> None:
    secret, key = new_key("shop")
    (tmp_path / "keys").write_text(f"# keys\n{key.name} {key.digest}\n")
    assert read_keys(tmp_path / "keys") == (key,)
    assert secret not in (tmp_path / "keys").read_text()


def test_logs_are_json_and_name_no_user_no_title(client: TestClient) -> None:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(JsonLines().format(record))

    handler, root, ours = Keep(), logging.getLogger(), logging.getLogger("metarec")
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        rate(client, "ann@example.org")
        client.get("/v1/search", params={"q": "secret-words", "user": "ann@example.org"})
        client.post("/v1/users/ann@example.org/feedback", json={"item": "secret-item", "rating": 5})
        try:
            raise ValueError("ann@example.org rated secret-item")
        except ValueError:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
    finally:
        root.removeHandler(handler)
        ours.setLevel(logging.NOTSET)
    parsed = [json.loads(line) for line in lines]
    assert [line["status"] for line in parsed if line["event"] == "request"] == [200, 200, 422]
    assert parsed[0]["route"] == "/v1/users/{user}/feedback"
    assert parsed[-1]["failure"] == "ValueError"
    assert not [line for line in lines if "ann@" in line or "secret" in line]


# The worker.


def test_a_full_queue_answers_429_at_once_and_the_service_stays_healthy(start: Callable[..., TestClient]) -> None:
    client = start(waiting=4)
    worker: Worker = client.app.state.service.worker  # type: ignore[attr-defined]
    gate = threading.Event()
    worker.submit(Job(lambda *_: gate.wait(20), alone=True))
    answers: list[Any] = []
    clients = [threading.Thread(target=lambda n=n: answers.append(rate(client, f"u{n}"))) for n in range(12)]
    for thread in clients:
        thread.start()
    while len(answers) < 8 - (worker.depth < 4):
        threading.Event().wait(0.01)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) >= 7
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert client.get("/healthz").status_code == 200
    gate.set()
    for thread in clients:
        thread.join()
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    held = [client.get(f"/v1/users/u{n}").status_code for n in range(12)]
    assert held.count(200) == codes.count(200)  # what was refused was not half accepted
    assert rate(client, "after").status_code == 200


def test_users_who_come_together_are_adapted_together(recommender: MetaRecommender, tmp_path: Path) -> None:
    from metarec.serve.records import Feedback

    engine = Engine(recommender, AdapterStore(tmp_path))
    worker = Worker(engine)
    gate = threading.Event()
    worker.submit(Job(lambda *_: gate.wait(20), alone=True))
    said = [Feedback(f"u{number}", LOVES_DRAMA) for number in range(5)]
    futures = [
        worker.submit(Job(lambda person, done: (person.version, done.version), one.user, one))  # type: ignore[union-attr]
        for one in said
    ]
    erased = worker.submit(Job(lambda *_: engine.erase("u0"), alone=True))
    gate.set()
    assert [future.result(20) for future in futures] == [(5, 5)] * 5
    assert erased.result(20)
    assert worker.batches <= 3
    worker.close()
    with pytest.raises(BusyError):
        worker.submit(Job(lambda *_: None))
    assert engine.store.sizes()["adapters"] == 4


def test_one_users_failure_is_nobody_elses(client: TestClient) -> None:
    worker: Worker = client.app.state.service.worker  # type: ignore[attr-defined]
    gate = threading.Event()
    worker.submit(Job(lambda *_: gate.wait(20), alone=True))
    bad = worker.submit(Job(lambda *_: 1 / 0, "bad"))
    good = worker.submit(Job(lambda *_: "fine", "good"))
    gate.set()
    assert good.result(20) == "fine"
    assert isinstance(bad.exception(20), ZeroDivisionError)
