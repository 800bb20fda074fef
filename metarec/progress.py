"""Progress bars with an ETA on standard error, so that standard output stays the result alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

# Set in the environment of a process that works beside others, whose bars would write over each other.
QUIET = "METAREC_NO_PROGRESS"
_SECONDS_BETWEEN_LINES = 10.0


class Advance(Protocol):
    """Tells a progress bar how far the work is."""

    def __call__(self, done: float, note: str = "") -> None:
        """Shows that `done` of the total are done, with a short note such as a loss."""
        ...


@contextmanager
def progress(description: str, total: float, *, after: float = 0.0) -> Iterator[Advance]:
    """Shows a bar with elapsed and remaining time while the body runs.

    Args:
        description: What is being done.
        total: Units of work in all.
        after: Seconds before a bar appears; work that is done by then shows none.
    """
    bars: Progress | None = None
    started = said = time.monotonic()

    def show_when_due(now: float) -> None:
        nonlocal bars
        # Made when it is due: what is done in milliseconds should not wait for a bar that it never shows.
        if bars is None and now - started >= after:
            bars = _bars()
            bars.add_task(description, total=total, note="")
            bars.tasks[0].start_time = started
            bars.start()

    def advance(done: float, note: str = "") -> None:
        nonlocal said
        now = time.monotonic()
        show_when_due(now)
        if bars is None:
            return
        bars.update(bars.task_ids[0], completed=done, note=note)
        # A log file shows no moving bar: it gets a line every few seconds.
        if not bars.console.is_terminal and now - said > _SECONDS_BETWEEN_LINES and 0 < done < total:
            said = now
            left = (now - started) * (total - done) / done
            bars.console.print(f"{description}: {done / total:.0%}, {left:.0f} s left  {note}", highlight=False)

    show_when_due(started)
    try:
        yield advance
    finally:
        if bars is not None:
            bars.stop()


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
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(file=sys.stderr, quiet=bool(os.environ.get(QUIET)))
    return Progress(*columns, console=console, refresh_per_second=4)
