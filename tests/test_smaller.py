"""Smaller models: what is rounded is near, what is left out is gone, and the table says what it cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import smaller
import torch
from conftest import Ran
from small_recommenders import SETTINGS, known_task

from metarec.config import RunConfig, validated
from metarec.errors import ConfigError
from metarec.lm.answer_model import AnswerModel, open_answer_model
from metarec.lm.backbone import Backbone
from metarec.lm.loading import load_backbone
from metarec.lm.placement import default_placement
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.rounded import Bits, RoundedLinear, RoundedWeight
from metarec.lm.smaller import influence, rounded, weight_bytes, with_blocks
from metarec.lm.tokenized import CatalogPrompts
from metarec.recommender import MetaRecommender
from metarec.training.fitting import open_backbone

Backbones = Callable[..., Backbone]
TEXTS = ["is this a good movie ? alien , drama answer :", "is this a good movie ? heat , war answer :"]


def logits(model: Backbone) -> torch.Tensor:
    tokens = torch.tensor(model.tokenize(TEXTS[:1]))
    with torch.no_grad():
        return model.model(input_ids=tokens).logits if model.kind == "causal" else model.model(tokens)[0]


@pytest.mark.parametrize(("bits", "width"), [(8, 40), (4, 40), (4, 64)])
def test_a_rounded_weight_is_half_a_step_away_at_most(bits: int, width: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(width, 12)
    found = RoundedLinear(layer, bits)  # type: ignore[arg-type]
    step = found.scales.float().amax(-1).amax(-1)[:, None]
    away = (found.weight - layer.weight.detach()).abs()
    assert (away <= 0.51 * step).all()
    assert away.max() > 0
    inputs = torch.randn(3, width)
    torch.testing.assert_close(found(inputs), torch.nn.functional.linear(inputs, found.weight, layer.bias))
    assert found.codes.dtype == torch.int8
    assert found.codes.numel() <= (12 * width if bits == 8 else 12 * 64 // 2)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_fewer_bits_take_fewer_bytes_and_answer_less_alike(family: str, backbone: Backbones) -> None:
    whole = backbone(family)
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    exact = logits(whole)
    away = {bits: float((logits(rounded(whole, bits)) - exact).abs().mean()) for bits in (8, 4)}
    assert 0 < away[8] < away[4]
    assert away[8] < 0.1 * float(exact.std())
    sizes = [weight_bytes(model) for model in (rounded(whole, 4), rounded(whole, 8), whole)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] < sizes[2]
    after = whole.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len({whole.fingerprint, rounded(whole, 8).fingerprint, rounded(whole, 4).fingerprint}) == 3


def test_a_model_without_its_top_blocks_is_its_lower_blocks(backbone: Backbones) -> None:
    whole = backbone("llama")
    tokens = torch.tensor(whole.tokenize(TEXTS[:1]))
    with torch.no_grad():
        states = whole.model.base_model(input_ids=tokens, output_hidden_states=True).hidden_states
        low = with_blocks(whole, [0, 1]).model.base_model(input_ids=tokens).last_hidden_state
        expected = whole.model.base_model.norm(states[2])
    torch.testing.assert_close(low, expected)
    assert int(whole.modules.config.num_hidden_layers) == 3, "the whole model stays whole"
    assert weight_bytes(with_blocks(whole, [0])) < weight_bytes(whole)
    for wrong in ([], [3], [-1]):
        with pytest.raises(ConfigError, match="Keep some of 0 to 2"):
            with_blocks(whole, wrong)


def test_a_shrunk_model_is_a_backbone_like_any_other(
    backbone: Backbones, model_dir: Callable[[str], Path], metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    out = tmp_path / "small"
    ran = metarec("shrink", model_dir("llama"), "--blocks", 2, "--out", out, "--json")
    assert ran.status == 0, ran.err
    facts = json.loads(ran.out)
    assert (facts["blocks"], facts["of"]) == ([0, 1], 3)
    assert facts["bytes"] < facts["bytes_before"]
    small = load_backbone(str(out))
    assert small.weights is not None, "the fast path reads it"
    torch.testing.assert_close(logits(small), logits(with_blocks(backbone("llama"), [0, 1])), atol=1e-6, rtol=1e-5)
    for more, said in ((["--blocks", 3], "has 3. Keep 1 to 2"), (["--blocks", 1, "--out", out], "is the model that")):
        lost = metarec("shrink", out if "--out" in more else model_dir("llama"), "--out", tmp_path / "other", *more)
        assert (lost.status, said in lost.err) == (2, True), lost.err
    task = metarec("shrink", model_dir("llama"), "--blocks", 2, "--out", out, "--keep", "influential", "--json")
    assert task.status == 0, task.err
    assert len(json.loads(task.out)["blocks"]) == 2


def test_a_block_that_does_nothing_has_no_influence(backbone: Backbones) -> None:
    idle = with_blocks(backbone("llama"), [0, 1, 2])
    block = idle.model.base_model.layers[1]
    for layer in (block.self_attn.o_proj, block.mlp.down_proj):
        layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    found = influence(idle, TEXTS)
    assert found.argmin() == 1
    assert float(found[1]) == pytest.approx(0, abs=1e-5)
    assert (found[[0, 2]] > 0.01).all()
    torch.testing.assert_close(logits(with_blocks(idle, [0, 2])), logits(idle), atol=1e-5, rtol=1e-5)


def test_a_distilled_score_follows_its_teacher_on_items_it_was_not_fitted_on() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(200, 4))
    teacher = vectors @ np.array([1.0, -2.0, 0.5, 0.0]) + 3
    assert np.corrcoef(smaller.distilled(vectors, teacher), teacher)[0, 1] > 0.99
    noise = generator.normal(size=200)
    assert abs(np.corrcoef(smaller.distilled(vectors, noise), noise)[0, 1]) < 0.3


def test_the_script_writes_a_row_of_every_model(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found.json"
    arguments = ["--backbone", str(model_dir("llama")), "--encoder", str(model_dir("encoder")), "--users", "6"]
    monkeypatch.setattr(sys, "argv", ["smaller.py", *arguments, "--items", "30", "--fewer", "0.6", "--out", str(out)])
    smaller.main()
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 6
    name = str(model_dir("llama"))
    whole, eight, four = (rows[one] for one in (name, f"{name}, int8", f"{name}, int4"))
    assert (whole["difference"], whole["correlation"]) == (0.0, pytest.approx(1.0))
    assert four["bytes"] < eight["bytes"] < whole["bytes"]
    assert all(row["users"] > 0 and 0 <= row["auc"] <= 1 for row in rows.values())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt-neox", "bert"])
def test_the_fast_path_reads_rounded_blocks_as_the_whole_model_does(
    family: str, bits: Bits, backbone: Backbones, prompts: Callable[[str], CatalogPrompts]
) -> None:
    """Layers of their own, fused ones that are cut by rows, and those whose heads lie between each other."""
    small, texts = rounded(backbone(family), bits), prompts(family)
    assert small.weights is not None
    placed = default_placement(
        small, texts, layers=2, targets=None, rank=2, alpha=4.0, active_tokens="auto", kind="lora"
    )
    items = np.arange(12)
    fast = open_answer_model(small, texts, placed).frozen_log_odds(items)
    whole = AnswerModel(small, texts, placed, ReferenceForward(small, texts, placed)).frozen_log_odds(items)
    torch.testing.assert_close(fast, whole, atol=1e-4, rtol=1e-4)
    held = [linear.weight for block in small.weights.blocks for linear in (block.attention.q, block.mlp.down)]
    assert all(isinstance(weight, RoundedWeight) for weight in held), "no long copy is kept"


def test_a_run_trains_saves_and_loads_with_rounded_weights(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    brief = {
        **SETTINGS,
        "backbone": str(model_dir("llama")),
        "collaborative": {"features": ["fields"]},
        "train": {**SETTINGS["train"], "steps": 2, "validate_every": 2},
    }
    config = validated(RunConfig, {**brief, "backbone_precision": "int8"}, "test")
    small = MetaRecommender.from_pretrained(config.backbone, config).fit(known_task())
    full = open_backbone(validated(RunConfig, brief, "test"))
    assert small.backbone.name.endswith("int8")
    assert weight_bytes(small.backbone) < weight_bytes(full)
    assert small.backbone.fingerprint != full.fingerprint, "no cache or checkpoint of the other is read"
    small.save_pretrained(tmp_path / "small")
    loaded = MetaRecommender.from_pretrained(tmp_path / "small")
    told = [(small.fitted.catalog.ids[code], value) for code, value in enumerate((5.0, 1.0, 2.0))]
    assert loaded.adapt(told).recommend(5) == small.adapt(told).recommend(5)
    assert "backbone_precision" not in full_dump(brief), "identities are those of before there was a choice"


def full_dump(settings: dict[str, object]) -> dict[str, object]:
    return validated(RunConfig, settings, "test").model_dump(mode="json")


def test_where_weights_cannot_be_rounded_it_says_what_to_do(model_dir: Callable[[str], Path]) -> None:
    config = RunConfig(backbone=str(model_dir("gpt2")), backbone_precision="int4")
    with pytest.raises(ConfigError, match="Set backbone_precision=full"):
        open_backbone(config)
    with pytest.raises(ConfigError, match="dtype mixed"):
        validated(RunConfig, {"backbone_precision": "int8", "dtype": "mixed"}, "test")
