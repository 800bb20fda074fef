"""A process that dies at any call of the system while it saves: what is there next is the old or the new, exactly.

The calls are those of which Python's audit hooks tell, flushes to disk, the exchange of two directories, and statements
of the index. At the chosen one an error is raised that nothing catches, and again at every later one, so that no
clean-up runs that a killed process would not run either.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import small_recommender

from metarec.config import TrainConfig
from metarec.files import exchange
from metarec.files.artifacts import is_whole, load_json, replace_dir, replace_file, verify_dir
from metarec.lm.item_cache import ItemCache, Rows
from metarec.meta import checkpoints, outer_loop
from metarec.recommender import MetaRecommender
from metarec.serve.database import Sqlite
from metarec.serve.records import Feedback, NewAdapter
from metarec.serve.store import AdapterStore
from metarec.system.tensors import write_tensors

CHANGES = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.link",
    "os.truncate",
    "os.listdir",
    "os.scandir",
    "shutil.rmtree",
    "sqlite3.connect",
}
ALL_TESTS = 14
left: int | None = None
dying: int | None = None
tried = 0


class CrashError(BaseException):
    """The process is dead."""


def call() -> None:
    """Counts a call of the thread that saves; what other threads do is no part of the save."""
    global left
    if left is None or threading.get_ident() != dying:
        return
    if left == 0:
        raise CrashError
    left -= 1


sys.addaudithook(lambda event, _: call() if left is not None and event in CHANGES else None)


@pytest.fixture(autouse=True)
def _calls_that_no_hook_tells_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            if name != "execute" or not str(given[1]).startswith("ROLLBACK"):
                call()
            return None if name == "fsync" else real(*given)

        return run

    monkeypatch.setattr(os, "fsync", counted("fsync", os.fsync))
    if exchange._renameat2 is not None:
        monkeypatch.setattr(exchange, "_renameat2", counted("exchange", exchange._renameat2))
    for name in ("execute", "execute_many", "rewrite"):
        monkeypatch.setattr(Sqlite, name, counted(name, getattr(Sqlite, name)))


@contextmanager
def dies_at(moment: int) -> Iterator[list[bool]]:
    """Runs a block that dies at a call; says whether it did."""
    global left, dying
    died = [False]
    left, dying = moment, threading.get_ident()
    try:
        yield died
    except CrashError:
        died[0] = True
    finally:
        left = None


def crashes(folder: Path, prepare: Callable[[Path], Any], save: Callable[[Path], Any]) -> Iterator[tuple[Path, bool]]:
    """Yields what a save left behind that died at its first call, its second, and so on, until it does not die."""
    global tried
    died, moment = [True], 0
    while died[0]:
        place = folder / str(moment)
        place.mkdir(parents=True)
        prepare(place)
        with dies_at(moment) as died:
            save(place)
        gc.collect(0)  # a dead process holds no lock
        tried += died[0]
        yield place, died[0]
        moment += 1


@pytest.fixture(params=["at once", "stepwise"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stepwise":
        monkeypatch.setattr(exchange, "_renameat2", None)
    return str(request.param)


def checkpoint(step: int) -> Callable[[Path], None]:
    def save(place: Path) -> None:
        tensors = {"init/a": torch.full((3,), float(step)), "init/b": torch.tensor(1.0)}
        optimizer, _ = outer_loop._optimizer(tensors, TrainConfig())
        at = checkpoints.Progress(step=step)
        checkpoints.save_checkpoint(place / "run", tensors, tensors, optimizer, at, {"seed": 1})

    return save


def test_a_checkpoint_resumes_at_the_old_step_or_the_new(way: str, tmp_path: Path) -> None:
    found = set()
    moments = 0
    for place, died in crashes(tmp_path, checkpoint(1), checkpoint(2)):
        tensors = {"init/a": torch.zeros(3), "init/b": torch.tensor(0.0)}
        optimizer, _ = outer_loop._optimizer(tensors, TrainConfig())
        at, _ = checkpoints.load_checkpoint(place / "run", tensors, optimizer, {"seed": 1}, steps=5)
        assert tensors["init/a"].tolist() == [float(at.step)] * 3
        found.add((died, at.step))
        checkpoint(3)(place)
        assert [path.name for path in place.iterdir()] == ["run"], "strays go with the next save"
        moments += 1
    assert found == {(True, 1), (True, 2), (False, 2)}
    assert moments > 40


def test_a_first_checkpoint_is_whole_or_not_there(way: str, tmp_path: Path) -> None:
    for place, died in crashes(tmp_path, lambda _: None, checkpoint(1)):
        there = checkpoints.recover_dir(place / "run")
        assert there or died
        if there:
            verify_dir(place / "run", "checkpoint")


@pytest.fixture(scope="session")
def recommender(model_dir: Callable[[str], Path]) -> MetaRecommender:
    return small_recommender(model_dir("llama"))


def test_a_model_is_the_old_or_the_new(way: str, recommender: MetaRecommender, tmp_path: Path) -> None:
    """The old one holds a file that the new one lacks."""

    def old(place: Path) -> None:
        with replace_dir(place / "model", "recommender") as directory:
            (directory / "old.json").write_text("{}")

    found = set()
    moments = 0
    for place, died in crashes(tmp_path, old, lambda place: recommender.save_pretrained(place / "model")):
        verify_dir(place / "model", "recommender")
        names = set(load_json(place / "model" / "manifest.json")["sha256"])
        found.add((died, "old.json" in names))
        assert len(names) == 1 or "recommender.json" in names
        moments += 1
    assert found == {(True, True), (True, False), (False, False)} or found == {(True, True), (False, False)}
    assert moments > 60


def adapter(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with replace_dir(path, "adapter", private=True) as directory:
            (directory / "adapter_model.safetensors").write_bytes(content)
            (directory / "adapter_config.json").write_text("{}\n")

    return write


def rated(place: Path) -> None:
    store = AdapterStore(place)
    store.append([Feedback("ann", (("m1", 5.0),))])
    store.put([NewAdapter(store.profile("ann").key, 1, "r", adapter(b"1"))])  # type: ignore[union-attr]
    store.append([Feedback("ann", (("m2", 4.0),)), Feedback("CANARY-bob", (("m1", 1.0),))])
    store.close()


def test_an_adapter_is_the_last_good_one_or_the_new(way: str, tmp_path: Path) -> None:
    def save(place: Path) -> None:
        store = AdapterStore(place)
        store.put([NewAdapter(store.profile("ann").key, 2, "r", adapter(b"2"))], keep=1)  # type: ignore[union-attr]

    versions = set()
    moments = 0
    for place, died in crashes(tmp_path, rated, save):
        store = AdapterStore(place)
        key = store.profile("ann").key  # type: ignore[union-attr]
        record, damaged = store.newest(key, "r")
        # An older version that the index still names when its directory is gone is not there, and is made again.
        assert record is not None or damaged
        if record is not None:
            content = (store.path(record) / "adapter_model.safetensors").read_bytes()
            assert content == str(record.version).encode()
        versions.add((died, None if record is None else record.version))
        store.put([NewAdapter(key, 2, "r", adapter(b"2"))], keep=1)
        store.gc(grace=0, unknown=0)
        assert [entry.path.name for entry in store.folder.entries()] == [f"{key}-2"]
        store.close()
        moments += 1
    assert {(True, 1), (True, 2), (False, 2)} <= versions
    assert moments > 40


def test_feedback_is_there_with_all_that_belongs_to_it_or_not_at_all(tmp_path: Path) -> None:
    said = Feedback("ann", (("m3", 3.0), ("m4", 2.0)), "key", about={"group": "b"}, friends=("CANARY-bob",))

    def save(place: Path) -> None:
        AdapterStore(place).append([said])

    counts = set()
    for place, died in crashes(tmp_path, rated, save):
        store = AdapterStore(place)
        (before,) = store.append([said])
        assert before.replayed or died  # type: ignore[union-attr]
        events = [(event.item, event.rating) for event in store.events("ann")]
        assert events == [("m1", 5.0), ("m2", 4.0), ("m3", 3.0), ("m4", 2.0)]
        assert store.profile("ann").version == 5  # type: ignore[union-attr]
        assert (len(store.support("ann", 9)), store.facts("ann").friends) == (4, ("CANARY-bob",))
        counts.add((died, before.replayed))  # type: ignore[union-attr]
        store.close()
    assert (False, True) in counts
    assert (True, False) in counts


def test_an_erasure_is_finished_by_whoever_opens_the_store_next(tmp_path: Path) -> None:
    def save(place: Path) -> None:
        store = AdapterStore(place)
        store.erase("CANARY-bob")
        store.newly_erased()

    outcomes = set()
    for place, died in crashes(tmp_path, rated, save):
        store = AdapterStore(place)
        store.newly_erased()
        there = store.profile("CANARY-bob") is not None
        files = [file for file in place.rglob("*") if file.is_file()]
        assert any(b"CANARY-bob" in file.read_bytes() for file in files) == there
        assert store.profile("ann") is not None
        outcomes.add((died, there))
        store.close()
    assert outcomes == {(True, True), (True, False), (False, False)}


def test_what_a_cache_holds_of_an_item_is_whole_or_missing(tmp_path: Path) -> None:
    counts = np.array([1, 2, 3, 1])

    def opened(place: Path) -> ItemCache:
        arrays = {name: Rows(counts, (2,), "float32") for name in ("keys", "values", "states")}
        return ItemCache(place / "cache", arrays)

    def rows(items: list[int]) -> dict[str, np.ndarray]:
        every = np.concatenate([np.full((counts[item], 2), item + 1, np.float32) for item in items])
        return {name: every * scale for scale, name in enumerate(("keys", "values", "states"), start=1)}

    for place, died in crashes(
        tmp_path, lambda place: opened(place).add([0], rows([0])), lambda place: opened(place).add([2, 1], rows([2, 1]))
    ):
        cache = opened(place)
        missing = cache.missing(np.arange(4)).tolist()
        assert missing in ([3], [1, 3], [1, 2, 3])
        assert died or missing == [3]
        cache.add(missing, rows(missing))
        assert not len(cache.missing(np.arange(4)))
        for scale, name in enumerate(("keys", "values", "states"), start=1):
            flat, starts = cache.rows(name)
            for item in range(4):
                np.testing.assert_array_equal(flat[starts[item]], np.full(2, (item + 1) * scale))


def test_files_of_caches_are_the_old_or_the_new(way: str, tmp_path: Path) -> None:
    def both(text: str) -> Callable[[Path], None]:
        def save(place: Path) -> None:
            replace_file(place / "digest.json", lambda target: target.write_text(text))
            with replace_dir(place / "stack", "stack") as directory:
                write_tensors(directory / "stack.safetensors", {"a": torch.tensor([float(len(text))])})

        return save

    for place, _ in crashes(tmp_path, both('"old"'), both('"newer"')):
        assert load_json(place / "digest.json") in ("old", "newer")
        assert is_whole(place / "stack", "stack")


def test_five_hundred_crashes_were_tried(request: pytest.FixtureRequest) -> None:
    """The tests above count them; some of them alone make fewer."""
    there = sum(item.path == request.path for item in request.session.items)
    if there < ALL_TESTS:
        pytest.skip("not all tests of this file run")
    assert tried >= 500
