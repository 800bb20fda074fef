"""What the command line imports: nothing heavy for an error of a name."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Runs one command after another, and says of each how it ended, what it said, and what it imported first.
CODE = """
import contextlib, io, json, sys, traceback
heavy = {"torch", "transformers", "pandas", "scipy", "sklearn", "pyarrow", "fastapi", "uvicorn"}
from metarec.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["metarec", *arguments]
    before, status, said = heavy & set(sys.modules), 0, io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        except Exception:
            status = traceback.format_exc()
    found.append([status, said.getvalue(), sorted(heavy & set(sys.modules) - before)])
print(json.dumps([sorted(heavy & set(sys.modules)), found]))
"""
Ran = tuple[list[str], list[tuple[int, str, list[str]]]]
COMMANDS = [
    (["bench", "--method", "item meen"], "Did you mean 'item mean'?"),
    (["bench", "--task", "movielens/user-clod", "--method", "trivial"], "no task, family or group is called"),
    (["bench", "--method", "metarec", "--backbone", "./nothing"], "the model directory './nothing' does not exist"),
    (["bench", "--method", "GP", "--set", "collaborative.encoder=./nothing"], "'./nothing' does not exist"),
    (["bench", "--method", "GP", "--set", "train.stpes=3"], "Did you mean 'steps'?"),
    (["bench", "--methods"], ""),
    (["train", "--backbone", "./nothing"], "the model directory './nothing' does not exist"),
    (["train", "--set", "collaborative.encoder=./nothing"], "the model directory './nothing' does not exist"),
    (["train", "--preset", "slow"], "'slow'"),
    (["tune", "movielens/user-cold", "--preset", "fast"], "nothing is searched over"),
    (["tune", "movielens/user-cold", "--task", "news/user-cold", "--param", "train.lr=1..2"], "are two tasks"),
    (["finetune", "--set", "trainble=all"], "Did you mean 'trainable'?"),
    (["quickstart", "--backbone", "./nothing"], "the model directory './nothing' does not exist"),
    (["doctor", "--backbone", "./nothing"], "the model directory './nothing' does not exist"),
    (["model", "prepare", "./nothing"], "the model directory './nothing' does not exist"),
    (["tasks", "validate", "--backbone", "./nothing"], "the model directory './nothing' does not exist"),
    (["data", "check", "movielens", "--backbone", "./nothing"], "'./nothing' does not exist"),
    (["train", "--device", "gpu"], "there is no device 'gpu'"),
    (["quickstart", "--device", "gpu"], "there is no device 'gpu'"),
    (["bench", "--method", "metarec", "--device", "gpu"], "there is no device 'gpu'"),
    (["recommend", "RUN", "--device", "gpu"], "there is no device 'gpu'"),
    (["serve", "--checkpoint", "RUN", "--device", "gpu"], "there is no device 'gpu'"),
    (["serve", "--checkpoint", "nowhere"], "'nowhere' holds no trained recommender"),
    (["recommend", "nowhere"], "'nowhere' holds no trained recommender"),
    (
        ["train", "--preset", "fast", "--backbone", "./nothing", "--task", "no-such-task"],
        "no task is called 'no-such-task'",  # no setting reads the model
    ),
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """What all commands imported in one process, and how each of them ended."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recommender.json").write_text("{}")
    commands = [[str(folder) if part == "RUN" else part for part in arguments] for arguments, _ in COMMANDS]
    command = [sys.executable, "-c", CODE, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    imported, found = json.loads(done.stdout)
    return imported, found


@pytest.mark.parametrize("place", range(len(COMMANDS)), ids=lambda place: " ".join(COMMANDS[place][0]))
def test_an_error_of_a_name_imports_nothing_heavy(place: int, ran: Ran) -> None:
    _, expected = COMMANDS[place]
    status, said, imported = ran[1][place]
    assert status == (2 if expected else 0), said
    assert expected in said
    assert said.count("\n") <= 1
    assert imported == []


def test_all_of_them_together_import_nothing_heavy(ran: Ran) -> None:
    assert ran[0] == []


def test_a_model_that_no_setting_reads_is_not_looked_for(
    ran: Ran,
) -> None:
    assert COMMANDS[-1][0][3:5] == ["--backbone", "./nothing"]
    assert "./nothing" not in ran[1][-1][1]
