"""A user's head as a rank-1 update of the output layer: what PEFT answers over the plain model, and what it cannot."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEMPLATES
from small_recommenders import SETTINGS, TASK, known_task
from torch import Tensor

from metarec.adapted_user import AdaptedUser
from metarec.config import RunConfig, validated
from metarec.data.task import Task
from metarec.errors import ArtifactError
from metarec.lm.output_layer import output_layer
from metarec.recommender import MetaRecommender
from metarec.scorers.language.score import HEAD, adapter_tensors
from metarec.serve.engine import Engine
from metarec.serve.records import Feedback
from metarec.serve.store import AdapterStore
from metarec.serve.vllm import export_adapters

ModelDir = Callable[[str], Path]
LOVED = [("m1", 5.0), ("m2", 1.0), ("m5", 4.5), ("m6", 2.0)]
# Untied, tied, with scaled logits, masked with a bias in the layer, with transposed weights in the blocks.
HELD = ["llama", "gemma", "granite", "bert", "gpt2"]


def recommender(path: Path, kind: str = "causal", **changed: Any) -> MetaRecommender:
    settings = {
        **SETTINGS,
        "score": ["kernel mean", "adapter"],
        "collaborative": {"features": ["fields"], "members": "none"},
        "meta": {"algorithm": "dkt"},
        **changed,
    }
    template = TEMPLATES[kind]
    prompt = {"text": template.text, "positive": template.positive, "negative": template.negative}
    data = known_task()
    task = validated(Task, TASK | {"prompt": prompt}, "test")
    config = validated(RunConfig, settings, "test")
    return MetaRecommender.from_pretrained(path, config).prepare(replace(data, task=task))


def by_peft(user: AdaptedUser, path: Path, items: list[int]) -> Tensor:
    """Returns the log-odds that PEFT gives the items over the plain model, each prompt alone."""
    from peft import PeftModel

    model = user.fitted.answer_model
    assert model is not None
    assert model.prompts.answers is not None
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model.backbone.model), path).eval()
    yes, no = model.prompts.answers
    found = []
    for item in items:
        ids = model.prompts.tokens[item]
        place = ids.index(model.prompts.mask_token) if model.backbone.kind == "masked" else -1
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = wrapped(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, place]
        found.append(logits[yes] - logits[no])
    return torch.stack(found)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("active", ["auto", None])
@pytest.mark.parametrize("name", HELD)
def test_peft_moves_the_log_odds_by_what_the_head_adds_to_the_score(
    name: str, active: str | None, model_dir: ModelDir, tmp_path: Path
) -> None:
    """But for a constant of the user; the adapter in the blocks is not a fresh one, and of another scale."""
    kind = "masked" if name == "bert" else "causal"
    if kind == "masked" and active == "auto":
        pytest.skip("activated adapters are causal models'")
    adapter = {"layers": 2, "rank": 2, "alpha": 6.0, "storage": "float32", "active_tokens": active}
    one = recommender(model_dir(name), kind, adapter=adapter)
    generator = torch.Generator().manual_seed(0)
    for key, value in adapter_tensors(one.fitted.meta.init).items():
        one.fitted.meta.init[key] = value + 0.3 * torch.randn(value.shape, generator=generator)
    user = one.adapt(LOVED)
    user.save(tmp_path / "user")
    again = one.load_user(tmp_path / "user")
    model = one.fitted.answer_model
    assert model is not None
    items = list(range(8))
    states = model.last_states(
        model.gather(torch.tensor([items])), {key: value[None] for key, value in adapter_tensors(user.state).items()}
    )
    head = (model.features(states)[0] @ user.state[HEAD]).detach()
    moved = by_peft(user, tmp_path / "user", items) - model.answer(states)[0]
    torch.testing.assert_close(moved - moved.mean(), head - head.mean(), atol=1e-5, rtol=1e-5)
    assert (head - head.mean()).abs().max() > 0.01
    assert again.state.keys() == user.state.keys()
    assert all(torch.equal(again.state[key], value) for key, value in user.state.items())


@pytest.mark.parametrize(("name", "kind"), [("gemma2", "causal"), ("encoder", "encoder")])
def test_a_head_that_peft_cannot_hold_is_kept_beside_and_a_warning_says_so(
    name: str, kind: str, model_dir: ModelDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = recommender(model_dir(name), kind, adapter={"layers": 2, "rank": 2})
    assert output_layer(one.fitted.answer_model) is None  # type: ignore[arg-type]
    user = one.adapt(LOVED)
    with caplog.at_level(logging.WARNING):
        user.save(tmp_path / "user")
    assert "PEFT has no place for the user's head" in caplog.text
    assert one.load_user(tmp_path / "user").score(["m7", "m8"]) == user.score(["m7", "m8"])


def test_the_store_keeps_a_short_adapter_that_vllm_gets_whole(model_dir: ModelDir, tmp_path: Path) -> None:
    adapter = {"layers": 2, "rank": 2, "storage": "float32", "active_tokens": None}
    one = recommender(model_dir("llama"), adapter=adapter)
    store = AdapterStore(tmp_path / "store")
    engine = Engine(one, store)
    store.append([Feedback("ann", tuple(LOVED))])
    engine.people(["ann"])
    name = export_adapters(store, tmp_path / "out")["ann"]
    kept = next(path for path in (tmp_path / "store").rglob("adapter_config.json"))
    assert "lm_head" not in json.loads(kept.read_text())["target_modules"]
    user = one.adapt(LOVED)
    user.save(tmp_path / "user")
    items = list(range(5))
    torch.testing.assert_close(by_peft(user, tmp_path / "out" / name, items), by_peft(user, tmp_path / "user", items))


def test_an_adapter_whose_head_peft_cannot_hold_is_not_exported_without_it(model_dir: ModelDir, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    engine = Engine(recommender(model_dir("encoder"), "encoder", adapter={"layers": 2, "rank": 2}), store)
    store.append([Feedback("ann", tuple(LOVED))])
    engine.people(["ann"])
    with pytest.raises(ArtifactError, match="no place for the user's head"):
        export_adapters(store, tmp_path / "out")
