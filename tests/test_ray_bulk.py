"""Many users adapted over a Ray cluster: on one that these tests start."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from serving import small_recommender

from metarec.errors import ConfigError, StoreError
from metarec.files.artifacts import MANIFEST
from metarec.recommender import MetaRecommender
from metarec.serve import ray_bulk
from metarec.serve.batching import BULK_USERS_AT_ONCE
from metarec.serve.bulk import adapt_users, bulk_feedback
from metarec.serve.engine import Engine
from metarec.serve.ray_bulk import StorePlace, adapt_users_over_ray
from metarec.serve.records import Feedback
from metarec.serve.store import AdapterStore

Said = dict[str, Feedback]


@pytest.fixture(scope="module")
def checkpoint(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "model"
    small_recommender(model_dir("llama")).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def recommender(checkpoint: Path) -> MetaRecommender:
    return MetaRecommender.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster on this machine."""
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
        with ray_bulk.cluster("local"):
            yield ray


def people(count: int) -> Said:
    """Users with five to twelve ratings each, which differ."""
    generator = np.random.default_rng(0)
    return {
        f"user{code:03d}": bulk_feedback(
            f"user{code:03d}",
            [
                (f"m{item}", float(generator.integers(1, 6)))
                for item in generator.choice(40, generator.integers(5, 13), replace=False)
            ],
        )
        for code in range(count)
    }


def ratings_of(users: Said) -> int:
    return sum(len(said.ratings) for said in users.values())


def engine_over(recommender: MetaRecommender, store: Path) -> Engine:
    return Engine(recommender, AdapterStore(store), hot_bytes=0, users_at_once=BULK_USERS_AT_ONCE)


def kept(store: AdapterStore) -> dict[str, dict[str, bytes]]:
    """Returns the bytes of every user's adapter; how long adapting took is beside them, and in the manifest."""
    found = {}
    for name, profile in store.users():
        (record,) = store.records(profile.key)
        assert store.is_good(record)
        files = [file for file in store.path(record).iterdir() if file.name not in (MANIFEST, "user.json")]
        found[name] = {file.name: file.read_bytes() for file in files}
        assert "adapter_model.safetensors" in found[name]
    return found


