"""The plan of larger models runs from end to end, on tiny random models of the same classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_models import without_head
from test_bench import task as task  # the known world as files

from metarec.bench import cells as engine
from metarec.bench.plan import Plan, read_plan
from metarec.bench.results import read_cells

PLAN = Path(__file__).parents[1] / "benchmarks" / "plans" / "larger-models.yaml"
# What each named model is, in `small_models`.
CLASSES = {"SmolLM2": "llama", "Qwen3": "qwen3", "gemma-3": "gemma3", "mpnet": "mpnet", "": "llama"}
BRIEF: dict[str, Any] = {
    "adapter.layers": 2,
    "train.steps": 2,
    "train.users": 2,
    "train.shots": [5],
    "train.validate_every": 2,
    "train.validation_users": 2,
    "collaborative.kernel.steps": 1,
    "collaborative.gp.sweeps": 1,
    "collaborative.gp.factors": 2,
    "collaborative.stack.folds": 2,
    "collaborative.stack.narrow_sweeps": 1,
    "collaborative.stack.pairs": 4,
    "collaborative.tuning.steps": 2,
    "collaborative.tuning.pairs": 4,
    "collaborative.tuning.validate_every": 2,
    "collaborative.linear.sweeps": 1,
}


def small(part: dict[str, Any], task: str, model_dir: Callable[[str], Path]) -> dict[str, Any]:
    """Returns a part of the plan on the known world, with a tiny model of the class that it names."""
    settings = dict(part["settings"])
    for key, other in (("backbone", "llama"), ("collaborative.encoder", "encoder")):
        name = settings.get(key, "")
        found = model_dir(next(CLASSES[word] for word in CLASSES if word in name) if name else other)
        if "mpnet" in name:  # published without the head that its configuration names
            published = found.with_name("published-mpnet")
            found = published if published.exists() else without_head(found, published)
        settings[key] = str(found)
    return {**part, "tasks": [task], "seeds": 1, "first_seed": 0, "users": 4, "settings": {**settings, **BRIEF}}


@pytest.fixture
def cold(task: str, tmp_path: Path) -> str:
    """The known world where users are asked about items that nobody rated."""
    described = yaml.safe_load(Path(task).read_text())
    described["split"] |= {"by": "item", "unseen": 0.4}
    described |= {"query": {"max": 14, "min": 2}, "shots": [0, 5]}
    path = tmp_path / "cold.yaml"
    path.write_text(yaml.safe_dump(described))
    return str(path)


def test_the_plan_of_larger_models_runs_from_end_to_end(
    cold: str, tmp_path: Path, model_dir: Callable[[str], Path]
) -> None:
    plan = read_plan(PLAN)
    named = {name for part in plan.parts for name in part.settings.values()}
    assert len(named) == 5
    parts = [small(part.model_dump(mode="json"), cold, model_dir) for part in plan.parts]
    asked = Plan.model_validate({"name": "small", "parts": parts})
    engine.run(asked, tmp_path / "out")
    (table,) = read_cells(tmp_path / "out")
    rows = [name for name in table.methods if name.startswith("metarec [")]
    # The three Llamas are one tiny model here.
    assert {name for row in rows for name in ("llama", "qwen3", "gemma3") if f"/{name}," in row} == set(
        list(CLASSES.values())[:3]
    )
    assert len(rows) == 3
    assert any("mpnet" in name for name in table.methods)
