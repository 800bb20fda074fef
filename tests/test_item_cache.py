"""The cache that is filled item by item: crashes, damage, several writers."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from metarec.errors import ArtifactError
from metarec.lm.item_cache import ItemCache, Rows, read_missing

COUNTS = np.array([2, 0, 3, 1, 2, 4])
ARRAYS = {
    "tokens": Rows(COUNTS, (3,), "float32"),
    "states": Rows(np.ones(6, np.int64), (2, 2), "int8"),
}


def rows_of(items: list[int], counts: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.concatenate([np.full((counts[item], *shape), item + 1, dtype) for item in items])


def add(cache: ItemCache, items: list[int]) -> None:
    cache.add(items, {name: rows_of(items, rows.counts, rows.shape, rows.dtype) for name, rows in ARRAYS.items()})


def assert_holds(cache: ItemCache, items: list[int]) -> None:
    assert len(cache.missing(np.array(items))) == 0
    for name, kind in ARRAYS.items():
        flat, starts = cache.rows(name)
        for item in items:
            own = flat[starts[item] : starts[item] + kind.counts[item]]
            np.testing.assert_array_equal(own, rows_of([item], kind.counts, kind.shape, kind.dtype))


def test_items_come_back_in_any_order_and_in_another_process(tmp_path: Path) -> None:
    cache = ItemCache(tmp_path / "c", ARRAYS)
    assert cache.missing(np.array([4, 0, 4])).tolist() == [0, 4]
    add(cache, [4, 0])
    add(cache, [1, 5])
    assert_holds(cache, [5, 4, 1, 0])
    assert_holds(ItemCache(tmp_path / "c", ARRAYS), [0, 1, 4, 5])
    assert cache.missing(np.arange(6)).tolist() == [2, 3]


def test_a_second_writer_is_seen_by_the_first(tmp_path: Path) -> None:
    first, second = ItemCache(tmp_path / "c", ARRAYS), ItemCache(tmp_path / "c", ARRAYS)
    add(first, [0, 2])
    add(second, [2, 3])
    assert_holds(first, [0, 2, 3])
    add(first, [4])
    assert_holds(second, [0, 2, 3, 4])


def test_what_a_killed_process_wrote_in_part_counts_as_missing(tmp_path: Path) -> None:
    """Cut at every byte: whole items stay, and the next writer goes on."""
    add(ItemCache(tmp_path / "c", ARRAYS), [0, 2])
    before = {file.name: file.read_bytes() for file in (tmp_path / "c").glob("*.*")}
    add(ItemCache(tmp_path / "c", ARRAYS), [3, 4])
    after = {file.name: file.read_bytes() for file in (tmp_path / "c").glob("*.*")}
    for name, content in after.items():
        for cut in range(len(before[name]), len(content)):
            folder = tmp_path / f"{name}-{cut}"
            folder.mkdir()
            for other, whole in after.items():
                # Rows are written before the index: what follows the cut file was not written yet.
                written = name if other == name else other
                order = ["tokens.rows", "states.rows", "index.bin"]
                late = order.index(written) > order.index(name)
                (folder / other).write_bytes(content[:cut] if other == name else before[other] if late else whole)
            cache = ItemCache(folder, ARRAYS)
            assert_holds(cache, [0, 2])
            missing = cache.missing(np.arange(6)).tolist()
            add(cache, missing)
            assert_holds(ItemCache(folder, ARRAYS), list(range(6)))


def test_no_flipped_byte_is_read_as_content(tmp_path: Path) -> None:
    add(ItemCache(tmp_path / "c", ARRAYS), [0, 2, 3, 4, 5])
    for file in sorted((tmp_path / "c").glob("*.*")):
        content = file.read_bytes()
        for place in range(len(content)):
            file.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
            cache = ItemCache(tmp_path / "c", ARRAYS)
            missing = set(cache.missing(np.arange(6)).tolist())
            assert_holds(cache, sorted(set(range(6)) - missing))
            assert len(missing) <= 2
        file.write_bytes(content)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ItemCache(tmp_path / "c", ARRAYS)
    add(cache, [0])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("metarec.lm.item_cache._append", full)
        with pytest.raises(ArtifactError, match="no room"):
            add(cache, [2])
    assert_holds(cache, [0])
    add(cache, [2])
    assert_holds(ItemCache(tmp_path / "c", ARRAYS), [0, 2])


class Reading:
    """Reads items into a cache, slowly or until it is stopped, and keeps a record."""

    def __init__(self, path: Path, seconds: float = 0.0, stop_after: int = 1000, workers: int = 1) -> None:
        self.cache = ItemCache(path, {"states": Rows(np.ones(40, np.int64), (3,), "float32")})
        self.seconds, self.stop_after, self.workers, self.items = seconds, stop_after, workers, []

    def __call__(self, items: np.ndarray) -> dict[str, np.ndarray]:
        if len(self.items) >= self.stop_after:
            raise KeyboardInterrupt
        time.sleep(self.seconds)
        self.items.extend(items.tolist())
        return {"states": np.repeat(items[:, None], 3, 1).astype(np.float32)}

    def all(self) -> np.ndarray:
        read_missing(self.cache, np.arange(40), np.arange(40) % 7 + 1, self, self.workers)
        flat, starts = self.cache.rows("states")
        return flat[starts]


def test_everything_is_read_once_and_what_one_left_another_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metarec.lm.item_cache.BLOCK_ITEMS", 4)
    stopped, other, third = (Reading(tmp_path / "a", stop_after=stop) for stop in (12, 1000, 1000))
    with pytest.raises(KeyboardInterrupt):
        stopped.all()
    np.testing.assert_array_equal(other.all(), np.repeat(np.arange(40)[:, None], 3, 1))
    assert sorted(stopped.items + other.items) == list(range(40))
    third.all()
    assert third.items == []


def test_threads_of_a_process_read_every_item_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metarec.lm.item_cache.BLOCK_ITEMS", 3)
    reading = Reading(tmp_path / "a", seconds=0.001, workers=3)
    np.testing.assert_array_equal(reading.all()[:, 0], np.arange(40))
    assert sorted(reading.items) == list(range(40))


def test_few_items_are_divided_among_the_threads(tmp_path: Path) -> None:
    reading, blocks = Reading(tmp_path / "a", workers=2), []

    def read(items: np.ndarray) -> dict[str, np.ndarray]:
        blocks.append(len(items))
        return reading(items)

    read_missing(reading.cache, np.arange(40), np.arange(40) % 7 + 1, read, workers=2)
    assert blocks == [20, 20]


def test_readers_side_by_side_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metarec.lm.item_cache.BLOCK_ITEMS", 2)
    readings = [Reading(tmp_path / "a", seconds=0.1) for _ in range(3)]  # long beside a switch of threads
    threads = [threading.Thread(target=reading.all) for reading in readings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {item for reading in readings for item in reading.items} == set(range(40))
    assert sum(len(reading.items) for reading in readings) < 80, "most are read by one alone"
    np.testing.assert_array_equal(readings[0].all()[:, 0], np.arange(40))


def test_what_is_added_again_leaves_the_rows_that_a_thread_holds_where_they_were(tmp_path: Path) -> None:
    first, second = ItemCache(tmp_path / "c", ARRAYS), ItemCache(tmp_path / "c", ARRAYS)
    add(first, [2])
    flat, starts = first.rows("states")
    add(second, [4, 2])
    assert_holds(first, [2, 4])
    np.testing.assert_array_equal(flat[starts[2]], np.full((2, 2), 3))


def test_a_limit_on_files_kills_no_process(tmp_path: Path) -> None:
    script = f"""
import resource
import numpy as np
from pathlib import Path
from metarec.errors import ArtifactError
from metarec.lm.item_cache import ItemCache, Rows
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
cache = ItemCache(Path({str(tmp_path / "a")!r}), {{"states": Rows(np.ones(40, int), (1000,), "float32")}})
try:
    cache.add(np.arange(40), {{"states": np.ones((40, 1000), np.float32)}})
except ArtifactError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "there is no room" in ran.stdout
