"""Small meta-learned networks over item features: MeLU and a neural process, in the engine's own terms.

Both start from the item prior and learn what to add to it from the support's residuals. MeLU adapts its decision
layers by gradient steps (`metarec.meta.algorithms`); the neural process reads the support in one pass, which to the
outer loop is an inner loop of no steps. Knows nothing of text or language models: an item is a vector.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from metarec.config import TrainConfig
from metarec.data.episodes import Episode, training_batch
from metarec.data.interactions import Codes, Interactions, Ratings
from metarec.meta.algorithms import MetaGradient, fomaml
from metarec.meta.inner_loop import Loss, MetaState, adapt, initial_meta_state
from metarec.meta.outer_loop import train
from metarec.metrics import auc
from metarec.scorer import Request, check_codes
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.residuals import Floats
from metarec.tensors import AdapterState

Form = Literal["melu", "neural process"]
_USERS_AT_ONCE = 64
_ADAPTED = ("decide.weight", "decide.bias", "answer.weight", "answer.bias")


@dataclass(frozen=True)
class _Batch:
    """Some users' items: features (users, items, features); the rest (users, items)."""

    features: Tensor
    prior: Tensor
    target: Tensor
    liked: Tensor
    real: Tensor


@dataclass(frozen=True)
class Network:
    """A meta-learned network: its score is the prior plus what the network reads from the support.

    Args:
        form: ``melu`` (Lee et al. 2019) or ``neural process`` (Garnelo et al. 2018; Lin et al. 2021).
        meta: The learned parameters.
        prior: The item prior.
        features: Item features, shape (items, features).
        inner_steps: MeLU's gradient steps.
        shrinkage: Ratings that the initialization counts for in MeLU's inner loss.
        threshold: See `Ratings.likes`.
    """

    form: Form
    meta: MetaState
    prior: ItemPrior
    features: Tensor
    inner_steps: int
    shrinkage: float
    threshold: float

    @property
    def name(self) -> str:
        """How the method is called in tables."""
        return "MeLU" if self.form == "melu" else "neural process"

    @property
    def bytes_per_user(self) -> int:
        """The adapted layers (MeLU), or the user's representation (neural process), in float32."""
        if self.form == "melu":
            return sum(4 * self.meta.init[name].numel() for name in self.meta.log_rate)
        return 4 * self.meta.init["encode2.bias"].numel()

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        check_codes(requests, len(self.features))
        scores: list[Tensor] = []
        for start in range(0, len(requests), _USERS_AT_ONCE):
            block = requests[start : start + _USERS_AT_ONCE]
            support = self.collate([request.support for request in block], seen=False)
            asked = [Ratings(request.candidates, np.zeros(len(request.candidates), np.float32)) for request in block]
            query = self.collate(asked, seen=False)
            with torch.no_grad():
                values = self.predict(self.adapted(support), support, query)
            scores += [row[: len(request.candidates)] for row, request in zip(values, block, strict=True)]
        return scores

    def collate(self, ratings: Sequence[Ratings], *, seen: bool) -> _Batch:
        """Pads several users' ratings; where the prior has `seen` them, each is taken out of its own item's mean."""
        width = max(map(len, ratings), default=0)
        items = np.zeros((len(ratings), width), np.int64)
        prior, target = np.zeros((2, len(ratings), width), np.float32)
        liked, real = np.zeros((2, len(ratings), width), bool)
        for row, one in enumerate(ratings):
            items[row, : len(one)] = one.items
            prior[row, : len(one)] = self.prior.values_without(one) if seen else self.prior.values(one.items)
            target[row, : len(one)] = self.prior.standardize(one.values)
            liked[row, : len(one)] = one.likes(self.threshold)
            real[row, : len(one)] = True
        return _Batch(
            self.features[torch.from_numpy(items)],
            *(torch.from_numpy(column) for column in (prior, target, liked, real)),
        )

    def adapted(self, support: _Batch) -> AdapterState:
        """Returns every user's parameters after the inner loop."""
        users, width = support.real.shape
        steps = self.inner_steps if self.form == "melu" and width else 0
        return adapt(self.meta, self.support_loss(support), users, steps).state

    def predict(self, state: AdapterState, support: _Batch, query: _Batch) -> Tensor:
        """Scores the query's items under every user's parameters, shape (users, items)."""
        hidden = functional.relu(_linear(state, "item", query.features))
        if self.form == "neural process":
            read = _read(state, support)
            hidden = torch.cat([hidden, read[:, None].expand(-1, hidden.shape[1], -1)], -1)
        hidden = functional.relu(_linear(state, "decide", hidden))
        return query.prior + _linear(state, "answer", hidden)[..., 0]

    def support_loss(self, support: _Batch) -> Loss:
        """Squared error on the support's ratings, divided by their number plus the shrinkage."""
        real = support.real.float()

        def loss(state: AdapterState) -> Tensor:
            error = (support.target - self.predict(state, support, support)) * real
            return error.square().sum(1) / (real.sum(1) + self.shrinkage)

        return loss

    def query_loss(self, support: _Batch, query: _Batch) -> Loss:
        """Logistic loss on the query's pairs of a liked and a disliked item (Rendle et al. 2009, eq. 4)."""
        pairs = ((query.liked & query.real)[:, :, None] & (~query.liked & query.real)[:, None]).float()

        def loss(state: AdapterState) -> Tensor:
            scores = self.predict(state, support, query)
            lost = functional.softplus(-2 * (scores[:, :, None] - scores[:, None])) * pairs
            return lost.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)

        return loss


