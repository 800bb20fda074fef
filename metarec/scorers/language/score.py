"""Episodes become losses: what the score is made of, and what inner and outer loops minimize.

The score of user u for item i is

    score(u, i) = prior_weight_u prior(i) + taste_weight taste(u, i) + prompt_weight frozen(i)
                  + llm_weight (log_odds(i; adapter_u) - frozen(i))

in units of the rating's standard deviation: what the item's raters say, what users of like taste say, what the frozen
language model says, and what the adapter has learned that none of them knew. A fresh adapter adds exactly nothing.
Where a head is fitted in closed form (`metarec.meta.heads`), its product with the item's features is added. Knows
nothing of files, optimizers or statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from metarec.data.interactions import Codes, Ratings, Values
from metarec.lm.adapters import init_adapter
from metarec.lm.answer_model import AnswerModel
from metarec.lm.forward import ItemBatch
from metarec.meta.heads import prototype_head, ridge_head
from metarec.meta.inner_loop import Loss, MetaState, Solve, initial_meta_state
from metarec.meta.losses import pairwise_logistic
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.language.linearized import Linearized
from metarec.tensors import AdapterState

PRIOR_WEIGHT = "score.prior_weight"
TASTE_WEIGHT = "score.taste_weight"
PROMPT_WEIGHT = "score.prompt_weight"
LLM_WEIGHT = "score.llm_weight"
HEAD = "score.head"
LOG_PENALTY = "score.log_penalty"
LOG_SCALE = "score.log_scale"
Head = Literal["ridge", "prototypes"]


@dataclass(frozen=True)
class Batch:
    """Rated items of several users, padded to the longest.

    Args:
        item_batch: The items, ready for the language model, shape (users, items).
        prior: Item priors, shape (users, items).
        taste: What a collaborative method expects of the user beyond `prior`, shape (users, items).
        frozen: Log-odds of the items under the frozen model, around the catalog's mean, shape (users, items).
        target: Standardized ratings, shape (users, items).
        liked: Whether the label rule calls the rating a like, shape (users, items).
        real: False at padding, shape (users, items).
    """

    item_batch: ItemBatch
    prior: Tensor
    taste: Tensor
    frozen: Tensor
    target: Tensor
    liked: Tensor
    real: Tensor


def collate(
    ratings: Sequence[Ratings],
    prior: ItemPrior,
    answer_model: AnswerModel,
    threshold: float,
    *,
    means: Sequence[Values] | None = None,
    expected: Sequence[Values] | None = None,
) -> Batch:
    """Pads several users' ratings into one batch.

    Args:
        ratings: One entry per user.
        prior: The item prior.
        answer_model: The language model.
        threshold: Ratings from here on are likes.
        means: The items' priors, where they are not `prior`'s own: users whose ratings it knows need another one.
        expected: What a collaborative method that has not seen these ratings expects of each, in the prior's units;
            None where there is no such method.
    """
    width = max((len(rating) for rating in ratings), default=0)

    def pad(rows: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
        padded = torch.zeros(len(rows), width, dtype=dtype)
        for row, values in enumerate(rows):
            padded[row, : len(values)] = torch.from_numpy(values)
        return padded.to(answer_model.backbone.device)

    items = pad([rating.items for rating in ratings], torch.long)
    frozen = answer_model.frozen_log_odds - answer_model.frozen_mean
    if means is None:
        means = [prior.values(rating.items) for rating in ratings]
    beyond = [np.zeros_like(mean) for mean in means]
    if expected is not None:
        beyond = [value - mean for value, mean in zip(expected, means, strict=True)]
    return Batch(
        item_batch=answer_model.gather(items.cpu()),
        prior=pad(means, torch.float32),
        taste=pad(beyond, torch.float32),
        frozen=frozen[items],
        target=pad([prior.standardize(rating.values) for rating in ratings], torch.float32),
        liked=pad([rating.likes(threshold) for rating in ratings], torch.bool),
        real=pad([np.ones(len(rating), bool) for rating in ratings], torch.bool),
    )


def candidates(
    items: Sequence[Codes], prior: ItemPrior, answer_model: AnswerModel, expected: Sequence[Values] | None = None
) -> Batch:
    """Pads several users' unlabelled candidates; targets are zero and mean nothing."""
    unrated = [Ratings(codes, np.zeros(len(codes), np.float32)) for codes in items]
    return collate(unrated, prior, answer_model, np.inf, expected=expected)


