"""Every Python at hand that metarec supports can read the source, and has what it imports of the standard library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUPPORTED = ("3.10", "3.11", "3.12", "3.13")
# Run by each interpreter, which has none of the packages that metarec needs.
CHECK = """
import ast, importlib, pathlib, sys, warnings
warnings.simplefilter("error")
wrong, names = [], 0
for file in sorted(pathlib.Path("metarec").rglob("*.py")):
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    compile(tree, str(file), "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            wanted = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in wanted:
            if module.partition(".")[0] in sys.stdlib_module_names and module != "__future__":
                names += 1
                try:
                    if name is not None and not hasattr(importlib.import_module(module), name):
                        importlib.import_module(f"{module}.{name}")
                except ImportError as error:
                    wrong.append(f"{file}:{node.lineno}: {error}")
sys.path.insert(0, ".")
from metarec.client import Client
assert Client("http://127.0.0.1:9").address
assert names > 500
print("\\n".join(wrong))
"""


def interpreter(version: str) -> str | None:
    """Returns a Python of a version, on the path or among pyenv's."""
    installed = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = [shutil.which(f"python{version}"), *map(str, sorted(installed.glob(f"{version}.*/bin/python")))]
    running = [path for path in found if path and _runs(path, version)]
    return running[0] if running else None


def _runs(path: str, version: str) -> bool:
    said = subprocess.run(
        [path, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], capture_output=True, text=True
    )
    return said.stdout.strip() == version


@pytest.mark.parametrize("version", SUPPORTED)
def test_the_source_is_read_and_the_client_runs(version: str) -> None:
    python = sys.executable if sys.version_info[:2] == tuple(map(int, version.split("."))) else interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} is installed")
    ran = subprocess.run([python, "-I", "-c", CHECK], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == ""


def test_what_is_supported_is_what_the_package_says() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert tuple(named) == SUPPORTED
    assert f'requires-python = ">={SUPPORTED[0]}"' in text
    assert f'target-version = "py{SUPPORTED[0].replace(".", "")}"' in text