def _linear(state: AdapterState, name: str, values: Tensor) -> Tensor:
    applied: Tensor = values @ state[f"{name}.weight"].mT + state[f"{name}.bias"][:, None]
    return applied


def _read(state: AdapterState, support: _Batch) -> Tensor:
    """Reads a support as the shrunk mean of what each rating says, shape (users, hidden)."""
    residual = (support.target - support.prior)[..., None]
    seen = torch.cat([support.features, residual, residual * support.features], -1)
    said = _linear(state, "encode2", functional.relu(_linear(state, "encode", seen))) * support.real[..., None]
    # The number of ratings is heard too: few leave the mean near zero.
    return said.sum(1) / (support.real.sum(1, keepdim=True) + 5.0)


def _initial(form: Form, features: int, hidden: int, inner_lr: float, seed: int) -> MetaState:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"item": (hidden, features), "decide": (hidden, hidden), "answer": (1, hidden)}
    if form == "neural process":
        shapes |= {"encode": (hidden, 2 * features + 1), "encode2": (hidden, hidden), "decide": (hidden, 2 * hidden)}
    init: AdapterState = {}
    for name, (rows, columns) in shapes.items():
        init[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * math.sqrt(2 / columns)
        init[f"{name}.bias"] = torch.zeros(rows)
    # A small last layer: before training the score is all but the prior.
    init["answer.weight"] *= 0.1
    return initial_meta_state(init, _ADAPTED if form == "melu" else (), inner_lr)


def fit_network(
    form: Form,
    interactions: Interactions,
    users: Codes,
    prior: ItemPrior,
    features: Floats,
    *,
    validation: Sequence[Episode],
    threshold: float,
    hidden: int = 32,
    inner_steps: int = 3,
    inner_lr: float = 0.1,
    shrinkage: float = 5.0,
    shots: tuple[int, ...] = (5, 10, 20),
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    steps: int = 400,
    validate_every: int = 50,
    seed: int = 0,
) -> Network:
    """Meta-trains MeLU or a neural process, and keeps the parameters that are best on the validation users.

    Args:
        form: Which of the two.
        interactions: The dataset.
        users: The meta-training users that `prior` was fitted on.
        prior: The item prior.
        features: A vector of each item, shape (items, features).
        validation: Episodes of validation users; they choose when to stop.
        threshold: See `Ratings.likes`.
        hidden: Width of every layer.
        inner_steps: MeLU's gradient steps.
        inner_lr: Where MeLU's learned inner rates start.
        shrinkage: Ratings that the initialization counts for in MeLU's inner loss.
        shots: Support sizes to train with and to validate at.
        lr: Outer learning rate.
        weight_decay: Of the outer loop.
        steps: Outer steps at most.
        validate_every: Outer steps between validations.
        seed: Seed of the initialization and the batches.

    Source: Lee et al. 2019, "MeLU", algorithm 1, first-order, with learned inner rates; Lin et al. 2021, "Task-adaptive
    neural process for user cold-start recommendation", sections 4.1 and 4.2, with a deterministic path and without the
    clustering of tasks.
    """
    table = torch.from_numpy(np.asarray(features, np.float32))
    initial = Network(
        form,
        _initial(form, table.shape[1], hidden, inner_lr, seed),
        prior,
        table,
        inner_steps if form == "melu" else 0,
        shrinkage,
        threshold,
    )
    config = TrainConfig(
        steps=steps,
        users=32,
        shots=shots,
        lr=lr,
        weight_decay=weight_decay,
        validate_every=validate_every,
        patience=6,
    )

    def with_meta(meta: MetaState) -> Network:
        return Network(form, meta, prior, table, initial.inner_steps, shrinkage, threshold)

    def gradient_at(meta: MetaState, step: int) -> MetaGradient:
        batch = training_batch(
            interactions,
            users,
            batch_users=config.users,
            shots=shots,
            max_query=config.max_query,
            min_query=config.min_query,
            seed=seed,
            step=step,
        )
        support = initial.collate([episode.support for episode in batch], seen=True)
        query = initial.collate([episode.query for episode in batch], seen=True)
        return fomaml(
            meta,
            initial.support_loss(support),
            initial.query_loss(support, query),
            len(batch),
            initial.inner_steps,
        )

    validate = _validation(with_meta, validation, shots, threshold)
    with tempfile.TemporaryDirectory() as directory:
        trained = train(
            initial.meta,
            gradient_at,
            validate,
            config,
            checkpoint=Path(directory) / "checkpoint",
            identity={},
            resume=False,
        )
    return with_meta(trained.best)


def _validation(
    with_meta: Callable[[MetaState], Network], episodes: Sequence[Episode], shots: Sequence[int], threshold: float
) -> Callable[[MetaState], float]:
    """Returns the mean AUC of validation users over some K, as a function of the parameters."""

    def validate(meta: MetaState) -> float:
        values = []
        for count in shots:
            asked = [Request(episode.user, episode.support.head(count), episode.query.items) for episode in episodes]
            for episode, scores in zip(episodes, with_meta(meta).score(asked), strict=True):
                value = auc(scores.numpy(), episode.query.likes(threshold))
                if value is not None:
                    values.append(value)
        return float(np.mean(values)) if values else 0.0

    return validate
