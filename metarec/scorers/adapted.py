"""The meta-learned language model, adapted to each user's support set, many users at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metarec.interactions import Ratings
from metarec.meta import Adapted, MetaState, adapt
from metarec.objective import candidates, collate, score, support_loss
from metarec.priors import ItemPrior
from metarec.reader import Reader
from metarec.scorer import Request

# Larger batches only cost memory: the work per user is the same.
USERS_AT_ONCE = 16


@dataclass(frozen=True)
class InnerLoop:
    """How users are adapted.

    Args:
        steps: Gradient steps.
        shrinkage: Ratings that the initialization counts for.
        bias_strength: Ratings that a user's level of zero counts for.
    """

    steps: int
    shrinkage: float
    bias_strength: float


@dataclass(frozen=True)
class MetaScorer:
    """Adapts to a request's support and scores its candidates.

    Args:
        meta: The meta-learned parameters.
        reader: The language model.
        prior: The item prior.
        inner: How users are adapted.
        threshold: Ratings from here on are likes.
        rate_scale: Factor on every inner rate; at 0 scores are exactly those before adaptation.
        name: How the method is called in tables.
    """

    meta: MetaState
    reader: Reader
    prior: ItemPrior
    inner: InnerLoop
    threshold: float
    rate_scale: float = 1.0
    name: str = "metarec, adapted"

    @property
    def bytes_per_user(self) -> int:
        """The adapted tensors' bytes; none where nothing is adapted."""
        if self.inner.steps == 0 or self.rate_scale == 0:
            return 0
        return sum(self.meta.init[name].numel() * self.meta.init[name].element_size() for name in self.meta.log_rate)

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        scores: list[Tensor] = []
        for start in range(0, len(requests), USERS_AT_ONCE):
            block = requests[start : start + USERS_AT_ONCE]
            state = self.adapt([request.support for request in block]).state
            batch = candidates([request.candidates for request in block], self.prior, self.reader)
            with torch.no_grad():
                values = score(state, batch, self.reader).cpu()
            scores += [row[: len(request.candidates)] for row, request in zip(values, block, strict=True)]
        return scores

    @torch.no_grad()
    def adapt(self, supports: Sequence[Ratings]) -> Adapted:
        """Adapts to several users' ratings at once.

        Args:
            supports: One entry per user; an empty one keeps the initialization.

        Returns:
            Every user's state.
        """
        batch = collate(supports, self.prior, self.reader, self.threshold, seen=False)
        loss = support_loss(batch, self.reader, shrinkage=self.inner.shrinkage, bias_strength=self.inner.bias_strength)
        steps = self.inner.steps if batch.real.shape[1] else 0
        return adapt(self.meta, loss, len(supports), steps, rate_scale=self.rate_scale)
