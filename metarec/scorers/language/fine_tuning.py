"""Fine-tuning on the meta-training users' ratings: one LoRA for all users, or every parameter of the model.

Training uses the prompts of the fitted scorer: a user's history as solved examples, then an item. The score contains
the item prior and the loss is one of `metarec.meta.losses`, so that these baselines use the same information as the
other methods. The loop is `metarec.meta.outer_loop`, with the trained tensors as meta-parameters. The gradients of a
step's users are computed one user after another and added up, so that a step of many users takes the memory of one.

Sources: Bao et al. 2023, "TALLRec", for one LoRA over all users' histories; Min et al. 2022, "MetaICL", for in-context
meta-training: every history is the support of another user; Miyato, Dai and Goodfellow 2017, "Adversarial Training
Methods for Semi-Supervised Text Classification", eq. 3, for the adversarial step on embeddings. Different here: the
loss ranks items within a user instead of taking the answer's likelihood, and the score contains the item prior.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarec.config import FineTuneConfig, flattened
from metarec.data.augmentation import check_augmentation, varied
from metarec.data.episodes import Episode, training_batch
from metarec.data.interactions import Codes, Interactions
from metarec.data.templates import PromptTemplate
from metarec.errors import ConfigError
from metarec.evaluation.evaluate import validation_auc
from metarec.files.artifacts import content_hash
from metarec.lm.backbone import Backbone
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import MetaState
from metarec.meta.losses import Labels, QueryLoss, info_nce, pairwise, smoothed
from metarec.meta.outer_loop import Trained, train
from metarec.registries import LOSSES
from metarec.scorer import Request
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.language.finetuned import NAMES, FineTuned, WeightedLogOdds
from metarec.scorers.language.in_context import History, InContext
from metarec.scorers.language.rank_allocation import RankAllocation, distance_from_orthogonal
from metarec.scorers.language.trainable_copy import Recipe, Trainable, TrainableCopy, trainable_copy

# No parameter of a model is called so.
_WEIGHT = "log-odds/weight"
# Validation reads so many users, and so many candidates of each.
_VALIDATION_USERS, _VALIDATION_ITEMS = 16, 16
# Few users a step and few steps: about a quarter of an hour on one CPU core.
_SHOTS, _MIN_QUERY = (0, 5), 8
LORA = FineTuneConfig(
    trainable="lora",
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
FULL = LORA.model_copy(update={"trainable": "all", "steps": 60, "lr": 2e-5, "validate_every": 30})
FINE_TUNING: dict[Trainable, FineTuneConfig] = {"lora": LORA, "all": FULL}


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
    config: FineTuneConfig | None = None,
    limit: int = 8,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    clear: Callable[[], None] | None = None,
) -> FineTuned:
    """Trains a copy of a model on users' histories; returns the state that is best on validation users.

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
        clear: See `metarec.meta.outer_loop.train`.

    Raises:
        ConfigError: The model is a masked LM and the prompt has no blank, is of low precision and all of it is to be
            trained, PEFT knows no targets for it, or the settings do not fit the model or the items.
        DataError: No user has enough ratings.
        ArtifactError: The checkpoint is damaged or of another run.
    """
    history = History(template, interactions.catalog, threshold, limit, seed)
    InContext(backbone, history)  # raises before anything is copied
    settings = config or FINE_TUNING[recipe.trainable]
    _check(backbone, interactions, settings)
    student = trainable_copy(backbone, recipe, settings.steps)
    context = InContext(student.backbone, history)
    run = _FineTuning(backbone, student, context, interactions, users, prior, recipe, settings, seed)
    trained = run.train(validation, checkpoint, resume, clear)
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
    config: FineTuneConfig
    seed: int

    @property
    def name(self) -> str:
        return NAMES[self.recipe.trainable]

    @property
    def adaptive(self) -> bool:
        """Whether ranks are taken away in training, as AdaLoRA does."""
        return self.recipe.trainable == "lora" and self.recipe.form == "adalora"

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
            # The budget of ranks falls by the number of steps.
            **({"allocated over": self.config.steps} if self.adaptive else {}),
        }

    def train(
        self,
        validation: Sequence[Episode],
        checkpoint: Path | None,
        resume: bool,
        clear: Callable[[], None] | None = None,
    ) -> Trained:
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
                clear=clear,
                after_step=RankAllocation(self.student.wrapped, self.student.parameters, "init/")
                if self.adaptive
                else None,
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
        with self.student.training(self.recipe.dropout > 0, seed=content_seed(self.seed, step)):
            for place, episode in enumerate(batch):
                losses.append(self._learn(episode, leaves[_WEIGHT], step, place))
            contrastive = self._contrastive_loss(step)
            if contrastive is not None:
                # The gradients of users are averaged below, and this loss is of all of them.
                (len(batch) * self.config.contrastive * contrastive).backward()
            if self.adaptive:
                weight = self.student.wrapped.peft_config["default"].orth_reg_weight
                (len(batch) * weight * distance_from_orthogonal(self.student.parameters)).backward()
        found = torch.stack(losses)
        kept = int(found.isfinite().sum())
        gradients = {
            f"init/{key}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / max(kept, 1)
            for key, leaf in leaves.items()
        }
        for leaf in leaves.values():
            leaf.grad = None
        return MetaGradient(found, gradients, ~found.isfinite())

    def _learn(self, episode: Episode, weight: Tensor, step: int, place: int) -> Tensor:
        """Adds the gradient of one user's loss to the trained tensors; returns the loss."""
        context = self._varied(episode, step, place)
        embeddings = _Embeddings(self.student.backbone.model.get_input_embeddings())
        with embeddings.recorded(self.config.fgm > 0):
            loss = self._loss(context, episode, weight)
        if not (loss.requires_grad and loss.isfinite()):
            return loss.detach()
        steps = embeddings.adversarial_steps(loss, self.config.fgm)
        loss.backward()
        if steps:
            with embeddings.moved(steps):
                self._loss(context, episode, weight).backward()
        return loss.detach()

    def _loss(self, context: InContext, episode: Episode, weight: Tensor) -> Tensor:
        outer = LOSSES.get(self.config.loss)
        settings = self.config
        found = _loss(context, self.prior, weight, episode, settings.sharpness, outer, settings.label_smoothing)
        if settings.class_loss:
            found = found + settings.class_loss * self._class_loss(context, episode)
        return found

    def _class_loss(self, context: InContext, episode: Episode) -> Tensor:
        """Returns the cross-entropy of the classes that a user's ratings are nearest to."""
        logits = context.class_logits(
            Request(episode.user, episode.support.asking(episode.query).unlabelled(), episode.query.items)
        )
        nearest = self.base.classes.nearest(episode.query.values).to(logits.device)
        return torch.nn.functional.cross_entropy(logits, nearest, label_smoothing=self.config.label_smoothing)

    def _varied(self, episode: Episode, step: int, place: int) -> InContext:
        """Returns the model with prompts that are varied as the settings say."""
        augment = self.config.augment
        generator = np.random.default_rng([self.seed, step, place, 1])
        history = self.context.history
        if augment.prompts:
            texts = (history.template.text, *augment.prompts)
            text = texts[int(generator.integers(len(texts)))]
            history = replace(history, template=replace(history.template, text=text))
        items = np.concatenate([episode.support.items, episode.query.items])
        catalog = varied(history.catalog, items, augment, generator)
        if catalog is history.catalog and history is self.context.history:
            return self.context
        return replace(self.context, history=replace(history, catalog=catalog))

    def _contrastive_loss(self, step: int) -> Tensor | None:
        """Returns InfoNCE over pairs of items that users like, each pair of another user; None where it has no weight.

        An item's vector is the state behind its answer, without a history.
        """
        if not self.config.contrastive:
            return None
        generator = np.random.default_rng([self.seed, step, 2])
        liked = self.liked
        users = generator.choice(len(liked), min(self.config.contrastive_users, len(liked)), replace=False)
        pairs = np.stack([generator.choice(liked[user], 2, replace=False) for user in users])
        vectors = torch.nn.functional.normalize(self.context.states(pairs.T.ravel()).float(), dim=-1)
        first, second = vectors.split(len(pairs))
        also = np.stack([np.isin(pairs[:, 1], liked[user]) for user in users])
        scores = first @ second.T / self.config.temperature
        return info_nce(scores, torch.from_numpy(also).to(scores.device)).mean()

    @cached_property
    def liked(self) -> list[Codes]:
        """The liked items of every training user who likes two or more."""
        likes = self.interactions.likes(self.context.history.threshold)
        rows = (self.interactions.rows_of_user[user] for user in self.users)
        found = (np.unique(self.interactions.item[some[likes[some]]]) for some in rows)
        return [items for items in found if len(items) > 1]