@pytest.fixture(scope="module")
def alone(recommender: MetaRecommender, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The adapters of 90 users that one process keeps."""
    engine = engine_over(recommender, tmp_path_factory.mktemp("alone") / "store")
    assert adapt_users(engine, people(90)).adapted == 90
    return kept(engine.store)


@pytest.mark.slow
def test_workers_keep_the_adapters_that_one_process_keeps_and_skip_them_the_next_time(
    ray: Any, recommender: MetaRecommender, alone: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    users, place = people(90), StorePlace.of(str(tmp_path / "store"), None)
    engine = engine_over(recommender, tmp_path / "store")
    done = adapt_users_over_ray(engine, users, place, shard=20)
    assert (done.users, done.ratings, done.adapted) == (90, ratings_of(users), 90)
    assert engine.counters.adapted == 0, "the process that asks adapts nobody"
    assert kept(engine.store) == alone
    again = adapt_users_over_ray(engine, users, place)
    assert (again.users, again.ratings, again.adapted) == (90, 0, 0)


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(
    ray: Any, recommender: MetaRecommender, alone: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    psutil = pytest.importorskip("psutil")
    engine = engine_over(recommender, tmp_path / "store")
    watched = AdapterStore(tmp_path / "store")
    before: dict[str, float] = {}
    killed: list[int] = []

    def kill_one() -> None:
        """Kills a worker that adapts, when some users are done and others are not."""
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            if not 0 < watched.sizes()["adapters"] < 80:
                time.sleep(0.002)
                continue
            for process in psutil.Process().children(recursive=True):
                if not killed and "ray::_adapt_shard" in " ".join(process.cmdline()):
                    done = [record for _, who in watched.users() for record in watched.records(who.key)]
                    before.update({record.key: record.created for record in done})
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    done = adapt_users_over_ray(engine, people(90), StorePlace.of(str(tmp_path / "store"), None), shard=5)
    killer.join()
    assert killed, "no worker was killed while it adapted"
    assert (done.users, done.ratings) == (90, ratings_of(people(90)))
    assert kept(engine.store) == alone
    assert 0 < len(before) < 90
    for key, created in before.items():
        assert engine.store.records(key)[0].created == created, "what was done is not done again"


def test_a_workers_error_is_raised_as_it_is(ray: Any, recommender: MetaRecommender, tmp_path: Path) -> None:
    """The workers find no store where they are told that it is."""
    engine = engine_over(recommender, tmp_path / "store")
    with pytest.raises(StoreError, match=r"other' holds no store\. Run: metarec adapt"):
        adapt_users_over_ray(engine, people(2), StorePlace.of(str(tmp_path / "other"), None))


def test_a_recommender_that_was_not_saved_does_not_travel(
    ray: Any, recommender: MetaRecommender, tmp_path: Path
) -> None:
    unsaved = MetaRecommender(recommender.backbone, recommender.config, recommender.fitted)
    with pytest.raises(ConfigError, match="was not saved"):
        adapt_users_over_ray(
            engine_over(unsaved, tmp_path / "store"), people(2), StorePlace.of(str(tmp_path / "store"), None)
        )


def ray_with(nodes: int, resources: dict[str, float]) -> Any:
    machine = {"Alive": True, "Resources": {"CPU": 4.0}}
    return SimpleNamespace(nodes=lambda: [machine] * nodes, cluster_resources=lambda: resources)


def test_a_store_for_one_machine_is_refused_on_several(recommender: MetaRecommender, tmp_path: Path) -> None:
    engine = engine_over(recommender, tmp_path / "store")
    place = StorePlace.of(str(tmp_path / "store"), None)
    with pytest.raises(StoreError, match=r"2 machines.*Give --store postgresql"):
        ray_bulk._check_cluster(ray_with(2, {"CPU": 8.0}), engine, place)
    assert ray_bulk._check_cluster(ray_with(1, {"CPU": 4.0}), engine, place) == 4
    assert ray_bulk._check_cluster(ray_with(2, {"CPU": 8.0}), engine, StorePlace("postgresql://x", tmp_path)) == 8


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("here", "'here' is no address of a cluster. Give --ray local, --ray auto, or HOST:PORT"),
        ("ray://head:10001", "is no address of a cluster"),
        ("127.0.0.1:PORT", "does not answer"),
    ],
)
def test_an_address_where_no_cluster_is_ends_with_status_2(
    address: str, problem: str, checkpoint: Path, tmp_path: Path, metarec: Callable[..., Any]
) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    store = tmp_path / "store"
    command = ["adapt", checkpoint, "--users", tmp_path / "none.csv", "--store", store]
    ran = metarec(*command, "--ray", address.replace("PORT", str(port)))
    assert ran.status == 2
    assert problem in ran.err
    assert not store.exists()


def test_something_else_that_listens_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    monkeypatch.setattr(ray_bulk, "_CLUSTER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with (
            pytest.raises(ConfigError, match=f"no Ray cluster answers at --ray '{address}' within 1 s"),
            ray_bulk.cluster(address),
        ):
            pass


def test_without_ray_the_command_says_what_to_install(
    checkpoint: Path, tmp_path: Path, metarec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = metarec("adapt", checkpoint, "--users", tmp_path / "f.csv", "--store", tmp_path / "store", "--ray", "local")
    assert ran.status == 2
    assert "pip install 'metarec[ray]'" in ran.err
    ran = metarec("adapt", checkpoint, "--rating", "m1=4", "--ray", "local")
    assert ran.status == 2
    assert "--ray is given without --users" in ran.err


def command(ray: Any, checkpoint: Path, folder: Path, users: Said) -> list[str]:
    """Returns the command that adapts users on the running cluster."""
    rows = [f"{user},{item},{rating}" for user, said in users.items() for item, rating in said.ratings]
    (folder / "feedback.csv").write_text("\n".join(["user,item,rating", *rows]))
    address = ray.get_runtime_context().gcs_address
    adapt = [sys.executable, "-m", "metarec.cli", "adapt", str(checkpoint), "--users", "feedback.csv"]
    return [*adapt, "--store", "store", "--ray", address]


@pytest.mark.slow
def test_the_command_adapts_on_a_cluster_that_runs(ray: Any, checkpoint: Path, tmp_path: Path) -> None:
    ran = command(ray, checkpoint, tmp_path, people(3))
    done = subprocess.run(ran, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "adapted: 3" in done.stdout
    assert set(kept(AdapterStore(tmp_path / "store"))) == set(people(3))


@pytest.mark.slow
def test_a_command_that_is_interrupted_loses_nothing(
    ray: Any, recommender: MetaRecommender, checkpoint: Path, alone: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    users = people(400)
    store = AdapterStore(tmp_path / "store")
    process = subprocess.Popen(
        command(ray, checkpoint, tmp_path, users), cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    while not store.sizes()["adapters"]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert b"nothing is lost: run the same command again" in said
    done = store.sizes()["adapters"]
    assert 0 < done < 400
    rest = adapt_users(engine_over(recommender, tmp_path / "store"), users)
    assert rest.adapted == 400 - done
    assert {name: files for name, files in kept(store).items() if name in alone} == alone
