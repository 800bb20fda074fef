"""The meta-learned language model, adapted to each user's support set, many users at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from metarec.data.interactions import Ratings
from metarec.lm.adapters import round_adapter
from metarec.lm.answer_model import Reader
from metarec.meta.inner_loop import Adapted, MetaState, adapt
from metarec.scorer import Request, check_codes
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.stack import Stacked
from metarec.scorers.language.linearized import Tangent
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
        bias_strength: Ratings that a user's level of zero counts for.
        head: Fit a head in closed form instead of taking steps; 0 steps still mean no adaptation.
        storage: Type that adapters are kept in; scores are those of the rounded adapter.
    """

    steps: int
    shrinkage: float
    bias_strength: float
    head: Head | None = None
    storage: torch.dtype = torch.float32


@dataclass(frozen=True)
class MetaScorer:
    """Adapts to a request's support and scores its candidates.

    Args:
        meta: The meta-learned parameters.
        reader: The language model.
        prior: The item prior.
        taste: What users of like taste say.
        inner: How users are adapted.
        threshold: Ratings from here on are likes.
        rate_scale: Factor on every inner rate; at 0 scores are exactly those before adaptation.
        name: How the method is called in tables.
    """

    meta: MetaState
    reader: Reader
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
            return self.reader.backbone.hidden_size * torch.float32.itemsize
        stored = self.reader.spec.tensor_shapes
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
            batch = candidates(codes, self.prior, self.reader, expected)
            with torch.no_grad():
                values = score(state, batch, self.reader).cpu()
            scores += [row[: len(request.candidates)] for row, request in zip(values, block, strict=True)]
        return scores

    @torch.no_grad()
    def adapt(self, supports: Sequence[Ratings], near: Tangent | None = None) -> Adapted:
        """Adapts to several users' ratings at once.

        Args:
            supports: One entry per user; an empty one keeps the initialization.
            near: The items at the initialization, which spares the first step the language model; it covers them all.

        Returns:
            Every user's state.
        """
        expected = [self.taste.leave_one_out(support) for support in supports]
        batch = collate(supports, self.prior, self.reader, self.threshold, expected=expected)
        adapted = self._solve(batch) if self.inner.head is not None and self._adapts else self._descend(batch, near)
        stored = round_adapter(adapted.state, self.reader.spec.tensor_shapes, self.inner.storage)
        return replace(adapted, state=stored)

    def _descend(self, batch: Batch, near: Tangent | None) -> Adapted:
        inner = partial(
            support_loss,
            batch,
            self.reader,
            shrinkage=self.inner.shrinkage,
            bias_strength=self.inner.bias_strength,
        )
        first = None if near is None else inner(near=near)
        steps = self.inner.steps if batch.real.shape[1] and self.inner.head is None else 0
        return adapt(self.meta, inner(), len(batch.real), steps, rate_scale=self.rate_scale, first=first)

    def _solve(self, batch: Batch) -> Adapted:
        assert self.inner.head is not None
        users = len(batch.real)
        solve = head_solver(batch, self.reader, self.inner.head, bias_strength=self.inner.bias_strength)
        state = solve(expand_users(self.meta.init, users))
        diverged = ~state[HEAD].isfinite().all(1)
        head = torch.where(diverged[:, None], 0.0, state[HEAD])
        return Adapted({**state, HEAD: head}, state[HEAD].new_zeros(0, users), diverged, ())
