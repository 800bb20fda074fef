"""Whoever asks for much, or often, waits behind those who ask for little."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

import pytest

from metarec.serve.fair_queue import HALF_LIFE, FairQueue, FullError, Usage


@dataclass(frozen=True, eq=False)
class Asked:
    client: str
    user: str | None
    cost: float = 1.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def queue(places: int = 8, units: float = 100.0) -> tuple[FairQueue[Asked], Clock]:
    clock = Clock()
    return FairQueue(places, units, clock), clock


def test_one_request_of_somebody_else_comes_before_the_second_of_a_flooder() -> None:
    waiting, _ = queue()
    for _ in range(5):
        waiting.put(Asked("shop", "flooder"))
    waiting.put(Asked("shop", "polite"))
    taken = [waiting.take() for _ in range(6)]
    assert [job.user for job in taken if job] == ["flooder", "polite", *["flooder"] * 4]


def test_equals_come_in_the_order_in_which_they_asked_while_time_goes_on() -> None:
    ticks = itertools.count()
    waiting: FairQueue[Asked] = FairQueue(8, 100.0, lambda: float(next(ticks)))
    waiting.put(Asked("shop", "before"))
    assert waiting.take()
    for user in "abc":
        waiting.put(Asked("shop", user))
    assert [job.user for _ in range(3) if (job := waiting.take())] == ["a", "b", "c"]


def test_a_key_with_many_users_has_no_larger_share_than_a_key_with_one() -> None:
    waiting, _ = queue(places=100)
    for number in range(40):
        waiting.put(Asked("many", f"user{number}"))
    for _ in range(10):
        waiting.put(Asked("few", "user"))
    first = Counter(job.client for _ in range(20) if (job := waiting.take()))
    assert first == {"many": 10, "few": 10}


def test_what_costs_more_is_asked_less_often() -> None:
    waiting, _ = queue(places=100, units=1000)
    for _ in range(10):
        waiting.put(Asked("shop", "dear", cost=10.0))
        waiting.put(Asked("shop", "cheap"))
    first = Counter(job.user for _ in range(11) if (job := waiting.take()))
    assert first == {"dear": 1, "cheap": 10}


def test_a_full_queue_of_flooders_gives_way_to_a_polite_client() -> None:
    """Flooders ask three times a second, refused or not; one client asks every third second, and is always served."""
    waiting, clock = queue(places=64)
    served: Counter[str | None] = Counter()
    for turn in range(30):
        for number in range(600):
            with suppress(FullError):
                waiting.put(Asked("", f"flooder{number % 200}"))
        if turn % 3 == 2:
            waiting.put(Asked("", "polite"))
        for _ in range(16):
            if job := waiting.take():
                served[job.user] += 1
        clock.now += 1.0
    assert served["polite"] == 10


def test_waiting_for_several_ends_when_they_are_there_or_after_some_time() -> None:
    waiting, _ = queue()
    waiting.wait_for(1, 0.01)
    assert not len(waiting)
    for number in range(2):
        threading.Timer(0.01 * number, waiting.put, (Asked("shop", "user"),)).start()
    waiting.wait_for(2, 60.0)
    assert len(waiting) == 2


def test_equals_are_refused_at_a_full_queue() -> None:
    waiting, _ = queue(places=2)
    for user in "ab":
        assert waiting.put(Asked("", user)) is None
    with pytest.raises(FullError):
        waiting.put(Asked("", "c"))
    assert len(waiting) == 2


def test_work_beyond_the_limit_is_refused_though_there_are_places() -> None:
    waiting, _ = queue(places=100, units=10.0)
    assert waiting.put(Asked("", "a", cost=50.0)) is None, "what finds nothing waiting is let in"
    assert waiting.put(Asked("", "b", cost=2.0)) is not None, "the dear one gives way"
    with pytest.raises(FullError):
        waiting.put(Asked("", "c", cost=9.0))


def test_what_was_taken_is_forgotten_with_time_and_ids_are_never_kept() -> None:
    clock = Clock()
    usage = Usage(clock)
    name = usage.name("shop", "ann@example.org")
    usage.add(name, 8.0)
    clock.now = 3 * HALF_LIFE
    assert usage.of(name, clock.now) == pytest.approx(1.0)
    assert b"ann" not in repr(usage).encode()
    assert usage.name("shop", "a") != usage.name("shopa", "")
    for number in range(20_000):
        usage.add(usage.name(str(number)), 0.001)
    assert len(usage._taken) < 11_000


def test_what_nobody_waits_for_leaves_the_queue() -> None:
    waiting, _ = queue()
    jobs = [Asked("", "a"), Asked("", "b")]
    for job in jobs:
        waiting.put(job)
    waiting.discard(jobs[0])
    waiting.discard(jobs[0])
    assert waiting.take() is jobs[1]
    assert waiting.take() is None
    waiting.end()
    assert waiting.get(10.0) is None
