"""The fast path equals the plain one, for every family, placement and number of active tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEMPLATES
from small_adapters import both, placement_of, random_state, some_items

from metarec.data.interactions import Catalog
from metarec.errors import ConfigError
from metarec.lm.adapter_kinds import Placement
from metarec.lm.answer_model import AnswerModel, open_answer_model
from metarec.lm.backbone import Backbone
from metarec.lm.cached_forward import CachedForward
from metarec.lm.placement import check_placement
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.tokenized import CatalogPrompts, tokenize_catalog
from metarec.system.tensors import select_user

FAMILIES = {
    "llama": [None, 1, 2],
    "llama-bias": [None, 2],
    "mistral": [1],
    "bert": [None],
    "encoder": [None],
}
CASES = [(family, active) for family, actives in FAMILIES.items() for active in actives]
Backbones = Callable[..., Backbone]
Prompts = Callable[[str], CatalogPrompts]


@pytest.mark.parametrize(("family", "active"), CASES)
@pytest.mark.parametrize("layers", [1, 3])
def test_the_cached_forward_matches_the_whole_model(
    family: str, active: int | None, layers: int, backbone: Backbones, prompts: Prompts
) -> None:
    model = backbone(family)
    fast, plain = both(model, prompts(family), placement_of(model, prompts(family), active, layers))
    items = some_items()
    state = random_state(fast.spec, 3)
    frozen = plain.log_odds(plain.gather(items), None)
    adapted = plain.log_odds(plain.gather(items), state)
    assert (adapted - frozen).abs().max() > 1e-3, "the adapter must matter, or the test says nothing"
    torch.testing.assert_close(fast.log_odds(fast.gather(items), None), frozen, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast.log_odds(fast.gather(items), state), adapted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast.frozen_log_odds(items.numpy()), frozen, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert", "encoder"])
def test_frozen_log_odds_are_the_same_bits_whatever_items_are_asked_for_with_them(
    family: str, backbone: Backbones, prompts: Prompts
) -> None:
    """A matrix product rounds a row differently with the number of rows; one person's company would change scores."""
    fast, _ = both(backbone(family), prompts(family), placement_of(backbone(family), prompts(family), None))
    everything = fast.answer(fast.frozen_states(np.arange(40)))
    assert torch.equal(fast.frozen_log_odds(np.array([[7, 3], [39, 7]])), everything[torch.tensor([[7, 3], [39, 7]])])
    for first in range(0, 40, 3):
        for count in range(1, 41 - first):
            some = np.arange(first, first + count)
            assert torch.equal(fast.answer(fast.frozen_states(some)), everything[first : first + count])


