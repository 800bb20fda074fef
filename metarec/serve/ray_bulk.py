"""Adapts many users over the workers of a Ray cluster, with the adapters that one process would write.

The process that calls it writes the log; the workers open the same store, and each keeps the adapters of its shards of
users there. So a worker that is killed, or a command that is interrupted, loses the shards under way and nothing else.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarec.errors import ConfigError, MetarecError, StoreError, shown
from metarec.registry import allow, allowed
from metarec.serve.batching import BULK_USERS_AT_ONCE, use_one_thread_per_batch
from metarec.serve.bulk import Bulk, adapt_stored, blocks, write_ratings
from metarec.serve.engine import Engine
from metarec.serve.index import is_remote
from metarec.serve.records import Feedback
from metarec.serve.store import AdapterStore
from metarec.system.progress import progress, quiet

LOCAL = "local"
_ADDRESSES = "Give --ray local, --ray auto, or HOST:PORT of a cluster's head"
# Seconds in which a port, and then a cluster behind it, has to answer. Ray itself waits for minutes.
_PORT_SECONDS, _CLUSTER_SECONDS = 5.0, 30.0
# Users of a shard at most: 16 batches. A worker that is killed loses no more.
_SHARD = 16 * BULK_USERS_AT_ONCE
_SHARDS_PER_WORKER = 4
# How often a shard whose worker ended is given to another one.
_RETRIES = 3
_PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False)"


@dataclass(frozen=True)
class StorePlace:
    """Where a store is, as every worker finds it.

    Args:
        location: An absolute path, or ``postgresql://...``.
        adapters: An absolute path; None takes the store's own.
    """

    location: str
    adapters: Path | None = None

    @classmethod
    def of(cls, location: str, adapters: Path | None) -> StorePlace:
        """Returns the place of a store that this process names relative to where it runs."""
        absolute = location if is_remote(location) else str(Path(location).absolute())
        return cls(absolute, None if adapters is None else adapters.absolute())


@contextmanager
def cluster(address: str) -> Iterator[None]:
    """Connects to a Ray cluster while the body runs.

    Args:
        address: ``local`` starts one on this machine, and ends it; ``auto`` finds the one that runs here, or that
            RAY_ADDRESS names; ``HOST:PORT`` is that of a cluster's head.

    Raises:
        ConfigError: Ray is not installed, the address is of another form, or no cluster answers there.
    """
    # Ray reports its use to its makers unless this is set.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = _ray()
    if address != LOCAL:
        _check_answers(address)
    started: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 128 << 20}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(started if address == LOCAL else {}),
        )
        yield
    finally:
        ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs Ray, which is not installed", "Run: pip install 'metarec[ray]'") from None
    return ray


def _check_answers(address: str) -> None:
    """Raises a `ConfigError` where no cluster answers, in seconds."""
    if address != "auto":
        host, colon, port = address.rpartition(":")
        if not (colon and host and port.isdecimal()) or "/" in host:
            raise ConfigError(f"--ray {shown(address)} is no address of a cluster", _ADDRESSES)
        try:
            socket.create_connection((host.strip("[]"), int(port)), _PORT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--ray {shown(address)} does not answer ({error})", _ADDRESSES) from None
    # In a process of its own: where something else than Ray listens, connecting takes minutes and ends the process.
    command = [sys.executable, "-c", _PROBE, address]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_CLUSTER_SECONDS)  # noqa: S603
    except subprocess.TimeoutExpired:
        found = f"no Ray cluster answers at --ray {shown(address)} within {_CLUSTER_SECONDS:.0f} s"
        raise ConfigError(found, _ADDRESSES) from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"--ray {shown(address)} cannot be used: {said}", _ADDRESSES) from None


def adapt_users_over_ray(engine: Engine, users: Mapping[str, Feedback], place: StorePlace, *, shard: int = 0) -> Bulk:
    """Writes users' ratings to the log, and has the workers of the `cluster` keep an adapter for each of them.

    Args:
        engine: Of a saved recommender, over the store at `place`. Workers load it by its path.
        users: See `metarec.serve.bulk.read_feedback`. The same of a user again changes nothing.
        place: Where the store is.
        shard: Users per shard; 0 chooses. It changes no adapter.

    Raises:
        ConfigError: The recommender was not saved, or the cluster lacks what its device needs.
        StoreError: The cluster has several machines and the store is for one.
        MetarecError: A worker failed; or a shard's workers ended again and again.
    """
    ray = _ray()
    cores = _check_cluster(ray, engine, place)
    shard = shard or min(_SHARD, _rounded_up(-(-len(users) // (_SHARDS_PER_WORKER * cores))))
    work = _Work(ray.put(engine.trained), place, tuple(allowed()))
    accelerators = 1 if engine.trained.config.device.startswith("cuda") else 0
    adapt = ray.remote(num_cpus=1, num_gpus=accelerators, max_retries=_RETRIES, max_calls=0)(_adapt_shard)
    found = Bulk(len(users))
    done = 0
    with progress("adapting users", len(users)) as advance:
        waiting = {}
        for names in blocks(sorted(users), shard):
            found += write_ratings(engine, users, names)
            waiting[adapt.remote(work, names)] = names
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=1.0)
            for reference in ready:
                names = waiting.pop(reference)
                found += _result(ray, reference, names)
                done += len(names)
                advance(done)
    return found


def _rounded_up(users: int) -> int:
    return max(1, -(-users // BULK_USERS_AT_ONCE)) * BULK_USERS_AT_ONCE


def _check_cluster(ray: Any, engine: Engine, place: StorePlace) -> int:
    """Returns how many cores the cluster has, if it can adapt into this store.

    Raises:
        ConfigError: It has no accelerator, and the recommender needs one.
        StoreError: It has several machines, and the store is for one.
    """
    machines = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if len(machines) > 1 and not is_remote(place.location):
        raise StoreError(
            f"the cluster has {len(machines)} machines, and '{place.location}' is a store for the processes of one",
            "Give --store postgresql://... with --adapters on a disk that all machines share, or --ray local",
        )
    device = engine.trained.config.device
    total = ray.cluster_resources()
    if device.startswith("cuda") and not total.get("GPU"):
        raise ConfigError(f"the device is '{device}', and the cluster has no such accelerator", "Give --device cpu")
    return max(1, int(total.get("CPU", 1)))


def _result(ray: Any, reference: Any, names: Sequence[str]) -> Bulk:
    """Returns what a worker counted, or raises what it raised."""
    try:
        counted: Bulk = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MetarecError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise MetarecError(
            f"the workers that adapt users {shown(names[0])} to {shown(names[-1])} ended {_RETRIES + 1} times "
            f"({type(error).__name__})",
            "Give the machines more memory, or fewer cores to Ray; then run the same command again: nothing is lost",
        ) from None
    return counted


@dataclass(frozen=True)
class _Work:
    """What a worker needs beside the names of users.

    Args:
        recommender: Ray's reference to the recommender, which is kept as its path.
        place: Where the store is.
        plugins: What a saved recommender may name, see `metarec.registry.allow`.
    """

    recommender: Any
    place: StorePlace
    plugins: tuple[str, ...]


def _adapt_shard(work: _Work, names: Sequence[str]) -> Bulk:
    """Keeps an adapter for each of some users of the store; runs in a worker."""
    with quiet():
        return adapt_stored(_engine(work), names)


@functools.lru_cache(1)
def _engine(work: _Work) -> Engine:
    """Loads the recommender, once in each worker."""
    for name in work.plugins:
        allow(name)
    use_one_thread_per_batch(1)
    store = AdapterStore(work.place.location, work.place.adapters, create=False)
    return Engine(_ray().get(work.recommender), store, hot_bytes=0, users_at_once=BULK_USERS_AT_ONCE)
