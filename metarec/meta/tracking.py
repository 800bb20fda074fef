"""Sends the numbers of a training to experiment trackers: TensorBoard, MLflow, trackio, or one of your own.

A tracker gets settings and, at every validation, a few means. It gets no rating, no id of a user, no item, no weight.
One that fails is left out from then on; the training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from metarec.errors import ConfigError
from metarec.registries import TRACKERS

_LOG = logging.getLogger(__name__)
PROJECT = "metarec"
# Trackers whose name is that of a package, and of the extra that installs it.
_EXTRAS = ("tensorboard", "mlflow", "trackio")


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of a run before it begins.

    Args:
        name: The run's name.
        folder: The run's directory.
        settings: Its settings by dotted key.
    """

    name: str
    folder: Path
    settings: Mapping[str, object]


class Tracker(Protocol):
    """Somebody who is sent the numbers of one run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes finite numbers by name, after some steps of the outer loop."""

    def close(self, *, finished: bool) -> None:
        """Ends the run; `finished` is False where an error or Ctrl-C ended it."""


class OpenTracker(Protocol):
    """How a tracker begins; what a name of `metarec.registries.TRACKERS` stands for."""

    def __call__(self, run: TrackedRun) -> Tracker:
        """Begins a run, and returns who is sent its numbers."""


_ACTIVE: ContextVar[tuple[Tracker, ...]] = ContextVar("trackers", default=())


def check_trackers(names: Sequence[str]) -> None:
    """Looks for trackers and what they need; imports none of it.

    Raises:
        ConfigError: There is no such tracker, or its package is not installed.
    """
    for name in names:
        TRACKERS.check(name)
        if name in _EXTRAS and find_spec(name) is None:
            raise ConfigError(f"the tracker '{name}' is not installed", f"Run: pip install 'metarec[{name}]'")


@contextmanager
def tracked(names: Sequence[str], run: TrackedRun) -> Iterator[None]:
    """Sends what is trained inside to some trackers.

    Args:
        names: Of `metarec.registries.TRACKERS`, or ``module:attribute``.
        run: The run.

    Raises:
        ConfigError: There is no such tracker, or its package is not installed.
    """
    check_trackers(names)
    opened: list[Tracker] = []
    token = None
    finished = False
    try:
        for name in dict.fromkeys(names):
            begin: OpenTracker = TRACKERS.get(name)
            opened.append(begin(run))
        token = _ACTIVE.set(tuple(opened))
        yield
        finished = True
    finally:
        if token is not None:
            _ACTIVE.reset(token)
        for tracker in opened:
            _attempt(tracker, partial(tracker.close, finished=finished))


def track(step: int, values: Mapping[str, float | None]) -> None:
    """Sends numbers to the trackers of this training; those that are None are left out."""
    known = {name: float(value) for name, value in values.items() if value is not None}
    working = tuple(tracker for tracker in _ACTIVE.get() if _attempt(tracker, partial(tracker.log, step, known)))
    if len(working) < len(_ACTIVE.get()):
        _ACTIVE.set(working)


def _attempt(tracker: Tracker, call: Callable[[], None]) -> bool:
    """Calls a tracker, and says whether it worked."""
    try:
        call()
    except Exception as error:
        _LOG.warning("the tracker %s fails, and is left out: %s", type(tracker).__name__, error)
        return False
    return True
