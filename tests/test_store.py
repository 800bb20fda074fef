"""The store: what was acknowledged is there once, what is damaged is refused, what is erased is gone."""

from __future__ import annotations

import hashlib
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metarec.errors import ArtifactError, ConfigError, ConflictError, StoreError
from metarec.files.artifacts import replace_dir
from metarec.serve.database import Sqlite
from metarec.serve.hot_adapters import HotAdapters
from metarec.serve.records import Accepted, Feedback, NewAdapter, check_id
from metarec.serve.store import AdapterStore, Collected


def latest(store: AdapterStore, user: str, limit: int) -> list[tuple[str, float]]:
    return [(event.item, event.rating) for event in store.support(user, limit)]


def writer(content: bytes = b"weights") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with replace_dir(path, "adapter") as directory:
            (directory / "adapter_model.safetensors").write_bytes(content)
            (directory / "adapter_config.json").write_text("{}\n")

    return write


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AdapterStore]:
    if request.param == "sqlite":
        opened = AdapterStore(tmp_path / "store")
    else:
        opened = AdapterStore(request.getfixturevalue("postgres"), tmp_path / "adapters")
        opened.erase(*[name for name, _ in opened.users()])
        opened._index.execute("DELETE FROM items")
    yield opened
    opened.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_servers_that_start_together_make_one_store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """PostgreSQL's ``CREATE TABLE IF NOT EXISTS`` fails for one of two that find no table at the same moment."""
    servers = 8
    for attempt in range(5):
        location, files = str(tmp_path / f"store{attempt}"), None
        if kind == "postgresql":
            url, files = request.getfixturevalue("postgres"), tmp_path / f"adapters{attempt}"
            psycopg = pytest.importorskip("psycopg")
            name = f"together{attempt}"
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}")
            location = url.replace("/postgres?", f"/{name}?")
        together = threading.Barrier(servers)

        def begin(location: str = location, files: Path | None = files) -> AdapterStore:
            together.wait()  # noqa: B023
            return AdapterStore(location, files)

        with ThreadPoolExecutor(servers) as pool:
            stores = [future.result() for future in [pool.submit(begin) for _ in range(servers)]]
        versions = [store.append([Feedback("ann", (("m1", 5.0),))])[0] for store in stores]
        assert versions == [Accepted(version, False) for version in range(1, servers + 1)]
        for store in stores:
            store.close()


def test_feedback_is_kept_in_order_and_counts_the_version(store: AdapterStore) -> None:
    first = store.append([Feedback("ann", (("m1", 5.0), ("m2", 1.0))), Feedback("bob", (("m1", 3.0),))])
    second = store.append([Feedback("ann", (("m1", 2.0),))])
    assert first == [Accepted(2, False), Accepted(1, False)]
    assert second == [Accepted(3, False)]
    events = store.events("ann")
    assert [(event.version, event.item, event.rating) for event in events] == [(1, "m1", 5), (2, "m2", 1), (3, "m1", 2)]
    assert latest(store, "ann", 10) == [("m1", 2.0), ("m2", 1.0)]
    assert latest(store, "ann", 1) == [("m1", 2.0)]
    assert store.profile("nobody") is None
    assert [(name, profile.version) for name, profile in store.users()] == [("ann", 3), ("bob", 1)]


def test_the_same_idempotency_key_counts_once(store: AdapterStore) -> None:
    once = Feedback("ann", (("m1", 5.0),), "k1")
    assert store.append([once, once, Feedback("bob", once.ratings, "k1")]) == [
        Accepted(1, False),
        Accepted(1, True),
        Accepted(1, False),
    ]
    store.append([Feedback("ann", (("m2", 1.0),))])
    other = Feedback("ann", (("m1", 4.0),), "k1")
    replay, conflict = store.append([once, other])
    assert replay == Accepted(1, True)
    assert isinstance(conflict, ConflictError)
    assert store.profile("ann").version == 2  # type: ignore[union-attr]


def test_writers_side_by_side_lose_nothing(store: AdapterStore) -> None:
    def write(worker: int) -> None:
        for number in range(20):
            users = ("shared", f"own{worker}") if worker % 2 else (f"own{worker}", "shared")
            store.append([Feedback(user, ((f"w{worker}n{number}", 4.0),)) for user in users])

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shared = [event.item for event in store.events("shared")]
    assert sorted(shared) == sorted(f"w{worker}n{number}" for worker in range(4) for number in range(20))
    assert [event.version for event in store.events("shared")] == list(range(1, 81))


