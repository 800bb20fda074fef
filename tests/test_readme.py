"""The README tells the truth: its Python runs as it stands, its links exist; its table is `test_tables`' matter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Set before the session's own cache takes its place: reading the catalog once is costly, its result is shared.
SHARED_CACHE = os.environ.get("METAREC_CACHE")


@pytest.mark.slow
def test_the_readmes_python_runs_as_it_stands(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    assert len(code.splitlines()) <= 20
    environment = {name: value for name, value in os.environ.items() if name != "METAREC_CACHE"}
    if SHARED_CACHE:
        environment["METAREC_CACHE"] = SHARED_CACHE
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert re.fullmatch(r"\[.*\] adapted in \d+\.\d\d s", lines[5])
    assert re.search(r"AUC over the item mean, 95% interval", lines[6])
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


def test_the_readmes_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
