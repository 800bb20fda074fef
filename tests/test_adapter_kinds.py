"""An adapter kind from outside the package works everywhere that metarec's own do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_adapters import both, placement_of, random_state, some_items
from torch import Tensor

from metarec.errors import ArtifactError, ConfigError
from metarec.lm.adapter_kinds import ADAPTER_KINDS, AdapterKind, AdapterSpec
from metarec.lm.adapters import init_adapter
from metarec.lm.answer_model import AnswerModel
from metarec.lm.backbone import Backbone
from metarec.lm.cached_forward import CachedForward
from metarec.lm.peft_files import load_adapter, save_adapter
from metarec.lm.placement import check_placement, default_placement
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.tokenized import CatalogPrompts
from metarec.system.tensors import AdapterState, select_user

Backbones = Callable[..., Backbone]
Prompts = Callable[[str], CatalogPrompts]


class OutputScale(AdapterKind):
    """Scales every number that a layer returns: y (1 + s). Source: Liu et al. 2022, "(IA)^3"."""

    inner_rate = 1.0

    def tensor_shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        return {f"{name}.scale": (rows,) for name, (rows, _) in spec.shapes.items()}

    def fresh(self, spec: AdapterSpec, generator: torch.Generator, dtype: torch.dtype) -> AdapterState:
        return {name: torch.zeros(shape, dtype=dtype) for name, shape in self.tensor_shapes(spec).items()}

    def update(
        self, spec: AdapterSpec, state: Mapping[str, Tensor], name: str, inputs: Tensor, output: Tensor
    ) -> Tensor:
        scale = state[f"{name}.scale"]
        return output * scale.view(scale.shape[0], *[1] * (output.ndim - 2), scale.shape[1])


OUTPUT_SCALE = OutputScale()


@pytest.fixture(params=["registered", "module:attribute"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(ADAPTER_KINDS, "_registered", {})
    if request.param == "registered":
        ADAPTER_KINDS.register("output-scale", OUTPUT_SCALE)
        yield "output-scale"
    else:
        yield f"{__name__}:OUTPUT_SCALE"


@pytest.mark.parametrize(("family", "active"), [("llama", None), ("llama", 2), ("bert", None)])
def test_a_kind_from_outside_gives_the_cached_forward_and_the_whole_model_the_same_answers_and_gradients(
    kind: str, family: str, active: int | None, backbone: Backbones, prompts: Prompts
) -> None:
    model, texts = backbone(family), prompts(family)
    placed = default_placement(model, texts, layers=2, targets=None, rank=1, alpha=1.0, active_tokens=active, kind=kind)
    check_placement(model, texts, placed)
    fast, plain = both(model, texts, placed)
    frozen = fast.log_odds(fast.gather(some_items()), None)
    fresh = {name: torch.stack([part] * 3) for name, part in init_adapter(fast.spec, torch.Generator()).items()}
    torch.testing.assert_close(fast.log_odds(fast.gather(some_items()), fresh), frozen, atol=1e-5, rtol=1e-4)
    found = []
    for answer_model in (fast, plain):
        state = {name: value.requires_grad_() for name, value in random_state(answer_model.spec, 3).items()}
        log_odds = answer_model.log_odds(answer_model.gather(some_items()), state)
        log_odds.square().sum().backward()
        found.append((log_odds.detach(), {name: value.grad for name, value in state.items()}))
    assert (found[1][0] - frozen).abs().max() > 1e-3, "the adapter must matter, or the test says nothing"
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-4)
    for name, expected in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], expected, atol=1e-4, rtol=1e-3)


def test_a_kind_from_outside_is_saved_and_loaded_and_refused_by_peft(kind: str, tmp_path: Path) -> None:
    from peft import PeftConfig

    spec = AdapterSpec({"block.q": (6, 5), "block.v": (3, 5)}, kind)
    state = select_user(random_state(spec, 1), 0) | {"score.prior_weight": torch.tensor(0.7)}
    save_adapter(tmp_path / "a", state, spec, base_model="x", task_type=None, user={"ratings": []})
    loaded, user = load_adapter(tmp_path / "a", spec)
    assert user == {"ratings": []}
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    with pytest.raises(ArtifactError, match="Load it with the recommender that made it"):
        load_adapter(tmp_path / "a", AdapterSpec({"block.q": (7, 5)}, kind))
    with pytest.raises(ArtifactError, match="peft_type"):
        load_adapter(tmp_path / "a", replace(spec, kind="lora"))
    with pytest.raises((KeyError, ValueError), match=r"metarec .*(OUTPUT_SCALE|output-scale)"):
        PeftConfig.from_pretrained(str(tmp_path / "a"))


def test_a_soft_prompt_is_refused_where_it_does_not_go_through_the_whole_model(
    backbone: Backbones, prompts: Prompts
) -> None:
    """What it is worth is compared with PEFT's in test_adapters."""
    model, texts = backbone("llama"), prompts("llama")
    placed = replace(placement_of(model, texts, None), kind="soft-prompt", targets=(), virtual_tokens=2, layers=3)
    check_placement(model, texts, placed)
    for changes, said in (
        ({"layers": 2}, "goes through all blocks"),
        ({"active_tokens": 1}, "all tokens see a soft prompt"),
        ({"virtual_tokens": 0}, "virtual_tokens is 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_placement(model, texts, replace(placed, **changes))  # type: ignore[arg-type]
    model, texts = backbone("bert"), prompts("bert")
    placed = replace(placement_of(model, texts, None), kind="soft-prompt", virtual_tokens=2)
    with pytest.raises(ConfigError, match="not a causal LM"):
        check_placement(model, texts, placed)


def test_the_gradient_of_a_soft_prompt_is_that_of_finite_differences(backbone: Backbones, prompts: Prompts) -> None:
    model, texts = backbone("llama", torch.float64), prompts("llama")
    placed = replace(placement_of(model, texts, None), kind="soft-prompt", targets=(), virtual_tokens=2, layers=3)
    forward = CachedForward(model, texts, placed)
    answers = AnswerModel(model, texts, placed, forward)
    batch = answers.gather(some_items(1, 3))
    start = {name: value.double() for name, value in random_state(answers.spec, 1).items()}
    state = {name: value.clone().requires_grad_() for name, value in start.items()}
    answers.log_odds(batch, state).square().sum().backward()
    slope = state["soft_prompt"].grad
    assert slope is not None
    direction = torch.randn(start["soft_prompt"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def at(step: float) -> float:
        moved = {"soft_prompt": start["soft_prompt"] + step * direction}
        return float(answers.log_odds(batch, moved).square().sum())

    expected = (at(1e-4) - at(-1e-4)) / 2e-4
    assert float((slope * direction).sum()) == pytest.approx(expected, rel=1e-3)


class HoulsbyLayer(torch.nn.Module):
    """A layer with Houlsby's adapter behind it, as one user has it: figure 2 of the paper."""

    def __init__(self, layer: torch.nn.Module, down: torch.nn.Linear, up: torch.nn.Linear) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, down, up

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer(inputs)
        return hidden + self.up(torch.nn.functional.gelu(self.down(hidden)))


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "distilbert"])
def test_a_bottleneck_is_houlsbys_adapter_behind_attention_and_mlp(
    family: str, backbone: Backbones, prompts: Prompts
) -> None:
    model, texts = backbone(family), prompts(family)
    placed = default_placement(
        model, texts, layers=2, targets=None, rank=3, alpha=1.0, active_tokens=None, kind="bottleneck"
    )
    check_placement(model, texts, placed)
    fast, plain = both(model, texts, placed)
    assert len(fast.spec.shapes) == 4, "two in each of two blocks"
    items = some_items(1, 4)
    state = random_state(fast.spec, 1)
    found = fast.log_odds(fast.gather(items), state)
    torch.testing.assert_close(plain.log_odds(plain.gather(items), state), found, atol=1e-4, rtol=1e-3)
    changed = copy.deepcopy(model.model)
    for name, (rows, _) in fast.spec.shapes.items():
        down, up = torch.nn.Linear(rows, 3), torch.nn.Linear(3, rows)
        parts = {"weight": (state[f"{name}.down"][0], state[f"{name}.up"][0])}
        parts["bias"] = (state[f"{name}.down_bias"][0], state[f"{name}.up_bias"][0])
        for key, (first, second) in parts.items():
            setattr(down, key, torch.nn.Parameter(first))
            setattr(up, key, torch.nn.Parameter(second))
        path, _, last = name.rpartition(".")
        setattr(changed.get_submodule(path), last, HoulsbyLayer(changed.get_submodule(name), down, up))
    whole = replace(model, modules=changed, open_model=None)
    other = AnswerModel(whole, texts, placed, ReferenceForward(whole, texts, placed))
    expected = other.log_odds(other.gather(items), None)
    assert (expected - fast.log_odds(fast.gather(items), None)).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_fresh_bottleneck_changes_nothing_and_is_kept_like_any_other(
    backbone: Backbones, prompts: Prompts, tmp_path: Path
) -> None:
    model, texts = backbone("llama"), prompts("llama")
    placed = default_placement(
        model, texts, layers=1, targets=None, rank=2, alpha=1.0, active_tokens=1, kind="bottleneck"
    )
    fast, _ = both(model, texts, placed)
    fresh = {name: part[None] for name, part in init_adapter(fast.spec, torch.Generator().manual_seed(0)).items()}
    items = some_items(1, 4)
    torch.testing.assert_close(fast.log_odds(fast.gather(items), fresh), fast.log_odds(fast.gather(items), None))
    state = select_user(random_state(fast.spec, 1), 0)
    save_adapter(tmp_path / "a", state, fast.spec, base_model="x", task_type=None, user={})
    loaded, _ = load_adapter(tmp_path / "a", fast.spec)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_an_unknown_kind_is_refused_with_the_nearest(backbone: Backbones, prompts: Prompts) -> None:
    model, texts = backbone("llama"), prompts("llama")
    with pytest.raises(ConfigError, match=r"no adapter kind is called 'lorra'.*lora"):
        check_placement(model, texts, replace(placement_of(model, texts, None), kind="lorra"))


@pytest.mark.parametrize(
    ("kind", "rate"), [("lora", 0.3), ("bottleneck", 0.3), ("bias", 3.0), ("prefix", 3.0), ("soft-prompt", 3.0)]
)
def test_every_kind_says_where_inner_rates_start(kind: str, rate: float) -> None:
    assert ADAPTER_KINDS.get(kind).inner_rate == rate


def test_a_prefix_is_refused_where_the_whole_model_runs(backbone: Backbones, prompts: Prompts) -> None:
    model, texts = backbone("llama"), prompts("llama")
    placed = replace(placement_of(model, texts, None), kind="prefix", targets=(), virtual_tokens=2)
    _, plain = both(model, texts, placed)
    with pytest.raises(ConfigError, match="Choose lora or bias"):
        plain.log_odds(plain.gather(some_items()), random_state(plain.spec, 3))


def test_naming_kinds_imports_no_torch() -> None:
    import subprocess
    import sys

    check = (
        "import sys; from metarec.lm.adapter_kinds import ADAPTER_KINDS; "
        "ADAPTER_KINDS.check('lora'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
