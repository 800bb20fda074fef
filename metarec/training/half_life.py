"""The half-life of ratings by age, learned: by the outer loop's gradient, and beside a few values by validation users.

Its logarithm is a meta-parameter of the inner loop, which weights the support loss by it. It starts at the value that
orders validation users' items best before meta-training; afterwards what was learned stands beside the fixed values,
and the best one by validation users is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from metarec.config import RunConfig
from metarec.meta.inner_loop import MetaState
from metarec.scorers.language.score import LOG_HALF_LIFE
from metarec.training.fitting import Fitted

# In days, the longest first; None: all ratings count alike.
HALF_LIVES: tuple[float | None, ...] = (None, 1460.0, 365.0, 90.0, 30.0, 7.0)
Value = Callable[[Fitted], float]


def learns_by_gradient(config: RunConfig, meta: MetaState) -> bool:
    """Says whether the half-life is a meta-parameter: it is learned, and users take steps that the outer loop follows.

    learn2learn follows the adapted tensors alone, and a head in closed form reads no ages.
    """
    settings = config.meta
    batched = settings.engine == "batched" and settings.start == "initialization"
    return settings.half_life == "learned" and batched and settings.inner_steps > 0 and bool(meta.log_rate)


def started(fitted: Fitted, value: Value) -> Fitted:
    """Returns what is meta-trained with the half-life among its meta-parameters.

    It starts at the fixed value that is best before meta-training; at the longest one where none is, for a half-life
    without an end has no gradient.

    Args:
        fitted: What was fitted before meta-training.
        value: What validation users say of a recommender.
    """
    worth = _worth(fitted, value)
    best = max(worth, key=lambda days: worth[days])
    days = torch.tensor(float(best or HALF_LIVES[1] or 0)).log()
    device = next(iter(fitted.meta.init.values())).device
    return replace(fitted, meta=MetaState({**fitted.meta.init, LOG_HALF_LIFE: days.to(device)}, fitted.meta.log_rate))


def folded(fitted: Fitted) -> Fitted:
    """Returns a recommender whose half-life is a number of its training instead of a meta-parameter, if it was one."""
    if LOG_HALF_LIFE not in fitted.meta.init:
        return fitted
    init = dict(fitted.meta.init)
    days = math.exp(float(init.pop(LOG_HALF_LIFE)))
    return replace(fitted, meta=MetaState(init, fitted.meta.log_rate), training={**fitted.training, "half_life": days})


def chosen(fitted: Fitted, value: Value) -> Fitted:
    """Returns what was fitted with the half-life of ratings that orders validation users' items best.

    Where several are equally good, the longest fixed one is taken, before all of them none; a learned one has to be
    better.

    Args:
        fitted: What was meta-trained, `folded`.
        value: What validation users say of a recommender.
    """
    worth = _worth(fitted, value)
    learned = fitted.training.get("half_life")
    names = {days: "none" if days is None else f"{days:g}" for days in worth}
    if learned is not None and learned not in worth:
        worth[learned], names[learned] = value(fitted), f"by gradient {learned:.1f}"
    best = max(worth, key=lambda days: worth[days])
    values = {names[days]: found for days, found in worth.items()}
    return replace(fitted, training={**fitted.training, "half_life": best, "half_lives": values})


def _worth(fitted: Fitted, value: Value) -> dict[float | None, float]:
    return {days: value(replace(fitted, training={**fitted.training, "half_life": days})) for days in HALF_LIVES}
