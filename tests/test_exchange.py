"""Replacing a directory: a process killed at any moment leaves the old or the new one whole, and no strays for long."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metarec.errors import ArtifactError
from metarec.files import artifacts, exchange
from metarec.files.artifacts import is_whole, load_json, recover_dir, replace_dir, replace_file, verify_dir, write_json

# Replaces a directory again and again in child processes; the n-th dies before its n-th change of the file system, of
# which Python's audit hooks tell. Prints what each left behind.
KILLED = """
import json, os, sys
from pathlib import Path
from metarec.files import exchange
from metarec.files import artifacts

root, stepwise = Path(sys.argv[1]), sys.argv[2] == "stepwise"
if stepwise:
    exchange._renameat2 = None

def put(path, value):
    with artifacts.replace_dir(path, "checkpoint") as directory:
        for name in ("a.json", "b.json"):
            artifacts.write_json(directory / name, value)

changes = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"}
left = None

def count(event, arguments):
    global left
    if left is not None and (event in changes or (event == "open" and arguments[2] & (os.O_CREAT | os.O_WRONLY))):
        if left == 0:
            os._exit(9)
        left -= 1

sys.addaudithook(count)
found, moment, died = [], 0, True
while died:
    path = root / str(moment) / "run"
    put(path, "old")
    child = os.fork()
    if child == 0:
        left = moment
        put(path, "new")
        left = None
        os._exit(0)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    found.append([died, path.exists(), len(list(path.parent.iterdir()))])
    moment += 1
print(json.dumps(found))
"""


@pytest.mark.parametrize("way", ["at once", "stepwise"])
def test_a_process_killed_at_any_moment_leaves_the_old_or_the_new(way: str, tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), way], capture_output=True, text=True, check=True)
    moments = json.loads(ran.stdout)
    assert len(moments) > 20
    values, missing = set(), 0
    for moment, (died, there, _) in enumerate(moments):
        path = tmp_path / str(moment) / "run"
        missing += not there
        assert recover_dir(path)
        verify_dir(path, "checkpoint")
        held = [load_json(path / name) for name in ("a.json", "b.json")]
        assert held[0] == held[1]
        values.add((died, held[0]))
        put(path, "newer")
        assert [entry.name for entry in path.parent.iterdir()] == ["run"], f"strays of moment {moment}"
        assert load_json(path / "a.json") == "newer"
    assert values == {(True, "old"), (True, "new"), (False, "new")}
    if way == "stepwise":
        assert missing, "the directory was nowhere between the two renames"
    elif exchange._renameat2 is not None and exchanges(tmp_path):
        assert not missing


def put(path: Path, value: object) -> None:
    with replace_dir(path, "checkpoint") as directory:
        for name in ("a.json", "b.json"):
            write_json(directory / name, value)


def exchanges(folder: Path) -> bool:
    """Says whether this file system exchanges two directories in one step."""
    for name in ("one", "two"):
        (folder / name).mkdir()
    return exchange._swap(folder / "one", folder / "two")


def test_what_is_put_back_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "run", "old")
    (tmp_path / "run").rename(tmp_path / ".run.0123456789abcdef.old")
    verify_dir(tmp_path / "run", "checkpoint")
    verify_dir(tmp_path / "run", "checkpoint")
    assert len(caplog.messages) == 1
    assert "a process was killed while it replaced it" in caplog.text


def test_half_a_directory_is_not_put_back(tmp_path: Path) -> None:
    put(tmp_path / ".run.0123456789abcdef", "half")
    (tmp_path / ".run.0123456789abcdef" / "a.json").write_text("{")
    assert not recover_dir(tmp_path / "run")
    with pytest.raises(ArtifactError, match="holds no metarec checkpoint"):
        verify_dir(tmp_path / "run", "checkpoint")


def test_what_another_process_is_writing_is_no_stray(tmp_path: Path) -> None:
    with replace_dir(tmp_path / "run", "checkpoint") as first:
        write_json(first / "a.json", 1)
        put(tmp_path / "run", 2)
        assert load_json(first / "a.json") == 1
    assert load_json(tmp_path / "run" / "a.json") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("at_once", [True, False])
def test_names_that_only_look_alike_stay(at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:
        monkeypatch.setattr(exchange, "_renameat2", None)
    kept = {".run.backup", ".runs.0123456789abcdef", "run.0123456789abcdef", ".run.0123456789abcdef.txt"}
    for name in kept:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".run.0123456789abcdef").write_text("a killed process's")
    put(tmp_path / "run", 1)
    assert {entry.name for entry in tmp_path.iterdir()} == kept | {"run"}


def test_a_full_disk_is_said_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "run", "old")
    replace_file(tmp_path / "file", lambda target: target.write_text("old"))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("metarec.files.artifacts.os.fsync", full)
    with pytest.raises(ArtifactError, match=r"no room for .*run.*No space left.*Free space"):
        put(tmp_path / "run", "new")
    with pytest.raises(ArtifactError, match=r"no room for .*file"):
        replace_file(tmp_path / "file", lambda target: target.write_text("new"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "run"]
    assert (load_json(tmp_path / "run" / "a.json"), (tmp_path / "file").read_text()) == ("old", "old")


def test_a_damaged_directory_is_noted_and_a_missing_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not is_whole(tmp_path / "run", "checkpoint")
    assert not caplog.messages
    put(tmp_path / "run", 1)
    assert is_whole(tmp_path / "run", "checkpoint")
    (tmp_path / "run" / "b.json").write_text("2")
    assert not is_whole(tmp_path / "run", "checkpoint")
    assert caplog.messages == [f"'{tmp_path / 'run' / 'b.json'}' is missing, truncated or altered; it is made again"]
    assert artifacts.MANIFEST in os.listdir(tmp_path / "run")
