"""How many threads linear algebra runs on; no other module decides it.

Small matrices, however many, run on one thread. With several, every call waits until all of them have had the
processor: beside another busy process that takes a hundred times as long, and alone it saves little.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TypeVar

import torch
from threadpoolctl import OpenBLASController, ThreadpoolController

Job = TypeVar("Job")
Result = TypeVar("Result")


class _Limits:
    """How many callers are inside `one_thread`, and what is restored when the last one leaves."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.callers = 0
        self.limiter: Any = None
        # torch has a number of threads for each thread that calls it.
        self.of_this_thread = threading.local()


_LIMITS = _Limits()


@contextmanager
def one_thread(wanted: bool = True, *, scipy: bool = True) -> Iterator[None]:
    """Runs the linear algebra of torch, NumPy and SciPy on one thread, and restores their numbers afterwards.

    Also a decorator: ``@one_thread()``. Calls may be nested, and may overlap in several threads.

    Args:
        wanted: False leaves everything as it is, e.g. where a language model takes part.
        scipy: False leaves SciPy's library alone where nothing has imported it yet, which takes half a second: for what
            serves, and calls none of it.
    """
    if not wanted or getattr(_LIMITS.of_this_thread, "inside", False):
        yield
        return
    _LIMITS.of_this_thread.inside = True
    before = torch.get_num_threads()
    try:
        if before != 1:
            torch.set_num_threads(1)
        with _LIMITS.lock:
            if _LIMITS.callers == 0:
                _LIMITS.limiter = _blas(scipy).limit(limits=1, user_api="blas")
            _LIMITS.callers += 1
        try:
            yield
        finally:
            with _LIMITS.lock:
                _LIMITS.callers -= 1
                if _LIMITS.callers == 0:
                    _let_any_thread_set_limits()
                    _LIMITS.limiter.restore_original_limits()
                    _let_any_thread_set_limits()
    finally:
        if before != 1:
            torch.set_num_threads(before)
        _LIMITS.of_this_thread.inside = False


def for_each(take: Callable[[], Job | None], do: Callable[[Job], object], workers: int) -> None:
    """Does jobs on several threads, each of which computes on one thread; no job waits for another to end.

    Two threads that share one job wait for each other at every operation, which takes many times as long beside another
    busy process. A job's result therefore does not depend on the number of workers either.

    Args:
        take: Returns the next job, or None when none is left; called from every thread.
        do: Does a job. Its first error is raised after the jobs that have begun; Ctrl-C interrupts these too.
        workers: Number of threads; 1 does all in this thread, on as many threads as it computes on.
    """
    if workers == 1:
        while (job := take()) is not None:
            do(job)
        return
    errors: list[BaseException] = []
    interruptible = _Interruptible()

    def work() -> None:
        with suppress(KeyboardInterrupt):  # that of `interrupt`, where it comes after the last job
            try:
                with interruptible.thread():
                    _on_one_thread()
                    while not errors and (job := take()) is not None:
                        do(job)
            except BaseException as error:  # raised by the thread that waits
                errors.append(error)

    threads = [threading.Thread(target=work, name=f"metarec-worker-{place}") for place in range(workers)]
    with one_thread():
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C: the jobs end at their next line of Python
            errors.append(error)
            interruptible.interrupt()
            for thread in threads:
                if thread.is_alive():  # one that has not begun yet takes no job
                    thread.join()
            raise
    if errors:
        raise errors[0]


def _on_one_thread() -> None:
    """Makes this thread compute on one thread, inside its creator's `one_thread`; there is nothing to restore."""
    torch.set_num_threads(1)
    _LIMITS.of_this_thread.inside = True


class _Interruptible:
    """The threads that do jobs at present, each of which is interrupted once, and never outside its jobs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: set[int] = set()

    @contextmanager
    def thread(self) -> Iterator[None]:
        """Makes this thread one of them while the body runs."""
        own = threading.get_ident()
        try:
            with self._lock:
                self._threads.add(own)
            yield
        finally:
            with self._lock:
                self._threads.discard(own)
                _raise_in(own, None)

    def interrupt(self) -> None:
        """Raises KeyboardInterrupt in all of them."""
        with self._lock:
            while self._threads:
                _raise_in(self._threads.pop(), KeyboardInterrupt)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raises an error in a thread at its next line of Python; None takes back one that has not been raised yet."""
    what = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


def map_each(
    do: Callable[[Job], Result], jobs: Sequence[Job], workers: int, advance: Callable[[float], None] = lambda done: None
) -> list[Result]:
    """Returns what `do` returns for every job, in their order; see `for_each`.

    Args:
        do: Does a job.
        jobs: The jobs.
        workers: Number of threads.
        advance: Called with the number of jobs that are done.
    """
    results: dict[int, Result] = {}
    left = iter(range(len(jobs)))
    guard = threading.Lock()

    def take() -> int | None:
        with guard:
            return next(left, None)

    def one(place: int) -> None:
        results[place] = do(jobs[place])
        advance(len(results))

    for_each(take, one, min(workers, len(jobs)))
    return [results[place] for place in range(len(jobs))]


def use_threads(threads: int) -> None:
    """Sets how many threads this process computes on, in torch, NumPy, SciPy, and in what else is loaded by now."""
    torch.set_num_threads(threads)
    _blas(True)
    ThreadpoolController().limit(limits=threads)
    _let_any_thread_set_limits()


def _let_any_thread_set_limits() -> None:
    """Undoes that newer threadpoolctl ignores every thread but the one that set a limit last."""
    clear = getattr(OpenBLASController, "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)


def _blas(with_scipy: bool) -> ThreadpoolController:
    """Returns the controller of the libraries that NumPy and SciPy call; of NumPy's alone where SciPy's is not loaded.

    Args:
        with_scipy: Loads SciPy's.
    """
    return _controller(with_scipy or "scipy.linalg" in sys.modules)


@cache
def _controller(with_scipy: bool) -> ThreadpoolController:
    if with_scipy:
        import scipy.linalg  # noqa: F401

    return ThreadpoolController()
