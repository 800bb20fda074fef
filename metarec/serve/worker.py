"""Runs the engine in one thread behind a bounded queue, and answers requests of many users in one batch.

A batch's feedback is made durable in one transaction before any request is answered; users are then adapted together.
"""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from metarec.errors import ConflictError, MetarecError
from metarec.serve.engine import Engine
from metarec.serve.fair_queue import CLIENT, FairQueue, FullError
from metarec.serve.person import Person
from metarec.serve.rankings import Ranked, Ranking
from metarec.serve.records import Accepted, Feedback, NewAdapter
from metarec.serve.watch import Watch

_LOG = logging.getLogger(__name__)
_BATCH = 16
# Who has just been answered may ask again at once: for so much of a batch's time, and so many seconds at most, the next
# one waits for as many as there were. Together they cost less.
_WINDOW, _LONGEST_WINDOW = 0.1, 0.02
# Rankings that cost no more are computed together; a dearer one would keep the others waiting.
_CHEAP = 2.0
# After so many seconds without a request the worker sees whom other servers have erased.
IDLE_SECONDS = 2.0
# How many adapters may wait to be written; a killed process computes them again from the log.
_UNSAVED = 64


class BusyError(MetarecError):
    """The queue is full.

    Args:
        seconds: Seconds after which to try again.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__("too many requests are waiting", f"Try again in {seconds} s")
        self.seconds = seconds


@dataclass(frozen=True)
class Wanted:
    """What a job may answer instead of its result: a ranking, which is computed together with those of other jobs.

    Args:
        person: For whom.
        ranking: What is asked.
        answer: Turns it into the job's result.
    """

    person: Person
    ranking: Ranking
    answer: Callable[[Ranked], Any]


@dataclass(frozen=True, eq=False)
class Job:
    """A function to call in the worker's thread, with a user or without.

    Args:
        answer: Called with the user as adapted to all ratings including this batch's, None without a user; and with
            the result of the job's own feedback, None without any. It returns the result, or `Wanted`.
        user: The id of the user whose adapter is needed.
        feedback: Feedback to write to the log first.
        alone: Runs in a batch of its own.
        cost: What it is expected to take, in units of a plain ranking.
        client: Whose key it came with.
    """

    answer: Callable[[Person | None, Accepted | None], Any]
    user: str | None = None
    feedback: Feedback | None = None
    alone: bool = False
    cost: float = 1.0
    client: str = field(default_factory=lambda: CLIENT.get())
    future: Future[Any] = field(default_factory=Future)
    given_up: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Ends the work where nobody waits for it any more.

        Raises:
            AbandonedError: Nobody does.
        """
        if self.given_up.is_set():
            raise AbandonedError


class AbandonedError(Exception):
    """Nobody waits for the answer any more."""


