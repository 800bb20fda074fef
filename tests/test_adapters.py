"""One user's slice is a standard PEFT adapter: same scores in PEFT, same bits when read back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_adapters import placement_of, random_state, some_items

from metarec.errors import ArtifactError
from metarec.lm.adapter_kinds import Adapters, AdapterSpec
from metarec.lm.adapter_kinds.lora import LORA, LORA_B
from metarec.lm.adapters import adapted_linear, init_adapter, round_adapter
from metarec.lm.answer_model import AnswerModel
from metarec.lm.backbone import Backbone
from metarec.lm.cached_forward import CachedForward
from metarec.lm.loading import load_backbone
from metarec.lm.peft_files import load_adapter, save_adapter
from metarec.lm.placement import check_placement
from metarec.lm.tokenized import CatalogPrompts
from metarec.system.tensors import select_user, write_tensors

Backbones = Callable[..., Backbone]
Prompts = Callable[[str], CatalogPrompts]
SPEC = AdapterSpec({"block.q": (6, 5), "block.v": (3, 5)}, rank=2, alpha=4.0)


def test_a_fresh_adapter_changes_nothing() -> None:
    state = init_adapter(SPEC, torch.Generator().manual_seed(0))
    users = {name: tensor.expand(2, *tensor.shape) for name, tensor in state.items()}
    inputs, weight = torch.randn(2, 3, 4, 5), torch.randn(6, 5)
    assert torch.equal(
        adapted_linear(inputs, weight, None, Adapters(users, SPEC), "block.q"),
        adapted_linear(inputs, weight, None, None, "block.q"),
    )


def test_every_user_gets_their_own_update() -> None:
    state = random_state(SPEC, 3)
    inputs, weight, bias = torch.randn(3, 2, 4, 5), torch.randn(6, 5), torch.randn(6)
    together = adapted_linear(inputs, weight, bias, Adapters(state, SPEC), "block.q")
    for user in range(3):
        a, b = state["block.q.lora_A"][user], state["block.q.lora_B"][user]
        merged = weight + LORA.scaling(SPEC) * b @ a
        torch.testing.assert_close(together[user], inputs[user] @ merged.T + bias)


PEFT_CASES = {
    "plain LoRA": ("llama", {}),
    "activated LoRA": ("llama", {"active_tokens": 2}),
    "activated LoRA, another family": ("mistral", {"active_tokens": 1}),
    "rsLoRA": ("llama", {"rslora": True}),
    "biases": ("llama", {"kind": "bias"}),
    "activated biases": ("llama-bias", {"kind": "bias", "active_tokens": 2}),
    "a soft prompt": ("llama", {"kind": "soft-prompt", "targets": (), "virtual_tokens": 3, "layers": 3}),
    "a soft prompt, another family": (
        "gpt-neox",
        {"kind": "soft-prompt", "targets": (), "virtual_tokens": 2, "layers": 3},
    ),
    "a prefix before every block": ("llama", {"kind": "prefix", "targets": (), "virtual_tokens": 3, "layers": 3}),
}


# PEFT warns that a bias cannot be merged into a layer without one; nobody merges here.
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("case", sorted(PEFT_CASES))
def test_peft_gives_a_saved_adapter_the_same_scores(
    case: str, backbone: Backbones, prompts: Prompts, tmp_path: Path
) -> None:
    from peft import PeftModel

    family, changes = PEFT_CASES[case]
    model, texts = backbone(family), prompts(family)
    placed = replace(placement_of(model, texts, None), **changes)  # type: ignore[arg-type]
    check_placement(model, texts, placed)
    answer_model = AnswerModel(model, texts, placed, CachedForward(model, texts, placed))
    state = random_state(answer_model.spec, 2)
    items = some_items(2, 6)
    ours = answer_model.log_odds(answer_model.gather(items), state)
    assert (ours - answer_model.log_odds(answer_model.gather(items), None)).abs().max() > 1e-3
    for user in range(2):
        save_adapter(
            tmp_path / str(user),
            select_user(state, user),
            answer_model.spec,
            base_model=model.location,
            task_type=model.task_type,
            user={},
            invocation_tokens=answer_model.invocation_tokens,
        )
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model.model), tmp_path / str(user))
        for item, expected in zip(items[user].tolist(), ours[user], strict=True):
            tokens = torch.tensor([texts.tokens[item]])
            with torch.no_grad():
                logits = wrapped(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -1]
            yes, no = texts.answers or (0, 0)
            torch.testing.assert_close(logits[yes] - logits[no], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "bias", "prefix"])
def test_an_adapter_is_read_back_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    spec = replace(SPEC, kind=kind) if kind != "prefix" else AdapterSpec({"block": (3, 4), "next": (3, 4)}, kind)
    state = select_user(random_state(spec, 1), 0) | {"score.item mean": torch.tensor(0.7)}
    state = round_adapter(state, spec.tensor_shapes, dtype)
    save_adapter(
        tmp_path / "a", state, spec, base_model="x", task_type=None, user={"ratings": [["7", 4.0]]}, dtype=dtype
    )
    loaded, user = load_adapter(tmp_path / "a", spec)
    assert user == {"ratings": [["7", 4.0]]}
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor)


def test_rounding_keeps_numbers_finite_and_leaves_the_others_alone() -> None:
    state = {"a": torch.tensor([1e9, -1e9, 1 / 3]), "score.b": torch.tensor(1 / 3)}
    rounded = round_adapter(state, ["a"], torch.float16)
    assert rounded["a"].tolist() == [65504.0, -65504.0, pytest.approx(1 / 3, abs=1e-4)]
    assert rounded["a"][2] != state["a"][2]
    assert rounded["score.b"] is state["score.b"]


def test_tensors_that_cannot_be_written_are_an_error_that_says_where(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone.*cannot be written"):
        write_tensors(tmp_path / "gone" / "x.safetensors", {"a": torch.zeros(1)})


def test_an_adapter_of_another_kind_is_refused(tmp_path: Path) -> None:
    state = select_user(random_state(SPEC, 1), 0)
    save_adapter(tmp_path / "a", state, SPEC, base_model="x", task_type=None, user={})
    with pytest.raises(ArtifactError, match="has peft_type 'LORA', the recommender 'PREFIX_TUNING'"):
        load_adapter(tmp_path / "a", AdapterSpec({"block": (3, 4)}, "prefix"))


def test_every_corrupted_byte_of_an_adapter_is_noticed(tmp_path: Path) -> None:
    small = AdapterSpec({"q": (2, 2)})
    state = select_user(random_state(small, 1), 0)
    save_adapter(tmp_path / "a", state, small, base_model="x", task_type=None, user={})
    weights = tmp_path / "a" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for position in range(len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 0xFF
        weights.write_bytes(bytes(broken))
        with pytest.raises(ArtifactError, match="altered"):
            load_adapter(tmp_path / "a", small)
    weights.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match="truncated"):
        load_adapter(tmp_path / "a", small)


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    state = select_user(random_state(SPEC, 1), 0)
    save_adapter(tmp_path / "a", state, SPEC, base_model="x", task_type=None, user={})
    with pytest.raises(ArtifactError, match="has r 2, the recommender 3"):
        load_adapter(tmp_path / "a", AdapterSpec(SPEC.shapes, rank=3, alpha=4.0))


def test_saving_never_replaces_a_directory_of_something_else(tmp_path: Path) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "draft.txt").write_text("years of work")
    state = select_user(random_state(SPEC, 1), 0)
    with pytest.raises(ArtifactError, match="not a metarec adapter"):
        save_adapter(precious, state, SPEC, base_model="x", task_type=None, user={})
    assert (precious / "draft.txt").read_text() == "years of work"


def test_lora_b_starts_at_zero_and_a_does_not() -> None:
    state = init_adapter(SPEC, torch.Generator().manual_seed(0))
    assert all(bool(tensor.any()) != name.endswith(LORA_B) for name, tensor in state.items())


def test_loading_a_backbone_gives_frozen_weights(model_dir: Callable[[str], Path]) -> None:
    model = load_backbone(str(model_dir("llama")))
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
