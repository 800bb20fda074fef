"""The wheel carries what it needs and works outside the clone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("metarec-*.whl"))


def test_the_wheel_holds_the_package_its_tasks_and_its_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"metarec/py.typed", "metarec/tasks/movielens/user-cold.yaml", "metarec/cli/runs.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_runs_outside_the_clone(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    # By PYTHONPATH the installed copy comes before the clone that the environment knows.
    environment = os.environ | {"PYTHONPATH": str(target)}
    code = (
        "import metarec, metarec.data.task_files as task; print(metarec.__file__); print(task.tasks_dir());"
        "print(task.load_task('movielens/user-cold').version)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    where, tasks, version = done.stdout.splitlines()
    assert where.startswith(str(target))
    assert tasks == str(target / "metarec" / "tasks")
    assert int(version) >= 1
    shown = subprocess.run(
        [sys.executable, "-m", "metarec.cli", "--version"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith("0.")
