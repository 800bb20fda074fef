"""Turns requests into jobs for the worker, waits for their results, and counts both."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException

from metarec.errors import StoreError
from metarec.serve.engine import Engine
from metarec.serve.guard import RequestLimits
from metarec.serve.person import Person
from metarec.serve.records import Accepted, Feedback, check_id
from metarec.serve.schema import Adapter, Asked
from metarec.serve.watch import Watch
from metarec.serve.worker import Job, Worker

# Adapting takes about as long as ranking three times.
_FEEDBACK_COST = 3.0
# For how long a service that was ready is, and how long the model may take to score one item.
_READY_SECONDS, _PROBE_SECONDS = 1.0, 5.0
_LATER = "Ask again in 5 s"


class RefusedError(HTTPException):
    """An answer with a status, a message and a cure.

    Args:
        status: The status.
        message: What is wrong.
        cure: What to do.
        headers: Headers of the answer.
    """

    def __init__(self, status: int, message: str, cure: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, headers)
        self.cure = cure


@dataclass(frozen=True)
class ServeSettings:
    """Settings of the service.

    Args:
        limits: API keys, rate and body size.
        waiting: Requests that may wait for the model.
        seconds: Seconds after which a request is given up.
        ui: Serves the page.
        watch: The share of users whose feedback the model is judged by; see `metarec.serve.watch`.
    """

    limits: RequestLimits = field(default_factory=RequestLimits)
    waiting: int = 64
    seconds: float = 30.0
    ui: bool = False
    watch: float = 1.0


class _State(Collector):
    """Metrics that are read from the engine and the worker when they are collected."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterable[Metric]:
        worker, engine = self._worker, self._worker.engine
        gauges = {
            "queue_depth": ("requests that wait for the model", worker.depth),
            "hot_adapters": ("adapters in memory", len(engine.hot)),
            "hot_adapter_bytes": ("bytes of adapters in memory", engine.hot.bytes),
            "items": ("items that can be recommended", engine.recommendable),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(f"metarec_{name}", what, value)
        counters = engine.counters
        counts = {
            "adapted_users": ("adapters computed", counters.adapted),
            "diverged": ("adapters that met a number that is not finite", counters.diverged),
            "damaged_adapters": ("adapters refused because a byte was altered", counters.damaged),
            "failed_adaptations": ("adapters that could not be computed", counters.failed),
            "unsaved_adapters": ("adapters that could not be written", counters.unsaved),
            "hot_hits": ("adapters found in memory", engine.hot.hits),
            "hot_misses": ("adapters not found in memory", engine.hot.misses),
            "batches": ("batches that the model worked on", worker.batches),
            "jobs": ("requests that the model worked on", worker.jobs),
        }
        for name, (what, value) in counts.items():
            yield CounterMetricFamily(f"metarec_{name}", what, value)


@dataclass
class _Erasure:
    """Somebody to erase, and whether there was such a user; None until it is known."""

    user: str
    found: bool | None = None


class Service:
    """The worker and the metrics of one application; routes reach the model through `ask`."""

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        self.settings = settings
        self.worker = Worker(engine, settings.waiting, settings.seconds, Watch(settings.watch))
        self._ready_at = -math.inf
        self._erasures: deque[_Erasure] = deque()
        self.own_registry = self.registry = CollectorRegistry()
        self.registry.register(_State(self.worker))
        self.registry.register(self.worker.watch)
        self._requests = Counter("metarec_requests", "answers", ["method", "route", "status"], registry=self.registry)
        self._seconds = Histogram("metarec_seconds", "seconds to an answer", ["route"], registry=self.registry)

    @property
    def engine(self) -> Engine:
        """The engine; only a job may compute with it."""
        return self.worker.engine

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts an answer."""
        known = method if method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS") else "other"
        self._requests.labels(known, route, status).inc()
        self._seconds.labels(route).observe(seconds)

    async def ask(self, job: Job) -> Any:
        """Waits for the worker to do a job.

        Raises:
            BusyError: The queue is full.
            RefusedError: It did not finish in time.
        """
        future = asyncio.wrap_future(self.worker.submit(job))
        try:
            return await asyncio.wait_for(future, self.settings.seconds)
        except asyncio.CancelledError:
            self.worker.abandon(job)
            raise
        except asyncio.TimeoutError:
            self.worker.abandon(job)
            raise RefusedError(503, "the answer takes too long", _LATER, {"Retry-After": "5"}) from None

    async def ready(self) -> None:
        """Tests that feedback can be stored and that the model answers; at most once a second.

        Raises:
            StoreError: Feedback cannot be stored.
            RefusedError: The model does not answer.
        """
        if time.monotonic() - self._ready_at < _READY_SECONDS:
            return
        if not self.worker.alive:
            raise StoreError("the worker does not run", "Start the service again")
        await asyncio.to_thread(self.engine.store.test_write)
        try:
            await asyncio.wait_for(asyncio.wrap_future(self.worker.probe()), _PROBE_SECONDS)
        except (asyncio.TimeoutError, RuntimeError):
            raise RefusedError(503, "the model does not answer", _LATER, {"Retry-After": "5"}) from None
        self._ready_at = time.monotonic()

    async def person(
        self, user: str, answer: Callable[[Person], Any], asked: Asked | None = None, cost: float = 1.0
    ) -> Any:
        """Calls a function with a user, in the worker, and returns its result.

        Args:
            user: The user's id.
            answer: The function.
            asked: What this question says of the user and of the moment.
            cost: See `Job`.
        """

        def run(person: Person | None, _: Accepted | None) -> Any:
            assert person is not None
            return answer(self._asking(person, asked))

        return await self.ask(Job(run, check_id(user, "user id"), cost=cost))

    def _asking(self, person: Person, asked: Asked | None) -> Person:
        return self.engine.asking(person, asked.about, asked.friends, asked.context) if asked else person

    async def alone(self, answer: Callable[[], Any], user: str | None = None) -> Any:
        """Calls a function between two batches, in the worker, and returns its result.

        Args:
            answer: The function.
            user: For whom, where it is for somebody: it comes after what they have asked for before.
        """
        return await self.ask(Job(lambda *_: answer(), user, alone=True))

    async def feedback(self, feedback: Feedback) -> tuple[Accepted, Person]:
        """Writes a user's ratings, and what is said of the user, to the log and adapts to them.

        Raises:
            MetarecError: An item is unknown, a rating off the scale, the recommender does not read what is said, or the
                key contradicts an earlier one.
        """
        engine, scale = self.engine, self.engine.trained.fitted.scale
        for item, rating in feedback.ratings:
            engine.code(item)
            scale.check(rating, "an item")
        check_id(feedback.user, "user id")
        if feedback.idempotency_key is not None:
            check_id(feedback.idempotency_key, "key")
        for friend in feedback.friends or ():
            check_id(friend, "id of a friend")
        engine.check(feedback)
        job = Job(lambda person, done: (done, person), feedback.user, feedback, cost=_FEEDBACK_COST)
        both: tuple[Accepted, Person] = await self.ask(job)
        return both

    async def erase(self, user: str) -> bool:
        """Removes a user from the store and from memory; returns whether there was one.

        Raises:
            StoreError: The store failed; see `AdapterStore.erase`.
        """
        asked = _Erasure(user)
        self._erasures.append(asked)
        await self.alone(self._erase_waiting, user)
        if asked.found is None:
            raise StoreError("the erasure failed", "Erase again")
        return asked.found

    def _erase_waiting(self) -> None:
        """Erases all users who wait for it: the store is written anew once, however many they are."""
        waiting: list[_Erasure] = []
        while self._erasures:
            waiting.append(self._erasures.popleft())
        if not waiting:
            return
        self.worker.settle()
        for asked, found in zip(waiting, self.engine.erase_all([each.user for each in waiting]), strict=True):
            asked.found = found


def adapter_facts(person: Person) -> Adapter:
    """Returns the facts about a user's adapter as a schema."""
    return Adapter.model_validate(person.facts())
