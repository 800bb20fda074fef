"""Trains a sentence encoder's LoRA through users' posteriors: deep kernel transfer over the texts of items.

A user's weights on the features of items are a draw whose mean and covariance expectation maximization has learned; the
support gives their posterior in closed form. The loss of a query's ranking by that posterior flows into the LoRA of
the encoder's topmost blocks, whose vectors are some of the features. What enters these blocks comes from the cache.

Each half of the meta-training users is asked under the mean and covariance of the other half: a user who has helped to
learn them would find them better than a new one does. Where a task asks about items that nobody rated, the mean and
covariance are learned without a fold of the items, and queries are about the fold.

Sources: Patacchiola et al. 2020, "Bayesian meta-learning for the few-shot setting via deep kernels"; Harrison, Sharma
and Pavone 2018, "Meta-learning priors for efficient online Bayesian regression".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from metarec.config import LinearConfig, PosteriorTuningConfig
from metarec.data.episodes import Episode, training_batch
from metarec.data.interactions import Codes, Flags, Ratings, Values
from metarec.evaluation.evaluate import validation_auc
from metarec.lm.answer_model import AnswerModel
from metarec.meta.algorithms import MetaGradient
from metarec.meta.heads import WeightPrior, posterior_head, posterior_parameters
from metarec.meta.inner_loop import MetaState
from metarec.meta.losses import pairwise_logistic
from metarec.scorers.collaborative.features import side_by_side
from metarec.scorers.collaborative.linear_kernel import (
    LinearPrior,
    fit_linear_prior,
    linear_process,
    with_bias,
)
from metarec.scorers.collaborative.residuals import Floats
from metarec.system.tensors import AdapterState, expand_users, pad_rows, read_by_length

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData

_TEXTS_AT_ONCE = 32
# Queries need a liked and a disliked item at least.
_MIN_QUERY = 2
# Where unrated items are queried: parts of the items, each left out once from the ratings that a prior is learned from.
_ITEM_FOLDS = 4


@dataclass(frozen=True)
class Half:
    """Meta-training users whose queries train the LoRA, and what the other users' ratings say of users' weights.

    Args:
        users: The users.
        prior: What the other users' ratings say, those of hidden items left out.
        hidden: The items that queries are about, and supports are not, shape (items,); None for any.
    """

    users: Codes
    prior: LinearPrior
    hidden: Flags | None = None

    def head(self, dtype: torch.dtype) -> AdapterState:
        """Returns the parameters of `posterior_head`."""
        mean, root = (torch.from_numpy(part).to(dtype) for part in (self.prior.weights, self.prior.root))
        return posterior_parameters(WeightPrior(mean, root, self.prior.noise))


@dataclass(frozen=True)
class FeatureBlocks:
    """Features of all items, of which the encoder's are computed anew as it learns.

    Args:
        design: All features under the encoder as it starts, see `with_bias`, shape (items, width + 1).
        first: The column from which on the encoder's vectors are, up to the last, constant one.
        centre: What is taken off its vectors, shape (hidden,).
        scale: What they are multiplied by then.
    """

    design: Values
    first: int
    centre: Tensor
    scale: float

    @classmethod
    def of(cls, beside: Sequence[Floats], vectors: Floats) -> FeatureBlocks:
        """Returns the features that `side_by_side` and `with_bias` make of blocks that stay and the vectors."""
        joined = side_by_side([*beside, vectors])
        whole = with_bias(joined)
        first = whole.shape[1] - 1 - vectors.shape[1]
        centre = vectors.mean(0)
        spread = np.sqrt(((vectors - centre) ** 2).sum(1).mean() * (joined**2).sum(1).mean())
        return cls(whole, first, torch.from_numpy(centre), float(1 / spread))

    def of_items(self, items: Codes, vectors: Tensor) -> Tensor:
        """Returns the features of some items under their present vectors, shape (items, width)."""
        kept = torch.from_numpy(self.design[items, : self.first]).to(vectors.dtype)
        return torch.cat([kept, (vectors - self.centre.to(vectors.dtype)) * self.scale], 1)


@dataclass(frozen=True)
class PosteriorTuning:
    """An encoder's LoRA in training through the posteriors of meta-training users.

    Args:
        data: The task's data.
        model: The encoder over the items' texts, with a LoRA in its topmost blocks.
        blocks: The features of items.
        halves: The meta-training users, each half once for every fold of items.
        settings: How the LoRA is learned.
        seed: Seed of the episodes.
    """

    data: TaskData
    model: AnswerModel
    blocks: FeatureBlocks
    halves: tuple[Half, ...]
    settings: PosteriorTuningConfig
    seed: int

    @cached_property
    def _shots(self) -> list[int]:
        return [*(self.settings.shots or self.data.task.shots)]

    def encode(self, items: Codes, init: Mapping[str, Tensor]) -> Tensor:
        """Returns the vectors of some items, differentiable in the LoRA, shape (items, hidden)."""
        model, lora = self.model, expand_users(init, 1)
        return read_by_length(
            items,
            model.prompts.lengths,
            lambda block: model.last_states(model.gather(block[None]), lora)[0],
            _TEXTS_AT_ONCE,
        )

    @torch.no_grad()
    def vectors(self, items: Codes, init: Mapping[str, Tensor]) -> Tensor:
        """Returns the vectors of some items, shape (items, hidden)."""
        return self.encode(items, init)

    def scores(self, half: Half, episodes: Sequence[Episode], init: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the posterior's scores of the users' queries, and which are no padding, each (users, items).

        The user's bias, which changes no order, is left out.
        """
        items = np.unique(np.concatenate([part.items for one in episodes for part in (one.support, one.query)]))
        features = self.blocks.of_items(items, self.encode(items, init))
        prior = half.prior
        rated, asked = ([np.searchsorted(items, part.items) for part in parts] for parts in _parts(episodes))
        support, query = pad_rows(rated, np.int64), pad_rows(asked, np.int64)
        real = _real(rated, support.shape[1])
        ratings = pad_rows([self._unexplained(prior, one.support) for one in episodes], np.float64).to(features.dtype)
        learned = expand_users(half.head(features.dtype), len(episodes))
        weights = posterior_head(features[support], ratings, real, learned)
        expected = (features[query] @ weights[..., None])[..., 0]
        if not self.data.task.split.asks_unrated:
            expected = expected + torch.from_numpy(prior.items[items]).to(expected.dtype)[query]
        return expected, _real(asked, query.shape[1])

    def _unexplained(self, prior: LinearPrior, support: Ratings) -> Floats:
        """Returns standardized ratings without the items' own effects, shape (ratings,)."""
        ratings: Floats = prior.baseline.standardize(support.values) - prior.items[support.items]
        return ratings

    def gradient_at(self, meta: MetaState, step: int) -> MetaGradient:
        """Returns the gradient of the mean loss over a step's users, who are all of one half."""
        half = self.halves[step % len(self.halves)]
        hidden = half.hidden
        episodes = training_batch(
            self.data.interactions,
            half.users,
            batch_users=self.settings.users,
            shots=self._shots,
            max_query=self.settings.max_query,
            min_query=_MIN_QUERY,
            seed=self.seed,
            step=step,
            hidden=None if hidden is None else lambda _: hidden,
            short_supports=self.data.task.short_supports,
        )
        leaves = {name: value.detach().requires_grad_() for name, value in meta.init.items()}
        scores, real = self.scores(half, episodes, leaves)
        liked = pad_rows([one.query.likes(self.data.task.like_threshold) for one in episodes], np.bool_)
        losses = pairwise_logistic(scores, liked, real, self.settings.sharpness)
        found = torch.autograd.grad(losses.mean(), list(leaves.values()))
        gradients = {f"init/{name}": value for name, value in zip(leaves, found, strict=True)}
        return MetaGradient(losses.detach(), gradients, ~losses.detach().isfinite())

    @cached_property
    def _validation(self) -> list[Episode]:
        return self.data.evaluated("validation")[0][: self.settings.validation_users]

    def validate(self, meta: MetaState) -> float:
        """Returns the validation users' AUC by their posterior under the first half's mean and covariance."""
        items = np.unique(np.concatenate([part.items for parts in _parts(self._validation) for part in parts]))
        design = self.blocks.design.copy()
        design[items, :-1] = self.blocks.of_items(items, self.vectors(items, meta.init)).numpy()
        process = linear_process(self.halves[0].prior, design, "text kernel")
        return validation_auc(process, self._validation, self._shots, self.data.task.like_threshold)


