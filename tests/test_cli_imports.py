"""What the command line imports: nothing heavy for an error of a name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
heavy = {"torch", "transformers", "pandas", "scipy", "sklearn", "pyarrow", "fastapi", "uvicorn"}
sys.argv = ["metarec", *sys.argv[1:]]
from metarec.cli import main
try:
    main()
finally:
    print("imported:", *sorted(heavy & set(sys.modules)))
"""


def ran(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--method", "item meen"], "Did you mean 'item mean'?"),
        (["bench", "--task", "movielens/user-clod", "--method", "trivial"], "no task, family or group is called"),
        (["bench", "--method", "metarec", "--backbone", "./nothing"], "the model directory './nothing' does not exist"),
        (["bench", "--method", "GP", "--set", "collaborative.encoder=./nothing"], "'./nothing' does not exist"),
        (["bench", "--method", "GP", "--set", "train.stpes=3"], "Did you mean 'steps'?"),
        (["bench", "--methods"], ""),
        (["train", "--backbone", "./nothing"], "the model directory './nothing' does not exist"),
        (["train", "--set", "collaborative.encoder=./nothing"], "the model directory './nothing' does not exist"),
        (["train", "--preset", "slow"], "'slow'"),
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
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_of_a_name_imports_nothing_heavy(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "recommender.json").write_text("{}")
    found = ran(*(tmp_path if part == "RUN" else part for part in arguments))
    assert found.returncode == (2 if said else 0), found.stderr
    assert said in found.stderr
    assert found.stdout.splitlines()[-1] == "imported:"


def test_a_model_that_no_setting_reads_is_not_looked_for(tmp_path: Path) -> None:
    found = ran("train", "--preset", "fast", "--backbone", "./nothing", "--task", "no-such-task", "--runs", tmp_path)
    assert "no task is called 'no-such-task'" in found.stderr
    assert "./nothing" not in found.stderr
