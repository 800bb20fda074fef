"""Small meta-learned networks over item features, trained by `metarec.meta`.

All predict what to add to the item prior from the support. MeLU adapts its decision layers by gradient steps
(`metarec.meta.algorithms`); a neural process, a set transformer and a hypernetwork read the support in one pass, so
that their inner loop has no steps. What is known of users and moments is an input beside the items' features, as in
MeLU. `metarec.scorers.collaborative.network_forms` says what each computes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarec.config import TrainConfig
from metarec.data.episodes import Episode, training_batch
from metarec.data.interactions import Codes, Interactions, Ratings
from metarec.evaluation.evaluate import validation_auc
from metarec.meta.algorithms import MetaGradient, fomaml
from metarec.meta.inner_loop import Loss, MetaState, adapt, initial_meta_state
from metarec.meta.losses import pairwise_logistic
from metarec.meta.outer_loop import train
from metarec.scorer import Request, check_codes
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.network_forms import FORMS, Form, ItemRows
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.side_inputs import SideInputs
from metarec.system.tensors import AdapterState, pad_rows

_USERS_AT_ONCE = 64
_TRAINING_USERS = 32
_PATIENCE = 6
_MIN_QUERY = 5
# Factor on differences of scores in the query loss.
_SHARPNESS = 2.0


@dataclass(frozen=True)
class Network:
    """A meta-learned network, whose output is added to the item prior.

    Args:
        form: A name in `FORMS`.
        meta: The learned parameters.
        prior: The item prior.
        features: Item features, shape (items, features).
        inner_steps: MeLU's gradient steps.
        shrinkage: Pseudo-count in the denominator of MeLU's support loss.
        threshold: See `Ratings.likes`.
        longest: The largest support that it was trained for; a set transformer keeps what it makes of each rating.
        side: What reads side information, whose numbers stand behind an item's features; None where nothing does.
    """

    form: Form
    meta: MetaState
    prior: ItemPrior
    features: Tensor
    inner_steps: int
    shrinkage: float
    threshold: float
    longest: int
    side: SideInputs | None = None

    @property
    def name(self) -> str:
        """How the method is called in tables."""
        return FORMS[self.form].name

    @property
    def bytes_per_user(self) -> int:
        """The adapted layers (MeLU), or what the support becomes, in float32."""
        hidden, features = self.meta.init["item.weight"].shape
        return 4 * FORMS[self.form].numbers(features, hidden, self.longest)

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        check_codes(requests, len(self.features))
        scores: list[Tensor] = []
        for start in range(0, len(requests), _USERS_AT_ONCE):
            block = requests[start : start + _USERS_AT_ONCE]
            support = self.collate([request.support for request in block], in_prior=False)
            query = self.collate([self._asked(request) for request in block], in_prior=False)
            with torch.no_grad():
                values = self.predict(self.adapted(support), support, query)
            scores += [row[: len(request.candidates)] for row, request in zip(values, block, strict=True)]
        return scores

    def _asked(self, request: Request) -> Ratings:
        if self.side is not None:
            return self.side.asked(request.support.side, request.candidates)
        return Ratings(request.candidates, np.zeros(len(request.candidates), np.float32))

    def collate(self, ratings: Sequence[Ratings], *, in_prior: bool) -> ItemRows:
        """Pads several users' ratings; if the prior was fitted on them, the prior of each is the one without it."""
        prior = [self.prior.values_without(one) if in_prior else self.prior.values(one.items) for one in ratings]
        return ItemRows(
            features=self._features(ratings),
            prior=pad_rows(prior, np.float32),
            target=pad_rows([self.prior.standardize(one.values) for one in ratings], np.float32),
            liked=pad_rows([one.likes(self.threshold) for one in ratings], bool),
            real=pad_rows([np.ones(len(one), bool) for one in ratings], bool),
        )

    def _features(self, ratings: Sequence[Ratings]) -> Tensor:
        """Returns the features of each item, with what is known beside it, shape (users, items, features)."""
        features = self.features[pad_rows([one.items for one in ratings], np.int64)]
        if self.side is None:
            return features
        known = features.new_zeros(*features.shape[:2], self.side.width)
        for row, numbers in zip(known, self.side.of(ratings), strict=True):
            row[: len(numbers)] = torch.from_numpy(numbers.astype(np.float32))
        return torch.cat([features, known], -1)

    def adapted(self, support: ItemRows) -> AdapterState:
        """Returns every user's parameters after the inner loop."""
        users, width = support.real.shape
        steps = self.inner_steps if self.form == "melu" and width else 0
        return adapt(self.meta, self.support_loss(support), users, steps).state

    def predict(self, state: AdapterState, support: ItemRows, query: ItemRows) -> Tensor:
        """Scores the query's items under every user's parameters, shape (users, items)."""
        return query.prior + FORMS[self.form].predict(state, support, query)

    def support_loss(self, support: ItemRows) -> Loss:
        """Squared error on the support's ratings, divided by their number plus the shrinkage."""
        real = support.real.float()

        def loss(state: AdapterState) -> Tensor:
            error = (support.target - self.predict(state, support, support)) * real
            return error.square().sum(1) / (real.sum(1) + self.shrinkage)

        return loss

    def query_loss(self, support: ItemRows, query: ItemRows) -> Loss:
        """Logistic loss on the query's pairs of a liked and a disliked item (Rendle et al. 2009, eq. 4)."""
        return lambda state: pairwise_logistic(self.predict(state, support, query), query.liked, query.real, _SHARPNESS)