def two_halves(data: TaskData, features: Floats, settings: LinearConfig, seed: int) -> tuple[Half, ...]:
    """Returns the meta-training users in two halves, each with the mean and covariance that the other's ratings say.

    Where unrated items are queried, each half comes once for every fold of the items.

    Args:
        data: The task's data.
        features: The features of all items, see `side_by_side`.
        settings: How mean and covariance are fitted.
        seed: Seed of the halves.
    """
    users, known = data.parts["train"], data.interactions
    generator = np.random.default_rng(seed)
    first = generator.permutation(len(users)) % 2 == 0
    folds: list[Flags | None] = [None]
    if data.task.split.asks_unrated:
        fold = generator.permutation(len(known.catalog)) % _ITEM_FOLDS
        folds = [fold == one for one in range(_ITEM_FOLDS)]

    def half(own: Flags, hidden: Flags | None) -> Half:
        shown = known if hidden is None else known.subset(~hidden[known.item])
        # Unshrunk: choosing the shrinkage is a second fit, and queries about other items and users hold the LoRA back.
        how = {**settings.model_dump(), "shrinkage": 0.0}
        return Half(users[own], fit_linear_prior(shown, users[~own], features, **how), hidden)

    return tuple(half(own, hidden) for hidden in folds for own in (first, ~first))


def _parts(episodes: Sequence[Episode]) -> tuple[list[Ratings], list[Ratings]]:
    return [one.support for one in episodes], [one.query for one in episodes]


def _real(rows: Sequence[Codes], width: int) -> Tensor:
    """Returns True where a padded row holds an entry, shape (rows, width)."""
    return torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
