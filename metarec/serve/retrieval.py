"""Chooses the items of a catalog that are worth an exact score, from approximate scores of all.

The score's other terms are exact; the adapter's is approximated to first order. Near the initialization an item's
log-odds move along their gradient. Gradients of different items are much alike, so that few principal directions hold
most of them, and an item is kept as its coordinates along these. A head that is fitted in closed form is linear in the
item's features: there the features are the coordinates, and the effect is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec.adapted_user import CANDIDATES, AdaptedUser
from metarec.data.interactions import Codes
from metarec.evaluation.metrics import leaders
from metarec.lm.answer_model import AnswerModel
from metarec.meta.inner_loop import MetaState
from metarec.recommender import MetaRecommender
from metarec.scorers.language.adapted import InnerLoop, MetaScorer
from metarec.scorers.language.left_out import ItemSlopes, rates, slopes_of
from metarec.scorers.language.linearized import Linearized, linearize
from metarec.scorers.language.score import ADAPTER_WEIGHT, HEAD, adapter_tensors
from metarec.scorers.term import ADAPTER_TERM, weighted_sum
from metarec.system.progress import progress
from metarec.system.tensors import expand_users

_DIRECTIONS = 128
_SAMPLE = 1024
_READ_AT_ONCE = 512
# Of a larger catalog the language model reads what the other terms put in front, and never all.
WHOLE_CATALOG = 20_000
_SMALLEST = 1e-7


@dataclass(frozen=True)
class Effects:
    """The effect of an adapter on every item's score, linear in the adapter.

    Args:
        names: Tensors that differ between users, one after another.
        directions: Shape (numbers in those tensors, coordinates); None where the tensors are used as they are.
        coordinates: Shape (items, coordinates).
    """

    names: tuple[str, ...]
    directions: Tensor | None
    coordinates: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.coordinates)

    def __call__(self, state: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """Returns how far every item's score moves, shape (items,).

        Args:
            state: A user's tensors, without a user dimension.
            start: A new user's tensors.
        """
        if not self.names:
            return np.zeros(len(self), np.float32)
        moved = torch.cat([(state[name] - start.get(name, 0.0)).flatten() for name in self.names])
        along = moved if self.directions is None else moved @ self.directions
        effect = torch.from_numpy(self.coordinates) @ along.cpu()
        if self.directions is not None:  # of the log-odds; a head's product has no weight
            weights = {ADAPTER_WEIGHT: state[ADAPTER_WEIGHT].cpu()}
            effect = weighted_sum(expand_users(weights, 1), {ADAPTER_TERM: effect[None]})[0]
        values: NDArray[np.float32] = effect.numpy()
        return values


def fit_effects(answer_model: AnswerModel | None, meta: MetaState, inner: InnerLoop) -> Effects:
    """Fits the principal directions; no item has coordinates yet.

    Args:
        answer_model: The language model over the catalog that was trained on; None where the score has no adapter.
        meta: The meta-parameters.
        inner: How users are adapted.
    """
    if answer_model is None:
        return Effects((), None, np.zeros((0, 0), np.float32))
    names = tuple(adapter_tensors(meta.log_rate))
    if inner.head is not None and inner.steps:
        return Effects((HEAD,), None, np.zeros((0, answer_model.backbone.hidden_size), np.float32))
    if not inner.steps or not names:
        return Effects((), None, np.zeros((0, 0), np.float32))
    items = len(answer_model.prompts.tokens)
    slopes = linearize(answer_model, meta, np.unique(np.linspace(0, items - 1, _SAMPLE).astype(np.int64))).slopes
    # The principal components of few long rows, from their inner products; not every accelerator has float64.
    values, vectors = torch.linalg.eigh((slopes @ slopes.T).cpu().double())
    top = values.argsort(descending=True)[:_DIRECTIONS]
    top = top[values[top] > _SMALLEST * values.max()]
    directions = slopes.T @ (vectors[:, top] * values[top].rsqrt()).to(slopes)
    return Effects(names, directions, np.zeros((0, directions.shape[1]), np.float32))


@torch.no_grad()
def extended(
    effects: Effects, answer_model: AnswerModel | None, meta: MetaState, items: int, linearized: Linearized | None
) -> Effects:
    """Computes the coordinates of the items that have none.

    Args:
        effects: Effects on the first items of the catalog.
        answer_model: The language model.
        meta: The meta-parameters.
        items: How many items there are.
        linearized: Holds gradients of some items, which are not computed again.
    """
    fresh = np.arange(len(effects), items)
    coordinates = np.zeros((len(fresh), effects.coordinates.shape[1]), np.float32)
    unread = np.arange(len(fresh))
    if linearized is not None and effects.directions is not None:
        inside = np.flatnonzero(fresh < len(linearized.place))
        rows = linearized.place[torch.from_numpy(fresh[inside])].numpy()
        covered = inside[rows >= 0]
        coordinates[covered] = (linearized.slopes @ effects.directions).cpu().numpy()[rows[rows >= 0]]
        unread = np.setdiff1d(unread, covered)
    count = len(unread) if effects.names and answer_model is not None else 0
    blocks = [unread[start : start + _READ_AT_ONCE] for start in range(0, count, _READ_AT_ONCE)]
    with progress("reading items for retrieval", len(blocks), after=2.0) as advance:
        for done, block in enumerate(blocks, start=1):
            assert answer_model is not None
            coordinates[block] = _read(effects, answer_model, meta, fresh[block])
            advance(done)
    return replace(effects, coordinates=np.concatenate([effects.coordinates, coordinates]))


def _read(effects: Effects, answer_model: AnswerModel, meta: MetaState, items: Codes) -> NDArray[np.float32]:
    if effects.directions is not None:
        found = linearize(answer_model, meta, items).slopes @ effects.directions
    else:
        adapter = adapter_tensors(meta.init)
        item_batch = answer_model.gather(torch.from_numpy(items)[None])
        found = answer_model.features(answer_model.last_states(item_batch, expand_users(adapter, 1)))[0]
    coordinates: NDArray[np.float32] = found.float().cpu().numpy()
    return coordinates


def is_small(items: int) -> bool:
    """Says whether a catalog of so many items is gone through before the first answer."""
    return items <= WHOLE_CATALOG


def reads_all(trained: MetaRecommender) -> bool:
    """Says whether the language model, if there is one, reads the whole catalog before the first ranking.

    It does not where that would take long, or be done for every user, and other terms can say which items are worth it.
    """
    fitted = trained.fitted
    if fitted.answer_model is None or not fitted.cheap_terms:
        return True
    return is_small(len(fitted.catalog)) and not fitted.reads_person


class CandidateRetrieval:
    """Approximate scores of a whole catalog, and the choice of candidates by them.

    Args:
        trained: The recommender, without items that were added later.
        linearized: Gradients of some items at the initialization, where they are there already.
        effects: Effects on the first items, where they are there already.
        new_user_scores: Scores of the first items for a user without ratings, where they are there already.
        each: Calls a function with each of several blocks of items; see `AdaptedUser.term_scores`.
    """

    def __init__(
        self,
        trained: MetaRecommender,
        linearized: Linearized | None,
        effects: Effects | None = None,
        new_user_scores: NDArray[np.float32] | None = None,
        each: Callable[..., Iterable[Any]] = map,
    ) -> None:
        self._trained = trained
        self._each = each
        self._linearized = linearized
        self._effects = effects
        self._metrics: tuple[Tensor, ...] = ()
        self._scores = np.zeros(0, np.float32) if new_user_scores is None else new_user_scores
        self._terms: NDArray[np.float32] | None = None

    def update(self, new_user: AdaptedUser) -> None:
        """Takes a longer catalog; once somebody has ranked, what was added to it is scored at once.

        Args:
            new_user: A user without ratings, of the recommender over the current catalog.
        """
        self._new_user = new_user
        if self._terms is not None:
            self._terms = self._score_items()

    @property
    def new_user_scores(self) -> NDArray[np.float32]:
        """Scores of every item for a user without ratings; the first call reads the catalog, if there is a model."""
        self._terms_of_new_user()
        return self._scores

    def _terms_of_new_user(self) -> NDArray[np.float32]:
        """Returns what the terms say of every item for a user without ratings."""
        if self._terms is None:
            self._terms = self._score_items()
        return self._terms

    def _score_items(self) -> NDArray[np.float32]:
        """Scores the items that have no score yet for a user without ratings; returns what the terms say of all."""
        new_user = self._new_user
        items = len(new_user.fitted.catalog)
        if not reads_all(self._trained):
            self._scores = new_user.term_scores(new_user.fitted.cheap_terms)
            return self._scores
        if len(self._scores) < items:
            fresh = new_user.scores(np.arange(len(self._scores), items)).numpy()
            self._scores = np.concatenate([self._scores, fresh])
        return new_user.term_scores()

    def prepare(self) -> Effects:
        """Returns the effect of an adapter on every item; computes it, and scores, for the items that lack them.

        Of a catalog that is too large to be read, no item has one.
        """
        self._terms_of_new_user()
        if not reads_all(self._trained):
            return Effects((), None, np.zeros((len(self._new_user.fitted.catalog), 0), np.float32))
        meta = self._trained.fitted.meta
        if self._effects is None:
            self._effects = fit_effects(self._trained.adapted_model, meta, self._trained.scorer().inner)
        new_user = self._new_user
        items = len(new_user.fitted.catalog)
        if len(self._effects) < items:
            self._effects = extended(self._effects, new_user.adapted_model, meta, items, self._linearized)
        return self._effects

    def slopes(self, scorer: MetaScorer, items: Codes) -> ItemSlopes:
        """Returns how some items' log-odds move with the adapter: as kept of every item, or else read here.

        Args:
            scorer: The recommender's, over the current catalog; its users take gradient steps.
            items: The items.
        """
        effects = self._effects
        if effects is None or effects.directions is None or len(effects) <= items.max(initial=0):
            return slopes_of(scorer, items)
        if not self._metrics:
            along = effects.directions
            by_step = (rates(scorer.meta, step)[:, None] * along for step in range(scorer.inner.steps))
            self._metrics = tuple((along.T @ weighed).cpu() for weighed in by_step)
        moved = self.new_user_scores[items] - self._terms_of_new_user()[items]
        start = torch.from_numpy(moved) / self._new_user.state[ADAPTER_WEIGHT].cpu()
        return ItemSlopes(start, torch.from_numpy(effects.coordinates[items]), self._metrics)

    def choose(self, adapted: AdaptedUser, codes: Codes, count: int) -> Codes:
        """Returns the items of `codes` with the best approximate scores, in order of code.

        Args:
            adapted: The user.
            codes: The items to choose from.
            count: How many; where there are fewer, all are returned and nothing is computed.
        """
        state, start = adapted.state, self._new_user.state
        scores = self.new_user_scores
        if not reads_all(self._trained):
            count = max(count, CANDIDATES)
            if len(codes) > count:
                scores = np.nan_to_num(adapted.term_scores(adapted.fitted.cheap_terms, self._each))
        elif len(codes) > count and (state is not start or adapted.support.side is not None):
            moved = adapted.term_scores(None, self._each) - self._terms_of_new_user() + self.prepare()(state, start)
            scores = scores + np.nan_to_num(moved)
        ours = scores[codes]
        front = leaders(ours, count)
        best = front[np.argsort(-ours[front], kind="stable")[:count]]
        chosen: Codes = np.sort(codes[best])
        return chosen
