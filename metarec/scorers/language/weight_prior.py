"""Fits a prior of users' weights on the language model's features, and the score term of what it expects of everybody.

The prior is where the head of `meta.algorithm: dkt` starts. It explains what the other terms of the score leave of
meta-training users' ratings, each by fits without that user; where there are no others, the ratings themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from metarec.config import LinearConfig
from metarec.data.interactions import Codes, Flags, Ratings, Values
from metarec.lm.answer_model import AnswerModel
from metarec.meta.heads import ClosedFormHead, WeightPrior
from metarec.meta.kept import kept_tensors
from metarec.scorers.collaborative.linear_kernel import LearnedWeights, RatedRows, learn_weights, rated_rows
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.term import AddedItems, CrossFitted, ScoreTerm, TermContext, same_without_each
from metarec.system.progress import progress
from metarec.system.tensors import AdapterState
from metarec.system.threads import map_each

# It is fitted together with the prior: see `fit_weight_prior`.
KERNEL_MEAN = ScoreTerm(None, needs_model=True)
KERNEL_MEAN_TERM = "kernel mean"
_KIND = "weight-prior"
# Raised whenever the same ratings and features lead to other weights.
_FORMAT = 1


@dataclass(frozen=True)
class KernelMean:
    """What an unknown user is expected to think of an item, by its features and by what its ratings say beside them.

    Args:
        answer_model: The language model; its frozen states are the features.
        weights: Mean of users' weights on the features, shape (features,).
        effects: What items' means have beyond their features, shape (items,); 0 for items added later.
    """

    answer_model: AnswerModel
    weights: Values
    effects: Values

    @torch.no_grad()
    def _of(self, codes: Codes) -> Values:
        read, places = np.unique(codes, return_inverse=True)
        features = self.answer_model.features(self.answer_model.frozen_states(read)).float().cpu().numpy()
        known = np.concatenate([self.effects, np.zeros(1, np.float32)])[np.minimum(read, len(self.effects))]
        values: Values = (features @ self.weights + known)[places]
        return values

    def values(self, supports: Sequence[Ratings], items: Sequence[Codes]) -> list[Values]:
        """See `Term.values`."""
        return [self._of(codes) for codes in items]

    def leave_one_out(self, supports: Sequence[Ratings]) -> list[Values]:
        """See `Term.leave_one_out`; it was fitted without the users' ratings."""
        return [self._of(support.items) for support in supports]

    def without_each(self, support: Ratings, items: Codes) -> tuple[Values, Values]:
        """See `LeavesOut.without_each`."""
        return same_without_each(self, support, items)

    def extended(self, added: AddedItems) -> KernelMean:
        """See `Term.extended`."""
        return replace(self, answer_model=added.answer_model)


@dataclass(frozen=True)
class FittedPrior:
    """A prior of users' weights.

    Args:
        weights: Fitted on all meta-training users.
        folds: Fitted without each fold of them, their directions turned to those of the whole.
        mean: The term of the mean; None where the score has no such term.
    """

    weights: WeightPrior
    folds: tuple[WeightPrior, ...]
    mean: CrossFitted | None


@dataclass(frozen=True)
class HeadStart:
    """Where a head in closed form starts, and the terms of the score with that of its prior's mean.

    Args:
        crossed: The fitted terms.
        parameters: The head's, for new users; None where there is no head.
        shifts: How far those without each fold of the meta-training users are from them; none where the head's start
            knows no users.
    """

    crossed: Mapping[str, CrossFitted]
    parameters: AdapterState | None
    shifts: tuple[AdapterState, ...] = ()


def fit_head_start(
    head: ClosedFormHead | None,
    terms: Mapping[str, ScoreTerm],
    crossed: Mapping[str, CrossFitted],
    context: TermContext,
    answer_model: AnswerModel | None,
    settings: LinearConfig,
) -> HeadStart:
    """Fits what a head and the term of the kernel's mean start from, where there are such.

    Args:
        head: The head; None where users have none.
        terms: The score's terms.
        crossed: Those that are fitted already.
        context: What they were fitted on.
        answer_model: The language model.
        settings: Settings of the expectation maximization.
    """
    mean_term, has_prior = KERNEL_MEAN_TERM in terms, head is not None and head.has_prior
    if not mean_term and not has_prior:
        return HeadStart(crossed, None if head is None else head.start(None))
    assert answer_model is not None
    starts = {name: terms[name].start for name in crossed}
    found = fit_weight_prior(context, crossed, starts, answer_model, settings, mean_term=mean_term)
    if found.mean is not None:
        crossed = {**crossed, KERNEL_MEAN_TERM: found.mean}
    if head is None:
        return HeadStart(crossed, None)
    parameters, parts = head.start(found.weights), [head.start(part) for part in found.folds if has_prior]
    shifts = tuple({name: part[name] - value for name, value in parameters.items()} for part in parts)
    return HeadStart(crossed, parameters, shifts)


