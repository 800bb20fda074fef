"""Meta-gradients against arithmetic done another way, in float64, on losses whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from metarec.lora import AdapterState
from metarec.meta import ALGORITHMS, Loss, MetaState, adapt, fomaml, initial_meta_state, reptile

USERS = 3
TARGETS = torch.tensor([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]], dtype=torch.float64)
QUERIES = TARGETS + 0.3


def quadratic(targets: Tensor) -> Loss:
    """Half the squared distance of ``w`` to each user's target, scaled by the user's ``c``."""

    def loss(state: AdapterState) -> Tensor:
        return 0.5 * state["c"].square() * (state["w"] - targets).square().sum(1)

    return loss


def meta_state(rate: float = 0.1) -> MetaState:
    init = {
        "w": torch.tensor([0.2, -0.1], dtype=torch.float64),
        "c": torch.tensor(1.5, dtype=torch.float64),
    }
    return initial_meta_state(init, ["w"], rate)


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


def test_the_rate_gradient_matches_finite_differences() -> None:
    # With one step the first-order gradient of the rate is exact.
    meta = meta_state()
    result = fomaml(meta, quadratic(TARGETS), quadratic(QUERIES), USERS, 1)

    def loss_at(log_rate: Tensor) -> Tensor:
        moved = MetaState(meta.init, {"w": log_rate})
        return quadratic(QUERIES)(adapt(moved, quadratic(TARGETS), USERS, 1).state).mean()

    step = 1e-6
    numeric = (loss_at(meta.log_rate["w"] + step) - loss_at(meta.log_rate["w"] - step)) / (2 * step)
    torch.testing.assert_close(result.gradients["log_rate/w"], numeric.detach(), rtol=1e-6, atol=1e-9)


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


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_meta_learning_finds_the_initialization_that_adapts_best(algorithm: str) -> None:
    meta = meta_state(0.05)
    tensors = {name: value.clone() for name, value in meta.tensors().items()}
    for _ in range(300):
        result = ALGORITHMS[algorithm](
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
    result = fomaml(meta, exploding, quadratic(QUERIES), USERS, 3)
    two = fomaml(meta, quadratic(TARGETS[[0, 2]]), quadratic(QUERIES[[0, 2]]), 2, 3)
    assert result.diverged.tolist() == [False, True, False]
    for name, gradient in two.gradients.items():
        torch.testing.assert_close(result.gradients[name], gradient)


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
