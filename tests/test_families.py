"""A backbone family from outside the package is cached like metarec's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEMPLATES
from small_adapters import both, placement_of, random_state, some_items

from metarec.data.interactions import Catalog
from metarec.lm.answer_model import open_answer_model
from metarec.lm.backbone import load_backbone
from metarec.lm.cached_forward import CachedForward
from metarec.lm.families import FAMILIES
from metarec.lm.families.llama import LlamaWeights, llama_weights
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.tokenized import tokenize_catalog


class Gemma:
    """Llama's blocks with norms that multiply by 1 + weight, and scaled embeddings."""

    def take_apart(self, model: Any, kind: str) -> LlamaWeights | None:
        if model.config.model_type != "gemma" or kind != "causal":
            return None
        plain = llama_weights(model)
        assert plain is not None
        return replace(
            plain,
            embeddings=plain.embeddings * model.config.hidden_size**0.5,
            final_norm=1 + plain.final_norm,
            blocks=tuple(
                replace(block, input_norm=1 + block.input_norm, post_norm=1 + block.post_norm) for block in plain.blocks
            ),
        )


GEMMA = Gemma()


@pytest.fixture(scope="module")
def gemma_dir(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir("llama"))
    torch.manual_seed(7)
    config = transformers.GemmaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        initializer_range=0.4,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    path = tmp_path_factory.mktemp("gemma")
    transformers.GemmaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("active", [None, 2])
@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_family_from_outside_is_cached_and_matches_the_whole_model(
    active: int | None, kind: str, gemma_dir: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FAMILIES, "_registered", {})
    FAMILIES.register("gemma", GEMMA)
    model = load_backbone(str(gemma_dir))
    prompts = tokenize_catalog(model, TEMPLATES["causal"], catalog)
    placed = placement_of(model, prompts, active)
    if kind == "prefix":
        placed = replace(placed, kind="prefix", targets=(), virtual_tokens=2)
    fast, plain = both(model, prompts, placed)
    assert isinstance(open_answer_model(model, prompts, placed).forward, CachedForward)
    items, state = some_items(), random_state(fast.spec, 3)
    frozen = plain.log_odds(plain.gather(items), None)
    torch.testing.assert_close(fast.log_odds(fast.gather(items), None), frozen, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast.frozen_log_odds[items], frozen, atol=1e-5, rtol=1e-4)
    adapted = fast.log_odds(fast.gather(items), state)
    assert (adapted - frozen).abs().max() > 1e-3
    if kind == "lora":
        expected = plain.log_odds(plain.gather(items), state)
        torch.testing.assert_close(adapted, expected, atol=1e-5, rtol=1e-4)


def test_a_model_that_no_family_recognises_is_run_whole(gemma_dir: Path, catalog: Catalog) -> None:
    model = load_backbone(str(gemma_dir))
    prompts = tokenize_catalog(model, TEMPLATES["causal"], catalog)
    assert model.weights is None
    assert isinstance(open_answer_model(model, prompts, placement_of(model, prompts, 1)).forward, ReferenceForward)


def test_metarecs_families_are_asked_in_order() -> None:
    assert FAMILIES.names()[:2] == ["llama", "bert"]
