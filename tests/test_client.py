"""The client reaches every operation of the service with every parameter, and reads every answer into its dataclass."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import parse_qs, urlsplit

import pytest
from serving import LOVES_DRAMA, listening, small_recommender

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from metarec import client as clients
from metarec.client import Client, Rating, ServiceError, service_client


@pytest.fixture(scope="module")
def application(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    from metarec.serve.app import create_app
    from metarec.serve.engine import Engine
    from metarec.serve.service import ServeSettings
    from metarec.serve.store import AdapterStore

    store = AdapterStore(tmp_path_factory.mktemp("client") / "store")
    return create_app(Engine(small_recommender(model_dir("llama")), store), ServeSettings())


@pytest.fixture(scope="module")
def client(application: Any) -> Iterator[Client]:
    with listening(application) as address:
        yield Client(address)


EVERYTHING: dict[str, Callable[[Client], Any]] = {
    "POST /v1/users/{user}/feedback": lambda client: client.rate(
        "a/b", [Rating("m0", 5, {"device": "phone"}, "good")], about="quiet", friends=["bob"], idempotency_key="k"
    ),
    "GET /v1/users/{user}/recommendations": lambda client: client.recommendations(
        "a/b", 3, explain=True, diversity=0.1, where="x", block=["m1"], context={"x": 1}, about="quiet", friends=["bob"]
    ),
    "POST /v1/users/{user}/score": lambda client: client.score(
        "a/b", ["m1"], context={"x": 1}, about={"x": 1}, friends=["bob"]
    ),
    "GET /v1/users/{user}/preferences": lambda client: client.preferences("a/b"),
    "GET /v1/users/{user}/informative": lambda client: client.informative("a/b", 3, exclude=["m1"]),
    "GET /v1/users/{user}": lambda client: client.export("a/b", after=1, limit=1),
    "DELETE /v1/users/{user}": lambda client: client.erase("a/b"),
    "POST /v1/items": lambda client: client.add_items({"new": {"title": "the dead river"}}),
    "DELETE /v1/items/{item}": lambda client: client.remove_item("new"),
    "GET /v1/search": lambda client: client.search(
        "love", 3, user="a/b", context={"x": 1}, about={"x": 1}, friends=["bob"]
    ),
    "GET /healthz": Client.health,
    "GET /readyz": Client.ready,
    "GET /version": Client.version,
    "GET /metrics": Client.metrics,
}


class SentError(Exception):
    """A request instead of its answer."""


def sent_by(ask: Callable[[Client], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the request that a call sends."""

    def refuse(request: Any, timeout: float) -> None:
        raise SentError(request)

    monkeypatch.setattr(service_client, "urlopen", refuse)
    with pytest.raises(SentError) as found:
        ask(Client("http://service"))
    return found.value.args[0]


def test_every_operation_of_the_service_has_a_method(application: Any) -> None:
    paths = application.openapi()["paths"]
    operations = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert operations == set(EVERYTHING)


