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
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from metarec.errors import ConflictError, MetarecError
from metarec.serve.engine import Engine
from metarec.serve.person import Person
from metarec.serve.records import Accepted, Feedback, NewAdapter

_LOG = logging.getLogger(__name__)
_BATCH = 16
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
class Job:
    """A function to call in the worker's thread, with a user or without.

    Args:
        answer: Called with the user as adapted to all ratings including this batch's, None without a user; and with
            the result of the job's own feedback, None without any.
        user: The id of the user whose adapter is needed.
        feedback: Feedback to write to the log first.
        alone: Runs in a batch of its own, after all jobs before it and before all jobs after it.
    """

    answer: Callable[[Person | None, Accepted | None], Any]
    user: str | None = None
    feedback: Feedback | None = None
    alone: bool = False
    future: Future[Any] = field(default_factory=Future)


class Worker:
    """A thread that runs the engine, and another that writes adapters meanwhile.

    Args:
        engine: The engine; from now on only this worker's thread may use it.
        waiting: How many jobs may wait.
    """

    def __init__(self, engine: Engine, waiting: int = 64) -> None:
        self.engine = engine
        self.batches = 0
        self.jobs = 0
        self._queue: queue.Queue[Job | None] = queue.Queue(waiting)
        self._unsaved: queue.Queue[NewAdapter | None] = queue.Queue(_UNSAVED)
        self._closed = threading.Event()
        self._seconds_per_job = 0.05
        self._swept = engine.counters.erased
        engine.save_with(self._unsaved.put)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._saver = threading.Thread(target=self._save, name="saver", daemon=True)
        self._thread.start()
        self._saver.start()

    @property
    def depth(self) -> int:
        """How many jobs wait."""
        return self._queue.qsize()

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
            self._queue.put_nowait(job)
        except queue.Full:
            raise BusyError(max(1, round(self.depth * self._seconds_per_job))) from None
        return job.future

    def _run(self) -> None:
        following: Job | None = None
        while True:
            try:
                job = following or self._queue.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                self._idle()
                continue
            following = None
            if job is None:
                return
            batch = [job]
            while not job.alone and len(batch) < _BATCH:
                try:
                    another = self._queue.get_nowait()
                except queue.Empty:
                    break
                if another is None:
                    self._do(batch)
                    return
                if another.alone:
                    following = another
                    break
                batch.append(another)
            self._do(batch)

    def _idle(self) -> None:
        """Forgets whom other servers erased; requests that named them are garbage by now, and go too."""
        try:
            self.engine.forget_erased()
            if self.engine.counters.erased > self._swept:
                self._swept = self.engine.counters.erased
                gc.collect()
        except MetarecError as error:  # the next request says it to somebody
            _LOG.error("erasures could not be read", extra={"failure": type(error).__name__})

    def _do(self, batch: Sequence[Job]) -> None:
        began = time.perf_counter()
        # A job whose client has gone is skipped; one that has started runs to its end.
        running = [job for job in batch if job.future.set_running_or_notify_cancel()]
        try:
            self._answer(running)
        except Exception as error:
            for job in running:
                if not job.future.done():
                    job.future.set_exception(error)
        if running:
            self.batches += 1
            self.jobs += len(running)
            taken = (time.perf_counter() - began) / len(running)
            self._seconds_per_job += 0.1 * (taken - self._seconds_per_job)

    def _answer(self, batch: Sequence[Job]) -> None:
        said = [job for job in batch if job.feedback is not None]
        outcomes = self.engine.store.append([job.feedback for job in said if job.feedback is not None]) if said else []
        accepted = {id(job): outcome for job, outcome in zip(said, outcomes, strict=True)}
        people = self.engine.people([job.user for job in batch if job.user is not None])
        for job in batch:
            outcome = accepted.get(id(job))
            if isinstance(outcome, ConflictError):
                job.future.set_exception(outcome)
                continue
            try:
                job.future.set_result(job.answer(None if job.user is None else people[job.user], outcome))
            except Exception as error:  # one job's failure must not fail the others
                job.future.set_exception(error)

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
        self._put_end(self._queue, deadline)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._put_end(self._unsaved, deadline)
        self._saver.join(max(0.0, deadline - time.monotonic()))

    @staticmethod
    def _put_end(into: queue.Queue[Any], deadline: float) -> None:
        try:
            into.put(None, timeout=max(0.0, deadline - time.monotonic()))
        except queue.Full:
            return
