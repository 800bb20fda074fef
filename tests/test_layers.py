"""The architecture, held by reading the source: imports point down, pickle appears nowhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "metarec"

# The picture in docs/architecture.md, from the bottom up.
LAYERS = [
    ["errors"],
    ["artifacts", "interactions", "packing", "progress"],
    ["metrics", "lora", "config", "store", "cache"],
    ["heads", "meta", "transformer", "sources", "labels"],
    ["episodes", "backbone", "learn2learn", "quality"],
    ["prompts", "scorer", "priors", "views", "recall"],
    ["trunk", "evaluate"],
    ["reader", "pooled", "task"],
    ["objective", "train", "report", "webpage"],
    ["scorers"],
    ["recommender", "doctor"],
    ["methods"],
    ["bench", "serve"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def level_of(path: Path) -> int:
    return LEVEL[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"metarec.{alias.name}" for alias in node.names} if node.module == "metarec" else {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    for name in imports(path):
        if name.startswith("metarec."):
            target = name.split(".")[1]
            if target == path.relative_to(PACKAGE).parts[0]:
                continue  # modules of one package are of one layer and may know each other
            assert LEVEL[target] < level_of(path), f"{path.name} imports {name}"
        assert not name.startswith(("benchmarks", "tests")), f"{path.name} imports {name}"


def test_every_module_has_a_layer() -> None:
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()} == set(LEVEL)


def test_the_architecture_document_shows_these_layers() -> None:
    document = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = [sorted(line.split()[1:]) for line in re.findall(r"^ +\d+ +.*$", document, re.M)]
    assert drawn == [sorted(names) for names in reversed(LAYERS)]


def test_only_the_backbone_imports_transformers_and_nothing_imports_pickle() -> None:
    for path in modules():
        heads = {name.split(".")[0] for name in imports(path)}
        assert "transformers" not in heads or path.name == "backbone.py"
        assert not heads & {"pickle", "joblib", "dill", "shelve", "marshal"}
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"torch\.load\(|allow_pickle=True|trust_remote_code=True|read_pickle", text), path


def test_every_module_says_what_it_does() -> None:
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize("code", ["import metarec", "from metarec.cli import app"])
def test_importing_loads_nothing_heavy(code: str) -> None:
    heavy = {"torch", "transformers", "pandas", "sklearn", "peft"}
    check = f"import sys; {code}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
