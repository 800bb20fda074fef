"""A user's adapter as a posterior, as gradient steps, and as steps on top of the posterior: three inner loops.

All share the population's part of the score, so that rows differ by what a user's ratings change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from metarec.bench.context import Method, MethodContext, MethodRow
from metarec.bench.methods.recommenders import recommender_row, trained_recommender

if TYPE_CHECKING:
    from metarec.config import Start
    from metarec.recommender import MetaRecommender
    from metarec.scorers.language.adapted import MetaScorer

_STEPS = (1, 3, 10)
# Factors on the learned inner rates, of which validation users choose one for each number of steps.
_RATE_SCALES = (0.3, 1.0, 3.0, 10.0)
_TUNING_USERS = 24
_SCORE: Mapping[str, Any] = {
    "score": ["kernel mean", "adapter"],
    "collaborative.features": ["fields"],
    "collaborative.members": "none",
}


def _posterior(context: MethodContext, **options: Any) -> Sequence[MethodRow]:
    """Returns the posterior alone, and what it expects before any rating."""
    recommender = trained_recommender(context, options)
    rows = [("posterior", None), ("posterior, no adaptation", 0)]
    return [recommender_row(recommender, recommender.scorer(steps=steps, name=name)) for name, steps in rows]


def _with_steps(context: MethodContext, *, start: Start, **options: Any) -> Sequence[MethodRow]:
    """Returns users after each number of steps from a start, each at the rate that is best for validation users."""
    recommender = trained_recommender(context, {"meta.start": start, **options})
    rows = []
    for steps in _STEPS:
        name = f"{start} + {steps} step{'s' if steps > 1 else ''}"
        scorer = replace(_best_rate(recommender, context, steps), name=name)
        rows.append(recommender_row(recommender, scorer))
    return rows


def _best_rate(recommender: MetaRecommender, context: MethodContext, steps: int) -> MetaScorer:
    from metarec.evaluation.evaluate import validation_auc

    shots = [count for count in context.data.task.shots if count > 0]
    users = context.validation[:_TUNING_USERS]
    scorers = [recommender.scorer(steps=steps, rate_scale=scale) for scale in _RATE_SCALES]
    return max(scorers, key=lambda scorer: validation_auc(scorer, users, shots, context.threshold))


POSTERIOR = {
    "posterior": Method(
        _posterior,
        "inner loop",
        "the adapter is the posterior given the support, in closed form (dkt)",
        {**_SCORE, "meta.algorithm": "dkt"},
    ),
    "posterior + steps": Method(
        _with_steps,
        "inner loop",
        "1, 3 and 10 gradient steps on top of the posterior, at rates chosen by validation users",
        {**_SCORE, "start": "posterior"},
    ),
    "initialization + steps": Method(
        _with_steps,
        "inner loop",
        "1, 3 and 10 gradient steps from the initialization, at rates chosen by validation users",
        {**_SCORE, "start": "initialization"},
    ),
}