@pytest.mark.parametrize(("family", "active"), CASES)
def test_batched_adapters_match_one_user_at_a_time(
    family: str, active: int | None, backbone: Backbones, prompts: Prompts
) -> None:
    model = backbone(family)
    fast, _ = both(model, prompts(family), placement_of(model, prompts(family), active))
    items = some_items()
    state = random_state(fast.spec, 3)
    together = fast.log_odds(fast.gather(items), state)
    for user in range(3):
        alone = {name: tensor[None] for name, tensor in select_user(state, user).items()}
        torch.testing.assert_close(
            fast.log_odds(fast.gather(items[user : user + 1]), alone)[0], together[user], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(("family", "active"), [("llama", None), ("llama", 1), ("bert", None)])
def test_bfloat16_weights_move_log_odds_by_less_than_a_tenth_of_their_spread(
    family: str, active: int | None, backbone: Backbones, prompts: Prompts
) -> None:
    exact_model, coarse_model = backbone(family), backbone(family, torch.bfloat16)
    placed = placement_of(exact_model, prompts(family), active)
    state = random_state(both(exact_model, prompts(family), placed)[0].spec, 3)
    items = some_items()
    exact, _ = both(exact_model, prompts(family), placed)
    expected = exact.log_odds(exact.gather(items), state)
    for coarse in both(coarse_model, prompts(family), placed):
        found = coarse.log_odds(coarse.gather(items), state)
        assert found.dtype == torch.float32
        error = (found - expected).square().mean().sqrt() / expected.std()
        assert 0 < error < 0.1


@pytest.mark.parametrize(("family", "active"), [("llama", None), ("llama", 1), ("phi3", 1), ("bert", None)])
def test_mixed_precision_is_nearer_to_float32_than_bfloat16_throughout(
    family: str, active: int | None, backbone: Backbones, prompts: Prompts
) -> None:
    model, texts = backbone(family), prompts(family)
    placed = placement_of(model, texts, active, layers=1)
    exact, _ = both(model, texts, placed)
    mixed = replace(exact, forward=CachedForward(model, texts, placed, torch.bfloat16))
    coarse, _ = both(backbone(family, torch.bfloat16), texts, placed)
    state, items = random_state(exact.spec, 3), some_items()
    expected, near, far = (
        answer_model.log_odds(answer_model.gather(items), state) for answer_model in (exact, mixed, coarse)
    )
    assert 0 < (near - expected).square().mean() < (far - expected).square().mean()


@pytest.mark.parametrize(("family", "active"), [("llama", None), ("llama", 2), ("bert", None)])
def test_the_cached_forward_matches_the_whole_model_with_biases(
    family: str, active: int | None, backbone: Backbones, prompts: Prompts
) -> None:
    model = backbone(family)
    placed = replace(placement_of(model, prompts(family), active), kind="bias")
    fast, plain = both(model, prompts(family), placed)
    items, state = some_items(), random_state(fast.spec, 3)
    found, expected = (answer_model.log_odds(answer_model.gather(items), state) for answer_model in (fast, plain))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("active", [None, 2])
def test_an_item_is_read_the_same_whatever_stands_beside_it(
    active: int | None, backbone: Backbones, prompts: Prompts
) -> None:
    # Rows are packed: item 3 beside 22 others, and alone.
    model = backbone("llama")
    placed = Placement(2, (), 1, 1.0, active, "prefix", virtual_tokens=3)
    fast, _ = both(model, prompts("llama"), placed)
    state = random_state(fast.spec, 1)
    many = fast.log_odds(fast.gather(torch.arange(23)[None]), state)[0]
    for item in (0, 3, 22):
        alone = fast.log_odds(fast.gather(torch.tensor([[item]])), state)[0, 0]
        torch.testing.assert_close(many[item], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "active"), [("llama", None), ("llama", 1), ("encoder", None)])
@pytest.mark.parametrize("whole", [False, True])
def test_at_one_width_an_item_is_read_to_the_same_bits_whatever_stands_beside_it(
    family: str, active: int | None, whole: bool, backbone: Backbones
) -> None:
    model = backbone(family)
    titles = tuple(" ".join(["night", "war", "love", "of"][: 1 + code % 4] * (1 + 3 * code)) for code in range(12))
    catalog = Catalog(tuple(map(str, range(12))), {"title": titles, "genres": ("drama",) * 12})
    long = tokenize_catalog(model, TEMPLATES[model.kind], catalog)
    answer_model = both(model, long, placement_of(model, long, active))[int(whole)]
    state = {name: torch.cat([value, value]) for name, value in random_state(answer_model.spec, 1).items()}
    width = int(long.lengths.max())

    def read(*codes: int) -> torch.Tensor:
        return answer_model.log_odds(answer_model.gather(torch.tensor([codes, codes]), width), state)[0]

    first = read(0, 1, 2, 3)
    assert torch.equal(read(0, 11, 7, 3)[[0, 3]], first[[0, 3]])
    assert torch.equal(read(2, 3, 0, 0)[[2, 1, 0]], first[[0, 3, 2]])


