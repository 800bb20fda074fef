"""Meta-gradients against arithmetic done another way, in float64, on losses whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from made_losses import QUERIES, RATES, TARGETS, USERS, bent, meta_state, numeric_gradients, quadratic
from small_adapters import placement_of, random_state, some_items
from torch import Tensor

from metarec.lm.answer_model import AnswerModel
from metarec.lm.backbone import Backbone
from metarec.lm.cached_forward import CachedForward
from metarec.lm.tokenized import CatalogPrompts
from metarec.meta.algorithms import fomaml, imaml, maml, maml_plus_plus, reptile
from metarec.meta.heads import ClosedFormHead
from metarec.meta.inner_loop import MetaState, adapt, initial_meta_state
from metarec.registries import ALGORITHMS
from metarec.system.tensors import AdapterState, select_user

GRADIENT_BASED = [name for name in ALGORITHMS.names() if not isinstance(ALGORITHMS.get(name), ClosedFormHead)]


def test_adapting_takes_gradient_steps() -> None:
    meta = meta_state()
    adapted = adapt(meta, quadratic(TARGETS), USERS, 4)
    expected = meta.init["w"].expand(USERS, 2)
    for _ in range(4):
        expected = expected - 0.1 * 1.5**2 * (expected - TARGETS)
    torch.testing.assert_close(adapted.state["w"], expected)
    torch.testing.assert_close(adapted.state["c"], torch.full((USERS,), 1.5, dtype=torch.float64))
    assert adapted.losses.shape == (4, USERS)
    assert (adapted.losses[1:] < adapted.losses[:-1]).all()


@pytest.mark.parametrize(("steps", "scale"), [(0, 1.0), (3, 0.0)])
def test_inner_rate_zero_gives_exactly_the_initialization(steps: int, scale: float) -> None:
    meta = meta_state()
    adapted = adapt(meta, quadratic(TARGETS), USERS, steps, rate_scale=scale)
    assert torch.equal(adapted.state["w"], meta.init["w"].expand(USERS, 2))


def test_first_order_maml_is_the_query_gradient_at_the_adapted_parameters() -> None:
    meta = meta_state()
    result = fomaml(meta, quadratic(TARGETS), quadratic(QUERIES), USERS, 3)
    adapted = adapt(meta, quadratic(TARGETS), USERS, 3).state["w"].detach()
    torch.testing.assert_close(result.gradients["init/w"], (1.5**2 * (adapted - QUERIES)).mean(0))
    torch.testing.assert_close(result.loss, 0.5 * 1.5**2 * (adapted - QUERIES).square().sum(1))


@pytest.mark.parametrize("rates", sorted(RATES))
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_mamls_gradient_matches_finite_differences(steps: int, rates: str) -> None:
    meta = initial_meta_state(meta_state().init, ["w"], 0.1, **RATES[rates])
    support, query = bent(TARGETS), bent(QUERIES)
    result = maml(meta, support, query, USERS, steps)
    expected = numeric_gradients(
        meta, lambda moved: query(adapt(moved, support, USERS, steps).state).mean(), meta.tensors()
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-6, atol=1e-8)


def test_maml_plus_plus_gradient_matches_finite_differences() -> None:
    meta = initial_meta_state(meta_state().init, ["w"], 0.1, steps=3)
    support, query = bent(TARGETS), bent(QUERIES)

    def value(moved: MetaState) -> Tensor:
        after = [query(adapt(moved, support, USERS, step).state).mean() for step in (1, 2, 3)]
        return (after[0] + 2 * after[1] + 3 * after[2]) / 6

    result = maml_plus_plus(meta, support, query, USERS, 3)
    for name, gradient in numeric_gradients(meta, value, meta.tensors()).items():
        torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-6, atol=1e-8)


def test_imamls_gradient_matches_finite_differences_at_the_inner_minimum() -> None:
    meta = meta_state(0.15)
    support, query = bent(TARGETS), bent(QUERIES)
    result = imaml(meta, support, query, USERS, 400, prox_strength=1.5)
    expected = numeric_gradients(
        meta,
        lambda moved: query(adapt(moved, support, USERS, 400, prox_strength=1.5).state).mean(),
        ["init/w", "init/c"],
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-5, atol=1e-7)


def test_second_order_differs_from_first_order() -> None:
    meta = meta_state()
    exact, first = (algorithm(meta, bent(TARGETS), bent(QUERIES), USERS, 3) for algorithm in (maml, fomaml))
    assert (exact.gradients["init/w"] - first.gradients["init/w"]).abs().max() > 1e-3
    torch.testing.assert_close(exact.loss, first.loss)


def test_first_order_rates_are_exact_with_one_step() -> None:
    meta = meta_state()
    exact, first = (algorithm(meta, bent(TARGETS), bent(QUERIES), USERS, 1) for algorithm in (maml, fomaml))
    torch.testing.assert_close(exact.gradients["log_rate/w"], first.gradients["log_rate/w"])


@pytest.mark.parametrize("algorithm", ["fomaml", "maml", "maml++", "imaml", "reptile"])
def test_a_language_models_meta_gradient_is_what_it_says(
    algorithm: str, backbone: Callable[..., Backbone], prompts: Callable[[str], CatalogPrompts]
) -> None:
    # In float64, along one random direction: exact algorithms match finite differences, first-order ones do not.
    model = backbone("llama", torch.float64)
    texts = prompts("llama")
    placed = placement_of(model, texts, 2)
    answer_model = AnswerModel(model, texts, placed, CachedForward(model, texts, placed))
    adapter = select_user(random_state(answer_model.spec, 1), 0)
    meta = initial_meta_state({name: value.double() for name, value in adapter.items()}, adapter, 0.02)
    support, query = (answer_model.gather(some_items(2, 4)), answer_model.gather(some_items(2, 6).flip(0)))
    wanted = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.3, 0.2, -1.0, 1.0]], dtype=torch.float64)

    def support_loss(state: AdapterState) -> Tensor:
        return (answer_model.log_odds(support, state) - wanted).square().mean(1)

    def query_loss(state: AdapterState) -> Tensor:
        return answer_model.log_odds(query, state).tanh().mean(1)

    result = ALGORITHMS.get(algorithm)(meta, support_loss, query_loss, 2, 2)
    generator = torch.Generator().manual_seed(3)
    way = {name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in meta.init.items()}
    ends = []
    for sign in (1, -1):
        moved = MetaState({name: value + sign * 1e-5 * way[name] for name, value in meta.init.items()}, meta.log_rate)
        if algorithm == "maml++":
            first, second = (query_loss(adapt(moved, support_loss, 2, steps).state).mean() for steps in (1, 2))
            ends.append((first + 2 * second) / 3)
        else:
            ends.append(query_loss(adapt(moved, support_loss, 2, 2).state).mean())
    numeric = float(ends[0] - ends[1]) / 2e-5
    found = float(sum((result.gradients[f"init/{name}"] * value).sum() for name, value in way.items()))
    assert (abs(found - numeric) < 1e-5 * abs(numeric)) == (algorithm in ("maml", "maml++"))


def test_tensors_that_are_not_adapted_get_their_plain_gradient() -> None:
    meta = meta_state()
    result = fomaml(meta, quadratic(TARGETS), quadratic(QUERIES), USERS, 2)
    adapted = adapt(meta, quadratic(TARGETS), USERS, 2).state["w"].detach()
    torch.testing.assert_close(result.gradients["init/c"], (1.5 * (adapted - QUERIES).square().sum(1)).mean())


def test_reptile_points_from_the_adapted_parameters_to_the_initialization() -> None:
    meta = meta_state()
    support, query = quadratic(TARGETS), quadratic(QUERIES)
    result = reptile(meta, support, query, USERS, 3)
    adapted = adapt(meta, lambda state: (support(state) + query(state)) / 2, USERS, 3).state["w"]
    expected = (meta.init["w"] - adapted).mean(0) / (0.1 * 3)
    torch.testing.assert_close(result.gradients["init/w"], expected)


@pytest.mark.parametrize("algorithm", GRADIENT_BASED)
def test_meta_learning_finds_the_initialization_that_adapts_best(algorithm: str) -> None:
    meta = meta_state(0.05)
    tensors = {name: value.clone() for name, value in meta.tensors().items()}
    for _ in range(300):
        result = ALGORITHMS.get(algorithm)(
            MetaState.from_tensors(tensors), quadratic(TARGETS), quadratic(TARGETS), USERS, 2
        )
        tensors["init/w"] = tensors["init/w"] - 0.1 * result.gradients["init/w"]
    torch.testing.assert_close(tensors["init/w"], TARGETS.mean(0), atol=1e-6, rtol=1e-6)


def test_a_diverging_user_falls_back_alone_and_poisons_nothing() -> None:
    meta = meta_state()

    def exploding(state: AdapterState) -> Tensor:
        loss = quadratic(TARGETS)(state)
        return loss * torch.tensor([1.0, math.inf, 1.0], dtype=torch.float64)

    adapted = adapt(meta, exploding, USERS, 3)
    healthy = adapt(meta, quadratic(TARGETS), USERS, 3)
    assert adapted.diverged.tolist() == [False, True, False]
    assert torch.equal(adapted.state["w"][1], meta.init["w"])
    assert torch.equal(adapted.state["w"][[0, 2]], healthy.state["w"][[0, 2]])
    for name in GRADIENT_BASED:
        algorithm = ALGORITHMS.get(name)
        result = algorithm(meta, exploding, quadratic(QUERIES), USERS, 3)
        two = algorithm(meta, quadratic(TARGETS[[0, 2]]), quadratic(QUERIES[[0, 2]]), 2, 3)
        assert result.diverged.tolist() == [False, True, False]
        for tensor, gradient in two.gradients.items():
            torch.testing.assert_close(result.gradients[tensor], gradient)


def test_a_users_result_does_not_depend_on_the_others() -> None:
    meta = meta_state()
    others = TARGETS.clone()
    others[1:] *= -7
    first = adapt(meta, quadratic(TARGETS), USERS, 3).state["w"][0]
    assert torch.equal(first, adapt(meta, quadratic(others), USERS, 3).state["w"][0])


def test_flat_names_invert() -> None:
    meta = meta_state()
    again = MetaState.from_tensors(meta.tensors())
    assert again.init.keys() == meta.init.keys()
    assert torch.equal(again.log_rate["w"], meta.log_rate["w"])


def test_a_rate_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        meta_state(0.0)
