"""The notebooks of examples/ run from the first cell to the last, and are kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


def code_of(name: str) -> list[dict[str, Any]]:
    book = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_to_its_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "benchmark.ipynb":
        pytest.importorskip("statsmodels", reason="the extra 'bench' is not installed")
    if name == "adapt-and-serve.ipynb":
        pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for number, cell in enumerate(code_of(name)):
            exec(compile("".join(cell["source"]), f"{name}, code {number}", "exec"), names)
    finally:
        if "server" in names:
            names["server"].kill()
            names["server"].wait(20)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs(name: str) -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_of(name))


def test_there_are_notebooks_and_the_documentation_lists_them() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) >= 3
    assert [name for name in NOTEBOOKS if f"]({name})" not in listed] == []
