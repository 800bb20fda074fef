"""A queue in which clients, and the users of each, wait in the order of what they have taken lately.

A request costs what its work is expected to take. Who has taken least comes first, and asking in vain counts too. Where
the queue is full, the last request of whoever has taken most gives way to one of somebody who has taken less.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

# Whose key the request came with that this task answers.
CLIENT: ContextVar[str] = ContextVar("client", default="")
# What somebody took counts half after so many seconds.
HALF_LIFE = 10.0
# What asking in vain counts, in units of a plain ranking.
REFUSED = 0.2
_REMEMBERED = 10_000
_FORGOTTEN = 0.01


class Costly(Protocol):
    """A request: who asks, for whom, and what it costs in units of a plain ranking."""

    @property
    def client(self) -> str:
        """Whose key it came with."""

    @property
    def user(self) -> str | None:
        """For whom, None for nobody."""

    @property
    def cost(self) -> float:
        """Units."""


J = TypeVar("J", bound=Costly)


class FullError(Exception):
    """The queue is full."""


@dataclass
class _Taken:
    units: float = 0.0
    at: float = 0.0


@dataclass
class Usage:
    """What clients and their users have taken lately; of users a keyed digest is kept, not the id.

    Args:
        clock: Returns seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _taken: dict[bytes, _Taken] = field(default_factory=dict)
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    def name(self, *parts: str) -> bytes:
        """Returns under which name a client, or a client's user, is remembered."""
        text = "\0".join(parts).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, key=self._secret, digest_size=16).digest()

    def of(self, name: bytes, now: float) -> float:
        """Returns the units that somebody has taken until now, older ones counting less."""
        taken = self._taken.get(name)
        return 0.0 if taken is None else taken.units * 0.5 ** ((now - taken.at) / HALF_LIFE)

    def add(self, name: bytes, units: float) -> None:
        """Counts units; negative ones give back what was counted too much."""
        now = self.clock()
        self._taken[name] = _Taken(max(0.0, self.of(name, now) + units), now)
        if len(self._taken) > _REMEMBERED:
            self._taken = {name: taken for name, taken in self._taken.items() if self.of(name, now) > _FORGOTTEN}


@dataclass(frozen=True)
class _Waiting(Generic[J]):
    job: J
    client: bytes
    user: bytes


class FairQueue(Generic[J]):
    """Requests that wait, safe to use from several threads; every operation takes time in proportion to their number.

    Args:
        places: How many may wait.
        units: How much work may wait in all; a request finds room where nothing waits.
        clock: Returns seconds.
    """

    def __init__(self, places: int, units: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._places = places
        self.limit = units
        self.usage = Usage(clock)
        self._waiting: list[_Waiting[J]] = []
        self._changed = threading.Condition()
        self._ended = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def units(self) -> float:
        """The work that waits."""
        return sum(waiting.job.cost for waiting in self._waiting)

    def put(self, job: J) -> J | None:
        """Adds a request.

        Returns:
            A request that gave way to it, or None.

        Raises:
            FullError: The queue is full, and nobody in it has taken more.
        """
        with self._changed:
            newcomer, given_way = self._named(job), None
            full = len(self._waiting) >= self._places or self.units + job.cost > self.limit
            if self._waiting and full:
                given_way = self._heaviest(newcomer)
                if given_way is None:
                    self._charge(newcomer, REFUSED)
                    raise FullError
                self._waiting.remove(given_way)
                self._charge(given_way, REFUSED)
            self._waiting.append(newcomer)
            self._changed.notify()
            return None if given_way is None else given_way.job

    def _named(self, job: J) -> _Waiting[J]:
        return _Waiting(job, self.usage.name(job.client), self.usage.name(job.client, job.user or ""))

    def _heaviest(self, newcomer: _Waiting[J]) -> _Waiting[J] | None:
        """Returns the last request of whoever has taken most, if that is more than the newcomer would have."""
        loads: dict[bytes, float] = {}
        now = self.usage.clock()
        for waiting in [*self._waiting, newcomer]:
            for name in (waiting.client, waiting.user):
                loads[name] = loads.get(name, self.usage.of(name, now)) + waiting.job.cost
        worst = max(reversed(self._waiting), key=lambda waiting: (loads[waiting.client], loads[waiting.user]))
        # Clients are compared with each other, users with others of the same client.
        if worst.client != newcomer.client:
            return worst if loads[worst.client] > loads[newcomer.client] else None
        return worst if loads[worst.user] > loads[newcomer.user] else None

    def get(self, timeout: float) -> J | None:
        """Takes the request of whoever has taken least, the oldest first; None where there is none in time."""
        with self._changed:
            if not self._waiting and not self._ended:
                self._changed.wait(timeout)
            return self.take()

    def wait_for(self, count: int, timeout: float) -> None:
        """Waits until so many requests are there, or some time has passed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) >= count or self._ended, timeout)

    def take(self) -> J | None:
        """Takes a request as `get` does, without waiting."""
        with self._changed:
            if not self._waiting:
                return None
            now, usage = self.usage.clock(), self.usage
            taken = min(self._waiting, key=lambda one: (usage.of(one.client, now), usage.of(one.user, now)))
            self._waiting.remove(taken)
            self._charge(taken, taken.job.cost)
            return taken.job

    def give_back(self, job: J) -> None:
        """Puts a request that was taken, but not begun, in front again."""
        with self._changed:
            self._waiting.insert(0, self._named(job))
            self._charge(self._waiting[0], -job.cost)

    def discard(self, job: J) -> None:
        """Removes a request that nobody waits for any more."""
        with self._changed:
            self._waiting = [waiting for waiting in self._waiting if waiting.job is not job]

    def charge(self, job: J, units: float) -> None:
        """Counts work that was not foreseen."""
        with self._changed:
            self._charge(self._named(job), units)

    def _charge(self, waiting: _Waiting[J], units: float) -> None:
        for name in (waiting.client, waiting.user):
            self.usage.add(name, units)

    def wake(self) -> None:
        """Ends the waiting in `get` once."""
        with self._changed:
            self._changed.notify_all()

    def end(self) -> None:
        """Ends all waiting in `get`."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
