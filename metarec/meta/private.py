"""Federated meta-training with differential privacy, as a simulation over users.

Every user takes the inner steps on their own; only a delta of the meta-parameters leaves them: the meta-gradient of
FOMAML, or Reptile's difference. Each delta is clipped to a norm, the server adds them up with Gaussian noise and
divides by the expected number of users. Users take part in a step by independent draws. What is learned is then
(epsilon, delta)-private with respect to any one meta-training user.

It is a simulation: one process sees all users, and whoever knows the seed can take the noise away. There is no secure
sum, and a setting that asks for one is refused. `metarec.recommending.flower` computes the same with users at clients.

Sources: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", algorithm 1; Nichol, Achiam
and Schulman 2018, "On First-Order Meta-Learning Algorithms", for the deltas; Mironov, Talwar and Zhang 2019, "Renyi
Differential Privacy of the Sampled Gaussian Mechanism", for the accounting, by opacus.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from metarec.config import PrivateConfig
from metarec.errors import ConfigError
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import MetaState
from metarec.system.tensors import AdapterState

_FIRST_ORDER = ("fomaml", "reptile")


def check_private(settings: PrivateConfig, algorithm: str, processes: int, replay: float = 0.0) -> None:
    """Refuses what would not be private, or not be what it is called.

    Args:
        settings: The settings.
        algorithm: The meta-algorithm.
        processes: How many train together.
        replay: Share of replayed users, whose deltas nobody accounts for.

    Raises:
        ConfigError: Noise without a bound on deltas, a secure sum, another algorithm, several processes, replayed
            users, or opacus is not installed.
    """
    if not settings.on:
        return
    if settings.secure_sum:
        raise ConfigError(
            "private.secure_sum is true, and there is no secure sum here: one process sees every user's delta",
            "Leave it out; for a real one run the clients in a federated framework that brings it",
        )
    if settings.noise and settings.clip is None:
        raise ConfigError("private.noise without private.clip protects nobody", "Set private.clip, e.g. to 1")
    if algorithm not in _FIRST_ORDER:
        raise ConfigError(
            f"private meta-training sends deltas of fomaml or reptile, and meta.algorithm is {algorithm}",
            "Set meta.algorithm=reptile or fomaml",
        )
    if replay:
        raise ConfigError("private meta-training replays no old users", "Use train.anchor instead of train.replay")
    if processes > 1:
        raise ConfigError("private meta-training is a simulation in one process", "Start it without torchrun")
    if settings.noise:
        _accountant()


def clipped(delta: dict[str, Tensor], bound: float | None) -> dict[str, Tensor]:
    """Returns a user's delta, scaled down to a norm over all tensors where it is longer; zero where it is not finite.

    Args:
        delta: The tensors by name.
        bound: The norm; None leaves deltas as they are.
    """
    norm = torch.stack([value.float().square().sum() for value in delta.values()]).sum().sqrt()
    if not norm.isfinite():
        return {name: torch.zeros_like(value) for name, value in delta.items()}
    if bound is None or norm <= bound:
        return delta
    return {name: value * (bound / norm) for name, value in delta.items()}


def private_gradient(
    meta: MetaState,
    deltas: Iterable[MetaGradient],
    settings: PrivateConfig,
    expected: float,
    generator: torch.Generator,
) -> MetaGradient:
    """Returns the noised mean of users' clipped deltas; it says nothing else of the users, their losses neither.

    Args:
        meta: The meta-parameters.
        deltas: Each user's own meta-gradient; of a user who diverged nothing is taken.
        settings: Bound and noise.
        expected: How many users take part on average: dividing by how many did would tell.
        generator: Draws the noise.
    """
    return noised(summed(meta, deltas, settings.clip), settings, expected, generator)


def summed(meta: MetaState, deltas: Iterable[MetaGradient], bound: float | None) -> AdapterState:
    """Returns the sum of users' clipped deltas, by name of the meta-parameter.

    Args:
        meta: The meta-parameters.
        deltas: Each user's own meta-gradient; of a user who diverged nothing is taken.
        bound: See `clipped`.
    """
    total = {name: torch.zeros_like(value) for name, value in meta.tensors().items()}
    for delta in deltas:
        if bool(delta.diverged.any()):
            continue
        for name, value in clipped(delta.gradients, bound).items():
            total[name] = total[name] + value.to(total[name])
    return total


def noised(total: AdapterState, settings: PrivateConfig, expected: float, generator: torch.Generator) -> MetaGradient:
    """Returns a sum of clipped deltas as the noised mean that the outer loop follows.

    Args:
        total: The sum.
        settings: Bound and noise.
        expected: See `private_gradient`.
        generator: Draws the noise.
    """
    total = dict(total)
    spread = settings.noise * (settings.clip or 0.0)
    for name, value in total.items():
        if spread:
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
            value = value + spread * noise.to(value)
        total[name] = value / expected
    nobody = torch.zeros(0)
    return MetaGradient(nobody, total, nobody.bool())


def epsilon(steps: int, sample_rate: float, settings: PrivateConfig) -> float:
    """Returns the epsilon of so many steps at the settings' delta; infinite without noise.

    Args:
        steps: Steps of meta-training.
        sample_rate: The probability with which a user takes part in one.
        settings: Noise and delta.

    Raises:
        ConfigError: opacus is not installed.
    """
    if not settings.noise:
        return math.inf
    accountant = _accountant()()
    accountant.history = [(settings.noise, sample_rate, steps)]
    return float(accountant.get_epsilon(settings.delta))


def statement(steps: int, sample_rate: float, settings: PrivateConfig) -> dict[str, Any]:
    """Returns what can be said of the privacy of a training, as JSON values; epsilon is None where it is infinite."""
    found = epsilon(steps, sample_rate, settings)
    return {
        "epsilon": found if math.isfinite(found) else None,
        "delta": settings.delta,
        "noise": settings.noise,
        "clip": settings.clip,
        "sample_rate": sample_rate,
        "steps": steps,
        "of": "one meta-training user, in the meta-parameters; not in item means and collaborative terms, nor of "
        "validation users, by whom the best step is chosen",
    }


def _accountant() -> Callable[[], Any]:
    try:
        from opacus.accountants import RDPAccountant
    except ImportError:
        raise ConfigError(
            "opacus, which accounts for privacy, is not installed", "Run: pip install 'metarec[private]'"
        ) from None
    found: Callable[[], Any] = RDPAccountant
    return found