class _Embeddings:
    """The vectors of words, which an adversarial step moves where they enter the model.

    Args:
        module: The layer that gives them.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._seen: list[Tensor] = []

    @contextmanager
    def recorded(self, on: bool) -> Iterator[None]:
        """Keeps the vectors that a forward pass reads, in the order in which it does."""

        def keep(_: Any, __: Any, output: Tensor) -> Tensor:
            kept = output if output.requires_grad else output.detach().requires_grad_()
            self._seen.append(kept)
            return kept

        hook = self._module.register_forward_hook(keep) if on else None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def adversarial_steps(self, loss: Tensor, length: float) -> list[Tensor]:
        """Returns how to move every vector so that the loss rises most: along its gradient, of a length together."""
        if not self._seen:
            return []
        slopes = torch.autograd.grad(loss, self._seen, retain_graph=True, allow_unused=True)
        pairs = zip(self._seen, slopes, strict=True)
        found = [torch.zeros_like(seen) if slope is None else slope for seen, slope in pairs]
        norm = torch.stack([slope.square().sum() for slope in found]).sum().sqrt()
        return [] if not norm > 0 else [length * slope / norm for slope in found]

    @contextmanager
    def moved(self, steps: Sequence[Tensor]) -> Iterator[None]:
        """Adds steps to the vectors that the same forward pass reads."""
        waiting = iter(steps)
        hook = self._module.register_forward_hook(lambda _, __, output: output + next(waiting))
        try:
            yield
        finally:
            hook.remove()


def content_seed(seed: int, step: int) -> int:
    """Returns a seed of torch's generator that depends on the run's and on the step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def _check(backbone: Backbone, interactions: Interactions, settings: FineTuneConfig) -> None:
    """Refuses settings that fit neither the model nor the items.

    Raises:
        ConfigError: Classes of a model that has none, a column that is not there, or a prompt that cannot be read.
    """
    check_augmentation(interactions.catalog, settings.augment)
    for place, text in enumerate(settings.augment.prompts):
        PromptTemplate(text, "", "", f"augment.prompts[{place}]").render(interactions.catalog, 0)
    if settings.class_loss and backbone.kind != "classifier":
        raise ConfigError(
            f"class_loss is {settings.class_loss:g}, and '{backbone.name}' is a {backbone.kind} model, without classes",
            "Set classes to the number of ratings, or class_loss to 0",
        )


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


