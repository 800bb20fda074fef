"""Vectors of items' texts by a sentence encoder whose LoRA is meta-learned from what users like together.

The encoder learns from pairs of items that one meta-training user likes (`metarec.scorers.collaborative.liked_pairs`).
A user's ratings then say more about items that nobody rated: what adapts to the user, in closed form, are weights over
these vectors. A second LoRA may go on from there, learned through these very posteriors
(`metarec.scorers.language.posterior_tuning`).

Source: Hu et al. 2021, "LoRA".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from metarec.config import EncoderTuningConfig, LinearConfig, PosteriorTuningConfig, TrainConfig
from metarec.data.episodes import Episode
from metarec.data.interactions import Codes
from metarec.errors import ConfigError, DataError
from metarec.files.artifacts import content_hash
from metarec.lm.adapters import init_adapter
from metarec.lm.answer_model import open_answer_model
from metarec.lm.backbone import Backbone
from metarec.lm.loading import load_backbone
from metarec.lm.placement import default_placement
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.tokenized import CatalogPrompts, tokenize_catalog
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import MetaState
from metarec.meta.kept import kept_tensors
from metarec.meta.outer_loop import train
from metarec.scorers.collaborative.features import side_by_side
from metarec.scorers.collaborative.liked_pairs import LikedPairs, cosine_auc, liked_items
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.language.posterior_tuning import FeatureBlocks, PosteriorTuning, two_halves
from metarec.scorers.language.trainable_copy import Recipe, TrainableCopy, trainable_copy
from metarec.system.tensors import AdapterState, read_by_length

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData

_KIND = "tuned-encoder"
_VECTORS = "vectors"
# The first one kept vectors without the LoRA.
_FORMAT = 2
_TEXTS_AT_ONCE = 32


def tuned_text_vectors(
    data: TaskData,
    encoder: str,
    settings: EncoderTuningConfig,
    seed: int,
    beside: Sequence[Floats] = (),
    linear: LinearConfig | None = None,
) -> Floats:
    """Returns the tuned encoder's vector of every item, shape (items, hidden), from the cache or by training.

    Args:
        data: The task's data; the LoRA is learned from the meta-training users' likes, and stops early on what the
            validation users like.
        encoder: A text encoder's name or directory.
        settings: How the LoRA is learned.
        seed: Seed of its start and of the pairs.
        beside: Features of all items that stand beside the vectors where it is learned through posteriors.
        linear: How users' weights on the features are fitted there; None takes the defaults.

    Raises:
        ConfigError: The encoder is none, or neither pairs nor posteriors are to be learned from.
        DataError: Too few users like two items.
        KeyboardInterrupt: After a checkpoint was written, from which the next call goes on.
    """
    backbone = load_backbone(encoder)
    if backbone.kind != "encoder":
        raise ConfigError(f"'{encoder}' is a {backbone.kind} model", "Name a sentence encoder in collaborative.encoder")
    prompts = tokenize_catalog(backbone, data.task.item_text, data.interactions.catalog)
    if not settings.steps and not settings.posterior.steps:
        raise ConfigError(
            "collaborative.tuning.steps and collaborative.tuning.posterior.steps are 0: nothing is tuned",
            "Set one of them, or name 'text' in place of 'tuned text' in collaborative.features",
        )
    pairs = liked_items(data) if settings.steps else []
    if settings.steps and len(pairs) < settings.pairs:
        raise DataError(
            f"{len(pairs)} meta-training users like two items, and a step takes a pair of each of {settings.pairs}",
            "Lower collaborative.tuning.pairs, or leave 'tuned text' out of collaborative.features",
        )
    identity = {
        "encoder": backbone.fingerprint,
        "texts": prompts.digest,
        "data": data.hashes,
        "task": data.task.digest,
        "users": content_hash(data.parts["train"].tolist()),
        "seed": seed,
        "format": _FORMAT,
        **settings.model_dump(mode="json", exclude={"posterior"}),
    }
    start = backbone
    if settings.steps:
        found = kept_tensors(
            _KIND,
            identity,
            lambda checkpoint: _by_pairs(data, backbone, prompts, pairs, settings, seed, checkpoint, identity),
        )
        start = _merged(backbone, settings.rank, seed, found, content_hash(identity))
    if settings.posterior.steps:
        kernel = linear or LinearConfig()
        further = {
            "pairs": identity,
            "beside": [hashlib.sha256(np.ascontiguousarray(block).tobytes()).hexdigest() for block in beside],
            "linear": kernel.model_dump(mode="json"),
            **settings.posterior.model_dump(mode="json"),
        }
        found = kept_tensors(
            _KIND,
            further,
            lambda checkpoint: _by_posteriors(
                data, start, prompts, settings.posterior, seed, [*beside], kernel, checkpoint, further
            ),
        )
    return found[_VECTORS].numpy().astype(np.float64)


def _by_pairs(
    data: TaskData,
    backbone: Backbone,
    prompts: CatalogPrompts,
    likes: Sequence[Codes],
    settings: EncoderTuningConfig,
    seed: int,
    checkpoint: Path,
    identity: dict[str, Any],
) -> AdapterState:
    """Returns the vectors of all items, and the LoRA that was learned from pairs of likes."""
    student = trainable_copy(backbone, _recipe(backbone, settings.rank, seed))
    pairs = LikedPairs(likes, len(prompts.tokens), settings.temperature, settings.frequency)
    tuning = _Tuning(student, prompts, pairs, data, settings, seed)
    initial = {name: parameter.detach() for name, parameter in tuning.student.parameters.items()}
    config = TrainConfig(
        steps=settings.steps,
        users=settings.pairs,
        lr=settings.lr,
        warmup=min(20, settings.steps),
        validate_every=settings.validate_every,
    )
    trained = train(
        MetaState(initial, {}),
        tuning.gradient_at,
        tuning.validate,
        config,
        checkpoint=checkpoint,
        identity=identity,
        resume=True,
        description="tuning the encoder",
    )
    student.take(trained.best.init)
    return {_VECTORS: tuning.vectors(np.arange(len(prompts.tokens))), **trained.best.init}


def _by_posteriors(
    data: TaskData,
    backbone: Backbone,
    prompts: CatalogPrompts,
    settings: PosteriorTuningConfig,
    seed: int,
    beside: list[Floats],
    kernel: LinearConfig,
    checkpoint: Path,
    identity: dict[str, Any],
) -> AdapterState:
    """Returns the vectors of all items, and the LoRA that was learned through posteriors."""
    placement = default_placement(
        backbone,
        prompts,
        layers=settings.layers or backbone.modules.config.num_hidden_layers,
        targets=_linear_layers(backbone),
        rank=settings.rank,
        alpha=2.0 * settings.rank,
        active_tokens=None,
    )
    model = open_answer_model(backbone, prompts, placement)
    everything = np.arange(len(prompts.tokens))
    start = model.frozen_states(everything).numpy().astype(np.float64)
    halves = two_halves(data, side_by_side([*beside, start]), kernel, seed)
    tuning = PosteriorTuning(data, model, FeatureBlocks.of(beside, start), halves, settings, seed)
    config = TrainConfig(
        steps=settings.steps,
        users=settings.users,
        lr=settings.lr,
        warmup=min(20, settings.steps),
        validate_every=settings.validate_every,
    )
    trained = train(
        MetaState(init_adapter(model.spec, torch.Generator().manual_seed(seed)), {}),
        tuning.gradient_at,
        tuning.validate,
        config,
        checkpoint=checkpoint,
        identity=identity,
        resume=True,
        description="tuning the encoder through posteriors",
    )
    return {_VECTORS: tuning.vectors(everything, trained.best.init), **trained.best.init}


def _merged(backbone: Backbone, rank: int, seed: int, lora: AdapterState, name: str) -> Backbone:
    """Returns the encoder with a LoRA merged into its weights.

    Args:
        backbone: The encoder.
        rank: Of the LoRA.
        seed: Of the LoRA.
        lora: Its tensors, among others.
        name: What names its weights in caches.
    """
    student = trainable_copy(backbone, _recipe(backbone, rank, seed))
    student.take(lora)
    student.finish()
    return replace(student.backbone, fingerprint=content_hash([backbone.fingerprint, name]))


def _recipe(backbone: Backbone, rank: int, seed: int) -> Recipe:
    return Recipe("lora", rank, 2.0 * rank, _linear_layers(backbone), seed)


def _linear_layers(backbone: Backbone) -> tuple[str, ...]:
    """Returns the names of a model's linear layers."""
    linear = [name for name, module in backbone.model.named_modules() if isinstance(module, torch.nn.Linear)]
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in linear}))


