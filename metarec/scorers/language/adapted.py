"""The fitted score as a `Scorer`, which adapts to each user's support set, many users at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from metarec.config import Start
from metarec.data.interactions import Ratings
from metarec.lm.adapters import round_adapter
from metarec.lm.answer_model import AnswerModel
from metarec.meta.heads import ClosedFormHead, closed_form_head, takes_steps
from metarec.meta.inner_loop import Adapted, Loss, MetaState, adapt, per_user
from metarec.scorer import Request, check_codes, items_of
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.language.linearized import Linearized
from metarec.scorers.language.score import (
    HEAD,
    Batch,
    head_solver,
    new_user_head,
    posterior_support_loss,
    rated_batch,
    score_adapted,
    support_loss,
    with_head,
)
from metarec.scorers.term import Term
from metarec.system.tensors import expand_users
from metarec.system.threads import one_thread

# Larger batches need more memory and are not faster per user.
USERS_AT_ONCE = 16


@dataclass(frozen=True)
class InnerLoop:
    """How users are adapted.

    Args:
        steps: Gradient steps.
        shrinkage: Pseudo-count in the support loss's denominator.
        user_bias_damping: Damping: pseudo-ratings that shrink the user bias to 0.
        algorithm: The meta-algorithm; one with a head in closed form fits it instead of taking steps, and with 0 steps
            does not adapt.
        storage: Type that adapters are rounded to before scoring.
        start: Where gradient steps start; see `metarec.config.MetaConfig`.
        half_life: Days after which a rating counts half in gradient steps; None where all count alike.
    """

    steps: int
    shrinkage: float
    user_bias_damping: float
    algorithm: str = "fomaml"
    storage: torch.dtype = torch.float32
    start: Start = "initialization"
    half_life: float | None = None

    @property
    def head(self) -> ClosedFormHead | None:
        """The head in closed form, None where users have none."""
        return closed_form_head(self.algorithm, self.start, from_file=True)

    @property
    def takes_steps(self) -> bool:
        """Whether users take gradient steps."""
        return self.steps > 0 and takes_steps(self.algorithm, from_file=True)


@dataclass(frozen=True)
class MetaScorer:
    """Adapts to a request's support and scores its candidates.

    Args:
        meta: The meta-learned parameters.
        terms: The score's terms by name, without the adapter.
        prior: Item means; standardizes ratings.
        answer_model: The language model that carries the adapters; None where the score has no adapter.
        inner: How users are adapted.
        threshold: Ratings from here on are likes.
        rate_scale: Factor on every inner rate; at 0 scores are exactly those before adaptation.
        name: How the method is called in tables.
    """

    meta: MetaState
    terms: Mapping[str, Term]
    prior: ItemPrior
    answer_model: AnswerModel | None
    inner: InnerLoop
    threshold: float
    rate_scale: float = 1.0
    name: str = "metarec, adapted"

    @property
    def bytes_per_user(self) -> int:
        """Bytes of the adapted tensors as they are stored; 0 without adaptation."""
        if not self._adapts:
            return 0
        head = 0
        if self.inner.head is not None and self.answer_model is not None:
            head = self.answer_model.backbone.hidden_size * torch.float32.itemsize
        return head + sum(
            self.meta.init[name].numel() * (self.inner.storage if name in self._stored else torch.float32).itemsize
            for name in self.meta.log_rate
        )

    @property
    def _adapts(self) -> bool:
        return self.inner.steps > 0 and self.rate_scale != 0

    @property
    def _stored(self) -> Mapping[str, tuple[int, ...]]:
        return {} if self.answer_model is None else self.answer_model.spec.tensor_shapes

    @property
    def device(self) -> torch.device:
        """The device of the states."""
        return next(iter(self.meta.init.values())).device

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        check_codes(requests, len(self.prior.count))
        if self.answer_model is not None and requests:
            self.answer_model.read(items_of(requests))
        scores: list[Tensor] = []
        for start in range(0, len(requests), USERS_AT_ONCE):
            block = requests[start : start + USERS_AT_ONCE]
            supports = [request.support for request in block]
            scores += score_adapted(
                self.adapt(supports).state,
                supports,
                [request.candidates for request in block],
                self.terms,
                self.prior,
                self.answer_model,
                self.device,
            )
        return scores

    @torch.no_grad()
    def adapt(self, supports: Sequence[Ratings], linearized: Linearized | None = None) -> Adapted:
        """Adapts to several users' ratings at once.

        Args:
            supports: One entry per user; an empty one keeps the initialization.
            linearized: All items, linearized at the initialization; the first step then needs no language model.

        Returns:
            Every user's state.
        """
        if self._head is None and not (self.inner.steps and self.meta.log_rate):
            return self._unmoved(len(supports))
        batch = rated_batch(supports, self.terms, self.prior, self.answer_model, self.threshold, self.device)
        adapted = self._descend(batch, linearized) if self._head is None else self._solve(batch, *self._head)
        stored = round_adapter(adapted.state, self._stored, self.inner.storage)
        return replace(adapted, state=stored)

    def _unmoved(self, users: int) -> Adapted:
        """Returns the initialization for every user, for which nothing has to be read."""
        adapted = adapt(self.meta, lambda state: next(iter(state.values())), users, 0)
        return replace(adapted, state=round_adapter(adapted.state, self._stored, self.inner.storage))

    @property
    def _head(self) -> tuple[ClosedFormHead, AnswerModel] | None:
        head = self.inner.head
        return None if head is None or self.answer_model is None else (head, self.answer_model)

    def _descend(self, batch: Batch, linearized: Linearized | None) -> Adapted:
        inner = partial(
            support_loss,
            batch,
            self.answer_model,
            shrinkage=self.inner.shrinkage,
            user_bias_damping=self.inner.user_bias_damping,
            half_life=self.inner.half_life,
        )
        first = None if linearized is None else inner(linearized=linearized)
        return self._steps(batch, inner(), first)

    def _steps(self, batch: Batch, loss: Loss, first: Loss | None = None) -> Adapted:
        steps = self.inner.steps if batch.real.shape[1] and self.meta.log_rate else 0
        with one_thread(self.answer_model is None):
            return adapt(self.meta, loss, len(batch.real), steps, rate_scale=self.rate_scale, first=first)

    def _solve(self, batch: Batch, head: ClosedFormHead, answer_model: AnswerModel) -> Adapted:
        """Fits heads in closed form, after gradient steps where users take some."""
        users = len(batch.real)
        start = expand_users(self.meta.init, users)
        fresh = new_user_head(start, answer_model, head)
        unadapted = Adapted(with_head(start, fresh), fresh.new_zeros(0, users), fresh.new_zeros(users).bool(), ())
        if not self._adapts:
            return unadapted
        moved = replace(unadapted, state=start)
        if self.inner.takes_steps:
            loss = posterior_support_loss(batch, answer_model, shrinkage=self.inner.shrinkage)
            moved = self._steps(batch, loss)
        state = head_solver(batch, answer_model, head, user_bias_damping=self.inner.user_bias_damping)(moved.state)
        diverged = moved.diverged | ~state[HEAD].isfinite().all(1)
        kept = {
            name: torch.where(per_user(diverged, value), unadapted.state[name], value) for name, value in state.items()
        }
        return replace(moved, state=kept if diverged.any() else state, diverged=diverged)
