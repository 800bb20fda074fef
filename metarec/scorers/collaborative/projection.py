"""A projection head over items' features, meta-learned from what users like together.

A linear map beside a small network makes vectors of the features in which items that the same people like lie close
(`metarec.scorers.collaborative.liked_pairs`). The features stay as they are: no encoder is trained, so that all likes
are read many times within a minute. What adapts to a user, in closed form, are weights over these vectors.

Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations" (SimCLR), section 2.1:
a projection head under InfoNCE.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from metarec.config import ProjectionConfig, TrainConfig
from metarec.errors import DataError
from metarec.files.artifacts import content_hash
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import MetaState
from metarec.meta.kept import kept_tensors
from metarec.meta.outer_loop import train
from metarec.scorers.collaborative.liked_pairs import LikedPairs, cosine_auc, liked_items
from metarec.scorers.collaborative.residuals import Floats

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData

_KIND, _FORMAT, _VECTORS = "projection", 1, "vectors"
_FEWEST = 2
# Features' mean length: with it the first layers' outputs have a size at which AdamW's rates suit them.
_LENGTH = 10.0


def projected_features(data: TaskData, features: Floats, settings: ProjectionConfig, seed: int) -> Floats:
    """Returns the projection of every item's features, vectors of length one, from the cache or by training.

    Args:
        data: The task's data; the projection is learned from the meta-training users' likes, and stops early on what
            the validation users like.
        features: Shape (items, width).
        settings: How it is learned.
        seed: Seed of its start, of the pairs and of dropout.

    Returns:
        Shape (items, settings.width).

    Raises:
        DataError: Fewer than two users like two items.
        KeyboardInterrupt: After a checkpoint was written, from which the next call goes on.
    """
    likes = liked_items(data)
    if len(likes) < _FEWEST:
        raise DataError(
            f"{len(likes)} meta-training users like two items: a projection has no pairs to be learned from",
            "Leave 'projection' out of collaborative.features",
        )
    unit = np.asarray(features, np.float64)
    unit = unit * (_LENGTH / np.sqrt(max((unit**2).sum(1).mean(), 1e-12)))
    read = torch.from_numpy(unit).float()
    identity = {
        "features": hashlib.sha256(read.numpy().tobytes()).hexdigest(),
        "data": data.hashes,
        "task": data.task.digest,
        "users": content_hash(data.parts["train"].tolist()),
        "seed": seed,
        "format": _FORMAT,
        **settings.model_dump(mode="json", exclude={"keep"}),
    }
    learning = ProjectionLearning(
        read, LikedPairs(likes, len(read), settings.temperature, settings.frequency), data, settings, seed
    )
    config = TrainConfig(
        steps=settings.steps,
        users=settings.pairs,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        warmup=min(20, settings.steps),
        validate_every=settings.validate_every,
    )

    def make(checkpoint: Path) -> dict[str, Tensor]:
        trained = train(
            MetaState(first_projection(read.shape[1], settings, seed), {}),
            learning.gradient_at,
            learning.validate,
            config,
            checkpoint=checkpoint,
            identity=identity,
            resume=True,
            description="learning a projection of items' features",
        )
        return {_VECTORS: project(trained.best.init, read)}

    return kept_tensors(_KIND, identity, make)[_VECTORS].numpy().astype(np.float64)


def first_projection(width: int, settings: ProjectionConfig, seed: int) -> dict[str, Tensor]:
    """Returns where the parameters start: a random linear map, beside a network that adds nothing yet.

    Args:
        width: Of the features.
        settings: The widths of the hidden layer and of the vectors.
        seed: Seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(inputs: int, outputs: int) -> Tensor:
        return torch.randn(inputs, outputs, generator=generator).div(inputs**0.5)

    return {
        "linear": drawn(width, settings.width),
        "hidden": drawn(width, settings.hidden),
        "bias": torch.zeros(settings.hidden),
        "output": torch.zeros(settings.hidden, settings.width),
    }


def project(parameters: Mapping[str, Tensor], features: Tensor, dropout: Dropout | None = None) -> Tensor:
    """Returns vectors of length one, shape (items, width of them).

    Args:
        parameters: See `first_projection`.
        features: Shape (items, width).
        dropout: What is left out of the features and of the hidden layer while the projection is learned.
    """
    keep = dropout or (lambda values: values)
    hidden = keep(functional.gelu(features @ parameters["hidden"] + parameters["bias"]))
    vectors: Tensor = functional.normalize(keep(features) @ parameters["linear"] + hidden @ parameters["output"], dim=1)
    return vectors


@dataclass(frozen=True)
class Dropout:
    """Sets a share of values to 0, as a function of a generator, and scales the others up.

    Args:
        share: Of the values.
        generator: What draws them.
    """

    share: float
    generator: torch.Generator

    def __call__(self, values: Tensor) -> Tensor:
        """Returns the values that are left, scaled up, of the same shape."""
        kept = torch.rand(values.shape, generator=self.generator) >= self.share
        return values * kept / (1 - self.share)


@dataclass(frozen=True)
class ProjectionLearning:
    """A projection in training.

    Args:
        features: Of all items, shape (items, width).
        pairs: What it is learned from.
        data: The task's data.
        settings: How it is learned.
        seed: Seed of the pairs and of dropout.
    """

    features: Tensor
    pairs: LikedPairs
    data: TaskData
    settings: ProjectionConfig
    seed: int

    def gradient_at(self, meta: MetaState, step: int) -> MetaGradient:
        """Returns the gradient of the mean loss over a step's pairs."""
        drawn = self.pairs.draw(
            min(self.settings.pairs, len(self.pairs.likes)), np.random.default_rng([self.seed, step])
        )
        dropout = Dropout(self.settings.dropout, torch.Generator().manual_seed(step))
        leaves = {name: value.detach().requires_grad_() for name, value in meta.init.items()}
        both = np.concatenate([drawn.first, drawn.second])
        first, second = project(leaves, self.features[both], dropout).split(len(drawn.first))
        losses = self.pairs.losses(first, second, drawn)
        found = torch.autograd.grad(losses.mean(), list(leaves.values()))
        gradients = {f"init/{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
        return MetaGradient(losses.detach(), gradients, ~losses.detach().isfinite())

    @torch.no_grad()
    def validate(self, meta: MetaState) -> float:
        """Returns the validation users' AUC by the cosine of an item and what the user likes."""
        vectors = project(meta.init, self.features).double().numpy()
        return cosine_auc(vectors, self.data, self.settings.validation_users)
