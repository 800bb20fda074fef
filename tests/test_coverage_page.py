"""docs/coverage.md names tests and results that exist; its commands: see `test_documented_commands`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| capability")
]
# What the page refers to before it is measured; empty when all is.
BEING_MEASURED: set[str] = set()


def test_every_row_names_a_command_a_test_and_a_figure_or_why_there_is_none() -> None:
    assert len(ROWS) >= 14
    for capability, command, known, figure in ROWS:
        assert "`" in command, capability
        files = re.findall(r"`(tests/[\w/]+\.py)`", known)
        assert files, capability
        assert all((ROOT / file).exists() for file in files), capability
        assert figure.startswith(("none: ", "none yet", "the same")) or "](" in figure, capability
        for name in re.findall(r"`([\w-]+\.json)`", figure):
            assert (ROOT / "benchmarks" / "results" / name).exists() or name in BEING_MEASURED, name
        for file, anchor in re.findall(r"\]\((\w+\.md)#([\w-]+)\)", figure):
            heads = re.findall(r"^#+ (.+)$", (ROOT / "docs" / file).read_text(encoding="utf-8"), re.M)
            assert (
                anchor in [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
                or anchor in BEING_MEASURED
            ), anchor


def test_every_script_and_plan_exists() -> None:
    for path in re.findall(r"benchmarks/[\w/-]+\.(?:py|yaml)", PAGE):
        assert (ROOT / path).exists(), path