@pytest.mark.parametrize(("family", "active"), CASES)
def test_a_users_log_odds_do_not_depend_on_who_else_is_in_the_batch(
    family: str, active: int | None, backbone: Backbones, prompts: Prompts
) -> None:
    # Bit for bit at fixed shapes: the same items, all other users' adapters changed beyond recognition.
    model = backbone(family)
    fast, _ = both(model, prompts(family), placement_of(model, prompts(family), active))
    item_batch = fast.gather(some_items())
    state = random_state(fast.spec, 3)
    strangers = {name: torch.cat([tensor[:1], -9 * tensor[1:]]) for name, tensor in state.items()}
    first, second = fast.log_odds(item_batch, state), fast.log_odds(item_batch, strangers)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_gradients_through_the_cache_match_those_through_the_whole_model(backbone: Backbones, prompts: Prompts) -> None:
    model = backbone("llama")
    fast, plain = both(model, prompts("llama"), placement_of(model, prompts("llama"), 2))
    gradients = []
    for answer_model in (fast, plain):
        state = {name: value.requires_grad_() for name, value in random_state(answer_model.spec, 3).items()}
        answer_model.log_odds(answer_model.gather(some_items()), state).square().sum().backward()
        gradients.append({name: value.grad for name, value in state.items()})
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["opt", "electra"])
def test_unknown_structures_are_read_whole_with_a_warning(
    family: str, backbone: Backbones, prompts: Prompts, caplog: pytest.LogCaptureFixture
) -> None:
    model = backbone(family)
    placed = placement_of(model, prompts(family), None)
    answer_model = open_answer_model(model, prompts(family), placed)
    assert isinstance(answer_model.forward, ReferenceForward)
    assert family in caplog.text
    items = some_items()
    state = random_state(answer_model.spec, 3)
    frozen, adapted = (answer_model.log_odds(answer_model.gather(items), adapters) for adapters in (None, state))
    assert (adapted - frozen).abs().max() > 1e-3
    yes, no = prompts(family).answers or (0, 0)
    for item, expected in zip(items[0].tolist(), frozen[0], strict=True):
        tokens = torch.tensor([prompts(family).tokens[item]])
        place = tokens[0].tolist().index(prompts(family).mask_token) if model.kind == "masked" else -1
        with torch.no_grad():
            logits = model.model(input_ids=tokens).logits[0, place]
        torch.testing.assert_close(expected, logits[yes] - logits[no], atol=1e-5, rtol=1e-4)


def test_gpt2_adapters_have_the_shape_that_peft_gives_them(backbone: Backbones, prompts: Prompts) -> None:
    from peft import LoraConfig, get_peft_model

    model = backbone("gpt2")
    answer_model = open_answer_model(model, prompts("gpt2"), placement_of(model, prompts("gpt2"), None, layers=1))
    config = LoraConfig(
        r=2, target_modules=sorted(answer_model.spec.shapes), fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    import copy

    wrapped = dict(get_peft_model(copy.deepcopy(model.model), config).named_parameters())
    for name, (rows, columns) in answer_model.spec.shapes.items():
        assert wrapped[f"base_model.model.{name}.lora_A.default.weight"].shape == (2, columns)
        assert wrapped[f"base_model.model.{name}.lora_B.default.weight"].shape == (rows, 2)


def everything(forward: CachedForward) -> torch.Tensor:
    return forward.frozen_states(np.arange(len(forward.prompts.tokens)))


def spied(monkeypatch: pytest.MonkeyPatch, fail_after: int = 1_000_000) -> list[int]:
    """Returns the items that are read from now on; reading stops like Ctrl-C after so many."""
    read_block = CachedForward._read_block
    read: list[int] = []

    def recording(forward: CachedForward, items: np.ndarray) -> dict[str, np.ndarray]:
        if len(read) >= fail_after:
            raise KeyboardInterrupt
        read.extend(items.tolist())
        return read_block(forward, items)

    monkeypatch.setattr(CachedForward, "_read_block", recording)
    return read


def test_an_item_is_read_when_it_is_first_asked_for_and_never_again(
    backbone: Backbones, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path))
    model, texts = backbone("llama"), prompts("llama")
    forward = CachedForward(model, texts, placement_of(model, texts, 1))
    read = spied(monkeypatch)
    forward.gather(torch.tensor([[3, 5], [5, 3]]))
    assert sorted(read) == [3, 5]
    CachedForward(model, texts, placement_of(model, texts, 1)).gather(torch.tensor([[3, 5, 7]]))
    assert sorted(read) == [3, 5, 7]


