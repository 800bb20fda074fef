"""Fine-tuning on the meta-training users' ratings: one LoRA for all users, or every parameter of the model.

Training uses the prompts of the fitted scorer: a user's history as solved examples, then an item. The score contains
the item prior and the loss is the pairwise one of `metarec.meta.losses`, so that these baselines use the same
information as the other methods. The loop is `metarec.meta.outer_loop`, with the trained tensors as meta-parameters.

Sources: Bao et al. 2023, "TALLRec", for one LoRA over all users' histories; Min et al. 2022, "MetaICL", for in-context
meta-training: every history is the support of another user. Different here: the loss ranks items within
a user instead of taking the answer's likelihood, and the score contains the item prior.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metarec.artifacts import content_hash
from metarec.config import TrainConfig, flattened
from metarec.data.episodes import Episode, training_batch
from metarec.data.interactions import Codes, Interactions
from metarec.data.templates import PromptTemplate
from metarec.evaluate import validation_auc
from metarec.lm.backbone import Backbone
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import MetaState
from metarec.meta.losses import pairwise_logistic
from metarec.meta.outer_loop import Trained, train
from metarec.scorer import Request
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.language.finetuned import NAMES, FineTuned, WeightedLogOdds
from metarec.scorers.language.in_context import History, InContext
from metarec.scorers.language.trainable_copy import Recipe, Trainable, TrainableCopy, trainable_copy

_WEIGHT = "score.weight"
# Validation reads so many users, and so many candidates of each.
_VALIDATION_USERS, _VALIDATION_ITEMS = 16, 16
# Few users a step and few steps: about a quarter of an hour on one CPU core.
_SHOTS, _MIN_QUERY = (0, 5), 8
LORA = TrainConfig(
    steps=80,
    users=2,
    shots=_SHOTS,
    max_query=8,
    min_query=_MIN_QUERY,
    lr=5e-4,
    warmup=10,
    adapter_weight=0.2,
    validate_every=40,
)
FULL = LORA.model_copy(update={"steps": 60, "lr": 2e-5, "validate_every": 30})
FINE_TUNING: dict[Trainable, TrainConfig] = {"lora": LORA, "all": FULL}


def fine_tune(
    backbone: Backbone,
    template: PromptTemplate,
    interactions: Interactions,
    users: Codes,
    prior: ItemPrior,
    *,
    validation: Sequence[Episode],
    threshold: float,
    recipe: Recipe,
    config: TrainConfig | None = None,
    limit: int = 8,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> FineTuned:
    """Trains a copy of a causal LM on users' histories; returns the state that is best on validation users.

    Args:
        backbone: The model, which does not change.
        template: The task's prompt.
        interactions: The dataset.
        users: The meta-training users that `prior` was fitted on.
        prior: The item prior; a user's own ratings are taken out of it in training.
        validation: Episodes of validation users, for early stopping.
        threshold: Ratings from here on are likes.
        recipe: Which parameters are trained.
        config: The loop's settings; `shots` are the lengths of histories, 0 trains on prompts without one too. None
            takes those of `FINE_TUNING`.
        limit: Examples in a history at most.
        seed: Seed of the batches and of the examples' order.
        checkpoint: Directory of the training state; None keeps it in a temporary directory.
        resume: Continues from `checkpoint` if it is there.

    Raises:
        ConfigError: The model is not a causal LM, is of low precision and all of it is to be trained, or PEFT knows no
            targets for it.
        DataError: No user has enough ratings.
        ArtifactError: The checkpoint is damaged or of another run.
    """
    history = History(template, interactions.catalog, threshold, limit, seed)
    InContext(backbone, history)  # raises before anything is copied
    student = trainable_copy(backbone, recipe)
    context = InContext(student.backbone, history)
    settings = config or FINE_TUNING[recipe.trainable]
    run = _FineTuning(backbone, student, context, interactions, users, prior, recipe, settings, seed)
    trained = run.train(validation, checkpoint, resume)
    tensors = dict(trained.best.init)
    weight = float(tensors.pop(_WEIGHT))
    return FineTuned(backbone, history, prior, weight, recipe, tensors, _summary(trained), run.name)


@dataclass(frozen=True)
class _FineTuning:
    """A fine-tuning run: the model in training, the data, and the settings; see `fine_tune`."""

    base: Backbone
    student: TrainableCopy
    context: InContext
    interactions: Interactions
    users: Codes
    prior: ItemPrior
    recipe: Recipe
    config: TrainConfig
    seed: int

    @property
    def name(self) -> str:
        return NAMES[self.recipe.trainable]

    @property
    def shots(self) -> tuple[int, ...]:
        return self.config.shots or _SHOTS

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        history = self.context.history
        template = history.template
        return {
            "base": self.base.fingerprint,
            "data": self.interactions.digest,
            "users": content_hash(self.users.tolist()),
            "prompt": content_hash([template.text, template.positive, template.negative]),
            "recipe": content_hash(asdict(self.recipe)),
            **flattened(self.config.model_dump(mode="json", exclude={"steps"}), "train."),
            "seed": self.seed,
            "limit": history.limit,
        }

    def train(self, validation: Sequence[Episode], checkpoint: Path | None, resume: bool) -> Trained:
        """Runs the outer loop over the trained tensors and the weight of the log-odds."""
        threshold = self.context.history.threshold
        short = _short_queries(validation, threshold, _VALIDATION_USERS, _VALIDATION_ITEMS)
        initial = {key: parameter.detach() for key, parameter in self.student.parameters.items()}
        weight = torch.tensor(self.config.adapter_weight, device=self.base.device)
        with tempfile.TemporaryDirectory() as scratch:
            return train(
                MetaState({**initial, _WEIGHT: weight}, {}),
                self.gradient_at,
                lambda meta: validation_auc(self.scorer(meta), short, [max(self.shots)], threshold),
                self.config,
                checkpoint=checkpoint or Path(scratch) / "checkpoint",
                identity=self.identity,
                resume=resume,
                description=self.name,
            )

    def scorer(self, meta: MetaState) -> WeightedLogOdds:
        """Returns the model in training as a scorer."""
        self.student.take(meta.init)
        return WeightedLogOdds(self.context, self.prior, float(meta.init[_WEIGHT]), self.name)

    def gradient_at(self, meta: MetaState, step: int) -> MetaGradient:
        """Returns the gradient of the mean loss over the users of a step."""
        self.student.take(meta.init)
        batch = training_batch(
            self.interactions,
            self.users,
            batch_users=self.config.users,
            shots=self.shots,
            max_query=self.config.max_query,
            min_query=self.config.min_query or _MIN_QUERY,
            seed=self.seed,
            step=step,
        )
        leaves = {**self.student.parameters, _WEIGHT: meta.init[_WEIGHT].detach().clone().requires_grad_()}
        losses = []
        for episode in batch:
            loss = _loss(self.context, self.prior, leaves[_WEIGHT], episode, self.config.sharpness)
            losses.append(loss.detach())
            if loss.requires_grad and loss.isfinite():
                loss.backward()
        found = torch.stack(losses)
        kept = int(found.isfinite().sum())
        gradients = {
            f"init/{key}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / max(kept, 1)
            for key, leaf in leaves.items()
        }
        for leaf in leaves.values():
            leaf.grad = None
        return MetaGradient(found, gradients, ~found.isfinite())


def _summary(trained: Trained) -> dict[str, Any]:
    """Returns a JSON-able summary of a training."""
    return {
        "best_step": trained.best_step,
        "best_validation_auc": trained.best_value,
        "steps": trained.steps,
        "diverged": trained.diverged,
        "history": tuple(
            {"step": step, "query_loss": loss, "validation_auc": value} for step, loss, value in trained.history
        ),
    }


def _loss(context: InContext, prior: ItemPrior, weight: Tensor, episode: Episode, sharpness: float) -> Tensor:
    """Returns the pairwise loss of one training user's query; 0 for a query of one class, which is not read."""
    query = episode.query
    liked = torch.from_numpy(query.likes(context.history.threshold)).to(weight.device)
    if liked.all() or not liked.any():
        return torch.zeros((), device=weight.device)
    # Labels in the history follow the threshold, as they do for new users.
    odds = context.log_odds(Request(episode.user, episode.support.unlabelled(), query.items))
    scores = torch.from_numpy(prior.values_without(query)).to(odds.device) + weight * odds
    return pairwise_logistic(scores[None], liked[None], torch.ones_like(liked)[None], sharpness)[0]


def _short_queries(episodes: Sequence[Episode], threshold: float, users: int, items: int) -> list[Episode]:
    """Returns the first users that have both classes among their first candidates, with these alone."""
    short = [replace(episode, query=episode.query.head(items)) for episode in episodes]
    return [episode for episode in short if len(set(episode.query.likes(threshold).tolist())) == 2][:users]