@pytest.mark.parametrize("operation", EVERYTHING)
def test_every_parameter_of_an_operation_can_be_sent(
    operation: str, application: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = sent_by(EVERYTHING[operation], monkeypatch)
    method, path = operation.split()
    asked = urlsplit(request.full_url)
    assert request.get_method() == method
    assert asked.path == path.format(user="a%2Fb", item="new")
    described = application.openapi()["paths"][path][method.lower()]
    parameters = {(entry["in"], entry["name"].lower()) for entry in described.get("parameters", ())}
    assert {name for place, name in parameters if place == "query"} == set(parse_qs(asked.query))
    assert {name for place, name in parameters if place == "header"} <= {name.lower() for name in request.headers}
    body = json.loads(request.data) if request.data else {}
    for name, value in schema_of(described.get("requestBody"), application).items():
        assert name in body, name
        if isinstance(value, dict):
            assert set(body[name][0]) == set(value)


def schema_of(content: Any, application: Any) -> dict[str, Any]:
    """Returns the keys of a body that may be several things: those of the one that holds most, and of its parts."""
    schemas = application.openapi()["components"]["schemas"]

    def keys(schema: Any) -> dict[str, Any]:
        named = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        return {
            name: keys(value["items"]) if "$ref" in value.get("items", {}) else None
            for name, value in named.get("properties", {}).items()
        }

    if content is None:
        return {}
    (media,) = content["content"].values()
    several = [keys(option) for option in media["schema"].get("oneOf", [media["schema"]])]
    return next((option for option in several if any(map(bool, option.values()))), several[0])


def test_answers_are_read_whole(application: Any) -> None:
    schemas = application.openapi()["components"]["schemas"]
    answers = {name: kind for name, kind in vars(clients).items() if is_dataclass(kind) and name != "Rating"}
    for name, kind in answers.items():
        assert {field.name for field in fields(kind)} == set(schemas[name]["properties"]), name
    returned = set()
    for path, methods in application.openapi()["paths"].items():
        for method, operation in methods.items():
            for media in operation["responses"]["200"]["content"].values():
                if "$ref" in media["schema"]:
                    returned.add((f"{method.upper()} {path}", media["schema"]["$ref"].rpartition("/")[2]))
    assert {name for _, name in returned} <= set(answers)


def test_what_the_service_answers_arrives(client: Client) -> None:
    client.wait_until_ready()
    answer = client.rate("ann", dict(LOVES_DRAMA))
    assert (answer.accepted, answer.adapter.version, answer.replayed) == (5, 5, False)
    ranked = client.recommendations("ann", 3, explain=True)
    assert ranked.adapter == answer.adapter
    assert len(ranked.items) == 3
    assert ranked.items[0].score >= ranked.items[1].score
    assert isinstance(ranked.items[0].because[0], clients.ReasonAnswer)
    assert client.score("ann", [ranked.items[0].item]).scores == pytest.approx((ranked.items[0].score,), abs=1e-4)
    believed = {one.category: one for one in client.preferences("ann").preferences}
    assert believed["drama"].low > 0 > believed["horror"].mean
    assert client.preferences("nobody").known == pytest.approx(0)
    (first, *rest) = client.informative("ann", 3, exclude=["m7"]).items
    assert not {first.item, *(one.item for one in rest)} & {*dict(LOVES_DRAMA), "m7"}
    assert first.item not in {one.item for one in client.informative("ann", 3, exclude=[first.item]).items}
    page = client.export("ann", limit=2)
    assert [(event.item, event.rating) for event in page.ratings] == list(LOVES_DRAMA[:2])
    assert [event.item for event in client.export("ann", after=page.next or 0).ratings] == ["m1", "m2", "m3"]
    assert client.add_items({"new": {"title": "the dead river"}}).added == 1
    assert client.search("dead river", 1).items[0].item == "new"
    assert client.rate("bea", {"new": 5}).accepted == 1  # of an item that the process does not know
    assert client.preferences("bea").known == pytest.approx(0)
    assert client.search("river", 2, user="ann").adapter == answer.adapter
    assert client.remove_item("new").removed
    assert client.version()["api"] == "v1"
    assert client.health() == {"status": "ok"}
    assert "metarec_" in client.metrics()
    assert client.erase("ann").erased


def test_a_text_in_a_ratings_place_is_sent_as_a_review(monkeypatch: pytest.MonkeyPatch) -> None:
    request = sent_by(lambda client: client.rate("ann", {"m0": "I loved it", "m1": 4}), monkeypatch)
    assert json.loads(request.data)["ratings"] == [{"item": "m0", "review": "I loved it"}, {"item": "m1", "rating": 4}]


def test_ratings_are_pairs_as_in_python_and_an_empty_id_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    request = sent_by(lambda client: client.rate("ann", [("m0", 4.5), Rating("m1", 2.0)]), monkeypatch)
    ratings = [{"item": "m0", "rating": 4.5}, {"item": "m1", "rating": 2.0}]
    assert json.loads(request.data) == {"ratings": ratings}
    for ask in (lambda client: client.rate("", {"m0": 4}), lambda client: client.remove_item("")):
        with pytest.raises(ServiceError, match=r"the id of the (user|item) is empty\. Give one"):
            ask(Client("http://localhost"))


def test_a_refusal_carries_the_services_words_and_status(client: Client) -> None:
    with pytest.raises(ServiceError, match="no such user") as refused:
        client.export("nobody")
    assert refused.value.status == 404
    with pytest.raises(ServiceError) as unknown:
        client.rate("ann", {"not there": 5})
    assert (unknown.value.status, bool(unknown.value.cure)) == (422, True)


def test_ratings_that_met_a_busy_service_are_sent_again_with_the_same_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, waited = [], []
    busy = Message()
    busy["Retry-After"] = "2"
    answer = {"accepted": 1, "replayed": False, "losses": [], "something": "new"}
    adapter = {"version": 1, "ratings": 1, "diverged": False, "stale": False}

    def service(request: Any, timeout: float) -> Any:
        keys.append(request.get_header("Idempotency-key"))
        if len(keys) == 1:
            raise HTTPError(request.full_url, 429, "busy", busy, io.BytesIO())
        if len(keys) == 2:
            raise URLError("reset")
        return io.BytesIO(json.dumps({**answer, "adapter": adapter}).encode())

    monkeypatch.setattr(service_client, "urlopen", service)
    monkeypatch.setattr(service_client.time, "sleep", waited.append)
    assert Client("http://service").rate("ann", {"m0": 5}).accepted == 1
    assert len(keys) == 3
    assert len(set(keys)) == 1
    assert waited[0] == 2


def test_what_counts_twice_when_sent_twice_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(request: Any, timeout: float) -> Any:
        tried.append(request)
        raise URLError("reset")

    monkeypatch.setattr(service_client, "urlopen", broken)
    monkeypatch.setattr(service_client.time, "sleep", lambda _: None)
    with pytest.raises(ServiceError, match=r"does not answer: reset. Is 'metarec serve' running there\?"):
        Client("http://service").erase("ann")
    assert len(tried) == 1


def test_the_client_needs_the_standard_library_alone() -> None:
    code = "import sys, metarec.client; print(sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pydantic", "requests", "fastapi"} & set(eval(done.stdout))


def test_hints_of_answers_are_what_they_hold() -> None:
    kinds = [kind for kind in vars(clients).values() if is_dataclass(kind)]
    for kind in kinds:
        assert set(typing.get_type_hints(kind)) == {field.name for field in fields(kind)}  # type: ignore[arg-type]


def test_the_page_of_operations_shows_all_of_them_and_asks_nobody_else(application: Any, client: Client) -> None:
    page = client._send("GET", "/docs", None, {})
    assert re.findall(r"https?://|//\w|<script|<link|<img|@import", page) == []
    document = application.openapi()
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in page
    for name in re.findall(r'href="#(\w+)"', page):
        assert f'id="{name}"' in page
    assert all(f'id="{name}"' in page for name in document["components"]["schemas"])
