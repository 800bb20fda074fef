"""CONTRIBUTING.md can be followed to the letter: its files are written, its commands run."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metarec import registries
from metarec.registry import _ALLOWED

GUIDE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
REGISTRIES = [value for value in vars(registries).values() if isinstance(value, registries.Registry)]
SECTIONS = dict(re.findall(r"^### (?:A|An) ([^\n]+)\n(.*?)(?=^### |^## |\Z)", GUIDE, re.S | re.M))
FILE = re.compile(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", re.S)
SCRIPT = re.compile(r"```python\n(?!# )(.*?)```", re.S)
COMMANDS = re.compile(r"```bash\n(.*?)```", re.S)


@pytest.fixture
def workplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Callable[[str], Path]
) -> Callable[[str], list[str]]:
    """Returns what writes a section's files, and the dataset's, and gives the section's commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "my_parts"]:
        monkeypatch.delitem(sys.modules, name)
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr("metarec.registry._ALLOWED", set())

    def write(section: str) -> list[str]:
        for name, text in FILE.findall(SECTIONS["dataset"] + SECTIONS[section]):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
        text = "\n".join(COMMANDS.findall(SECTIONS[section]))
        return [line.replace("path/to/model", str(model_dir("llama"))) for line in text.splitlines() if line]

    return write


@pytest.mark.parametrize("section", SECTIONS)
def test_the_guide_can_be_followed_to_the_letter(
    section: str, workplace: Callable[[str], list[str]], metarec: Callable[..., Any]
) -> None:
    commands = workplace(section)
    scripts = SCRIPT.findall(SECTIONS[section])
    assert commands or scripts
    for script in scripts:
        exec(script, {})
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "metarec"
        ran = metarec(*arguments)
        assert ran.status == 0, f"{command}\n{ran.err}"


def test_the_guide_covers_everything_that_is_looked_up_by_name() -> None:
    groups = set(re.findall(r"[Ee]ntry points(?: of|:)\s+`(metarec\.[\w_]+)`", GUIDE))
    known = {registry.group for registry in REGISTRIES}
    assert known | {"metarec.sources", "metarec.methods"} <= groups


def test_plugins_are_allowed_for_one_process_alone() -> None:
    assert not {name for name in _ALLOWED if name.startswith("my_parts")}