class Worker:
    """A thread that runs the engine, and another that writes adapters meanwhile.

    Args:
        engine: The engine; from now on only this worker's thread may use it.
        waiting: How many jobs may wait.
        seconds: How many seconds of work may wait.
        watch: Judges the model by feedback, after the requests of a batch are answered.
    """

    def __init__(self, engine: Engine, waiting: int = 64, seconds: float = 30.0, watch: Watch | None = None) -> None:
        self.engine = engine
        self.watch = watch or Watch(0.0)
        engine.forget_with(self.watch.forget)
        self.watch.model(engine)
        self.batches = 0
        self.jobs = 0
        self._seconds = seconds
        self._seconds_per_unit = 0.05
        self._queue: FairQueue[Job] = FairQueue(waiting, seconds / self._seconds_per_unit)
        self._probes: queue.SimpleQueue[Future[None]] = queue.SimpleQueue()
        self._unsaved: queue.Queue[NewAdapter | None] = queue.Queue(_UNSAVED)
        self._closed = threading.Event()
        self._swept = engine.counters.erased
        # How many clients were there at the end of the last batch, and how many seconds it took.
        self._expected, self._taken = 0, 0.0
        engine.save_with(self._unsaved.put)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._saver = threading.Thread(target=self._save, name="saver", daemon=True)
        self._thread.start()
        self._saver.start()

    @property
    def depth(self) -> int:
        """How many jobs wait."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        """Whether jobs are being worked on."""
        return self._thread.is_alive() and not self._closed.is_set()

    def submit(self, job: Job) -> Future[Any]:
        """Queues a job.

        Raises:
            BusyError: The queue is full, or the worker is closing.
        """
        if self._closed.is_set():
            raise BusyError(5)
        try:
            given_way = self._queue.put(job)
        except FullError:
            raise self._busy() from None
        if given_way is not None:
            _fail(given_way.future, self._busy())
        return job.future

    def _busy(self) -> BusyError:
        return BusyError(max(1, min(60, round(self._queue.units * self._seconds_per_unit))))

    def abandon(self, job: Job) -> None:
        """Takes back a job that nobody waits for; one that runs ends at the next block of its work."""
        job.given_up.set()
        job.future.cancel()
        self._queue.discard(job)

    def probe(self) -> Future[None]:
        """Tests the model between two jobs, whatever waits; the result is an error where it does not answer."""
        future: Future[None] = Future()
        self._probes.put(future)
        self._queue.wake()
        return future

    def _probe(self) -> None:
        while not self._probes.empty():
            future = self._probes.get()
            if future.set_running_or_notify_cancel():
                try:
                    self.engine.probe()
                    future.set_result(None)
                except Exception as error:
                    future.set_exception(error)

    def _run(self) -> None:
        while True:
            self._probe()
            job = self._queue.get(IDLE_SECONDS if self._probes.empty() else 0.0)
            if job is not None:
                self._do(self._batch(job))
            elif self._closed.is_set():
                self._save_sums(now=True)
                return
            else:
                self._idle()

    def _batch(self, job: Job) -> list[Job]:
        """Returns a job and those that are done together with it."""
        batch = [job]
        if not job.alone and self._expected > 1:
            self._queue.wait_for(min(self._expected, _BATCH) - 1, min(_WINDOW * self._taken, _LONGEST_WINDOW))
        while not job.alone and len(batch) < _BATCH and (another := self._queue.take()) is not None:
            if another.alone:
                self._queue.give_back(another)
                break
            batch.append(another)
        return batch

    def _idle(self) -> None:
        """Forgets whom other servers erased; requests that named them are garbage by now, and go too."""
        self._save_sums()
        try:
            self.engine.forget_erased()
            if self.engine.counters.erased > self._swept:
                self._swept = self.engine.counters.erased
                gc.collect()
        except MetarecError as error:  # the next request says it to somebody
            _LOG.error("erasures could not be read", extra={"failure": type(error).__name__})

    def _do(self, batch: Sequence[Job]) -> None:
        began = time.perf_counter()
        # A job whose client has gone is skipped.
        running = [job for job in batch if job.future.set_running_or_notify_cancel()]
        try:
            self._answer(running)
        except Exception as error:
            for job in running:
                _fail(job.future, error)
        self._expected, self._taken = len(running) + len(self._queue), time.perf_counter() - began
        self.batches += bool(running)
        self.jobs += len(running)
        if running and not running[0].alone:
            units = sum(job.cost for job in running)
            taken = (time.perf_counter() - began) / units
            # Who asked for what takes longer than foreseen pays for it, and the others in the batch alike.
            for job in running:
                self._queue.charge(job, job.cost * (taken / self._seconds_per_unit - 1))
            self._seconds_per_unit += 0.1 * (taken - self._seconds_per_unit)
            self._queue.limit = self._seconds / self._seconds_per_unit

    def _answer(self, batch: Sequence[Job]) -> None:
        said = [job for job in batch if job.feedback is not None]
        known = self.watch.before(self.engine, [job.user for job in said if job.user is not None])
        outcomes = self.engine.store.append([job.feedback for job in said if job.feedback is not None]) if said else []
        accepted = {id(job): outcome for job, outcome in zip(said, outcomes, strict=True)}
        people = self.engine.people([job.user for job in batch if job.user is not None and not job.alone])
        wanted: list[tuple[Job, Wanted]] = []
        for job in batch:
            self._probe()
            outcome = accepted.get(id(job))
            if isinstance(outcome, ConflictError):
                _fail(job.future, outcome)
                continue
            try:
                self.engine.check_with(job.check)
                person = None if job.user is None or job.alone else people[job.user]
                job.check()
                answer = job.answer(person, outcome)
                if isinstance(answer, Wanted):
                    wanted.append((job, answer))
                elif not job.future.done():
                    job.future.set_result(answer)
            except Exception as error:  # one job's failure must not fail the others
                _fail(job.future, error)
            finally:
                self.engine.check_with(None)
        cheap = [pair for pair in wanted if pair[0].cost <= _CHEAP]
        for together in (cheap, *([pair] for pair in wanted if pair[0].cost > _CHEAP)):
            if together:
                self._probe()
                self._rank(together)
        for job in said:
            outcome = accepted[id(job)]
            if job.feedback is not None and isinstance(outcome, Accepted):
                self.watch.after(self.engine, job.feedback, outcome, known.get(job.feedback.user))
        self._save_sums()

    def _save_sums(self, now: bool = False) -> None:
        """Adds what the watch has counted to the store."""
        self.watch.count_adapted([self.engine])
        self.watch.save(self.engine.store, now=now)

    def _rank(self, wanted: Sequence[tuple[Job, Wanted]]) -> None:
        """Answers jobs that asked for rankings; the work ends where nobody waits for any of them."""
        waiting = [pair for pair in wanted if not pair[0].given_up.is_set()]

        def check() -> None:
            if all(job.given_up.is_set() for job, _ in waiting):
                raise AbandonedError

        try:
            self.engine.check_with(check)
            rankings = self.engine.recommend_all([(one.person, one.ranking) for _, one in waiting])
        except Exception as error:
            if len(waiting) == 1:
                _fail(waiting[0][0].future, error)
                return
            for pair in waiting:  # one job's failure must not fail the others
                self._rank([pair])
            return
        finally:
            self.engine.check_with(None)
        for (job, one), ranked in zip(waiting, rankings, strict=True):
            _finish(job.future, one, ranked)

    def _save(self) -> None:
        while (adapter := self._unsaved.get()) is not None:
            self.engine.keep(adapter)
            self._unsaved.task_done()

    def settle(self) -> None:
        """Waits until every adapter so far is written; called by a job that runs alone."""
        self._unsaved.join()

    def close(self, seconds: float = 5.0) -> None:
        """Finishes accepted jobs and writes waiting adapters, within a time limit.

        Args:
            seconds: The limit; adapters not written by then are computed again from the log when they are needed.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        deadline = time.monotonic() + seconds
        self._queue.end()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with suppress(queue.Full):
            self._unsaved.put(None, timeout=max(0.0, deadline - time.monotonic()))
        self._saver.join(max(0.0, deadline - time.monotonic()))


def _finish(future: Future[Any], one: Wanted, ranked: Ranked | Exception) -> None:
    try:
        if isinstance(ranked, Exception):
            raise ranked
        answer = one.answer(ranked)
        if not future.done():
            future.set_result(answer)
    except Exception as error:
        _fail(future, error)


def _fail(future: Future[Any], error: Exception) -> None:
    with suppress(InvalidStateError):  # nobody waits for it any more
        future.set_exception(error)
