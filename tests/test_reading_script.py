"""The benchmark of reading items runs on a tiny model, counts what is multiplied, and keeps other measurements."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from metarec.system.threads import use_threads

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import reading


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    use_threads(before)


def test_it_says_how_fast_items_are_read_and_what_bfloat16_costs(
    tmp_path: Path, model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WIDTH", 64)
    out = tmp_path / "reading.json"
    out.write_text('{"other": {}}')
    call = ["--items", "30", "--backbone", str(model_dir("llama")), "--out", str(out)]
    reading.main(call)
    found = json.loads(out.read_text())
    assert found["other"] == {}
    one = found["this processor"]
    for row in one["rows"].values():
        assert row["items_per_cpu_second"] > 0
        assert row["gflop_per_item"] > 0
        assert row["share_of_gemm"] == pytest.approx(row["gflop_per_second"] / row["gemm_gflop_per_second"])
    assert one["rows"]["float32"]["gflop_per_item"] == one["rows"]["bfloat16"]["gflop_per_item"]
    error = one["bfloat16_against_float32"]
    assert 0 < error["log_odds_mean_error"] <= error["log_odds_largest_error"]
    assert error["users"] > 10
    assert 0 <= error["auc"]["float32"] <= 1