@dataclass(frozen=True)
class NetworkSettings:
    """Settings of `fit_network`.

    Args:
        hidden: Width of every layer.
        inner_steps: MeLU's gradient steps.
        inner_lr: Initial value of MeLU's learned inner rates.
        shrinkage: Pseudo-count in the denominator of MeLU's support loss.
        shots: Support sizes in training and validation; with side information 0 is one of them.
        lr: Outer learning rate.
        weight_decay: Of the outer loop.
        steps: Outer steps at most.
        validate_every: Outer steps between validations.
    """

    hidden: int = 32
    inner_steps: int = 3
    inner_lr: float = 0.1
    shrinkage: float = 5.0
    shots: tuple[int, ...] = (5, 10, 20)
    lr: float = 1e-3
    weight_decay: float = 0.1
    steps: int = 400
    validate_every: int = 50

    def train_config(self) -> TrainConfig:
        """Returns the settings of the outer loop."""
        return TrainConfig(
            steps=self.steps,
            users=_TRAINING_USERS,
            lr=self.lr,
            weight_decay=self.weight_decay,
            validate_every=self.validate_every,
            patience=_PATIENCE,
        )


def _initial(form: Form, features: int, hidden: int, inner_lr: float, seed: int) -> MetaState:
    generator = torch.Generator().manual_seed(seed)
    architecture = FORMS[form]
    init: AdapterState = {}
    for name, (rows, columns) in architecture.shapes(features, hidden).items():
        init[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * math.sqrt(2 / columns)
        init[f"{name}.bias"] = torch.zeros(rows)
    for name in architecture.last:
        init[f"{name}.weight"] *= 0.1
    adapted = [f"{name}.{part}" for name in architecture.adapted for part in ("weight", "bias")]
    return initial_meta_state(init, adapted, inner_lr)


def fit_network(
    form: Form,
    interactions: Interactions,
    users: Codes,
    prior: ItemPrior,
    features: Floats,
    *,
    validation: Sequence[Episode],
    threshold: float,
    seed: int = 0,
    side: SideInputs | None = None,
    **options: Any,
) -> Network:
    """Meta-trains a network; returns the parameters that are best on the validation users.

    Args:
        form: Which one.
        interactions: The dataset.
        users: The meta-training users that `prior` was fitted on.
        prior: The item prior.
        features: A vector of each item, shape (items, features).
        validation: Episodes of validation users, for early stopping.
        threshold: See `Ratings.likes`.
        seed: Seed of the initialization and the batches.
        side: What reads side information, an input beside the items' features; None for none.
        **options: Fields of `NetworkSettings`.

    Raises:
        EvaluationError: No validation user has both classes.

    Source: Lee et al. 2019, "MeLU", algorithm 1, first-order, with learned inner rates; Lin et al. 2021, "Task-adaptive
    neural process for user cold-start recommendation", sections 4.1 and 4.2, with a deterministic path and without the
    clustering of tasks; Lee et al. 2019, "Set Transformer", eq. 6 to 8, without layer normalization, the query's items
    in the place of seeds; Ha et al. 2017, "HyperNetworks", section 3.1, for a rank-1 update of the output layer.
    """
    settings = NetworkSettings(**options)
    table = torch.from_numpy(np.asarray(features, np.float32))
    width = table.shape[1] + (0 if side is None else side.width)
    meta = _initial(form, width, settings.hidden, settings.inner_lr, seed)
    inner_steps = settings.inner_steps if form == "melu" else 0
    initial = Network(form, meta, prior, table, inner_steps, settings.shrinkage, threshold, max(settings.shots), side)
    shots = settings.shots if side is None else (0, *(count for count in settings.shots if count))
    config = settings.train_config()
    with tempfile.TemporaryDirectory() as directory:
        trained = train(
            meta,
            partial(_gradient_at, initial, interactions, users, shots, config, seed),
            lambda meta: validation_auc(replace(initial, meta=meta), validation, shots, threshold),
            config,
            checkpoint=Path(directory) / "checkpoint",
            identity={},
            resume=False,
        )
    return replace(initial, meta=trained.best)


def _gradient_at(
    network: Network,
    interactions: Interactions,
    users: Codes,
    shots: tuple[int, ...],
    config: TrainConfig,
    seed: int,
    meta: MetaState,
    step: int,
) -> MetaGradient:
    """Returns the meta-gradient on the users of an outer step."""
    batch = training_batch(
        interactions,
        users,
        batch_users=config.users,
        shots=shots,
        max_query=config.max_query,
        min_query=_MIN_QUERY,
        seed=seed,
        step=step,
    )
    support = network.collate([episode.support for episode in batch], in_prior=True)
    query = network.collate([episode.query for episode in batch], in_prior=True)
    return fomaml(
        meta, network.support_loss(support), network.query_loss(support, query), len(batch), network.inner_steps
    )
