"""One thread for small matrices: inside for every library, outside as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread, main_thread

import numpy as np
import pytest
import scipy.linalg  # noqa: F401  its BLAS is another one than NumPy's
import torch
from threadpoolctl import ThreadpoolController

from metarec.system.threads import for_each, map_each, one_thread, use_threads


def blas() -> set[int]:
    return {library["num_threads"] for library in ThreadpoolController().select(user_api="blas").info()}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads(), min(blas())
    use_threads(2)
    yield
    use_threads(before[1])
    torch.set_num_threads(before[0])


def test_inside_every_library_has_one_thread_and_afterwards_what_it_had() -> None:
    before = torch.get_num_threads(), blas()
    with one_thread():
        assert (torch.get_num_threads(), blas()) == (1, {1})
        with one_thread():
            pass
        assert (torch.get_num_threads(), blas()) == (1, {1})
    assert (torch.get_num_threads(), blas()) == before


def test_an_error_inside_restores_the_threads_too() -> None:
    before = torch.get_num_threads(), blas()
    with pytest.raises(np.linalg.LinAlgError), one_thread():
        np.linalg.inv(np.zeros((2, 2)))
    assert (torch.get_num_threads(), blas()) == before


def test_the_first_of_two_callers_to_leave_does_not_take_the_limit_from_the_other() -> None:
    before, both, left = blas(), Barrier(2), Barrier(2)

    def first() -> None:
        with one_thread():
            both.wait(10)
        left.wait(10)

    def second() -> tuple[int, set[int]]:
        with one_thread():
            both.wait(10)
            left.wait(10)
            return torch.get_num_threads(), blas()

    with ThreadPoolExecutor(2) as pool:
        pool.submit(first)
        assert pool.submit(second).result(20) == (1, {1})
    assert blas() == before


def test_a_decorated_function_keeps_the_gradient_and_the_limit() -> None:
    @one_thread()
    def solve(matrix: torch.Tensor) -> torch.Tensor:
        assert torch.get_num_threads() == 1
        return torch.linalg.solve(matrix, torch.ones(2))

    matrix = torch.eye(2, requires_grad=True)
    solve(matrix).sum().backward()  # type: ignore[no-untyped-call]
    assert matrix.grad is not None
    assert torch.get_num_threads() == 2


def test_where_it_is_not_wanted_nothing_changes() -> None:
    before = torch.get_num_threads(), blas()
    with one_thread(wanted=False):
        assert (torch.get_num_threads(), blas()) == before


def test_a_process_can_be_set_to_a_number_of_threads() -> None:
    use_threads(1)
    assert (torch.get_num_threads(), blas()) == (1, {1})


def test_jobs_are_done_side_by_side_and_each_computes_on_one_thread() -> None:
    before, together = (torch.get_num_threads(), blas()), Barrier(2)

    def threads_of(job: int) -> tuple[int, int, set[int]]:
        together.wait(10)  # breaks unless two jobs run at the same time
        found = job, torch.get_num_threads(), blas()
        together.wait(10)
        return found

    assert map_each(threads_of, range(4), workers=2) == [(job, 1, {1}) for job in range(4)]
    assert (torch.get_num_threads(), blas()) == before


def test_one_worker_does_all_jobs_in_its_callers_thread_on_all_threads() -> None:
    assert map_each(lambda job: job * torch.get_num_threads(), [1, 2, 3], workers=1) == [2, 4, 6]


def test_the_first_error_of_a_job_is_raised_and_no_further_job_begins() -> None:
    begun: list[int] = []

    def failing(job: int) -> None:
        begun.append(job)
        raise ValueError(f"job {job}")

    with pytest.raises(ValueError, match="job 0"):
        map_each(failing, range(100), workers=2)
    assert len(begun) <= 2


def test_ctrl_c_ends_jobs_that_have_begun() -> None:
    ended: list[bool] = []

    def long(job: int) -> None:
        try:
            if job == 1:
                signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
            for _ in range(6000):
                time.sleep(0.01)
            ended.append(True)
        except KeyboardInterrupt:
            ended.append(False)
            raise

    left = iter([0, 1])
    with pytest.raises(KeyboardInterrupt):
        for_each(lambda: next(left, None), long, workers=2)
    assert ended == [False, False]


def test_ctrl_c_while_threads_begin_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Thread] = []
    begin = Thread.start

    def interrupted(thread: Thread) -> None:
        starts.append(thread)
        if len(starts) == 2:
            raise KeyboardInterrupt
        begin(thread)

    monkeypatch.setattr(Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        map_each(lambda job: job, [1, 2, 3], workers=2)
    assert not starts[0].is_alive()


def test_ctrl_c_at_any_moment_restores_the_numbers_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads(), blas()
    unseen: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: unseen.append(args.exc_type))
    main = main_thread().ident or 0

    def press(job: int) -> None:
        with one_thread():
            time.sleep(job * 0.0001)
        if job == 9:
            signal.pthread_kill(main, signal.SIGINT)

    for _ in range(100):
        with pytest.raises(KeyboardInterrupt):
            map_each(press, range(12), workers=4)
    assert (torch.get_num_threads(), blas(), unseen) == (*before, [])


def test_what_serves_limits_numpy_without_loading_scipys_library_and_what_fits_limits_both() -> None:
    code = (
        "import sys, numpy as np, torch\n"
        "from threadpoolctl import ThreadpoolController\n"
        "from metarec.system.threads import one_thread\n"
        "ask = lambda: [one['num_threads'] for one in ThreadpoolController().select(user_api='blas').info()]\n"
        "with one_thread(scipy=False):\n"
        "    print('scipy' in sys.modules, set(ask()))\n"
        "before = len(ask())\n"
        "with one_thread():\n"
        "    print(len(ask()) - before, set(ask()))\n"
        "with one_thread(scipy=False):\n"
        "    print(set(ask()))\n"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, second, third = done.stdout.splitlines()
    assert (first, third) == ("False {1}", "{1}")
    assert second in ("1 {1}", "0 {1}")  # SciPy may share NumPy's library
