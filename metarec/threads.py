"""How many threads linear algebra runs on; no other module decides it.

Small matrices, however many, run on one thread. With several, every call waits until all of them have had the
processor: beside another busy process that takes a hundred times as long, and alone it saves little.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from threadpoolctl import OpenBLASController, ThreadpoolController


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
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Runs the linear algebra of torch, NumPy and SciPy on one thread, and restores their numbers afterwards.

    Also a decorator: ``@one_thread()``. Calls may be nested, and may overlap in several threads.

    Args:
        wanted: False leaves everything as it is, e.g. where a language model takes part.
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
                _LIMITS.limiter = _blas().limit(limits=1, user_api="blas")
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


def use_threads(threads: int) -> None:
    """Sets how many threads this process computes on, in torch, NumPy, SciPy, and in what else is loaded by now."""
    torch.set_num_threads(threads)
    _blas()
    ThreadpoolController().limit(limits=threads)
    _let_any_thread_set_limits()


def _let_any_thread_set_limits() -> None:
    """Undoes that newer threadpoolctl ignores every thread but the one that set a limit last."""
    clear = getattr(OpenBLASController, "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)


@cache
def _blas() -> ThreadpoolController:
    """Returns the controller of the libraries that NumPy and SciPy call."""
    import scipy.linalg  # noqa: F401

    return ThreadpoolController()