def fit_weight_prior(
    context: TermContext,
    others: Mapping[str, CrossFitted],
    starts: Mapping[str, float],
    answer_model: AnswerModel,
    settings: LinearConfig,
    *,
    mean_term: bool,
) -> FittedPrior:
    """Fits the prior by expectation maximization; see `metarec.scorers.collaborative.linear_kernel`.

    Args:
        context: What the score's terms were fitted on.
        others: The score's other terms.
        starts: Their weights before meta-training.
        answer_model: The language model; its frozen states are the features.
        settings: Settings of the expectation maximization.
        mean_term: Whether the score has the term of the mean. The prior's own mean is 0 then, and otherwise items have
            no means beyond their features.
    """
    interactions, folds = context.interactions, context.stack.out_of_fold
    rows = rated_rows(interactions, context.users, lambda ratings: ratings.values)
    user = np.repeat(np.arange(len(context.users)), np.diff(rows.bounds))
    rows = RatedRows(rows.bounds, rows.item, _left_by(rows, context, others, starts))
    design = _design(answer_model, rows.item, len(interactions.catalog))

    how = settings if mean_term else settings.model_copy(update={"item_damping": np.inf})
    fold_of = np.array([folds.fold[interactions.users[code]] for code in context.users])
    parts = [np.ones(len(user), bool)]
    for number, fold in enumerate(folds.folds):
        parts.append((fold_of[user] != number) & ~fold.hidden.astype(bool)[rows.item])
    whole, *rest = _learned(rows, design, parts, how)
    device = answer_model.backbone.device

    def prior(found: LearnedWeights, root: Floats) -> WeightPrior:
        # The term has no bias: nobody's order depends on it, but a rating's error does.
        mean = np.concatenate([np.zeros(len(root) - 1), found.weights[-1:]]) if mean_term else found.weights
        on_device = [torch.from_numpy(np.ascontiguousarray(part)).float().to(device) for part in (mean, root)]
        return WeightPrior(on_device[0], on_device[1], found.noise)

    def term(found: LearnedWeights) -> KernelMean:
        return KernelMean(answer_model, found.weights[:-1].astype(np.float32), found.items.astype(np.float32))

    root = whole.root
    return FittedPrior(
        weights=prior(whole, root),
        folds=tuple(prior(part, turned(part.root, root)) for part in rest),
        mean=CrossFitted(term(whole), tuple(map(term, rest)), folds.fold) if mean_term else None,
    )


def _learned(
    rows: RatedRows, design: Values, parts: Sequence[Flags], settings: LinearConfig
) -> tuple[LearnedWeights, ...]:
    """Returns the weights that explain each part of the ratings, from the cache where they were learned before.

    Args:
        rows: The ratings.
        design: See `learn_weights`.
        parts: Which ratings each part has, each of shape (ratings,).
        settings: Settings of the expectation maximization.
    """
    users = len(rows.bounds) - 1
    user = np.repeat(np.arange(users), np.diff(rows.bounds))

    def fit(kept: Flags) -> LearnedWeights:
        bounds = np.unique(np.searchsorted(user[kept], np.arange(users + 1)))
        part = RatedRows(bounds, rows.item[kept], rows.value[kept])
        return learn_weights(part, design, name="prior of users' weights", **settings.model_dump(exclude={"shrinkage"}))

    def make(_: Path) -> AdapterState:
        with progress("fitting the prior of users' weights", len(parts), after=2.0) as advance:
            found = map_each(fit, parts, torch.get_num_threads(), advance)
        tensors: AdapterState = {}
        for number, one in enumerate(found):
            arrays = {
                "weights": one.weights,
                "covariance": one.covariance,
                "items": one.items,
                "noise": np.float64(one.noise),
            }
            tensors |= {f"{number} {name}": torch.as_tensor(value) for name, value in arrays.items()}
        return tensors

    arrays = (rows.bounds, rows.item, rows.value, design, *parts)
    identity = {
        "arrays": [hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in arrays],
        "settings": settings.model_dump_json(exclude={"shrinkage"}),
        "format": _FORMAT,
    }
    kept = {name: value.numpy() for name, value in kept_tensors(_KIND, identity, make).items()}
    return tuple(
        LearnedWeights(
            kept[f"{number} weights"],
            kept[f"{number} covariance"],
            kept[f"{number} items"],
            float(kept[f"{number} noise"]),
        )
        for number in range(len(parts))
    )


def turned(root: Floats, like: Floats) -> Floats:
    """Returns another root of the same covariance, the nearest one to a matrix.

    Args:
        root: Shape (width, directions).
        like: Shape (width, directions).

    Source: Schoenemann 1966, "A generalized solution of the orthogonal Procrustes problem", eq. 1.11.
    """
    left, _, right = np.linalg.svd(root.T @ like)
    nearest: Floats = root @ left @ right
    return nearest


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
