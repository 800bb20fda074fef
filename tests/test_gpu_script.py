"""The accelerator's benchmark runs end to end, on the processor and a tiny model, and goes on where it stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu


def test_the_script_measures_everything_then_nothing_twice_and_says_where_numbers_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    call = ["--device", "cpu", "--small", "--out", str(out)]
    assert gpu.main([*call, "--minutes", "0"]) == 1
    assert "time is up; call again to go on" in capsys.readouterr().out
    assert gpu.main(call) == 0
    found = json.loads(out.read_text())["parts"]
    parity = [part for name, part in found.items() if name.startswith("parity")]
    assert len(parity) == 4
    assert all(set(part["differences"]) == {"scores", "gradients", "states"} for part in parity)
    assert found["speed, 8 users"]["meta_step"]["ratio"]["batched"] == 1.0
    assert found["run"]["auc"]
    monkeypatch.setattr(gpu, "parity", lambda *_: {"differences": {}, "within_tolerance": False})
    monkeypatch.setattr(gpu, "speed_of", lambda *_: pytest.fail("measured twice"))
    capsys.readouterr()
    assert gpu.main(call) == 0
    assert capsys.readouterr().out.count("done before") == len(found)
    kept = json.loads(out.read_text())
    del kept["parts"]["parity, plain LoRA, mixed"]
    out.write_text(json.dumps(kept))
    assert gpu.main(call) == 1
    assert "parity, plain LoRA, mixed: numbers differ from the processor's" in capsys.readouterr().err


def test_without_an_accelerator_the_script_says_so_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert capsys.readouterr().err == ("torch finds no accelerator here: use --device cpu --small to try the script\n")
    assert not (tmp_path / "gpu.json").exists()
