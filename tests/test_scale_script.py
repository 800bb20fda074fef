"""The benchmark of large catalogs runs end to end on tiny ones, and goes on where it stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import scale

TINY = scale.Sizes(
    catalogs=(),
    read=(2000,),
    users=60,
    growing_users=(60, 90),
    growing_items=(150, 300),
    supports=(2, 4),
    repeats=1,
)
CELL = {"cpu_seconds": 1.0, "wall_seconds": 1.0, "peak_mib": 1}


def made(fit: float) -> dict[str, Any]:
    return {
        "fit": fit,
        "adapt": {"2": 1.0, "4": 2.0},
        "adapt users": {"1": 1.0, "4": 2.0},
        "rank": {"2": fit, "4": 1.0},
    }


def test_a_language_model_reads_what_it_is_asked_for_and_a_second_call_measures_nothing(
    tmp_path: Path,
    model_dir: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(scale, "grown", lambda *_: made(1.0))
    monkeypatch.setattr(scale, "QUICK", TINY)
    # Words that the tiny model knows.
    monkeypatch.setattr(scale, "WORDS", (WORDS[3:13], WORDS[13:23]))
    scale.make(2000, 60, tmp_path / "data" / "2000-60")
    call = ["--quick", "--folder", str(tmp_path), "--backbone", str(model_dir("llama"))]
    call += ["--set", "adapter.layers=1", "--set", "collaborative.kernel.steps=2"]
    scale.main([*call, "--only", "train"])
    assert not json.loads((tmp_path / "quick.json").read_text())["growth"]
    scale.main(call)
    cells = json.loads((tmp_path / "quick.json").read_text())["cells"]
    one, service = (cells[f"{verb} 2000 items with a language model"] for verb in ("recommend", "serve"))
    assert 0 < one["read_mib"] < 1
    assert 0 < service["ready_seconds"] <= service["wall_seconds"]
    assert min(cell["cpu_seconds"] for cell in (one, service)) > 0.1
    assert min(cell["peak_mib"] for cell in (one, service)) > 50
    monkeypatch.setattr(scale, "ran", lambda *_: pytest.fail("measured twice"))
    monkeypatch.setattr(scale, "serve", lambda *_: pytest.fail("measured twice"))
    capsys.readouterr()
    scale.main(call)
    assert "fit over users: slope 0.0" in capsys.readouterr().out


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def failing(bench: scale.Bench, sizes: scale.Sizes, items: int, users: int) -> dict[str, Any]:
        if len(measured) == 2:
            raise RuntimeError("stopped")
        measured.append(items)
        return made(float(items * users))

    sizes = scale.Sizes((), (), 60, (60, 90), (150, 300), (2, 4), 1)
    bench, out = scale.opened(tmp_path), tmp_path / "scale.json"
    monkeypatch.setattr(scale, "grown", failing)
    with pytest.raises(RuntimeError, match="stopped"):
        scale.measure(bench, sizes, out, "command")
    assert len(json.loads(out.read_text())["cells"]) == 2
    measured.clear()
    found = scale.measure(bench, sizes, out, "command")
    assert len(measured) == 1
    assert found["growth"]["fit over users"]["slope"] == pytest.approx(1.0)
    assert found["growth"]["adapt over K"]["slope"] == pytest.approx(1.0)
    assert found["growth"]["adapt over users"]["slope"] == pytest.approx(0.5)


def test_a_slope_is_over_ascending_sizes_however_the_file_orders_them() -> None:
    found = scale.slope({"16": 4.0, "32": 8.0, "4": 1.0, "8": 2.0})
    assert found["sizes"] == [4, 8, 16, 32]
    assert (found["slope"], found["slope_of_the_last_two"]) == (1.0, 1.0)


def test_growth_is_measured_by_fitting_adapting_and_ranking(tmp_path: Path) -> None:
    scale.make(150, 60, tmp_path)
    found = json.loads(json.dumps(scale.grow(tmp_path, TINY)))
    assert found["fit"] > 0
    assert set(found["adapt"]) == set(found["rank"]) == {"2", "4"}
    assert min(*found["adapt users"].values(), *found["rank"].values()) > 0
