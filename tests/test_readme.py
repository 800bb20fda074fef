"""The README tells the truth: its Python runs as it stands, its figures are in a committed result, its links exist."""

from __future__ import annotations

import json
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


def test_the_readmes_figures_are_measured() -> None:
    """Every row of the table is a row of the committed result, figure by figure; no row is left out."""
    results = json.loads((ROOT / "benchmarks" / "results" / "headline.json").read_text(encoding="utf-8"))
    rows = {(row["method"], row["shots"]): row for row in results["tables"][0]["rows"]}
    table = re.search(r"\| AUC \(difference.*?\n\n", README, re.S)
    assert table is not None
    lines = table.group().strip().splitlines()[2:]
    shown = []
    for line in lines:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        shown.append(name.strip("* "))
        for shots, cell in zip((0, 5, 10, 20), cells, strict=False):
            row = rows[shown[-1], shots]
            figures = re.findall(r"[+-]?\.\d{4}", cell)
            expected = [f"{row['auc']:.4f}".removeprefix("0")]
            if "versus item mean" in row:
                gain = [row["versus item mean"][key] for key in ("difference", "low", "high")]
                expected += [re.sub("0(?=[.])", "", f"{value:+.4f}") for value in gain]
            assert figures == expected, (shown[-1], shots)
    assert sorted(shown) == sorted({method for method, _ in rows})
