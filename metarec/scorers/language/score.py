"""The score of a user's items, and the inner and outer losses on it.

The score of user u for item i is a weighted sum of named terms,

    score(u, i) = sum over terms t of  weight_t  t(support of u, i)
                  + weight_adapter (log_odds(i; adapter of u) - log_odds(i; frozen model))

in standard deviations of the rating. `metarec.registries.TERMS` lists the terms; the last one, the adapter, depends on
the user's state and is exactly 0 for a fresh adapter. A head that is fitted in closed form (`metarec.meta.heads`) adds
its product with the item's features. Meta-training, evaluation, adaptation and the service all use `score`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarec.data.interactions import Codes, Ratings, Values
from metarec.lm.adapters import init_adapter
from metarec.lm.answer_model import AnswerModel
from metarec.lm.forward import ItemBatch
from metarec.meta.heads import ClosedFormHead, Support, leave_one_out_errors
from metarec.meta.inner_loop import INNER, Loss, MetaState, Solve, initial_meta_state
from metarec.meta.losses import Labels, QueryLoss
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.language.linearized import Linearized
from metarec.scorers.term import ADAPTER_TERM, ScoreTerm, Term, weight_name, weighted_sum
from metarec.system.tensors import AdapterState, pad_rows, to_device

ADAPTER = ScoreTerm(None, needs_model=True)
ADAPTER_WEIGHT = weight_name(ADAPTER_TERM)
# Natural logarithm of the days after which a rating counts half, while it is learned; see `metarec.training.half_life`.
LOG_HALF_LIFE = f"{INNER}log_half_life"
HEAD = "score.head"
# Names of what all users' heads share begin so.
HEAD_PARAMETER = "score.head."


@dataclass(frozen=True)
class Batch:
    """Items of several users, padded to the longest, with every term's values and their labels.

    Args:
        items: Item codes, shape (users, items).
        terms: Values of every term that does not depend on a user's state, by name, shape (users, items).
        item_batch: The items as input of the adapted language model; None where the score has no adapter.
        frozen: Log-odds of the items under the frozen model, shape (users, items); None where the score has no adapter.
        target: Standardized ratings, shape (users, items).
        liked: Whether the label rule calls the rating a like, shape (users, items).
        real: False at padding, shape (users, items).
        age: Days before each user's latest rating, shape (users, items).
    """

    items: Tensor
    terms: Mapping[str, Tensor]
    item_batch: ItemBatch | None
    frozen: Tensor | None
    target: Tensor
    liked: Tensor
    real: Tensor
    age: Tensor

    def weight(self, half_life: float | Tensor | None) -> Tensor:
        """Returns how much every rating counts: one, or half of it per half-life of its age; none at padding.

        Args:
            half_life: In days, or every user's, shape (users,); None where all ratings count alike.
        """
        if half_life is None:
            return self.real
        return self.real * torch.exp2(-self.age / (half_life[:, None] if isinstance(half_life, Tensor) else half_life))

    @property
    def labels(self) -> Labels:
        """The labels for the query loss."""
        return Labels(self.liked, self.target, self.real)


def collate(
    ratings: Sequence[Ratings],
    values: Mapping[str, Sequence[Values]],
    prior: ItemPrior,
    adapted: AnswerModel | None,
    threshold: float,
    device: torch.device | str = "cpu",
    width: int = 0,
) -> Batch:
    """Pads several users' ratings into one batch.

    Args:
        ratings: One entry per user.
        values: Every term's values of these items, by name, one array per user.
        prior: Standardizes ratings.
        adapted: The language model that carries the users' adapters; None where the score has no adapter.
        threshold: Ratings from here on are likes.
        device: The batch's device.
        width: See `AnswerModel.gather`.
    """
    codes = pad_rows([rating.items for rating in ratings], np.int64)
    items = to_device(codes, device)
    return Batch(
        items=items,
        terms={name: to_device(pad_rows(rows, np.float32), device) for name, rows in values.items()},
        item_batch=None if adapted is None else adapted.gather(codes, width),
        frozen=None if adapted is None else adapted.frozen_log_odds(codes.numpy()),
        target=to_device(pad_rows([prior.standardize(rating.values) for rating in ratings], np.float32), device),
        liked=to_device(pad_rows([rating.likes(threshold) for rating in ratings], bool), device),
        real=to_device(pad_rows([np.ones(len(rating), bool) for rating in ratings], bool), device),
        age=to_device(pad_rows([rating.ages for rating in ratings], np.float32), device),
    )


def rated_batch(
    supports: Sequence[Ratings],
    terms: Mapping[str, Term],
    prior: ItemPrior,
    adapted: AnswerModel | None,
    threshold: float,
    device: torch.device | str = "cpu",
) -> Batch:
    """Pads several users' ratings; every term's value of a rating is computed without that rating."""
    values = {name: term.leave_one_out(supports) for name, term in terms.items()}
    return collate(supports, values, prior, adapted, threshold, device)


def candidate_batch(
    supports: Sequence[Ratings],
    items: Sequence[Codes],
    terms: Mapping[str, Term],
    prior: ItemPrior,
    adapted: AnswerModel | None,
    device: torch.device | str = "cpu",
    width: int = 0,
) -> Batch:
    """Pads several users' unlabelled candidates; targets and likes are undefined."""
    values = {name: term.values(supports, items) for name, term in terms.items()}
    unrated = [Ratings(codes, np.zeros(len(codes), np.float32)) for codes in items]
    return collate(unrated, values, prior, adapted, np.inf, device, width)