def initial_state(
    answer_model: AnswerModel,
    *,
    inner_lr: float,
    llm_weight: float,
    seed: int,
    top_only: bool = False,
    steps_with_rates: int = 1,
    elementwise_rates: bool = False,
    head: Head | None = None,
) -> MetaState:
    """Returns the meta-parameters before any training: a fresh adapter and the score's weights.

    Args:
        answer_model: Says which adapters there are.
        inner_lr: Inner rate that every adapted tensor starts with.
        llm_weight: Weight of the adapter's log-odds at the start; the prior's and the taste's are one,
            the frozen model's zero.
        seed: Seed of the adapter's A.
        top_only: The inner loop adapts the topmost block alone; the others learn in the outer loop (ANIL, Raghu et
            al. 2020).
        steps_with_rates: Learn inner rates for each of so many steps.
        elementwise_rates: Learn an inner rate for every number (Meta-SGD, Li et al. 2017, eq. 2; there a rate may be
            negative, here it is positive).
        head: Fit users by such a head in closed form, and nothing by gradient steps.
    """
    adapter = init_adapter(answer_model.spec, torch.Generator().manual_seed(seed))
    weights = {PRIOR_WEIGHT: 1.0, TASTE_WEIGHT: 1.0, PROMPT_WEIGHT: 0.0, LLM_WEIGHT: llm_weight}
    weights |= {} if head is None else {LOG_PENALTY: 0.0} if head == "ridge" else {LOG_SCALE: -1.0}
    fresh = adapter | {name: torch.tensor(value) for name, value in weights.items()}
    init = {name: value.to(answer_model.backbone.device) for name, value in fresh.items()}
    if head is not None:
        return MetaState(init, {})
    top = f"{answer_model.backbone.layer_path}.{answer_model.backbone.model.config.num_hidden_layers - 1}."
    adapted = [name for name in adapter if name.startswith(top) or not top_only]
    return initial_meta_state(
        init, [*adapted, PRIOR_WEIGHT], inner_lr, steps=steps_with_rates, elementwise=elementwise_rates
    )


def score(state: Mapping[str, Tensor], batch: Batch, answer_model: AnswerModel) -> Tensor:
    """Scores every item of a batch under every user's state, shape (users, items)."""
    return _score_and_features(state, batch, answer_model)[0]


def _score_and_features(state: Mapping[str, Tensor], batch: Batch, answer_model: AnswerModel) -> tuple[Tensor, Tensor]:
    adapters = {name: value for name, value in state.items() if not name.startswith("score.")}
    states = answer_model.last_states(batch.item_batch, adapters)
    total = _mix(state, batch, answer_model, answer_model.answer(states))
    features = answer_model.features(states)
    if HEAD in state:
        total = total + (features @ state[HEAD].unsqueeze(-1)).squeeze(-1)
    return total, features


def _mix(state: Mapping[str, Tensor], batch: Batch, answer_model: AnswerModel, log_odds: Tensor) -> Tensor:
    parts = {
        PRIOR_WEIGHT: batch.prior,
        TASTE_WEIGHT: batch.taste,
        PROMPT_WEIGHT: batch.frozen,
        LLM_WEIGHT: log_odds - (batch.frozen + answer_model.frozen_mean),
    }
    return torch.stack([state[name][:, None] * part for name, part in parts.items()]).sum(0)


def head_solver(batch: Batch, answer_model: AnswerModel, head: Head, *, user_bias_damping: float) -> Solve:
    """Returns what fits every user's head to their ratings, given a state that all share.

    Args:
        batch: The support sets.
        answer_model: The language model; its features move with the shared adapter, so the outer loop can shape them.
        head: Which head.
        user_bias_damping: Ratings that the level zero counts for; see `support_loss`.
    """

    def solve(state: AdapterState) -> AdapterState:
        scores, features = _score_and_features(state, batch, answer_model)
        if head == "prototypes":
            fitted = prototype_head(features, batch.liked, batch.real, state[LOG_SCALE].exp())
        else:
            error = _around_level(batch.target - scores, batch.real, user_bias_damping)
            fitted = ridge_head(features, error, batch.real, state[LOG_PENALTY].exp())
        return {**state, HEAD: fitted}

    return solve


def _around_level(error: Tensor, real: Tensor, user_bias_damping: float) -> Tensor:
    """Takes each user's own level, shrunk towards zero, out of their errors; padding becomes zero."""
    kept = error * real
    return (kept - kept.sum(1, keepdim=True) / (real.sum(1) + user_bias_damping)[:, None]) * real


def support_loss(
    batch: Batch,
    answer_model: AnswerModel,
    *,
    shrinkage: float,
    user_bias_damping: float,
    linearized: Linearized | None = None,
) -> Loss:
    """Squared error on a user's ratings around the user's own level.

    The level is fitted in closed form, shrunk as if `user_bias_damping` ratings had been exactly as predicted. Dividing
    by the number of ratings plus `shrinkage` lets more ratings take longer steps, as a posterior would.

    Args:
        batch: The support sets.
        answer_model: The language model.
        shrinkage: Ratings that the initialization counts for.
        user_bias_damping: Ratings that the level zero counts for.
        linearized: Reads the items to first order around the initialization; there loss and gradient are the same.

    Returns:
        A loss with one number per user; zero for a user without ratings.
    """

    def loss(state: AdapterState) -> Tensor:
        if linearized is None:
            scores = score(state, batch, answer_model)
        else:
            scores = _mix(state, batch, answer_model, linearized.log_odds(batch.item_batch.items, state))
        error = _around_level(batch.target - scores, batch.real, user_bias_damping)
        return error.square().sum(1) / (batch.real.sum(1) + shrinkage)

    return loss


def pairwise_loss(batch: Batch, answer_model: AnswerModel, *, sharpness: float) -> Loss:
    """Logistic loss on every pair of a liked and a disliked item of a user: a smooth bound on 1 - AUC.

    Args:
        batch: The query sets.
        answer_model: The language model.
        sharpness: Factor on the score's differences.

    Returns:
        A loss with one number per user, see `pairwise_logistic`.
    """
    return lambda state: pairwise_logistic(score(state, batch, answer_model), batch.liked, batch.real, sharpness)
