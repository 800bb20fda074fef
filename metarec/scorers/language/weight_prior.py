"""Fits a prior of users' weights on the language model's features, and the score term of what items have beside them.

The prior is where the head of `meta.algorithm: dkt` starts. It explains what the other terms of the score leave of
meta-training users' ratings, each by fits without that user; where there are no others, the ratings themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from metarec.config import LinearConfig
from metarec.data.interactions import Codes, Ratings, Values
from metarec.lm.answer_model import AnswerModel
from metarec.meta.heads import WeightPrior
from metarec.scorers.collaborative.linear_kernel import LearnedWeights, RatedRows, learn_weights, rated_rows
from metarec.scorers.term import CrossFitted, ItemValues, ScoreTerm, TermContext

# Its values come with the prior: see `fit_weight_prior`.
ITEM_EFFECTS = ScoreTerm(None, needs_model=True)
ITEM_EFFECTS_TERM = "item effects"


@dataclass(frozen=True)
class FittedPrior:
    """A prior of users' weights, and what items' means have beyond their features."""

    weights: WeightPrior
    item_effects: CrossFitted


def fit_weight_prior(
    context: TermContext,
    others: Mapping[str, CrossFitted],
    starts: Mapping[str, float],
    answer_model: AnswerModel,
    settings: LinearConfig,
    *,
    item_effects: bool,
) -> FittedPrior:
    """Fits the prior by expectation maximization; see `metarec.scorers.collaborative.linear_kernel`.

    Args:
        context: What the score's terms were fitted on.
        others: The score's other terms.
        starts: Their weights before meta-training.
        answer_model: The language model; its frozen states are the features.
        settings: Settings of the expectation maximization.
        item_effects: Whether items have means beyond their features, and so also what they are without each fold.
    """
    interactions, folds = context.interactions, context.stack.out_of_fold
    rows = rated_rows(interactions, context.users, lambda ratings: ratings.values)
    user = np.repeat(np.arange(len(context.users)), np.diff(rows.bounds))
    rows = RatedRows(rows.bounds, rows.item, _left_by(rows, context, others, starts))
    design = _design(answer_model, rows.item, len(interactions.catalog))

    def fit(kept: np.ndarray) -> LearnedWeights:
        bounds = np.searchsorted(user[kept], np.arange(len(context.users) + 1))
        present = np.unique(bounds)
        part = RatedRows(present, rows.item[kept], rows.value[kept])
        how = settings if item_effects else settings.model_copy(update={"item_damping": np.inf})
        return learn_weights(part, design, name="prior of users' weights", **how.model_dump())

    whole = fit(np.ones(len(user), bool))
    parts = []
    if item_effects:
        fold_of = np.array([folds.fold[interactions.users[code]] for code in context.users])
        for number, fold in enumerate(folds.folds):
            parts.append(fit((fold_of[user] != number) & ~fold.hidden.astype(bool)[rows.item]))
    device = answer_model.backbone.device
    mean, root = (torch.from_numpy(part).float().to(device) for part in (whole.weights, whole.root))
    effects = CrossFitted(_effects(whole), tuple(map(_effects, parts)), folds.fold if parts else {})
    return FittedPrior(WeightPrior(mean, root.contiguous(), whole.noise), effects)


def _effects(found: LearnedWeights) -> ItemValues:
    return ItemValues(found.items.astype(np.float32))


def _left_by(
    rows: RatedRows, context: TermContext, others: Mapping[str, CrossFitted], starts: Mapping[str, float]
) -> np.ndarray:
    """Returns standardized ratings minus what the other terms expect, shape (ratings,)."""
    left = context.stack.prior.standardize(rows.value.astype(np.float32)).astype(np.float64)
    for name, crossed in others.items():
        if starts[name] == 0:
            continue
        for code, start, end in zip(context.users, rows.bounds[:-1], rows.bounds[1:], strict=True):
            term = crossed.without(context.interactions.users[code])
            own = Ratings(rows.item[start:end], rows.value[start:end].astype(np.float32))
            left[start:end] -= starts[name] * term.leave_one_out([own])[0]
    return left


@torch.no_grad()
def _design(answer_model: AnswerModel, rated: Codes, items: int) -> Values:
    """Returns the frozen features of the items that anybody rated; of others nothing is read, shape (items, width)."""
    design = np.zeros((items, answer_model.backbone.hidden_size + 1), np.float32)
    read = np.unique(rated)
    design[read, :-1] = answer_model.features(answer_model.frozen_states(read)).float().cpu().numpy()
    design[:, -1] = 1.0
    return design
