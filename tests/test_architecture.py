"""The architecture, held by reading the source: folders are layers, imports point down, pickle appears nowhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "metarec"
DOCUMENT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Returns the modules that a file imports anywhere in it, function bodies included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


IMPORTS = {name: imports(path) & set(MODULES) - {name} for name, path in MODULES.items()}


def inside(folder: str) -> list[str]:
    prefix = "metarec." + folder.replace("/", ".").strip(".")
    return [name for name in MODULES if name == prefix or name.startswith(prefix + ".")]


def rules() -> list[tuple[str, str]]:
    """Reads the rules in docs/architecture.md: what a folder never imports, directly or through others."""
    found = re.findall(r"^- `([\w/]+)` never reaches ((?:`[\w/]+`(?:, )?)+)$", DOCUMENT, re.M)
    return [(folder, other) for folder, others in found for other in re.findall(r"`([\w/]+)`", others)]


def reached(module: str) -> dict[str, str]:
    """Returns everything that a module imports through any number of others, with who imports it."""
    parents: dict[str, str] = {}
    todo = [module]
    while todo:
        at = todo.pop()
        for target in IMPORTS[at] - set(parents) - {module}:
            parents[target] = at
            todo.append(target)
    return parents


def test_the_architecture_document_states_the_rules() -> None:
    assert len(rules()) >= 10
    assert all(inside(name) for rule in rules() for name in rule)


@pytest.mark.parametrize(("folder", "other"), rules(), ids=lambda name: name)
def test_a_folder_never_reaches_what_the_document_forbids(folder: str, other: str) -> None:
    forbidden = set(inside(other))
    for module in inside(folder):
        for target, parent in reached(module).items():
            assert target not in forbidden, f"{module} reaches {target} through {parent}"


def test_imports_have_no_circle() -> None:
    for module in MODULES:
        assert module not in {target for name in reached(module) for target in IMPORTS[name]}, module


def test_the_package_imports_neither_benchmarks_nor_tests() -> None:
    for path in MODULES.values():
        assert not [name for name in imports(path) if name.split(".")[0] in ("benchmarks", "tests")], path


def test_few_modules_import_transformers_and_nothing_imports_pickle() -> None:
    for path in MODULES.values():
        heads = {name.split(".")[0] for name in imports(path)}
        assert "transformers" not in heads or path.name in (
            "backbone.py",
            "loading.py",
            "whole_model.py",
            "image_encoder.py",
        )
        assert not heads & {"pickle", "joblib", "dill", "shelve", "marshal"}
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"torch\.load\(|allow_pickle=True|trust_remote_code=True|read_pickle", text), path


def test_every_module_says_what_it_does() -> None:
    for path in MODULES.values():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize("code", ["import metarec", "from metarec.cli import app"])
def test_importing_loads_nothing_heavy(code: str) -> None:
    heavy = {"torch", "transformers", "pandas", "sklearn", "peft"}
    check = f"import sys; {code}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    "arguments",
    [
        "tasks list",
        "tasks show movielens/user-cold",
        "tasks show movielens/user-cod",
        "train --task movielens/user-cod",
        "train --set meta.algorithm=fomam",
        "recommend no-such-run",
    ],
)
def test_a_verb_that_needs_no_model_loads_nothing_heavy(arguments: str, tmp_path: Path) -> None:
    assert loaded("from metarec.cli import main; main()", arguments.split(), tmp_path) == set()


def test_checking_a_table_loads_pandas_alone(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("user,item,rating\n" + "".join(f"u{i},i{i % 3},{i % 5}\n" for i in range(9)))
    assert loaded("from metarec.cli import main; main()", ["data", "check", "ratings.csv"], tmp_path) == {"pandas"}


def test_a_recommender_is_imported_without_what_only_fitting_needs(tmp_path: Path) -> None:
    assert not loaded("import metarec.recommender", [], tmp_path) & {"sklearn", "scipy.stats", "transformers", "peft"}


def loaded(code: str, arguments: list[str], folder: Path) -> set[str]:
    """Returns which heavy modules a process has loaded in the end."""
    heavy = ["torch", "transformers", "pandas", "sklearn", "scipy", "scipy.stats", "peft"]
    check = (
        f"import atexit, sys; atexit.register(lambda: print('loaded', *({set(heavy)!r} & set(sys.modules)))); {code}"
    )
    done = subprocess.run([sys.executable, "-c", check, *arguments], cwd=folder, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split()[1:])