@torch.no_grad()
def score_adapted(
    state: AdapterState,
    supports: Sequence[Ratings],
    items: Sequence[Codes],
    terms: Mapping[str, Term],
    prior: ItemPrior,
    adapted: AnswerModel | None,
    device: torch.device | str = "cpu",
    width: int = 0,
) -> list[Tensor]:
    """Scores several users' candidates under their adapted states.

    Args:
        state: The users' tensors, with a user dimension.
        supports: The ratings that the users were adapted to.
        items: Candidates, one array of codes per user.
        terms: The score's terms by name.
        prior: Standardizes ratings.
        adapted: The language model that carries the adapters; None where the score has no adapter.
        device: The state's device.
        width: See `AnswerModel.gather`.

    Returns:
        One tensor per user, of the shape of its candidates, on the CPU.
    """
    values = score(state, candidate_batch(supports, items, terms, prior, adapted, device, width), adapted).cpu()
    return [row[: len(codes)] for row, codes in zip(values, items, strict=True)]


def initial_state(
    terms: Mapping[str, ScoreTerm],
    answer_model: AnswerModel | None,
    *,
    inner_lr: float,
    adapter_weight: float,
    seed: int,
    top_only: bool = False,
    steps_with_rates: int = 1,
    elementwise_rates: bool = False,
    head: Mapping[str, Tensor] | None = None,
    steps: bool = True,
    device: torch.device | str = "cpu",
) -> MetaState:
    """Returns the meta-parameters before training: a fresh adapter and the score's weights.

    Args:
        terms: The score's terms by name.
        answer_model: The language model with adapters; None where the score has no adapter.
        inner_lr: Initial inner rate of every adapted tensor.
        adapter_weight: Initial weight of the adapter's log-odds.
        seed: Seed of the adapter's A.
        top_only: The inner loop adapts the topmost block alone; only the outer loop changes the others (ANIL, Raghu et
            al. 2020).
        steps_with_rates: Learn inner rates for each of so many steps.
        elementwise_rates: Learn an inner rate for every number (Meta-SGD, Li et al. 2017, eq. 2; there a rate may be
            negative, here it is positive).
        head: Parameters of a head that is fitted in closed form, before training.
        steps: Whether users take gradient steps.
        device: The tensors' device.
    """
    adapter: AdapterState = {}
    top = ""
    if answer_model is not None:
        adapter = init_adapter(answer_model.spec, torch.Generator().manual_seed(seed))
        backbone = answer_model.backbone
        top = f"{backbone.layer_path}.{backbone.modules.config.num_hidden_layers - 1}."
    weights = {
        weight_name(name): adapter_weight if name == ADAPTER_TERM else term.start for name, term in terms.items()
    }
    fresh = adapter | {name: torch.tensor(value) for name, value in weights.items()}
    fresh |= {f"{HEAD_PARAMETER}{name}": value for name, value in (head or {}).items()}
    init = {name: value.to(device) for name, value in fresh.items()}
    if not steps:
        return MetaState(init, {})
    adapted = [name for name in adapter if name.startswith(top) or not top_only]
    adapted += [weight_name(name) for name, term in terms.items() if term.adapted]
    return initial_meta_state(init, adapted, inner_lr, steps=steps_with_rates, elementwise=elementwise_rates)


