"""Llama's blocks without transformers: the same numbers as with it, and what is not known is left to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from metarec.lm.loading import load_backbone
from metarec.lm.plain_llama import PlainLlama, open_llama


def test_blocks_are_those_of_transformers_to_the_last_bit(model_dir: Callable[[str], Path]) -> None:
    plain, whole = (load_backbone(str(model_dir("llama")), blocks_alone=alone) for alone in (True, False))
    assert isinstance(plain.modules, PlainLlama)
    for fact in ("kind", "fingerprint", "location", "layer_path", "hidden_size", "dtype", "max_tokens", "summary"):
        assert getattr(plain, fact) == getattr(whole, fact), fact
    names = [[name for name, _ in model.modules.named_parameters()] for model in (plain, whole)]
    assert names[0] == names[1], "adapters draw their first numbers in this order"
    assert plain.weights is not None
    assert whole.weights is not None
    tokens, positions = torch.tensor([[1, 5, 9, 2]]), torch.arange(4)[None]
    mask = torch.ones(4, 4, dtype=torch.bool).tril()[None]
    states = []
    for model in (plain.weights, whole.weights):
        hidden = model.embed(tokens, 0)[None]
        for block, places in zip(model.blocks, model.places(positions), strict=True):
            hidden = block(hidden, places, (), mask)
        states.append(model.final(hidden))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    for mine, theirs in zip(plain.answer_direction(3, 4), whole.answer_direction(3, 4), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_what_only_transformers_can_do_is_done_by_it(model_dir: Callable[[str], Path]) -> None:
    plain, whole = (load_backbone(str(model_dir("llama")), blocks_alone=alone) for alone in (True, False))
    assert not {"model", "tokenizer"} & set(vars(plain))
    texts = plain.tokenize(["a good film", "a good old film"])
    assert texts == whole.tokenize(["a good film", "a good old film"])
    torch.testing.assert_close(plain.last_states(texts, 1), whole.last_states(texts, 1), rtol=0, atol=0)
    renamed = replace(plain, name="another")
    assert renamed.model is plain.model, "opened once"
    shared = [parameter.data_ptr() for parameter in plain.modules.parameters()]
    assert [parameter.data_ptr() for parameter in plain.model.parameters()] == shared, "one copy of the weights"


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"hidden_act": "gelu"},
        {"model_type": "mistral"},
        {"quantization_config": {"bits": 4}},
        {"auto_map": {"AutoModel": "code.py"}},
        {"num_hidden_layers": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_llama_that_asks_for_more_is_left_to_transformers(
    change: dict[str, Any], model_dir: Callable[[str], Path]
) -> None:
    settings = json.loads((model_dir("llama") / "config.json").read_text())
    assert open_llama(model_dir("llama"), settings, torch.float32) is not None
    assert open_llama(model_dir("llama"), settings | change, torch.float32) is None


def test_a_llama_with_other_weights_is_left_to_transformers(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(model_dir("llama"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(8)}, file)
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    assert open_llama(tmp_path / "model", settings, torch.float32) is None
    for family in ("llama-bias", "mistral", "bert"):
        assert not isinstance(load_backbone(str(model_dir(family)), blocks_alone=True).modules, PlainLlama)
