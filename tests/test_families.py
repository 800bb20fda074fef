"""Every backbone family gives the scores and gradients of the whole model, and its adapters are PEFT's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Ran
from small_adapters import both, placement_of, random_state, some_items
from small_models import CAUSAL
from torch.nn import functional

from metarec.errors import ConfigError
from metarec.lm.answer_model import open_answer_model
from metarec.lm.backbone import Backbone
from metarec.lm.cached_forward import CachedForward
from metarec.lm.families import FAMILIES
from metarec.lm.layouts import Layout, sliding_window
from metarec.lm.peft_files import save_adapter
from metarec.lm.placement import check_placement, linear_shapes
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.tokenized import CatalogPrompts
from metarec.system.tensors import select_user

Backbones = Callable[..., Backbone]
Prompts = Callable[[str], CatalogPrompts]

# A model of `small_models`, and the family that takes it apart.
MODELS = {
    "llama-scaled-rope": "llama",
    "mistral-window": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3-window": "qwen3",
    "smollm3": "smollm3",
    "smollm3-norope": "smollm3",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "phi3-longrope": "phi3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gpt2-depth": "gpt2",
    "gpt-neox": "gpt-neox",
    "gpt-neox-serial": "gpt-neox",
    "roberta": "roberta",
    "roberta-encoder": "roberta",
    "xlm-roberta": "roberta",
    "distilbert": "distilbert",
    "mpnet": "mpnet",
    "mpnet-encoder": "mpnet",
    "modernbert": "modernbert",
    "modernbert-encoder": "modernbert",
    "bert-classifier": "bert",
    "roberta-classifier": "roberta",
}
CASES = [(model, active) for model in MODELS for active in ([None, 2] if model in CAUSAL else [None])]


def every_linear(model: Backbone) -> tuple[str, ...]:
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in linear_shapes(model, f"{model.layer_path}.2")}))


@pytest.mark.parametrize(("name", "active"), CASES)
def test_a_family_gives_the_scores_and_gradients_of_the_whole_model(
    name: str, active: int | None, backbone: Backbones, prompts: Prompts
) -> None:
    model, texts = backbone(name), prompts(name)
    assert model.taken_apart.family == MODELS[name]
    placed = placement_of(model, texts, active, targets=every_linear(model))
    assert isinstance(open_answer_model(model, texts, placed).forward, CachedForward)
    items, found = some_items(3, 12), []
    for answer_model in both(model, texts, placed):
        state = {key: value.requires_grad_() for key, value in random_state(answer_model.spec, 3).items()}
        frozen = answer_model.log_odds(answer_model.gather(items), None)
        adapted = answer_model.log_odds(answer_model.gather(items), state)
        adapted.square().sum().backward()
        found.append((frozen, adapted.detach(), {key: value.grad for key, value in state.items()}))
    (fast, fast_adapted, fast_gradients), (whole, whole_adapted, gradients) = found
    assert (whole_adapted - whole).abs().max() > 1e-3, "the adapter must matter, or the test says nothing"
    torch.testing.assert_close(fast, whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast_adapted, whole_adapted, atol=2e-5, rtol=1e-4)
    for key, expected in gradients.items():
        assert expected is not None
        scale = float(expected.abs().max())
        assert scale > 0, "every adapter must matter"
        torch.testing.assert_close(fast_gradients[key], expected, atol=1e-4 * max(scale, 1.0), rtol=1e-3)


@pytest.mark.parametrize(("name", "active"), CASES)
def test_peft_gives_a_familys_adapter_the_same_scores(
    name: str, active: int | None, backbone: Backbones, prompts: Prompts, tmp_path: Path
) -> None:
    from peft import PeftModel

    model, texts = backbone(name), prompts(name)
    answer_model = open_answer_model(model, texts, placement_of(model, texts, active))
    state, items = random_state(answer_model.spec, 1), some_items(1, 4)
    ours = answer_model.log_odds(answer_model.gather(items), state)[0]
    assert (ours - answer_model.log_odds(answer_model.gather(items), None)[0]).abs().max() > 1e-3
    save_adapter(
        tmp_path / "adapter",
        select_user(state, 0),
        answer_model.spec,
        base_model=model.location,
        task_type=model.task_type,
        user={},
        invocation_tokens=answer_model.invocation_tokens,
    )
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model.model), tmp_path / "adapter").eval()
    yes, no = texts.answers or (0, 0)
    for item, expected in zip(items[0].tolist(), ours, strict=True):
        tokens = torch.tensor([texts.tokens[item]])
        with torch.no_grad():
            output = wrapped(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        if model.kind == "encoder":
            mean = functional.normalize(output.last_hidden_state[0].mean(0), dim=-1)
            found = answer_model.answer(mean)
        else:
            place = texts.tokens[item].index(texts.mask_token) if model.kind == "masked" else -1
            found = output.logits[0, place, yes] - output.logits[0, place, no]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


PREFIXED = ["qwen3", "smollm3", "olmo2", "phi3", "gemma", "gpt-neox"]


@pytest.mark.parametrize("name", PREFIXED)
def test_peft_gives_a_familys_prefix_the_same_scores(
    name: str, backbone: Backbones, prompts: Prompts, tmp_path: Path
) -> None:
    from peft import PeftModel

    model, texts = backbone(name), prompts(name)
    placed = replace(placement_of(model, texts, None, layers=3), kind="prefix", targets=(), virtual_tokens=2)
    answer_model = open_answer_model(model, texts, placed)
    state, items = random_state(answer_model.spec, 1), some_items(1, 3)
    ours = answer_model.log_odds(answer_model.gather(items), state)[0]
    save_adapter(
        tmp_path / "adapter",
        select_user(state, 0),
        answer_model.spec,
        base_model=model.location,
        task_type=model.task_type,
        user={},
    )
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model.model), tmp_path / "adapter").eval()
    yes, no = texts.answers or (0, 0)
    for item, expected in zip(items[0].tolist(), ours, strict=True):
        tokens = torch.tensor([texts.tokens[item]])
        with torch.no_grad():
            logits = wrapped(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -1]
        torch.testing.assert_close(logits[yes] - logits[no], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if name in CAUSAL])
def test_texts_that_begin_alike_are_read_as_each_alone(name: str, backbone: Backbones, prompts: Prompts) -> None:
    model, texts = backbone(name), prompts(name).tokens[:5]
    with torch.no_grad():
        found = model.last_states(texts, prompts(name).prefix)
        alone = [model.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in texts]
    torch.testing.assert_close(found, torch.stack(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gpt-neox", "mpnet", "modernbert"])
def test_second_derivatives_are_those_of_the_whole_model(name: str, backbone: Backbones, prompts: Prompts) -> None:
    model, texts = backbone(name), prompts(name)
    found = []
    for answer_model in both(model, texts, placement_of(model, texts, None, layers=1)):
        state = {key: value.requires_grad_() for key, value in random_state(answer_model.spec, 1).items()}
        loss = answer_model.log_odds(answer_model.gather(some_items(1, 4)), state).square().sum()
        slopes = torch.autograd.grad(loss, list(state.values()), create_graph=True)
        length = torch.stack([slope.square().sum() for slope in slopes]).sum()
        found.append(torch.cat([part.flatten() for part in torch.autograd.grad(length, list(state.values()))]))
    scale = float(found[1].abs().max())
    torch.testing.assert_close(found[0] / scale, found[1] / scale, atol=1e-4, rtol=1e-3)


def test_positions_that_depend_on_the_texts_beside_are_left_to_the_whole_model(
    backbone: Backbones, prompts: Prompts, caplog: pytest.LogCaptureFixture
) -> None:
    model, texts = backbone("phi3-longrope-15"), prompts("phi3-longrope-15")
    answer_model = open_answer_model(model, texts, placement_of(model, texts, None))
    assert isinstance(answer_model.forward, ReferenceForward)
    assert "beyond 15" in caplog.text


def test_a_decoder_that_classifies_is_an_encoder_and_run_whole(backbone: Backbones, prompts: Prompts) -> None:
    model, texts = backbone("llama-classifier"), prompts("llama-classifier")
    assert model.kind == "encoder"
    assert model.taken_apart.why_not == "it is read as encoder; of its family, only causal models are cached"
    answer_model = open_answer_model(model, texts, placement_of(model, texts, None))
    state = random_state(answer_model.spec, 2)
    frozen, adapted = (answer_model.log_odds(answer_model.gather(some_items(2)), one) for one in (None, state))
    assert (adapted - frozen).abs().max() > 1e-3


def test_a_prefix_is_refused_where_positions_are_in_the_embeddings(backbone: Backbones, prompts: Prompts) -> None:
    model, texts = backbone("gpt2-depth"), prompts("gpt2-depth")
    placed = replace(placement_of(model, texts, 1), kind="prefix", targets=(), virtual_tokens=2)
    with pytest.raises(ConfigError, match="knows positions in attention alone"):
        check_placement(model, texts, placed)


@pytest.mark.parametrize("name", ["mistral-window", "qwen3-window"])
def test_a_prefix_is_refused_where_attention_would_not_see_it(name: str, backbone: Backbones, prompts: Prompts) -> None:
    model, texts = backbone(name), prompts(name)
    placed = replace(placement_of(model, texts, 1), kind="prefix", targets=(), virtual_tokens=2)
    with pytest.raises(ConfigError, match=r"looks back over [56].*Choose lora"):
        check_placement(model, texts, placed)


STARCODER2 = Layout(
    model_types=("starcoder2",),
    kinds=("causal",),
    attention="self_attn",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    mlp=("mlp.c_fc", "mlp.c_proj"),
    activation="mlp.act",
    attention_norms=("input_layernorm", None, None),
    mlp_norms=("post_attention_layernorm", None, None),
    window=sliding_window,
)


@pytest.mark.parametrize("active", [None, 2])
@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_family_from_outside_is_cached_and_matches_the_whole_model(
    active: int | None, kind: str, backbone: Backbones, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FAMILIES, "_registered", {})
    FAMILIES.register("starcoder2", STARCODER2)
    model, texts = replace(backbone("starcoder2")), prompts("starcoder2")
    placed = placement_of(model, texts, active)
    if kind == "prefix":
        placed = replace(placed, kind="prefix", targets=(), virtual_tokens=2)
    fast, plain = both(model, texts, placed)
    assert isinstance(open_answer_model(model, texts, placed).forward, CachedForward)
    items, state = some_items(), random_state(fast.spec, 3)
    frozen = plain.log_odds(plain.gather(items), None)
    torch.testing.assert_close(fast.log_odds(fast.gather(items), None), frozen, atol=1e-5, rtol=1e-4)
    adapted = fast.log_odds(fast.gather(items), state)
    assert (adapted - frozen).abs().max() > 1e-3
    if kind == "lora":
        expected = plain.log_odds(plain.gather(items), state)
        torch.testing.assert_close(adapted, expected, atol=1e-5, rtol=1e-4)


def test_a_model_that_no_family_recognises_is_run_whole(backbone: Backbones, prompts: Prompts) -> None:
    model, texts = backbone("starcoder2"), prompts("starcoder2")
    assert model.weights is None
    assert model.taken_apart.why_not == "no backbone family recognises its structure (starcoder2)"
    assert isinstance(open_answer_model(model, texts, placement_of(model, texts, 1)).forward, ReferenceForward)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"qk_norms": None}, r"parts that the family does not know \(self_attn.k_norm, self_attn.q_norm\)"),
        ({"mlp": ("mlp.gate", "mlp.up", "mlp.down")}, "have no 'mlp.gate'"),
        ({"kinds": ("masked",)}, "read as causal"),
        ({"model_types": ("other",)}, "no backbone family recognises"),
    ],
)
def test_a_model_that_its_family_does_not_describe_is_run_whole(
    change: dict[str, object], why: str, backbone: Backbones, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = replace(FAMILIES.get("qwen3"), **change)  # type: ignore[type-var]
    monkeypatch.setattr(FAMILIES, "_builtin", {"changed": layout})
    model = replace(backbone("qwen3"))
    assert model.weights is None
    assert model.taken_apart.why_not is not None
    import re

    assert re.search(why, model.taken_apart.why_not)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gemma2", "causal, 3 layers, 8192 positions; fast path by family gemma2"),
        ("roberta", "masked, 3 layers, 62 positions; fast path by family roberta"),
        ("granite", "through transformers itself, which is slower: no backbone family recognises its structure"),
        ("llama-classifier", "through transformers itself, which is slower: it is read as encoder"),
    ],
)
def test_doctor_says_how_a_backbone_runs(
    name: str, said: str, model_dir: Callable[[str], Path], metarec: Callable[..., Ran]
) -> None:
    assert said in metarec("doctor", "--backbone", model_dir(name)).out


def test_metarecs_families_are_asked_in_order() -> None:
    assert FAMILIES.names()[:2] == ["llama", "mistral"]