def test_an_interrupted_reading_goes_on_where_it_stopped(
    backbone: Backbones, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path))
    monkeypatch.setattr("metarec.lm.item_cache.BLOCK_ITEMS", 2)
    model, texts = backbone("llama"), prompts("llama")
    placed = placement_of(model, texts, 2)
    whole = everything(CachedForward(model, texts, placed))
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path / "second"))
    with monkeypatch.context() as interrupted:
        before = spied(interrupted, fail_after=36)
        with pytest.raises(KeyboardInterrupt):
            everything(CachedForward(model, texts, placed))
    after = spied(monkeypatch)
    torch.testing.assert_close(everything(CachedForward(model, texts, placed)), whole)
    assert len(before) == 36
    assert set(before).isdisjoint(after), "items that were kept are not read again"


@pytest.mark.parametrize("active", [1, None])
def test_what_all_prompts_begin_with_is_run_once_for_all_processes(
    active: int | None, backbone: Backbones, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path))
    model, texts = backbone("llama"), prompts("llama")
    placed = placement_of(model, texts, active)
    items = torch.tensor([[3, 5, 7]])
    runs: list[None] = []
    run = CachedForward._run_prefix
    monkeypatch.setattr(CachedForward, "_run_prefix", lambda self: runs.append(None) or run(self))

    def states() -> torch.Tensor:
        forward = CachedForward(model, texts, placed)
        return forward.last_states(forward.gather(items), None)

    first = states()
    assert torch.equal(states(), first)
    assert len(runs) == 1
    (file,) = tmp_path.rglob("prefix.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    torch.testing.assert_close(states(), first)
    assert len(runs) == 2


@pytest.mark.parametrize("active", [1, None])
def test_damaged_items_are_read_again(
    active: int | None, backbone: Backbones, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path))
    model, texts = backbone("llama"), prompts("llama")
    placed = replace(placement_of(model, texts, active), rank=3)
    forward = CachedForward(model, texts, placed)
    whole = everything(forward)
    files = sorted(forward.path.glob("*.rows"))
    assert len(files) >= 2
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with monkeypatch.context() as patched:
            read = spied(patched)
            torch.testing.assert_close(everything(CachedForward(model, texts, placed)), whole, atol=1e-5, rtol=1e-4)
        assert 1 <= len(read) <= 2


def test_keys_and_values_in_fewer_bytes_change_log_odds_little(backbone: Backbones, prompts: Prompts) -> None:
    model, texts = backbone("llama"), prompts("llama")
    placed = placement_of(model, texts, 1)
    exact = AnswerModel(model, texts, placed, CachedForward(model, texts, placed))
    items, state = some_items(), random_state(exact.spec, 3)
    expected = exact.log_odds(exact.gather(items), state)
    for kept, most in (("float16", 0.01), ("int8", 0.1)):
        rounded = AnswerModel(model, texts, placed, CachedForward(model, texts, placed, kept=kept))  # type: ignore[arg-type]
        found = rounded.log_odds(rounded.gather(items), state)
        error = (found - expected).abs().max() / expected.std()
        assert 0 < error < most, kept
        frozen = rounded.log_odds(rounded.gather(items), None)
        torch.testing.assert_close(rounded.frozen_log_odds(items.numpy()), frozen, atol=1e-5, rtol=1e-4)


