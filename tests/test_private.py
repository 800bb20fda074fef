"""Federated meta-training with privacy: only clipped deltas leave users, and epsilon is what is published."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_recommenders import NO_MODEL, known_task

from metarec.config import PrivateConfig, RunConfig, validated
from metarec.errors import ConfigError
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import MetaState
from metarec.meta.private import check_private, clipped, epsilon, private_gradient
from metarec.recommender import MetaRecommender
from metarec.training import meta_training as training
from metarec.training.fitting import prepare
from metarec.training.meta_training import _batch, _meta_gradient, _private_gradient

pytest.importorskip("opacus")
META = MetaState({"a": torch.zeros(3)}, {})


@pytest.fixture(autouse=True)
def last_step_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at is what the steps learned, not which of them validation users would choose."""
    counter = itertools.count()
    monkeypatch.setattr(training, "validation_auc_of", lambda *_: float(next(counter)))


def config(**private: object) -> RunConfig:
    steps = {"train": {**NO_MODEL["train"], "steps": 4, "validate_every": 4}}
    return validated(RunConfig, {**NO_MODEL, **steps, **({"private": private} if private else {})}, "test")


def fitted(settings: RunConfig) -> MetaRecommender:
    return MetaRecommender(None, settings).fit(known_task())


def delta(*values: float, diverged: bool = False) -> MetaGradient:
    return MetaGradient(torch.ones(1), {"init/a": torch.tensor(values)}, torch.tensor([diverged]))


def summed(deltas: list[MetaGradient], **private: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return private_gradient(META, deltas, PrivateConfig(**private), 2.0, generator).gradients["init/a"]  # type: ignore[arg-type]


def test_noise_zero_and_no_bound_is_the_plain_run_bit_for_bit() -> None:
    plain, off = fitted(config()), fitted(config(noise=0.0, clip=None))
    assert plain.fitted.training["best_step"] == 4
    assert plain.digest != fitted(config(clip=1e-3)).digest
    for name, value in plain.fitted.meta.tensors().items():
        assert torch.equal(value, off.fitted.meta.tensors()[name])
    assert "privacy" not in off.fitted.training
    assert "private" not in config().model_dump(mode="json"), "identities are those of before there was a choice"


def test_deltas_of_all_users_without_noise_are_the_gradient_of_the_batch(model_dir: Callable[[str], Path]) -> None:
    """A wide bound, no noise and everybody taking part: user by user equals all at once."""
    data = known_task()
    count = len(data.parts["train"])
    settings = config(clip=1e9)
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"users": count})})
    prepared = prepare(data, settings, None)
    found = _private_gradient(data, prepared, settings, prepared.fitted.meta, 3)
    whole = _meta_gradient(prepared, settings, prepared.fitted.meta, _batch(data, prepared, settings, 3, count))
    assert float(torch.cat([value.flatten() for value in whole.gradients.values()]).abs().max()) > 1e-3
    for name, value in whole.gradients.items():
        torch.testing.assert_close(found.gradients[name], value, atol=1e-6, rtol=1e-4)
    assert len(found.loss) == 0, "nobody's loss leaves"


def test_a_delta_is_clipped_to_the_bound_and_one_that_diverged_is_left_out() -> None:
    assert clipped({"x": torch.tensor([3.0, 4.0])}, 1.0)["x"].tolist() == pytest.approx([0.6, 0.8])
    assert clipped({"x": torch.tensor([0.3, 0.4])}, 1.0)["x"].tolist() == pytest.approx([0.3, 0.4])
    assert clipped({"x": torch.tensor([3.0]), "y": torch.tensor([4.0])}, 1.0)["y"].tolist() == pytest.approx([0.8])
    assert clipped({"x": torch.tensor([float("nan")])}, None)["x"].tolist() == [0.0]
    found = summed([delta(3.0, 4.0, 0.0), delta(9.0, 9.0, 9.0, diverged=True)], clip=1.0)
    assert found.tolist() == pytest.approx([0.3, 0.4, 0.0]), "divided by how many are expected"


def test_noise_has_the_spread_that_the_settings_say() -> None:
    meta = MetaState({"a": torch.zeros(20_000)}, {})
    settings = PrivateConfig(clip=2.0, noise=1.5)
    found = private_gradient(meta, [], settings, 4.0, torch.Generator().manual_seed(1)).gradients["init/a"]
    assert float(found.std()) == pytest.approx(2.0 * 1.5 / 4.0, rel=0.02)
    assert abs(float(found.mean())) < 0.02


def test_one_user_moves_the_sum_by_the_bound_at_most() -> None:
    generator = np.random.default_rng(0)
    others = [delta(*generator.normal(size=3).tolist()) for _ in range(5)]
    with_one = summed([*others, delta(100.0, -50.0, 7.0)], clip=0.7, noise=1.0)
    assert float((with_one - summed(others, clip=0.7, noise=1.0)).norm()) * 2.0 <= 0.7 + 1e-5


def test_epsilon_is_that_of_the_published_accountants() -> None:
    """Abadi et al. 2016, section 5.2: q = .01, sigma = 4, delta = 1e-5, 10,000 steps give 1.26 by their moments.

    opacus's tighter conversion gives less; without sampling, one step of noise 1 has a closed bound.
    """
    found = epsilon(10_000, 0.01, PrivateConfig(clip=1.0, noise=4.0, delta=1e-5))
    assert 1.0 < found <= 1.26
    assert epsilon(20_000, 0.01, PrivateConfig(clip=1.0, noise=4.0)) > found
    assert epsilon(10_000, 0.01, PrivateConfig(clip=1.0, noise=8.0)) < found
    # Mironov 2017, corollary 3: alpha / (2 sigma^2) + log(1 / delta) / (alpha - 1), at its best alpha.
    alphas = np.linspace(1.1, 60, 2000)
    closed = (alphas / 2 + np.log(1e5) / (alphas - 1)).min()
    assert epsilon(1, 1.0, PrivateConfig(clip=1.0, noise=1.0)) <= closed
    assert epsilon(5, 0.1, PrivateConfig(clip=1.0)) == float("inf")


def test_a_private_run_states_its_epsilon_and_is_the_same_again() -> None:
    settings = config(clip=0.5, noise=1.0)
    first, again = fitted(settings), fitted(settings)
    said = first.fitted.training["privacy"]
    assert said["epsilon"] > 0
    assert (said["delta"], said["noise"], said["clip"], said["steps"]) == (1e-5, 1.0, 0.5, 4)
    assert said["sample_rate"] == pytest.approx(8 / 36)
    assert first.digest == again.digest
    assert first.digest != fitted(config(clip=0.5)).digest
    assert all(entry["query_loss"] is None for entry in first.fitted.training["history"])


@pytest.mark.parametrize(
    ("settings", "algorithm", "processes", "replay", "said"),
    [
        ({"secure_sum": True}, "fomaml", 1, 0.0, "no secure sum"),
        ({"noise": 1.0}, "fomaml", 1, 0.0, "without private.clip"),
        ({"clip": 1.0}, "maml", 1, 0.0, "fomaml or reptile"),
        ({"clip": 1.0}, "reptile", 2, 0.0, "one process"),
        ({"clip": 1.0}, "reptile", 1, 0.5, "replays no old users"),
    ],
)
def test_what_would_not_be_private_is_refused(
    settings: dict[str, object], algorithm: str, processes: int, replay: float, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_private(PrivateConfig(**settings), algorithm, processes, replay)  # type: ignore[arg-type]
