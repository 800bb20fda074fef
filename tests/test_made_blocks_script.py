"""The benchmark of made blocks measures a block and writes what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import made_blocks
import pytest


def test_a_block_that_carries_taste_gains_and_noise_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "found.json"
    blocks = ["--block", "friends", "--block", "moments that are noise"]
    monkeypatch.setattr(sys, "argv", ["made_blocks.py", "--seeds", "1", "--out", str(out), *blocks])
    made_blocks.main()
    found = json.loads(out.read_text())
    friends, noise = found["friends"], found["moments that are noise"]
    assert friends["K = 0"]["low"] > 0
    assert abs(noise["K = 5"]["difference"]) < 0.02
    assert friends["K = 0"]["users"] > 30
    assert "reviews" not in found
