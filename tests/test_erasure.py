"""What is erased is gone: from files, from memory, and from every server of the store."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import LOVES_DRAMA, small_recommender

from metarec.errors import StoreError
from metarec.files.artifacts import replace_dir
from metarec.recommender import MetaRecommender
from metarec.serve.engine import Engine
from metarec.serve.records import Feedback, NewAdapter
from metarec.serve.store import AdapterStore, Collected


@pytest.fixture(scope="session")
def recommender(model_dir: Callable[[str], Path]) -> MetaRecommender:
    return small_recommender(model_dir("llama"))


def write(path: Path) -> None:
    with replace_dir(path, "adapter") as directory:
        (directory / "adapter_model.safetensors").write_bytes(b"weights")


def left(root: Path, needles: list[str]) -> list[tuple[str, str]]:
    """Returns which of some texts are in which files."""
    found = []
    for file in root.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            found += [(file.name, needle) for needle in needles if needle.encode() in content]
    return found


def ids(count: int) -> list[str]:
    """Ids of mixed length, which make pages of an index split and merge at any place."""
    generator = random.Random(0)
    return [f"CANARY-{number}-{'x' * generator.randint(0, 200)}-end" for number in range(count)]


def fill(store: AdapterStore, users: list[str]) -> None:
    for start in range(0, len(users), 20):
        batch = users[start : start + 20]
        store.append([Feedback(user, ((f"item of {user}", 5.0), ("m1", 1.0)), f"request of {user}") for user in batch])


@pytest.mark.parametrize(("together", "kind"), [(True, "sqlite"), (False, "sqlite"), (False, "postgresql")])
def test_no_file_of_an_index_holds_an_erased_id(
    together: bool, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    users = ids(900 if together else 300)
    location, files = str(tmp_path), tmp_path
    if kind == "postgresql":
        location = request.getfixturevalue("postgres")
        files = Path(location.partition("host=")[2]) / "data"
    store = AdapterStore(location, tmp_path / "adapters")
    fill(store, users)
    gone = users[::3]
    if kind == "postgresql":
        store._index.execute("CHECKPOINT")  # so that what is erased is in files of tables, too
    assert len(left(files, gone)) >= len(gone)
    if together:
        store.erase(*gone)
    else:
        for user in gone[:30]:
            store.erase(user)
        store.erase(*gone[30:])
    assert not left(files, gone), "an id, or an item or a request that only they named"
    assert store.sizes()["users"] == len(users) - len(gone)
    assert all(len(store.events(user)) == 2 for user in users if user not in set(gone))
    store.erase(*(user for user in users if user not in set(gone)))
    store.close()


def test_an_erasure_that_a_crash_interrupts_is_finished_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = ids(300)
    store = AdapterStore(tmp_path)
    fill(store, users)

    def crash() -> None:
        raise StoreError("the disk is full", "")

    monkeypatch.setattr(store._index, "rewrite", crash)
    with pytest.raises(StoreError, match="full"):
        store.erase(*users[::3])
    assert store.profile(users[0]) is None
    assert left(tmp_path, users[::3])
    store.close()
    again = AdapterStore(tmp_path)
    assert len(again.newly_erased()) == 100
    assert not left(tmp_path, users[::3])


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_an_erasure_removes_the_adapters_of_every_server(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    location = request.getfixturevalue("postgres") if kind == "postgresql" else str(tmp_path / "index")
    servers = [AdapterStore(location, tmp_path / f"server{number}") for number in range(3)]
    for user in ("ann", "bob"):
        servers[0].append([Feedback(user, (("m1", 5.0),))])
    keys = {user: servers[0].profile(user).key for user in ("ann", "bob")}  # type: ignore[union-attr]
    for server in servers:
        for key in keys.values():
            server.put([NewAdapter(key, 1, "r", write)])
    servers[0].erase("ann")
    assert servers[1].newly_erased()[-1] == keys["ann"]
    assert servers[1].newly_erased() == []
    servers[2].close()
    again = AdapterStore(location, tmp_path / "server2")  # it did not run meanwhile
    assert again.newly_erased()[-1] == keys["ann"]
    for number in range(3):
        kept = {entry.key for entry in servers[number].folder.entries()}
        assert kept == {keys["bob"]}, number
    servers[1].append([Feedback("ann", (("m1", 1.0),))])
    assert servers[1].profile("ann").key != keys["ann"]  # type: ignore[union-attr]
    assert servers[0].newly_erased()[-1] == keys["ann"]
    assert servers[0].profile("ann") is not None, "who comes back is somebody new, and stays"
    for server in (*servers, again):
        server.close()


def test_a_server_forgets_whom_another_erased_before_it_answers(recommender: MetaRecommender, tmp_path: Path) -> None:
    one, two = (Engine(recommender, AdapterStore(tmp_path, tmp_path / name)) for name in ("one", "two"))
    forgotten: list[str] = []
    two.forget_with(forgotten.append)
    for user in ("ann", "bob"):
        one.store.append([Feedback(user, LOVES_DRAMA)])
    for engine in (one, two):
        assert {person.version for person in engine.people(["ann", "bob"]).values()} == {5}
        assert len(engine.hot) == 2
    key = one.store.profile("ann").key  # type: ignore[union-attr]
    assert one.erase("ann")
    assert len(two.hot) == 2
    assert two.people(["ann"])["ann"].version == 0
    assert (len(one.hot), len(two.hot), forgotten) == (1, 1, [key])
    for name in ("one", "two"):
        assert len(list((tmp_path / name).glob("*/*"))) == 1


def test_an_adapter_that_another_server_is_still_writing_is_not_kept(tmp_path: Path) -> None:
    one, two = (AdapterStore(tmp_path, tmp_path / name) for name in ("one", "two"))
    one.append([Feedback("ann", (("m1", 5.0),))])
    key = one.profile("ann").key  # type: ignore[union-attr]

    def erased_meanwhile(path: Path) -> None:
        write(path)
        one.erase("ann")

    assert two.put([NewAdapter(key, 1, "r", erased_meanwhile)]) == 0
    assert not list(two.folder.entries())


def test_whoever_named_an_erased_friend_is_adapted_again_on_every_server(tmp_path: Path) -> None:
    one, two = (AdapterStore(tmp_path, tmp_path / name) for name in ("one", "two"))
    one.append([Feedback("eve", (("m1", 5.0),), friends=("CANARY-ann",)), Feedback("CANARY-ann", (("m1", 5.0),))])
    before = one.profile("eve")
    assert before is not None

    def naming(path: Path) -> None:
        with replace_dir(path, "adapter") as directory:
            (directory / "user.json").write_text('{"friends": ["CANARY-ann"]}')

    adapters = [NewAdapter(before.key, before.version, "r", naming)]
    assert one.put(adapters) == two.put(adapters) == 1
    one.erase("CANARY-ann")
    after = one.profile("eve")
    assert after is not None
    assert (after.key, after.version) == (before.key, before.version + 1)
    assert before.key in two.newly_erased()
    assert not left(tmp_path, ["CANARY-ann"])
    assert two.put(adapters) == 0, "what was under way is not kept"
    assert one.put([NewAdapter(after.key, after.version, "r", write)]) == 1
    one.newly_erased()
    assert AdapterStore(tmp_path, tmp_path / "one").newly_erased()
    assert one.newest(after.key, "r")[0] is not None, "nor does what came later go"
    assert one.gc() == Collected()


def test_the_page_remembers_nothing_of_an_erased_visitor(recommender: MetaRecommender, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    from starlette.testclient import TestClient

    from metarec.serve.app import create_app
    from metarec.serve.page import PageContent
    from metarec.serve.service import ServeSettings

    made: list[PageContent] = []
    first = PageContent.__init__

    def noted(self: PageContent, *given: Any) -> None:
        made.append(self)
        first(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PageContent, "__init__", noted)
        application = create_app(Engine(recommender, AdapterStore(tmp_path)), ServeSettings(ui=True))
    with TestClient(application, "http://localhost") as client:
        client.get("/")
        visitor = client.cookies["metarec_visitor"]
        assert client.post("/ui/rate", data={"item": "m1", "rating": "5"}).status_code == 200
        assert made[0]._moved
        other = AdapterStore(tmp_path, tmp_path / "other")
        other.erase(visitor)
        client.get("/v1/users/somebody/recommendations")
        assert not made[0]._moved
    assert not left(tmp_path, [visitor])


def test_a_server_that_nobody_asks_forgets_too(
    recommender: MetaRecommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metarec.serve import worker

    monkeypatch.setattr(worker, "IDLE_SECONDS", 0.02)
    engine = Engine(recommender, AdapterStore(tmp_path, tmp_path / "two"))
    engine.store.append([Feedback("ann", LOVES_DRAMA)])
    engine.people(["ann"])
    running = worker.Worker(engine)
    AdapterStore(tmp_path, tmp_path / "one").erase("ann")
    deadline = time.monotonic() + 10
    while len(engine.hot) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not len(engine.hot)
    assert not list(engine.store.folder.entries())
    running.close()


def test_erasures_that_wait_together_rewrite_the_index_once(recommender: MetaRecommender, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    import asyncio
    import threading

    from metarec.serve.service import ServeSettings, Service
    from metarec.serve.worker import Job

    engine = Engine(recommender, AdapterStore(tmp_path))
    service = Service(engine, ServeSettings())
    engine.store.append([Feedback(f"user{number}", LOVES_DRAMA) for number in range(4)])
    rewritten: list[None] = []
    rewrite = engine.store._index.rewrite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.store._index, "rewrite", lambda: rewritten.append(rewrite()))
        gate = threading.Event()
        service.worker.submit(Job(lambda *_: gate.wait(20), alone=True))

        async def all_at_once() -> list[bool]:
            tasks = [asyncio.create_task(service.erase(f"user{number}")) for number in range(5)]
            await asyncio.sleep(0.05)
            gate.set()
            return await asyncio.gather(*tasks)

        assert asyncio.run(all_at_once()) == [True] * 4 + [False]
    assert len(rewritten) == 1
    assert engine.store.sizes()["users"] == 0
    service.worker.close()