@dataclass(frozen=True)
class _Tuning:
    """An encoder in training, its texts, and the likes it learns from."""

    student: TrainableCopy
    prompts: CatalogPrompts
    pairs: LikedPairs
    data: TaskData
    settings: EncoderTuningConfig
    seed: int

    @cached_property
    def forward(self) -> ReferenceForward:
        """The encoder with its LoRA over the items' texts."""
        placement = default_placement(
            self.student.backbone, self.prompts, layers=1, targets=None, rank=1, alpha=1.0, active_tokens=None
        )
        return ReferenceForward(self.student.backbone, self.prompts, placement)

    def encode(self, items: Codes) -> Tensor:
        """Returns the vectors of some items, differentiable, shape (items, hidden)."""
        forward = self.forward
        return read_by_length(
            items,
            self.prompts.lengths,
            lambda block: forward.last_states(forward.gather(block[None]), None)[0],
            _TEXTS_AT_ONCE,
        )

    @torch.no_grad()
    def vectors(self, items: Codes) -> Tensor:
        """Returns the vectors of some items, shape (items, hidden)."""
        return self.encode(items)

    def gradient_at(self, meta: MetaState, step: int) -> MetaGradient:
        """Returns the gradient of the mean loss over a step's pairs."""
        self.student.take(meta.init)
        drawn = self.pairs.draw(self.settings.pairs, np.random.default_rng([self.seed, step]))
        first, second = self.encode(np.concatenate([drawn.first, drawn.second])).split(len(drawn.first))
        losses = self.pairs.losses(first, second, drawn)
        losses.mean().backward()
        gradients = {}
        for name, leaf in self.student.parameters.items():
            gradients[f"init/{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            leaf.grad = None
        return MetaGradient(losses.detach(), gradients, ~losses.detach().isfinite())

    @cached_property
    def validation(self) -> list[Episode]:
        """Episodes of the validation users."""
        return self.data.evaluated("validation")[0][: self.settings.validation_users]

    def validate(self, meta: MetaState) -> float:
        """Returns the validation users' AUC by the cosine of an item and what the user likes."""
        self.student.take(meta.init)
        asked = [np.concatenate([episode.support.items, episode.query.items]) for episode in self.validation]
        items = np.unique(np.concatenate(asked))
        whole = np.zeros((len(self.prompts.tokens), self.student.backbone.hidden_size))
        whole[items] = self.vectors(items).numpy()
        return cosine_auc(whole, self.data, self.settings.validation_users)