def adapter_tensors(state: Mapping[str, Tensor]) -> AdapterState:
    """Returns a state's tensors that belong to the language model's adapter."""
    return {name: value for name, value in state.items() if not name.startswith("score.")}


def score(state: Mapping[str, Tensor], batch: Batch, adapted: AnswerModel | None) -> Tensor:
    """Scores every item of a batch under every user's state, shape (users, items)."""
    return _score_and_features(state, batch, adapted)[0]


def _score_and_features(
    state: Mapping[str, Tensor], batch: Batch, adapted: AnswerModel | None
) -> tuple[Tensor, Tensor | None]:
    if adapted is None:
        return weighted_sum(state, batch.terms), None
    assert batch.item_batch is not None
    states = adapted.last_states(batch.item_batch, adapter_tensors(state))
    total = _sum_with_adapter(state, batch, adapted.answer(states))
    features = adapted.features(states)
    if HEAD in state:
        total = total + (features @ state[HEAD].unsqueeze(-1)).squeeze(-1)
    return total, features


def _sum_with_adapter(state: Mapping[str, Tensor], batch: Batch, log_odds: Tensor) -> Tensor:
    assert batch.frozen is not None
    return weighted_sum(state, {**batch.terms, ADAPTER_TERM: log_odds - batch.frozen})


def head_parameters(state: Mapping[str, Tensor]) -> AdapterState:
    """Returns the parameters of a closed-form head, by the names that the head gives them."""
    return {
        name.removeprefix(HEAD_PARAMETER): value for name, value in state.items() if name.startswith(HEAD_PARAMETER)
    }


def with_shifted_head(state: Mapping[str, Tensor], shift: Mapping[str, Tensor]) -> AdapterState:
    """Returns users' states whose closed-form head has other parameters by a shift, with a user dimension."""
    return {**state, **{f"{HEAD_PARAMETER}{name}": state[f"{HEAD_PARAMETER}{name}"] + by for name, by in shift.items()}}


def with_head(state: Mapping[str, Tensor], head: Tensor) -> AdapterState:
    """Returns users' states with their heads, and without the parameters that all users' heads share."""
    return {**{name: value for name, value in state.items() if not name.startswith(HEAD_PARAMETER)}, HEAD: head}


def new_user_head(state: Mapping[str, Tensor], adapted: AnswerModel, head: ClosedFormHead) -> Tensor:
    """Returns the heads of users without ratings, shape (users, features)."""
    like = state[ADAPTER_WEIGHT]
    return head.fit(Support.empty(len(like), adapted.backbone.hidden_size, like), head_parameters(state))


def _full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Returns a context in which `torch.autocast`, where it is on for a tensor's device, is off."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def head_solver(batch: Batch, adapted: AnswerModel, head: ClosedFormHead, *, user_bias_damping: float) -> Solve:
    """Returns a function that fits every user's head, given a state without heads.

    Args:
        batch: The support sets.
        adapted: The language model; its features depend on the adapter in the state.
        head: Which head.
        user_bias_damping: See `support_loss`.
    """

    def solve(state: AdapterState) -> AdapterState:
        support = _support(state, batch, adapted, user_bias_damping)
        with _full_precision(batch.target):
            return with_head(state, head.fit(support, head_parameters(state)))

    return solve


def _support(state: AdapterState, batch: Batch, adapted: AnswerModel, user_bias_damping: float) -> Support:
    scores, features = _score_and_features(state, batch, adapted)
    assert features is not None
    error = batch.target - scores
    residual = _without_user_bias(error, batch.real, user_bias_damping)
    exact = features.to(torch.promote_types(features.dtype, batch.target.dtype))
    return Support(exact, error, residual, batch.liked, batch.real)


