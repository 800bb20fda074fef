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
from metarec.lm.answer_model import Reader
from metarec.lm.forward import Gathered
from metarec.meta.heads import prototype_head, ridge_head
from metarec.meta.inner_loop import Loss, MetaState, Solve, initial_meta_state
from metarec.meta.losses import pairwise_logistic
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.language.linearized import Tangent
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
        gathered: The items, ready for the language model, shape (users, items).
        prior: Item priors, shape (users, items).
        taste: What a collaborative method expects of the user beyond `prior`, shape (users, items).
        frozen: Log-odds of the items under the frozen model, around the catalog's mean, shape (users, items).
        target: Standardized ratings, shape (users, items).
        liked: Whether the label rule calls the rating a like, shape (users, items).
        real: False at padding, shape (users, items).
    """

    gathered: Gathered
    prior: Tensor
    taste: Tensor
    frozen: Tensor
    target: Tensor
    liked: Tensor
    real: Tensor


def collate(
    ratings: Sequence[Ratings],
    prior: ItemPrior,
    reader: Reader,
    threshold: float,
    *,
    means: Sequence[Values] | None = None,
    expected: Sequence[Values] | None = None,
) -> Batch:
    """Pads several users' ratings into one batch.

    Args:
        ratings: One entry per user.
        prior: The item prior.
        reader: The language model.
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
        return padded.to(reader.backbone.device)

    items = pad([rating.items for rating in ratings], torch.long)
    frozen = reader.frozen_log_odds - reader.frozen_mean
    if means is None:
        means = [prior.values(rating.items) for rating in ratings]
    beyond = [np.zeros_like(mean) for mean in means]
    if expected is not None:
        beyond = [value - mean for value, mean in zip(expected, means, strict=True)]
    return Batch(
        gathered=reader.gather(items.cpu()),
        prior=pad(means, torch.float32),
        taste=pad(beyond, torch.float32),
        frozen=frozen[items],
        target=pad([prior.standardize(rating.values) for rating in ratings], torch.float32),
        liked=pad([rating.likes(threshold) for rating in ratings], torch.bool),
        real=pad([np.ones(len(rating), bool) for rating in ratings], torch.bool),
    )


def candidates(
    items: Sequence[Codes], prior: ItemPrior, reader: Reader, expected: Sequence[Values] | None = None
) -> Batch:
    """Pads several users' unlabelled candidates; targets are zero and mean nothing."""
    unrated = [Ratings(codes, np.zeros(len(codes), np.float32)) for codes in items]
    return collate(unrated, prior, reader, np.inf, expected=expected)


def initial_state(
    reader: Reader,
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
        reader: Says which adapters there are.
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
    adapter = init_adapter(reader.spec, torch.Generator().manual_seed(seed))
    weights = {PRIOR_WEIGHT: 1.0, TASTE_WEIGHT: 1.0, PROMPT_WEIGHT: 0.0, LLM_WEIGHT: llm_weight}
    weights |= {} if head is None else {LOG_PENALTY: 0.0} if head == "ridge" else {LOG_SCALE: -1.0}
    fresh = adapter | {name: torch.tensor(value) for name, value in weights.items()}
    init = {name: value.to(reader.backbone.device) for name, value in fresh.items()}
    if head is not None:
        return MetaState(init, {})
    top = f"{reader.backbone.layer_path}.{reader.backbone.model.config.num_hidden_layers - 1}."
    adapted = [name for name in adapter if name.startswith(top) or not top_only]
    return initial_meta_state(
        init, [*adapted, PRIOR_WEIGHT], inner_lr, steps=steps_with_rates, elementwise=elementwise_rates
    )


def score(state: Mapping[str, Tensor], batch: Batch, reader: Reader) -> Tensor:
    """Scores every item of a batch under every user's state, shape (users, items)."""
    return _score_and_features(state, batch, reader)[0]


def _score_and_features(state: Mapping[str, Tensor], batch: Batch, reader: Reader) -> tuple[Tensor, Tensor]:
    adapters = {name: value for name, value in state.items() if not name.startswith("score.")}
    states = reader.last_states(batch.gathered, adapters)
    total = _mix(state, batch, reader, reader.answer(states))
    features = reader.features(states)
    if HEAD in state:
        total = total + (features @ state[HEAD].unsqueeze(-1)).squeeze(-1)
    return total, features


def _mix(state: Mapping[str, Tensor], batch: Batch, reader: Reader, log_odds: Tensor) -> Tensor:
    parts = {
        PRIOR_WEIGHT: batch.prior,
        TASTE_WEIGHT: batch.taste,
        PROMPT_WEIGHT: batch.frozen,
        LLM_WEIGHT: log_odds - (batch.frozen + reader.frozen_mean),
    }
    return torch.stack([state[name][:, None] * part for name, part in parts.items()]).sum(0)


def head_solver(batch: Batch, reader: Reader, head: Head, *, bias_strength: float) -> Solve:
    """Returns what fits every user's head to their ratings, given a state that all share.

    Args:
        batch: The support sets.
        reader: The language model; its features move with the shared adapter, so the outer loop can shape them.
        head: Which head.
        bias_strength: Ratings that the level zero counts for; see `support_loss`.
    """

    def solve(state: AdapterState) -> AdapterState:
        scores, features = _score_and_features(state, batch, reader)
        if head == "prototypes":
            fitted = prototype_head(features, batch.liked, batch.real, state[LOG_SCALE].exp())
        else:
            error = _around_level(batch.target - scores, batch.real, bias_strength)
            fitted = ridge_head(features, error, batch.real, state[LOG_PENALTY].exp())
        return {**state, HEAD: fitted}

    return solve


def _around_level(error: Tensor, real: Tensor, bias_strength: float) -> Tensor:
    """Takes each user's own level, shrunk towards zero, out of their errors; padding becomes zero."""
    kept = error * real
    return (kept - kept.sum(1, keepdim=True) / (real.sum(1) + bias_strength)[:, None]) * real


def support_loss(
    batch: Batch, reader: Reader, *, shrinkage: float, bias_strength: float, near: Tangent | None = None
) -> Loss:
    """Squared error on a user's ratings around the user's own level.

    The level is fitted in closed form, shrunk as if `bias_strength` ratings had been exactly as predicted. Dividing
    by the number of ratings plus `shrinkage` lets more ratings take longer steps, as a posterior would.

    Args:
        batch: The support sets.
        reader: The language model.
        shrinkage: Ratings that the initialization counts for.
        bias_strength: Ratings that the level zero counts for.
        near: Reads the items to first order around the initialization instead; there the loss and its gradient are the
            same.

    Returns:
        A loss with one number per user; zero for a user without ratings.
    """

    def loss(state: AdapterState) -> Tensor:
        if near is None:
            scores = score(state, batch, reader)
        else:
            scores = _mix(state, batch, reader, near.log_odds(batch.gathered.items, state))
        error = _around_level(batch.target - scores, batch.real, bias_strength)
        return error.square().sum(1) / (batch.real.sum(1) + shrinkage)

    return loss


def pairwise_loss(batch: Batch, reader: Reader, *, sharpness: float) -> Loss:
    """Logistic loss on every pair of a liked and a disliked item of a user: a smooth bound on 1 - AUC.

    Args:
        batch: The query sets.
        reader: The language model.
        sharpness: Factor on the score's differences.

    Returns:
        A loss with one number per user, see `pairwise_logistic`.
    """
    return lambda state: pairwise_logistic(score(state, batch, reader), batch.liked, batch.real, sharpness)
