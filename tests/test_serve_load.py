"""The service under load and without room: who is served, who is refused, and what is said."""

from __future__ import annotations

import asyncio
import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import LOVES_DRAMA, listening, small_recommender

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
from starlette.testclient import TestClient

from metarec.errors import ConfigError
from metarec.recommender import MetaRecommender
from metarec.serve import service, slow_clients
from metarec.serve.app import create_app
from metarec.serve.engine import Engine
from metarec.serve.guard import Guard, RequestLimits
from metarec.serve.person import Person
from metarec.serve.rankings import Ranking
from metarec.serve.records import Feedback
from metarec.serve.service import ServeSettings
from metarec.serve.store import AdapterStore
from metarec.serve.worker import AbandonedError, Job, Wanted, Worker


@pytest.fixture(scope="session")
def recommender(model_dir: Callable[[str], Path]) -> MetaRecommender:
    return small_recommender(model_dir("llama"))


@pytest.fixture
def engine(recommender: MetaRecommender, tmp_path: Path) -> Engine:
    return Engine(recommender, AdapterStore(tmp_path / "store"))


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, ServeSettings()), "http://localhost", False) as opened:
        yield opened


BODY = {"type": "http.request", "body": b"", "more_body": False}


def gate(worker: Worker) -> threading.Event:
    """Keeps the worker busy until the event is set."""
    shut = threading.Event()
    worker.submit(Job(lambda *_: shut.wait(20), alone=True))
    return shut


def test_readiness_fails_where_feedback_cannot_be_stored(client: TestClient, engine: Engine) -> None:
    engine.store._index.execute("PRAGMA query_only=ON")
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200
    engine.store._index.execute("PRAGMA query_only=OFF")
    assert client.get("/readyz").json() == {"status": "ready"}


