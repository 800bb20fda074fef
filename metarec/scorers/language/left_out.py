"""Scores without each of a person's ratings, all of them in one pass that runs no language model.

The adapter's log-odds are linear around the initialization: what a gradient step on some ratings moves them by depends
on inner products of items' gradients alone. So the inner loop is run on the log-odds themselves, for all supports
that lack one rating together. The score's other terms are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec.data.interactions import Codes, Ratings
from metarec.meta.inner_loop import MetaState
from metarec.scorers.language.adapted import MetaScorer
from metarec.scorers.language.linearized import Linearized, linearize
from metarec.scorers.language.score import adapter_tensors, squared_error
from metarec.scorers.term import ADAPTER_TERM, LeavesOut, Term, weighted_sum
from metarec.system.tensors import AdapterState, expand_users


@dataclass(frozen=True)
class ItemSlopes:
    """How some items' log-odds move with the adapter, to first order, on the CPU.

    Args:
        start: How far the initialization moves the frozen model's log-odds, shape (items,).
        rows: Gradients, or their coordinates along some directions, shape (items, numbers).
        metrics: For every inner step what weighs the numbers: rates, shape (numbers,), or a matrix.
    """

    start: Tensor
    rows: Tensor
    metrics: tuple[Tensor, ...]

    def products(self, others: Tensor, step: int) -> Tensor:
        """Returns by how much a unit step on other items' log-odds moves these, shape (others, items)."""
        metric = self.metrics[step]
        weighed = others * metric if metric.ndim == 1 else others @ metric
        return weighed @ self.rows.T


def rates(meta: MetaState, step: int) -> Tensor:
    """Returns the inner rate of every number of the adapter at a step, in the order of `Linearized.slopes`."""
    start = {name: value for name, value in adapter_tensors(meta.init).items() if name in meta.log_rate}
    return torch.cat([meta.rate(name, step).detach().expand(value.shape).flatten() for name, value in start.items()])


def slopes_of(scorer: MetaScorer, items: Codes) -> ItemSlopes:
    """Reads the gradients of some items with the language model."""
    assert scorer.answer_model is not None
    chosen, places = np.unique(items, return_inverse=True)
    found: Linearized = linearize(scorer.answer_model, scorer.meta, chosen)
    start = (found.values - scorer.answer_model.frozen_log_odds(chosen))[places].cpu()
    metrics = tuple(rates(scorer.meta, step).cpu() for step in range(scorer.inner.steps))
    return ItemSlopes(start, found.slopes[places].cpu(), metrics)


def scores_without_each(
    scorer: MetaScorer, support: Ratings, codes: Codes, slopes: ItemSlopes | None
) -> NDArray[np.float32]:
    """Scores items for a person without each of their ratings, and with all.

    Args:
        scorer: The recommender's; its users take gradient steps, or are not adapted at all.
        support: What the person rated.
        codes: The items to score.
        slopes: Of the rated items, then of `codes`; None where the score has no adapter.

    Returns:
        Shape (ratings + 1, items); the last row is with all ratings.
    """
    count = len(support)
    rows = np.arange(count)
    supports = [support.rows(np.delete(rows, row)) for row in rows] + [support]
    real = torch.from_numpy(np.vstack([~np.eye(count, dtype=bool), np.ones((1, count), bool)]))
    target = torch.from_numpy(scorer.prior.standardize(support.values).astype(np.float32)).expand(len(supports), -1)
    both = {name: _without_each(term, supports, codes, real) for name, term in scorer.terms.items()}
    rated, asked = ({name: pair[place] for name, pair in both.items()} for place in (0, 1))
    state = {name: value.detach().cpu() for name, value in scorer.meta.init.items() if name.startswith("score.")}
    weights = expand_users(state, len(supports))
    adapted = [name for name in weights if name in scorer.meta.log_rate]
    here = torch.zeros(len(supports), count) if slopes is None else slopes.start[:count].expand(len(supports), -1)
    there = torch.zeros(len(supports), len(codes)) if slopes is None else slopes.start[count:].expand(len(supports), -1)
    weight = _weights(supports, real, scorer.inner.half_life)
    steps = scorer.inner.steps if count and scorer.meta.log_rate else 0
    for step in range(steps):
        leaves = {name: weights[name].detach().requires_grad_() for name in adapted}
        moved = here.detach().requires_grad_()
        with torch.enable_grad():
            total = _total({**weights, **leaves}, rated, None if slopes is None else moved)
            loss = squared_error(
                target - total,
                real,
                weight,
                shrinkage=scorer.inner.shrinkage,
                user_bias_damping=scorer.inner.user_bias_damping,
            )
            by = torch.autograd.grad(loss.sum(), [moved, *leaves.values()], allow_unused=True)
        for name, gradient in zip(leaves, by[1:], strict=True):
            assert gradient is not None
            weights[name] = weights[name] - scorer.rate_scale * scorer.meta.rate(name, step).detach().cpu() * gradient
        if slopes is not None and by[0] is not None:
            push = scorer.rate_scale * by[0] @ slopes.products(slopes.rows[:count], step)
            here, there = here - push[:, :count], there - push[:, count:]
    found: NDArray[np.float32] = _total(weights, asked, None if slopes is None else there).numpy()
    return found


def _without_each(term: Term, supports: Sequence[Ratings], codes: Codes, real: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a term's values of every support's ratings, 0 at the one that is left out, and of the items asked for."""
    if isinstance(term, LeavesOut) and len(supports[-1]):
        rated, asked = (_float32(part) for part in term.without_each(supports[-1], codes))
        return rated * real, asked
    values = torch.zeros(real.shape)
    values[real] = _float32(np.concatenate(term.leave_one_out(supports)))
    return values, _float32(np.stack(term.values(supports, [codes] * len(supports))))


def _float32(values: NDArray[np.floating]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _weights(supports: Sequence[Ratings], real: Tensor, half_life: float | None) -> Tensor | None:
    """Returns how much every support's ratings count, see `Batch.weight`; None where all count alike."""
    if half_life is None:
        return None
    ages = torch.zeros(real.shape)
    ages[real] = torch.from_numpy(np.concatenate([support.ages for support in supports]).astype(np.float32))
    return real * torch.exp2(-ages / half_life)


def _total(state: Mapping[str, Tensor], terms: Mapping[str, Tensor], moved: Tensor | None) -> Tensor:
    parts: AdapterState = {**terms, **({} if moved is None else {ADAPTER_TERM: moved})}
    return weighted_sum(state, parts)