def key_of(store: AdapterStore, user: str = "ann") -> str:
    store.append([Feedback(user, (("m1", 5.0),))])
    profile = store.profile(user)
    assert profile is not None
    return profile.key


def test_the_newest_versions_stay_and_directories_carry_no_id(store: AdapterStore) -> None:
    key = key_of(store, "ann@example.org")
    for version in (1, 2, 3):
        assert store.put([NewAdapter(key, version, "r", writer())]) == 1
    records = store.records(key)
    assert [record.version for record in records] == [3, 2]
    assert sorted(path.name for path in (store.folder.path / key[:2]).iterdir()) == [f"{key}-2", f"{key}-3"]
    assert store.newest(key, "r") == (records[0], [])
    assert store.newest(key, "another recommender") == (None, [])
    assert store.sizes()["adapters"] == 2


def test_every_single_byte_corruption_is_refused_and_the_last_good_version_found(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    key = key_of(store)
    store.put([NewAdapter(key, 1, "r", writer(b"old"))])
    store.put([NewAdapter(key, 2, "r", writer(bytes(range(64))))])
    newest, good = store.records(key)
    files = sorted(store.path(newest).iterdir())
    assert len(files) == 3
    tried = 0
    for file in files:
        content = file.read_bytes()
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(bytes(damaged))
            with pytest.raises(ArtifactError):
                store.verify(newest)
            tried += 1
        file.write_bytes(content[:-1])
        assert store.newest(key, "r") == (good, [newest])
        file.write_bytes(content)
    assert tried > 300
    store.verify(newest)
    (store.path(newest) / "stray.py").write_text("")
    with pytest.raises(ArtifactError, match="does not belong"):
        store.verify(newest)


def holds(root: Path, needle: bytes) -> list[str]:
    return [str(file) for file in root.rglob("*") if file.is_file() and needle in file.read_bytes()]


def test_erasing_leaves_no_byte_of_the_user(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    secrets = [b"ann@example.org", b"very-rare-item", b"secret-request", b"ann's weights"]
    for user in ("bob", "ann@example.org", "eve"):
        rare = "very-rare-item" if user.startswith("ann") else "m1"
        store.append([Feedback(user, ((rare, 5.0),) * 50, "secret-request" if user.startswith("ann") else "k")])
    keys = {name: profile.key for name, profile in store.users()}
    for name, key in keys.items():
        store.put([NewAdapter(key, 1, "r", writer(b"ann's weights" if name.startswith("ann") else b"w"))])
    half_written = store.folder.adapter(keys["ann@example.org"], 2).with_name(f".{keys['ann@example.org']}-2.abc")
    half_written.mkdir()
    (half_written / "adapter_model.safetensors").write_bytes(b"ann's weights")
    assert all(holds(tmp_path, secret) for secret in secrets)
    assert store.erase("ann@example.org") == [True]
    for secret in secrets:
        assert not holds(tmp_path, secret), secret
    assert not list(tmp_path.rglob(f"*{keys['ann@example.org']}*"))
    assert store.erase("ann@example.org") == [False]
    assert store.newest(keys["bob"], "r")[0] is not None
    assert len(store.events("eve")) == 50


def test_an_adapter_that_arrives_after_the_erasure_is_not_kept(store: AdapterStore) -> None:
    key = key_of(store)
    store.erase("ann")
    assert store.put([NewAdapter(key, 1, "r", writer())]) == 0
    assert not list(store.folder.entries())
    assert store.append([Feedback("ann", (("m1", 5.0),))]) == [Accepted(1, False)]
    assert key_of(store) != key


def test_gc_removes_what_nobody_needs_and_nothing_else(store: AdapterStore) -> None:
    key, gone = key_of(store), key_of(store, "gone")
    store.put([NewAdapter(key, 1, "r", writer()), NewAdapter(key, 2, "r", writer())])
    store.erase("gone")
    shard = store.folder.adapter(key, 1).parent
    for name in (f".{key}-3.tmp", f"{key}-9", f"{gone}-1", "deadbeef-1", ".deadbeef-2.tmp"):
        (shard / name).mkdir()
    # What may still be on its way into the index stays for an hour, what the index knows nothing of for a week.
    assert store.gc() == Collected(erased=1, waiting=2)
    assert store.gc(grace=0) == Collected(unfinished=2, waiting=2)
    assert store.gc(unknown=0, dry_run=True) == Collected(unknown=2)
    assert store.gc(unknown=0) == Collected(unknown=2)
    assert sorted(path.name for path in shard.iterdir()) == [f"{key}-1", f"{key}-2"]
    assert store.gc(keep=1, dry_run=True) == Collected(old=1)
    assert store.gc(keep=1) == Collected(old=1)
    assert [record.version for record in store.records(key)] == [2]
    assert [path.name for path in shard.iterdir()] == [f"{key}-2"]


def test_what_the_index_does_not_know_goes_a_week_after_it_was_first_seen(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store.folder.path / "de").mkdir()
    (store.folder.path / "de" / "deadbeef-1").mkdir()
    now = time.time()
    for day, found in ((0, Collected(waiting=1)), (6, Collected(waiting=1)), (8, Collected(unknown=1))):
        monkeypatch.setattr("metarec.serve.folder.time.time", lambda day=day: now + 86400 * day)
        assert store.gc() == found


@pytest.mark.parametrize("index", ["truncated", "another's"])
def test_nothing_is_collected_against_an_index_that_does_not_know_the_adapters(index: str, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    for user in range(5):
        store.put([NewAdapter(key_of(store, f"user{user}"), 1, "r", writer())])
    store.close()
    file = tmp_path / "index.sqlite"
    if index == "another's":
        AdapterStore(tmp_path / "other").close()
        file.write_bytes((tmp_path / "other" / "index.sqlite").read_bytes())
    else:
        file.write_bytes(b"")
    for owned in (True, False):  # also where nothing says whose the adapters are, as before schema 2
        if not owned:
            (tmp_path / "adapters" / "store.json").unlink()
        with pytest.raises(StoreError, match=r"adapters of another index.*Put the index back"):
            AdapterStore(tmp_path)
        assert len(list((tmp_path / "adapters").glob("*/*"))) == 5
    (tmp_path / "adapters").rename(tmp_path / "aside")
    AdapterStore(tmp_path)


def test_an_older_copy_of_the_index_loses_no_adapter(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    key_of(store, "first")
    store.close()
    copy = (tmp_path / "index.sqlite").read_bytes()
    store = AdapterStore(tmp_path)
    store.put([NewAdapter(key_of(store, "second"), 1, "r", writer())])
    store.close()
    (tmp_path / "index.sqlite").write_bytes(copy)
    store = AdapterStore(tmp_path)
    assert store.gc() == Collected(waiting=1)
    assert len(list(store.folder.entries())) == 1


def test_servers_with_adapters_of_their_own_keep_apart_what_they_wrote(tmp_path: Path) -> None:
    """An adapter's manifest differs from server to server: it holds how long adapting took."""
    one = AdapterStore(tmp_path)
    other = AdapterStore(tmp_path, tmp_path / "elsewhere")
    key = key_of(one)
    for version in (1, 2, 3):
        for store in (one, other):
            store.put([NewAdapter(key, version, "r", writer(f"{store.folder.path} took {version} s".encode()))])
    for store in (one, other):
        assert [record.version for record in store.records(key)] == [3, 2]
        assert store.newest(key, "r") == (store.records(key)[0], [])
        assert store.sizes()["adapters"] == 2
        assert store.gc() == Collected()


def test_what_another_server_replaced_meanwhile_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = AdapterStore(tmp_path), AdapterStore(tmp_path)
    key = key_of(one)
    one.put([NewAdapter(key, 1, "r", writer(b"it took 1 s"))])
    two.put([NewAdapter(key, 1, "r", writer(b"it took 2 s"))])
    stale = two.records(key)
    assert [two.is_good(record) for record in stale] == [True]
    one.put([NewAdapter(key, 2, "r", writer())], keep=1)
    read, old = two.records, [stale]
    monkeypatch.setattr(two, "records", lambda key: old.pop() if old else read(key))
    assert two.newest(key, "r") == (read(key)[0], [])


SCHEMA_1 = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, key TEXT NOT NULL UNIQUE,
  created DOUBLE PRECISION NOT NULL);
CREATE TABLE feedback (user_id BIGINT NOT NULL REFERENCES users (id) ON DELETE CASCADE, version BIGINT NOT NULL,
  item TEXT NOT NULL, rating DOUBLE PRECISION NOT NULL, at DOUBLE PRECISION NOT NULL, PRIMARY KEY (user_id, version));
CREATE TABLE adapters (user_id BIGINT NOT NULL REFERENCES users (id) ON DELETE CASCADE, version BIGINT NOT NULL,
  recommender TEXT NOT NULL, manifest TEXT NOT NULL, bytes BIGINT NOT NULL, created DOUBLE PRECISION NOT NULL,
  PRIMARY KEY (user_id, version));
INSERT INTO facts VALUES ('schema_version', '1');
INSERT INTO users VALUES (7, 'ann', 'abcd', 1.0);
INSERT INTO feedback VALUES (7, 1, 'm1', 5.0, 1.0);
INSERT INTO feedback VALUES (7, 2, 'm2', 4.0, 2.0);
INSERT INTO feedback VALUES (7, 3, 'm1', 1.0, 3.0);
"""


def test_a_store_of_schema_1_opens_with_everything_in_it(tmp_path: Path) -> None:
    adapter = tmp_path / "adapters" / "ab" / "abcd-3"
    adapter.parent.mkdir(parents=True)
    writer()(adapter)
    with sqlite3.connect(tmp_path / "index.sqlite") as connection:
        connection.executescript(SCHEMA_1)
        digest = hashlib.sha256((adapter / "manifest.json").read_bytes()).hexdigest()
        connection.execute("INSERT INTO adapters VALUES (7, 3, 'r', ?, 10, 1.0)", (digest,))
    connection.close()
    for _ in range(2):
        store = AdapterStore(tmp_path)
        assert [(event.item, event.rating) for event in store.events("ann")] == [("m1", 5), ("m2", 4), ("m1", 1)]
        assert latest(store, "ann", 9) == [("m1", 1.0), ("m2", 4.0)]
        (record,) = store.records("abcd")
        assert store.newest("abcd", "r") == (record, [])
        assert store.gc() == Collected()
        store.close()


def test_added_items_are_kept_and_never_replaced(store: AdapterStore) -> None:
    assert store.add_items([("x1", {"title": "New"}), ("x2", {"title": "Newer"})]) == 2
    assert store.add_items([("x1", {"title": "New"})]) == 0
    with pytest.raises(ConflictError):
        store.add_items([("x3", {"title": "Third"}), ("x1", {"title": "Other"})])
    assert store.items() == [("x1", {"title": "New"}), ("x2", {"title": "Newer"})]
    assert store.count_items() == 2


def test_a_store_opens_again_with_everything_in_it(tmp_path: Path) -> None:
    place = tmp_path / "store"
    store = AdapterStore(place)
    key = key_of(store)
    store.put([NewAdapter(key, 1, "r", writer())])
    store.close()
    again = AdapterStore(place, create=False)
    assert again.export("ann")["version"] == 1  # type: ignore[index]
    again.verify(again.records(key)[0])
    assert place.stat().st_mode & 0o077 == 0


def test_a_directory_that_was_there_keeps_its_mode_and_what_the_store_makes_is_its_owners(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    store = AdapterStore(tmp_path)
    key_of(store)
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert {file.name for file in tmp_path.iterdir()} > {"adapters", "index.sqlite"}, "with the write-ahead log"
    for file in tmp_path.iterdir():
        assert file.stat().st_mode & 0o077 == 0, file


def test_wrong_places_get_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no store"):
        AdapterStore(tmp_path / "nothing", create=False)
    with pytest.raises(ConfigError, match="--adapters"):
        AdapterStore("postgresql://nowhere")
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError, match="does not answer") as caught:
        AdapterStore(f"postgresql://me:hunter2@/x?host={tmp_path}", tmp_path / "adapters")
    assert "hunter2" not in str(caught.value)


def test_a_store_of_another_schema_is_refused(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    store._index.execute("UPDATE facts SET value = '99'")
    store.close()
    with pytest.raises(StoreError, match="schema version 99"):
        AdapterStore(tmp_path)


WRITERS = 8
_KILLED = """
import sys, threading
from metarec.serve.records import Feedback
from metarec.serve.store import AdapterStore
store = AdapterStore(sys.argv[1])
lock = threading.Lock()
def write(worker):
    number = 0
    while True:
        item = f"{sys.argv[2]}.{worker}.{number}"
        store.append([Feedback(f"user{worker % 3}", ((item, 4.0),), item)])
        with lock:
            sys.stdout.write(item + chr(10)); sys.stdout.flush()
        number += 1
for worker in range(int(sys.argv[3])):
    threading.Thread(target=write, args=(worker,)).start()
"""


def test_what_was_acknowledged_before_a_kill_is_there_exactly_once(tmp_path: Path) -> None:
    acknowledged: list[str] = []
    for round_ in range(3):
        command = [sys.executable, "-c", _KILLED, str(tmp_path), str(round_), str(WRITERS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            # Killed in the middle of its work, however long that took it to begin.
            acknowledged += [process.stdout.readline().strip() for _ in range(2 * WRITERS)]
            process.kill()
            # A line without its end was being said when the process died.
            acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
    store = AdapterStore(tmp_path)
    stored = [event.item for name, _ in store.users() for event in store.events(name)]
    assert len(acknowledged) >= 3 * 2 * WRITERS
    assert len(stored) == len(set(stored))
    assert set(acknowledged) <= set(stored)
    assert len(stored) - len(acknowledged) <= 3 * WRITERS


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.integers(0, 60)), max_size=40))
@settings(max_examples=50, deadline=None)
def test_the_hot_adapters_stay_within_their_bytes_and_never_lie(steps: list[tuple[str, int, int]]) -> None:
    hot: HotAdapters[str] = HotAdapters(100)
    for key, version, size in steps:
        hot.put(key, version, f"{key}{version}", size)
        assert hot.bytes == sum(size for _, _, size in hot._kept.values()) <= 100
        assert hot.get(key, version) == f"{key}{version}"
        assert hot.get(key, version + 1) is None
    hot.drop("a")
    assert all(hot.get("a", version) is None for version in range(1, 6))


def test_the_least_recently_used_adapter_goes_first() -> None:
    hot: HotAdapters[str] = HotAdapters(100)
    hot.put("a", 1, "A", 50)
    hot.put("b", 1, "B", 50)
    hot.get("a", 1)
    hot.put("c", 1, "C", 50)
    assert (hot.get("a", 1), hot.get("b", 1), hot.get("c", 1)) == ("A", None, "C")
    hot.put("d", 1, "D", 101)
    assert hot.get("d", 1) is None


@pytest.mark.parametrize("name", ["", "x" * 257, "a\nb", "a\x00b", "\ud800"])
def test_ids_that_cannot_be_said_again_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="the user id"):
        check_id(name, "user id")


def test_the_order_of_different_items_does_not_matter(tmp_path: Path) -> None:
    store, generator = AdapterStore(tmp_path), random.Random(0)
    for turn in range(50):
        ratings = [(generator.choice("abcd"), generator.uniform(0.5, 5)) for _ in range(generator.randint(1, 12))]
        last = dict(ratings)
        store.append([Feedback(f"one{turn}", tuple(ratings))])
        store.append([Feedback(f"other{turn}", tuple(generator.sample(sorted(last.items()), len(last))))])
        found = [latest(store, f"{who}{turn}", 99) for who in ("one", "other")]
        assert found == [sorted(last.items())] * 2


def rows_read(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list to which every statement from now on adds how many rows it returned."""
    counts: list[int] = []
    execute = store._index._database.execute

    def counted(sql: str, values: tuple[object, ...] = ()) -> list[object]:
        rows = execute(sql, values)
        counts.append(len(rows))
        return rows

    monkeypatch.setattr(store._index._database, "execute", counted)
    return counts


def test_what_a_rating_and_an_adaptation_read_does_not_grow_with_the_history(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for start in range(0, 3000, 500):
        store.append([Feedback("long", tuple((f"m{code % 700}", 3.0) for code in range(start, start + 500)))])
    store.append([Feedback("short", (("m1", 3.0),))])
    read = []
    for user in ("long", "short"):
        with monkeypatch.context() as patched:
            counts = rows_read(store, patched)
            store.append([Feedback(user, (("m5", 4.0),), "k")])
            store.profile(user)
            support = store.support(user, 64)
            read.append((len(counts), sum(counts) - len(support)))
    assert read[0] == read[1]
    assert latest(store, "long", 2) == [("m199", 3.0), ("m5", 4.0)]
    if isinstance(store._index._database, Sqlite):
        plan = " ".join(
            str(step[3])
            for sql in ("SELECT version FROM latest WHERE user_id = 1 ORDER BY version DESC LIMIT 64",)
            for step in store._index.execute(f"EXPLAIN QUERY PLAN {sql}")
        )
        assert "latest_by_version" in plan
        assert "TEMP B-TREE" not in plan


def test_an_export_comes_in_pages_with_the_idempotency_keys(store: AdapterStore) -> None:
    for number in range(5):
        said = tuple((f"m{number}{place}", 3.0) for place in range(3))
        store.append([Feedback("ann", said, f"key{number}")])
    whole = store.export("ann")
    assert whole is not None
    assert (len(whole["ratings"]), whole["next"]) == (15, None)
    assert whole["idempotency_keys"] == {f"key{number}": 3 * number + 3 for number in range(5)}
    pages, after = [], 0
    while after is not None:
        page = store.export("ann", after, 4)
        assert page is not None
        pages.append(page)
        after = page["next"]
    assert [len(page["ratings"]) for page in pages] == [4, 4, 4, 3]
    assert [rating for page in pages for rating in page["ratings"]] == whole["ratings"]
    assert {key: at for page in pages for key, at in page["idempotency_keys"].items()} == whole["idempotency_keys"]