def test_readiness_fails_where_the_model_does_not_answer(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_PROBE_SECONDS", 0.1)
    monkeypatch.setattr(service, "_READY_SECONDS", 0.0)
    shut = gate(client.app.state.service.worker)  # type: ignore[attr-defined]
    refused = client.get("/readyz")
    shut.set()
    assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the model does not answer")
    monkeypatch.setattr(service, "_PROBE_SECONDS", 20)
    assert client.get("/readyz").status_code == 200
    monkeypatch.setattr(engine, "probe", lambda: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert client.get("/readyz").status_code == 503


def test_readiness_waits_for_one_request_and_not_for_all_that_wait(client: TestClient) -> None:
    worker = client.app.state.service.worker  # type: ignore[attr-defined]
    shut = gate(worker)
    done: list[str] = []
    jobs = [worker.submit(Job(lambda *_: done.append("job"), f"user{number}")) for number in range(5)]
    probe = worker.probe()
    probe.add_done_callback(lambda _: done.append("probe"))
    shut.set()
    for future in [*jobs, probe]:
        future.result(20)
    assert done.index("probe") == 0


def test_work_that_nobody_waits_for_ends_at_the_next_block(engine: Engine) -> None:
    worker = Worker(engine)
    engine.store.append([Feedback("ann", LOVES_DRAMA)])
    began, blocks = threading.Event(), []

    def long(*_: Any) -> None:
        for block in range(1000):
            blocks.append(block)
            began.set()
            engine.score(engine.people(["ann"])["ann"], ["m1"])
            time.sleep(0.005)

    job = Job(long, "ann")
    future = worker.submit(job)
    assert began.wait(20)
    worker.abandon(job)
    assert isinstance(future.exception(20), AbandonedError)
    assert len(blocks) < 1000
    waiting = Job(lambda *_: None, "bob")
    shut = gate(worker)
    worker.submit(waiting)
    worker.abandon(waiting)
    assert worker.depth <= 1
    shut.set()
    worker.close()


def test_rankings_that_wait_are_computed_together_and_ones_failure_is_nobody_elses(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(engine)
    together: list[int] = []
    whole = engine.recommend_all

    def counted(asked: Any) -> Any:
        together.append(len(asked))
        if len(asked) > 1 and len(together) > 1:
            raise RuntimeError("out of memory")
        return whole(asked)

    monkeypatch.setattr(engine, "recommend_all", counted)
    rankings = [*[Ranking(3)] * 3, Ranking(3, where="nothing at all"), Ranking(900)]

    def job(number: int, ranking: Ranking) -> Job:
        def want(person: Person | None, _: Any) -> Wanted:
            assert person is not None
            return Wanted(person, ranking, lambda found: len(found[1]))

        return Job(want, f"u{number}", cost=ranking.k / 16)

    for expected in ([4, 1], [4, 1, 4, 1, 1, 1, 1, 1]):
        shut = threading.Event()
        worker.submit(Job(lambda *_, shut=shut: shut.wait(600), alone=True))
        futures = [worker.submit(job(number, ranking)) for number, ranking in enumerate(rankings)]
        shut.set()
        errors = [type(future.exception(600)) for future in futures]
        assert errors == [*[type(None)] * 3, ConfigError, type(None)]
        assert [future.result() for future in (*futures[:3], futures[4])] == [3, 3, 3, 40]
        assert together == expected
    worker.close()


def test_a_batch_waits_for_those_who_were_just_answered_and_one_client_for_nobody(engine: Engine) -> None:
    worker = Worker(engine)
    waits: list[int] = []
    worker._queue.wait_for = lambda count, _: waits.append(count)  # type: ignore[method-assign]

    def settled(jobs: int) -> None:
        deadline = time.monotonic() + 20
        while worker.jobs < jobs and time.monotonic() < deadline:
            time.sleep(0.001)

    for number in range(3):
        worker.submit(Job(lambda *_: None, f"u{number}")).result(20)
        settled(number + 1)
    assert not waits
    shut = threading.Event()
    worker.submit(Job(lambda *_: shut.wait(600), alone=True))
    jobs = [worker.submit(Job(lambda *_: None, f"u{number}")) for number in range(5)]
    shut.set()
    for job in jobs:
        job.result(20)
    settled(9)
    waits.clear()  # the job that kept the worker busy ran alone, beside five that waited
    worker.submit(Job(lambda *_: None, "u1")).result(20)
    worker.close()
    assert waits == [4]


def answered(application: Any, *events: Any, path: str = "/healthz") -> list[Any]:
    """Calls a guarded application as a server does; `events` are what the client sends, or pauses in seconds."""
    sent: list[Any] = []

    async def run() -> None:
        inbox: asyncio.Queue[Any] = asyncio.Queue()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "headers": []}
        guard = Guard(application, RequestLimits(), lambda *_: None)
        task = asyncio.ensure_future(guard(scope, inbox.get, send))
        for event in events:
            if isinstance(event, float):
                await asyncio.sleep(event)
            elif event == "stop":
                task.cancel()
            else:
                await inbox.put(event)
        await asyncio.wait({task}, timeout=10)
        assert task.done()

    asyncio.run(run())
    return sent


async def status_of(application: Any, path: str) -> int:
    """Sends a request without a server and its sockets, and returns its answer's status."""
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    await inbox.put(BODY)
    statuses: list[int] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    place, _, query = path.partition("?")
    scope = {"type": "http", "method": "GET", "path": place, "raw_path": place.encode(), "query_string": query.encode()}
    await application(scope | {"headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1)}, inbox.get, send)
    return statuses[0]


def test_two_hundred_flooders_do_not_starve_a_polite_client(engine: Engine) -> None:
    """All come without a key, so that nothing but what they have asked for tells them apart."""
    application = create_app(engine, ServeSettings(waiting=8))
    refused = Counter(dict.fromkeys(range(200), 0))
    statuses: set[int] = set()

    async def run() -> list[int]:
        done = asyncio.Event()
        polite = []

        async def flood(number: int) -> None:
            while not done.is_set():
                status = await status_of(application, f"/v1/users/flooder{number}/recommendations?k=5")
                statuses.add(status)
                refused[number] += status == 429

        async with application.router.lifespan_context(application):
            flooding = [asyncio.ensure_future(flood(number)) for number in range(200)]
            for times in (6, 9):  # six refusals cost a flooder what a ranking costs
                while min(refused.values()) < times:
                    await asyncio.sleep(0.01)
                polite.append(await status_of(application, "/v1/users/polite/recommendations?k=5"))
            done.set()
            await asyncio.gather(*flooding)
        return polite

    assert asyncio.run(run()) == [200, 200]
    assert statuses == {200, 429}


def test_eight_explained_rankings_of_many_ratings_refuse_nobody_a_plain_one(client: TestClient, engine: Engine) -> None:
    ids = engine.catalog.ids[:30]
    engine.store.append([Feedback("heavy", tuple((item, 1.0 + place % 5) for place, item in enumerate(ids)))])
    heavy: list[int] = []

    def explain() -> None:
        address = "/v1/users/heavy/recommendations?k=50&explain=true"
        heavy.extend(client.get(address).status_code for _ in range(3))

    threads = [threading.Thread(target=explain) for _ in range(8)]
    for thread in threads:
        thread.start()
    light = [client.get(path).status_code for _ in range(5) for path in ("/v1/users/light/recommendations", "/readyz")]
    for thread in threads:
        thread.join()
    assert (set(heavy), len(heavy), set(light)) == ({200}, 24, {200})


def test_a_client_that_goes_ends_its_request() -> None:
    ended: list[str] = []

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    assert answered(slow, BODY, 0.05, {"type": "http.disconnect"}) == []
    assert ended == ["cancelled"]


def test_a_client_that_waits_when_the_service_stops_gets_a_503_and_not_a_500() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    start, body = answered(slow, BODY, 0.05, "stop")
    assert start["status"] == 503
    assert (b"retry-after", b"5") in start["headers"]
    assert b"stopping" in body["body"]


def test_clients_that_send_headers_slowly_are_dropped_and_others_are_not(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_clients, "HEADER_SECONDS", 0.3)
    with listening(client.app, http=slow_clients.PatientProtocol, lifespan="off") as url:
        host, port = url.removeprefix("http://").split(":")
        slow = [socket.create_connection((host, int(port))) for _ in range(50)]
        for number, connection in enumerate(slow):
            connection.sendall(b"GET /healthz HTTP/1.1\r\n" if number % 2 else b"")
        polite = http.client.HTTPConnection(host, int(port), timeout=20)
        for _ in range(3):  # over one connection, which is longer open than headers may take
            polite.request("GET", "/healthz")
            assert polite.getresponse().read() == b'{"status":"ok"}'
            time.sleep(0.2)
        polite.close()
        for connection in slow:
            connection.settimeout(10)
            assert connection.recv(100) == b""
            connection.close()


def test_every_method_of_a_path_is_named(client: TestClient) -> None:
    for path, methods in (("/v1/users/ann", "DELETE, GET"), ("/v1/items", "POST"), ("/healthz", "GET")):
        answer = client.options(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)


def test_a_path_with_one_more_slash_is_not_redirected_to_whatever_host_is_named(client: TestClient) -> None:
    answer = client.post("/v1/users/ann/feedback/", json={"item": "m1", "rating": 3.0}, follow_redirects=False)
    assert (answer.status_code, "location" in answer.headers) == (404, False)


@pytest.mark.parametrize("rating", [b'5, "rating": 1', b"true", b'"5"'])
def test_a_rating_is_one_number(rating: bytes, client: TestClient) -> None:
    body = b'{"item": "m1", "rating": ' + rating + b"}"
    headers = {"Content-Type": "application/json"}
    assert client.post("/v1/users/ann/feedback", content=body, headers=headers).status_code == 422
    assert client.get("/v1/users/ann").status_code == 404