def _loss(
    context: InContext,
    prior: ItemPrior,
    weight: Tensor,
    episode: Episode,
    sharpness: float,
    loss: QueryLoss = pairwise,
    smoothing: float = 0.0,
) -> Tensor:
    """Returns the loss of one training user's query; 0 where it has no pairs to compare, and then nothing is read."""
    query = episode.query
    liked = torch.from_numpy(query.likes(context.history.threshold)).to(weight.device)
    if loss is pairwise and (liked.all() or not liked.any()):
        return torch.zeros((), device=weight.device)
    # Labels in the history follow the threshold, as they do for new users.
    odds = context.log_odds(Request(episode.user, episode.support.asking(query).unlabelled(), query.items))
    scores = torch.from_numpy(prior.values_without(query)).to(odds.device) + weight * odds
    target = torch.from_numpy(prior.standardize(query.values)).to(scores)
    labels = Labels(liked[None], target[None], torch.ones_like(liked)[None])
    return smoothed(loss, smoothing)(scores[None], labels, sharpness)[0]


def _short_queries(episodes: Sequence[Episode], threshold: float, users: int, items: int) -> list[Episode]:
    """Returns the first users that have both classes among their first candidates, with these alone."""
    short = [replace(episode, query=episode.query.head(items)) for episode in episodes]
    return [episode for episode in short if len(set(episode.query.likes(threshold).tolist())) == 2][:users]
