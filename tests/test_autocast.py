"""Under `torch.autocast`, products are of low precision, and everything that is learned stays float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_recommenders import SETTINGS, known_task

from metarec.config import RunConfig, validated
from metarec.recommender import MetaRecommender

BRIEF = {**SETTINGS["train"], "steps": 2, "validate_every": 2, "users": 4}


@pytest.mark.parametrize("algorithm", ["fomaml", "ridge"])
def test_what_is_learned_stays_float32_under_autocast(
    algorithm: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = {
        **SETTINGS,
        "train": BRIEF,
        "meta": {**SETTINGS["meta"], "algorithm": algorithm},
        "collaborative": {"features": ["fields"]},
    }
    recommender = MetaRecommender.from_pretrained(model_dir("llama"), validated(RunConfig, settings, "test"))
    exact = recommender.prepare(known_task()).fitted.meta.tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recommender.fit(known_task(), checkpoint=tmp_path / "checkpoint")
        person = recommender.adapt([("m0", 5.0), ("m1", 1.0), ("m2", 4.0)])
        scores = person.scores(torch.arange(5).numpy())
    learned = recommender.fitted.meta.tensors()
    assert {name: value.dtype for name, value in learned.items()} == dict.fromkeys(exact, torch.float32)
    moved = any(not torch.equal(value, exact[name]) for name, value in learned.items())
    assert moved or algorithm == "ridge", "something was learned, where validation did not prefer the start"
    assert {value.dtype for value in person.state.values()} == {torch.float32}
    kept = [load_file(file) for file in (tmp_path / "checkpoint").rglob("*.safetensors")]
    floats = [value.dtype for part in kept for value in part.values() if value.is_floating_point()]
    assert floats
    assert set(floats) <= {torch.float32, torch.float64}, "the optimizer's state, too"
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
