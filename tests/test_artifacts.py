"""Files that are kept: readable for whom the process's umask says, and never half written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from metarec.artifacts import load_json, replace_dir, replace_file, write_json
from metarec.tensors import write_tensors


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
