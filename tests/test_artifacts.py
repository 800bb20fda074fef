"""Files that are kept: readable for whom the process's umask says, and never half written."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from metarec.files import artifacts
from metarec.files.artifacts import load_json, replace_dir, replace_file, sha256_file, write_json
from metarec.system.tensors import write_tensors


@pytest.fixture(params=[0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_files_and_directories_are_readable_for_whom_the_umask_says(umask: int, tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {})
    with replace_dir(tmp_path / "run", "checkpoint") as directory:
        write_json(directory / "config.json", {})
        write_tensors(directory / "meta.safetensors", {"rates": torch.ones(2)})
    assert mode(tmp_path / "run") == 0o777 & ~umask
    for file in (tmp_path / "report.json", *(tmp_path / "run").iterdir()):
        assert mode(file) == 0o666 & ~umask, file


def test_what_is_private_is_the_owners_alone(umask: int, tmp_path: Path) -> None:
    with replace_dir(tmp_path / "user", "adapter", private=True) as directory:
        write_json(directory / "user.json", {})
        write_tensors(directory / "adapter.safetensors", {"a": torch.ones(2)})
    assert mode(tmp_path / "user") == 0o700


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "kept.json", {"version": 1})

    def half(path: Path) -> None:
        path.write_text('{"ver')
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        replace_file(tmp_path / "kept.json", half)
    with pytest.raises(OSError, match="full"), replace_dir(tmp_path / "run", "checkpoint") as directory:
        half(directory / "config.json")
    assert load_json(tmp_path / "kept.json") == {"version": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["kept.json"]


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read for their digest from now on; files of ten bytes are large."""
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(artifacts, "_LARGE_BYTES", 10)
    monkeypatch.setattr(artifacts, "_SETTLED_NS", 0)
    read: list[Path] = []
    whole = artifacts._sha256_of
    monkeypatch.setattr(artifacts, "_sha256_of", lambda path: read.append(path) or whole(path))
    return read


def test_a_large_file_is_hashed_once_and_again_after_any_write(tmp_path: Path, hashed: list[Path]) -> None:
    file, small = tmp_path / "weights", tmp_path / "small"
    file.write_bytes(b"a" * 20)
    small.write_bytes(b"a")
    time.sleep(0.05)
    digests = [sha256_file(file) for _ in range(3)]
    assert digests == [hashlib.sha256(b"a" * 20).hexdigest()] * 3
    assert hashed == [file]
    assert len({sha256_file(small) for _ in range(2)}) == 1
    assert hashed == [file, small, small]
    facts = file.stat()
    file.write_bytes(b"b" * 20)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)
    assert sha256_file(file) == hashlib.sha256(b"b" * 20).hexdigest()


def test_a_digest_is_not_kept_of_a_file_that_was_written_just_now(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "_SETTLED_NS", 10**12)
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 20)
    assert sha256_file(file) == sha256_file(file)
    assert hashed == [file, file]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["", "[]", '{"sha256": "00", "of": "0"}', "{"])
def test_a_damaged_record_of_a_digest_is_not_believed(damage: str, tmp_path: Path, hashed: list[Path]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 20)
    time.sleep(0.05)
    known = sha256_file(file)
    (record,) = (tmp_path / "cache" / "digests").iterdir()
    record.write_text(damage)
    assert sha256_file(file) == known
    assert hashed == [file, file]


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path: Path, hashed: list[Path]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 20)
    (tmp_path / "cache").write_text("no directory")
    time.sleep(0.05)
    assert sha256_file(file) == sha256_file(file)
    assert hashed == [file, file]
