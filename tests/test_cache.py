"""Caches of readings: what several processes want at once is read once between them, and a crash costs one share."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from metarec.errors import ArtifactError
from metarec.lm.cache import Arrays, fill_cache

LENGTHS = np.random.default_rng(0).integers(1, 9, 40)


@pytest.fixture(autouse=True)
def _small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metarec.lm.cache.BLOCK_ITEMS", 2)
    monkeypatch.setattr("metarec.lm.cache._SHARE_BLOCKS", 2)


class Reading:
    """Writes an item's length where the item is, and counts."""

    def __init__(self, path: Path, seconds: float = 0.0, stop_after: int = 1000) -> None:
        self.path, self.seconds, self.stop_after = path, seconds, stop_after
        self.items: list[int] = []
        self.finished = 0

    def __call__(self, items: np.ndarray, into: Arrays) -> None:
        if len(self.items) >= self.stop_after:
            raise KeyboardInterrupt
        time.sleep(self.seconds)
        self.items += items.tolist()
        into["states"][items] = LENGTHS[items][:, None]

    def finish(self, arrays: Arrays) -> None:
        self.finished += 1
        np.testing.assert_array_equal(arrays["states"][:, 0], LENGTHS)

    def fill(self) -> np.ndarray:
        arrays = {"states": (np.ones_like(LENGTHS), (3,)), "nothing": (np.zeros_like(LENGTHS), (2,))}
        fill_cache(self.path, "hidden-states", LENGTHS, arrays, torch.float32, self, self.finish)
        states: np.ndarray = np.load(self.path / "states.npy")
        return states


def test_everything_is_read_once_and_then_never_again(tmp_path: Path) -> None:
    first, second = Reading(tmp_path / "a"), Reading(tmp_path / "a")
    np.testing.assert_array_equal(first.fill(), np.repeat(LENGTHS[:, None], 3, 1))
    second.fill()
    assert sorted(first.items) == list(range(40))
    assert (first.finished, second.items, second.finished) == (1, [], 0)


def test_readers_side_by_side_share_the_work(tmp_path: Path) -> None:
    readings = [Reading(tmp_path / "a", seconds=0.01) for _ in range(3)]
    threads = [threading.Thread(target=reading.fill) for reading in readings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(item for reading in readings for item in reading.items) == list(range(40))
    assert sum(bool(reading.items) for reading in readings) > 1
    assert sum(reading.finished for reading in readings) == 1


def test_what_one_left_unfinished_another_reads(tmp_path: Path) -> None:
    stopped, other = Reading(tmp_path / "a", stop_after=10), Reading(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        stopped.fill()
    np.testing.assert_array_equal(other.fill()[:, 0], LENGTHS)
    assert set(other.items) == set(range(40)) - set(stopped.items[:8]), "two shares of four items were done"


def test_a_killed_process_keeps_no_share(tmp_path: Path) -> None:
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import metarec.lm.cache, test_cache
metarec.lm.cache.BLOCK_ITEMS = metarec.lm.cache._SHARE_BLOCKS = 2
class Stuck(test_cache.Reading):
    def __call__(self, items, into):
        print("reading", flush=True)
        time.sleep(600)
Stuck(Path({str(tmp_path / "a")!r})).fill()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "reading\n"
        killed.kill()
    reading = Reading(tmp_path / "a")
    reading.fill()
    assert sorted(reading.items) == list(range(40))


def flipped(file: Path, place: int) -> bytes:
    """Flips one bit of a file, and returns what it held before."""
    before = file.read_bytes()
    place %= len(before) * 8
    after = bytearray(before)
    after[place // 8] ^= 1 << place % 8
    file.write_bytes(after)
    return before


@pytest.mark.parametrize("finished", [True, False])
def test_a_flipped_bit_anywhere_is_noticed_or_means_nothing(
    finished: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A finished cache is checked against its manifest, an unfinished one against the digests of its shares."""
    places = np.random.default_rng(3).integers(0, 1 << 40, 40).tolist()
    original = tmp_path / "original"
    with suppress(KeyboardInterrupt):
        Reading(original, stop_after=1000 if finished else 26).fill()
    shutil.rmtree(original / "locks")
    files = sorted(file.name for file in original.iterdir())
    assert ("manifest.json" in files) == finished
    noted = 0
    for number, place in enumerate(places):
        path = tmp_path / str(number)
        shutil.copytree(original, path)
        flipped(path / files[number % len(files)], place)
        caplog.clear()
        reading = Reading(path)
        np.testing.assert_array_equal(reading.fill(), np.repeat(LENGTHS[:, None], 3, 1), err_msg=str((number, place)))
        assert len(caplog.messages) <= 1
        noted += len(caplog.messages)
        again = Reading(path)
        again.fill()
        assert again.items == []
    assert noted > 10


@pytest.mark.parametrize("way", ["allocated", "written"])
def test_a_full_disk_is_said_before_anything_is_mapped(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 1

    def full(*_: object) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if way == "allocated":
        monkeypatch.setattr("metarec.lm.cache.os.posix_fallocate", full, raising=False)
    else:
        monkeypatch.setattr("metarec.lm.cache._allocate", full)
    with pytest.raises(ArtifactError, match=r"no room for '.*/a', which needs 480 bytes: No space left"):
        Reading(tmp_path / "a").fill()
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["locks"]
    monkeypatch.undo()
    Reading(tmp_path / "a").fill()


def test_a_file_system_without_allocation_is_written_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("metarec.lm.cache.os.posix_fallocate", unknown, raising=False)
    monkeypatch.setattr("metarec.lm.cache._ZEROS", bytes(100))
    np.testing.assert_array_equal(Reading(tmp_path / "a").fill()[:, 0], LENGTHS)


def test_a_limit_on_files_kills_no_process(tmp_path: Path) -> None:
    script = f"""
import resource
import numpy as np, torch
from pathlib import Path
from metarec.errors import ArtifactError
from metarec.lm.cache import fill_cache
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
ones = np.ones(40, int)
def read(items, into):
    into["states"][items] = 1
try:
    fill_cache(Path({str(tmp_path / "a")!r}), "hidden-states", ones, {{"states": (ones, (1000,))}}, torch.float32, read)
except ArtifactError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "which needs 160,000 bytes" in ran.stdout


def test_what_is_damaged_is_read_again(tmp_path: Path) -> None:
    Reading(tmp_path / "a").fill()
    with (tmp_path / "a" / "states.npy").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x01\x02\x03")
    reading = Reading(tmp_path / "a")
    np.testing.assert_array_equal(reading.fill()[:, 0], LENGTHS)
    assert len(reading.items) == 40