def test_caches_of_different_content_have_different_names(backbone: Backbones, prompts: Prompts) -> None:
    model, texts = backbone("llama"), prompts("llama")
    placed = placement_of(model, texts, 1)
    shorter = replace(texts, prefix=texts.prefix - 1)
    forwards = [
        CachedForward(model, texts, placed),
        CachedForward(model, texts, placed, torch.bfloat16),
        CachedForward(model, shorter, placed),
        CachedForward(backbone("llama", torch.bfloat16), texts, placed),
    ]
    assert len({forward.path for forward in forwards}) == len(forwards)
    assert forwards[0].path == CachedForward(model, texts, replace(placed, rank=3)).path
    exact, other = everything(forwards[0]), everything(forwards[2])
    torch.testing.assert_close(other, exact, atol=1e-5, rtol=1e-4)
    assert not torch.equal(everything(forwards[1]), exact), "the adapted blocks ran in bfloat16"


def test_prompts_beyond_what_the_blocks_are_exact_for_are_read_by_the_whole_model(
    backbone: Backbones, prompts: Prompts, caplog: pytest.LogCaptureFixture
) -> None:
    model, texts = backbone("mistral"), prompts("mistral")
    placed = placement_of(model, texts, 1)
    assert isinstance(open_answer_model(model, texts, placed).forward, CachedForward)
    narrow = replace(model)
    blocks = replace(model.weights, limit=4)  # type: ignore[type-var]
    narrow.__dict__["taken_apart"] = replace(model.taken_apart, blocks=blocks)
    assert isinstance(open_answer_model(narrow, texts, placed).forward, ReferenceForward)
    assert "beyond 4" in caplog.text


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        ({"layers": 4}, "has 1 to 3"),
        ({"targets": ("q_prj",)}, "Did you mean 'q_proj'"),
        ({"active_tokens": 9}, "all prompts share only their last"),
        ({"rank": 0}, "Choose 1 or more"),
    ],
)
def test_placements_that_do_not_fit_are_refused(
    change: dict[str, object], cure: str, backbone: Backbones, prompts: Prompts
) -> None:
    model, texts = backbone("llama"), prompts("llama")
    with pytest.raises(ConfigError, match=cure):
        check_placement(model, texts, replace(placement_of(model, texts, 1), **change))  # type: ignore[arg-type]


def test_a_prefix_is_refused_where_it_cannot_be_read(backbone: Backbones, prompts: Prompts) -> None:
    model, texts = backbone("bert"), prompts("bert")
    with pytest.raises(ConfigError, match="not a causal LM that knows positions in attention alone"):
        check_placement(model, texts, replace(placement_of(model, texts, None), kind="prefix", virtual_tokens=2))
    model, texts = backbone("llama"), prompts("llama")
    with pytest.raises(ConfigError, match="virtual_tokens is 0"):
        check_placement(model, texts, replace(placement_of(model, texts, None), kind="prefix"))


def test_activated_lora_is_refused_where_tokens_see_the_future(backbone: Backbones, prompts: Prompts) -> None:
    model, texts = backbone("bert"), prompts("bert")
    with pytest.raises(ConfigError, match="not a causal LM"):
        check_placement(model, texts, replace(placement_of(model, texts, None), active_tokens=1))


def test_the_cache_takes_the_bytes_that_its_precision_says(
    backbone: Backbones, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = backbone("llama"), prompts("llama")
    placed = placement_of(model, texts, 1)
    sizes = {}
    for kept in ("float32", "int8"):
        monkeypatch.setenv("METAREC_CACHE", str(tmp_path / kept))
        forward = open_answer_model(model, texts, placed, kept=kept).forward
        assert isinstance(forward, CachedForward)
        forward.read(np.arange(len(texts.tokens)))
        written = sum(file.stat().st_size for file in forward.path.glob("*.rows"))
        sizes[kept] = written / len(texts.tokens)
        assert sizes[kept] == pytest.approx(forward.bytes_per_item)
    assert sizes["int8"] < 0.6 * sizes["float32"]
