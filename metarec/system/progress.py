"""Progress bars with an ETA on standard error, so that standard output stays the result alone.

Where standard error is no terminal, but a log file say, a line every fifteen seconds says what is being done, how much
of it is, and how long the rest takes, however long a single unit of the work is.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

# Set in the environment of a process that works beside others, whose bars would write over each other.
QUIET = "METAREC_NO_PROGRESS"
_SECONDS_BETWEEN_LINES = 15.0


class Advance(Protocol):
    """Tells a progress bar how far the work is."""

    def __call__(self, done: float, note: str = "") -> None:
        """Shows that `done` of the total are done, with a short note such as a loss."""
        ...


@contextmanager
def progress(description: str, total: float, *, after: float = 0.0) -> Iterator[Advance]:
    """Shows a bar with elapsed and remaining time while the body runs, or lines where there is no terminal.

    Args:
        description: What is being done.
        total: Units of work in all.
        after: Seconds before a bar appears; work that is done by then shows none.
    """
    shown = _Shown(description, total)
    over = threading.Event()
    if after <= 0:
        shown.show()
    watcher = None
    if not os.environ.get(QUIET):
        watcher = threading.Thread(target=shown.watch, args=(over, after), daemon=True)
        watcher.start()
    try:
        yield shown.advance
    finally:
        over.set()
        if watcher is not None:
            watcher.join()
        shown.stop()


@contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Shows no bar and logs no warning while the body runs: for a process beside another that says the same.

    Args:
        wanted: False changes nothing.
    """
    if not wanted:
        yield
        return
    bars, logs = os.environ.get(QUIET), logging.root.manager.disable
    os.environ[QUIET] = "1"
    logging.disable(max(logs, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(logs)
        if bars is None:
            del os.environ[QUIET]
        else:
            os.environ[QUIET] = bars


class _Shown:
    """What is shown of one piece of work, by the thread that does it and by one that watches it."""

    def __init__(self, description: str, total: float) -> None:
        self._description, self._total = description, total
        self._started = time.monotonic()
        self._done, self._note = 0.0, ""
        self._bars: Progress | None = None
        self._lock = threading.Lock()

    def show(self) -> Progress:
        """Makes the bar when it is due: work of milliseconds should not wait for a bar that it never shows."""
        with self._lock:
            if self._bars is None:
                bars = _bars()
                task = bars.add_task(self._description, total=self._total, note=self._note)
                bars.update(task, completed=self._done)
                bars.tasks[0].start_time = self._started
                bars.start()
                self._bars = bars
            return self._bars

    def advance(self, done: float, note: str = "") -> None:
        self._done, self._note = done, note
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=done, note=note)

    def watch(self, over: threading.Event, after: float) -> None:
        """Shows the bar when it is due, and says how far the work is where no bar is seen moving."""
        if after > 0 and over.wait(after):
            return
        console = self.show().console
        while not console.is_terminal and not over.wait(_SECONDS_BETWEEN_LINES):
            console.print(self._line(), highlight=False, markup=False)

    def _line(self) -> str:
        done, passed = self._done, time.monotonic() - self._started
        share = done / self._total if self._total else 1.0
        rest = f"{_duration(passed / share - passed)} left" if share > 0 else f"{_duration(passed)} so far"
        return f"{self._description}: {share:.0%}, {rest}  {self._note}".rstrip()

    def stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _bars() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    console = Console(file=sys.stderr, quiet=bool(os.environ.get(QUIET)))
    return Progress(*columns, console=console, refresh_per_second=4)
