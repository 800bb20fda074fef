"""The meta-learned language model, adapted to each user's support set, many users at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from metarec.data.interactions import Ratings
from metarec.lm.adapters import round_adapter
from metarec.lm.answer_model import AnswerModel
from metarec.meta.inner_loop import Adapted, MetaState, adapt
from metarec.scorer import Request, check_codes
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.stack import Stacked
from metarec.scorers.language.linearized import Linearized
from metarec.scorers.language.score import HEAD, Batch, Head, candidates, collate, head_solver, score, support_loss
from metarec.tensors import expand_users

# Larger batches only cost memory: the work per user is the same.
USERS_AT_ONCE = 16


@dataclass(frozen=True)
class InnerLoop:
    """How users are adapted.

    Args:
        steps: Gradient steps.
        shrinkage: Ratings that the initialization counts for.
        user_bias_damping: Ratings that a user's level of zero counts for.
        head: Fit a head in closed form instead of taking steps; 0 steps still mean no adaptation.
        storage: Type that adapters are kept in; scores are those of the rounded adapter.
    """

    steps: int
    shrinkage: float
    user_bias_damping: float
    head: Head | None = None
    storage: torch.dtype = torch.float32


@dataclass(frozen=True)
class MetaScorer:
    """Adapts to a request's support and scores its candidates.

    Args:
        meta: The meta-learned parameters.
        answer_model: The language model.
        prior: The item prior.
        taste: What users of like taste say.
        inner: How users are adapted.
        threshold: Ratings from here on are likes.
        rate_scale: Factor on every inner rate; at 0 scores are exactly those before adaptation.
        name: How the method is called in tables.
    """

    meta: MetaState
    answer_model: AnswerModel
    prior: ItemPrior
    taste: Stacked
    inner: InnerLoop
    threshold: float
    rate_scale: float = 1.0
    name: str = "metarec, adapted"

    @property
    def bytes_per_user(self) -> int:
        """The adapted tensors' bytes as they are kept; none where nothing is adapted."""
        if not self._adapts:
            return 0
        if self.inner.head is not None:
            return self.answer_model.backbone.hidden_size * torch.float32.itemsize
        stored = self.answer_model.spec.tensor_shapes
        return sum(
            self.meta.init[name].numel() * (self.inner.storage if name in stored else torch.float32).itemsize
            for name in self.meta.log_rate
        )

    @property
    def _adapts(self) -> bool:
        return self.inner.steps > 0 and self.rate_scale != 0

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        check_codes(requests, len(self.prior.count))
        scores: list[Tensor] = []
        for start in range(0, len(requests), USERS_AT_ONCE):
            block = requests[start : start + USERS_AT_ONCE]
            state = self.adapt([request.support for request in block]).state
            codes = [request.candidates for request in block]
            expected = [self.taste.posterior_mean(request.support, request.candidates) for request in block]
            batch = candidates(codes, self.prior, self.answer_model, expected)
            with torch.no_grad():
                values = score(state, batch, self.answer_model).cpu()
            scores += [row[: len(request.candidates)] for row, request in zip(values, block, strict=True)]
        return scores

    @torch.no_grad()
    def adapt(self, supports: Sequence[Ratings], linearized: Linearized | None = None) -> Adapted:
        """Adapts to several users' ratings at once.

        Args:
            supports: One entry per user; an empty one keeps the initialization.
            linearized: All the items, linearized at the initialization: the first step then needs no language model.

        Returns:
            Every user's state.
        """
        expected = [self.taste.leave_one_out(support) for support in supports]
        batch = collate(supports, self.prior, self.answer_model, self.threshold, expected=expected)
        adapted = (
            self._solve(batch) if self.inner.head is not None and self._adapts else self._descend(batch, linearized)
        )
        stored = round_adapter(adapted.state, self.answer_model.spec.tensor_shapes, self.inner.storage)
        return replace(adapted, state=stored)

    def _descend(self, batch: Batch, linearized: Linearized | None) -> Adapted:
        inner = partial(
            support_loss,
            batch,
            self.answer_model,
            shrinkage=self.inner.shrinkage,
            user_bias_damping=self.inner.user_bias_damping,
        )
        first = None if linearized is None else inner(linearized=linearized)
        steps = self.inner.steps if batch.real.shape[1] and self.inner.head is None else 0
        return adapt(self.meta, inner(), len(batch.real), steps, rate_scale=self.rate_scale, first=first)

    def _solve(self, batch: Batch) -> Adapted:
        assert self.inner.head is not None
        users = len(batch.real)
        solve = head_solver(batch, self.answer_model, self.inner.head, user_bias_damping=self.inner.user_bias_damping)
        state = solve(expand_users(self.meta.init, users))
        diverged = ~state[HEAD].isfinite().all(1)
        head = torch.where(diverged[:, None], 0.0, state[HEAD])
        return Adapted({**state, HEAD: head}, state[HEAD].new_zeros(0, users), diverged, ())