def _without_user_bias(error: Tensor, real: Tensor, damping: float, weight: Tensor | None = None) -> Tensor:
    """Subtracts each user's damped and weighted mean error; padding becomes 0."""
    kept = error * real
    if weight is None:
        return (kept - kept.sum(1, keepdim=True) / (real.sum(1) + damping)[:, None]) * real
    return (kept - (kept * weight).sum(1, keepdim=True) / (weight.sum(1) + damping)[:, None]) * real


def support_loss(
    batch: Batch,
    adapted: AnswerModel | None,
    *,
    shrinkage: float,
    user_bias_damping: float,
    linearized: Linearized | None = None,
    half_life: float | None = None,
) -> Loss:
    """Returns the squared error on a user's ratings around the user's bias.

    The bias is fitted in closed form. The sum is divided by the number of ratings plus a pseudo-count, so that gradient
    steps are longer for users with more ratings, like the change of a posterior mean.

    Args:
        batch: The support sets.
        adapted: The language model; None where the score has no adapter.
        shrinkage: Pseudo-count in the loss's denominator.
        user_bias_damping: Damping: pseudo-ratings that shrink the user bias to 0.
        linearized: Replaces the language model by its linearization; at the initialization loss and gradient are equal.
        half_life: Days after which a rating counts half, in the loss and in the bias; None where all count alike. A
            state that holds a `LOG_HALF_LIFE` has its own.

    Returns:
        A loss with one number per user; zero for a user without ratings.
    """
    fixed = None if half_life is None else batch.weight(half_life)

    def loss(state: AdapterState) -> Tensor:
        weight = batch.weight(state[LOG_HALF_LIFE].exp()) if LOG_HALF_LIFE in state else fixed
        if linearized is None:
            scores = score(state, batch, adapted)
        else:
            scores = _sum_with_adapter(state, batch, linearized.log_odds(batch.items, state))
        return squared_error(
            batch.target - scores,
            batch.real,
            weight,
            shrinkage=shrinkage,
            user_bias_damping=user_bias_damping,
        )

    return loss


def squared_error(
    error: Tensor, real: Tensor, weight: Tensor | None = None, *, shrinkage: float, user_bias_damping: float
) -> Tensor:
    """Returns every user's squared error around the user's bias, shape (users,); see `support_loss`.

    Args:
        error: Ratings minus scores, shape (users, items).
        real: False at padding, shape (users, items).
        weight: How much every rating counts, shape (users, items); None where all count alike.
        shrinkage: See `support_loss`.
        user_bias_damping: See `support_loss`.
    """
    around = _without_user_bias(error, real, user_bias_damping, weight).square()
    if weight is None:
        return around.sum(1) / (real.sum(1) + shrinkage)
    return (around * weight).sum(1) / (weight.sum(1) + shrinkage)


def posterior_support_loss(batch: Batch, adapted: AnswerModel, *, shrinkage: float) -> Loss:
    """Returns the squared error of each rating's prediction by the posterior given the user's other ratings.

    The posterior knows the support, so that its errors on the support say little of what is to be learned from it.

    Args:
        batch: The support sets.
        adapted: The language model.
        shrinkage: See `support_loss`.
    """

    def loss(state: AdapterState) -> Tensor:
        support = _support(state, batch, adapted, 1.0)
        errors = leave_one_out_errors(support.features, support.error, support.real, head_parameters(state))
        return errors.square().sum(1) / (batch.real.sum(1) + shrinkage)

    return loss


def query_loss(batch: Batch, adapted: AnswerModel | None, loss: QueryLoss, *, sharpness: float) -> Loss:
    """Returns a loss of `metarec.meta.losses` as a function of the users' states.

    Args:
        batch: The query sets.
        adapted: The language model; None where the score has no adapter.
        loss: The loss on scores and labels.
        sharpness: Factor on scores or on their differences.
    """
    return lambda state: loss(score(state, batch, adapted), batch.labels, sharpness)
