"""Fine-tuning on the meta-training users' ratings: one LoRA for all users, or every parameter of the model.

Training asks what serving asks: a user's history as solved examples (`metarec.scorers.language.in_context`), then an
item. The score is the item prior plus a learned weight times the log-odds, and the loss the pairwise one of
`metarec.meta.losses`, so that these baselines know what every other method knows. A constant that all log-odds share
would cancel in both, so none is taken off. The loop is `metarec.meta.outer_loop`'s; the trained tensors stand where
meta-parameters stand.

Sources: Bao et al. 2023, "TALLRec", for one LoRA over all users' histories; Hu et al. 2021, "LoRA". What is different
here: ranking within a user instead of the answer's likelihood, and the item prior in the score.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metarec.artifacts import content_hash
from metarec.config import TrainConfig
from metarec.data.episodes import Episode, training_batch
from metarec.data.interactions import Codes, Interactions
from metarec.data.templates import PromptTemplate
from metarec.errors import ConfigError
from metarec.evaluate import evaluate, mean_auc
from metarec.lm.answer_model import open_answer_model
from metarec.lm.backbone import Backbone
from metarec.lm.placement import default_placement
from metarec.lm.tokenized import tokenize_catalog
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import MetaState
from metarec.meta.losses import pairwise_logistic
from metarec.meta.outer_loop import train
from metarec.scorer import Request
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.terms import ITEM_MEAN, ItemMeanTerm
from metarec.scorers.language.adapted import InnerLoop, MetaScorer
from metarec.scorers.language.in_context import History, InContext, score_one_by_one
from metarec.scorers.language.prompt_term import PROMPT, PromptTerm
from metarec.scorers.language.score import ADAPTER, initial_state
from metarec.scorers.term import ADAPTER_TERM, weight_name

Trainable = Literal["lora", "all"]
NAMES: dict[Trainable, str] = {"lora": "joint LoRA", "all": "full fine-tuning"}
_WEIGHT = "score.weight"
# Few users a step and few steps: what one CPU core reads and differentiates in about a quarter of an hour.
LORA = TrainConfig(
    steps=80,
    users=2,
    shots=(0, 5),
    max_query=8,
    min_query=8,
    lr=5e-4,
    warmup=10,
    adapter_weight=0.2,
    validate_every=40,
)
FULL = LORA.model_copy(update={"steps": 60, "lr": 2e-5, "validate_every": 30})
FINE_TUNING: dict[Trainable, TrainConfig] = {"lora": LORA, "all": FULL}


@dataclass(frozen=True)
class Recipe:
    """Which parameters of a model are trained.

    Args:
        trainable: ``lora``: a low-rank update that all users share; ``all``: every parameter.
        rank: Of the LoRA.
        alpha: The LoRA is scaled by ``alpha / rank``.
        targets: Linear layers that carry the LoRA; None takes those that PEFT knows for the architecture, which are
            queries and values of a Llama.
        seed: Of the LoRA's A.
    """

    trainable: Trainable
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Weighted:
    """Scores by the item prior plus weighted log-odds, of a model in training or of one that is done."""

    context: InContext
    prior: ItemPrior
    weight: float
    name: str
    bytes_per_user: int = 0

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_one_by_one(self.name, requests, len(self.prior.count), self._score)

    def _score(self, request: Request) -> Tensor:
        odds = self.context.log_odds(request)
        return torch.from_numpy(self.prior.values(request.candidates)).to(odds.device) + self.weight * odds


@dataclass(frozen=True)
class FineTuned:
    """Scores a candidate by ``prior + weight * log-odds`` of a fine-tuned model that reads the user's history.

    Args:
        base: The model as it was before; it stays as it is.
        history: How a user is told.
        prior: The item prior.
        weight: Weight of the log-odds.
        recipe: What was trained.
        trained: The trained tensors by name.
        training: A JSON-able summary of the training.
        name: How the method is called in tables.
        bytes_per_user: See `Scorer`: nothing is kept of a user but the ratings.

    Raises:
        ConfigError: The base is of low precision and all of it was trained.
    """

    base: Backbone
    history: History
    prior: ItemPrior
    weight: float
    recipe: Recipe
    trained: Mapping[str, Tensor]
    training: Mapping[str, Any]
    name: str
    bytes_per_user: int = 0

    def __post_init__(self) -> None:
        _ = self.context  # now, so that what does not fit is refused at once and no request pays for it

    @property
    def parameters(self) -> int:
        """How many numbers were trained, which all users share."""
        return sum(tensor.numel() for tensor in self.trained.values()) + 1

    @cached_property
    def context(self) -> InContext:
        """The fine-tuned model, which shares with the base what was not trained, and how a user is told to it."""
        student = _student(self.base, self.recipe)
        student.take(self.trained)
        student.finish()
        digest = hashlib.sha256()
        for key, tensor in sorted(self.trained.items()):
            digest.update(key.encode() + tensor.cpu().numpy().tobytes())
        fingerprint = content_hash([self.base.fingerprint, asdict(self.recipe), digest.hexdigest()])
        name = f"{self.base.name}, {NAMES[self.recipe.trainable]}"
        return InContext(replace(student.backbone, name=name, fingerprint=fingerprint), self.history)

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return _Weighted(self.context, self.prior, self.weight, self.name).score(requests)

    def prompt_text(self, request: Request, candidate: int) -> str:
        """Returns the text that is read to score a candidate."""
        return self.context.prompt_text(request, candidate)

    def tokens_read(self, request: Request) -> int:
        """Returns how many tokens scoring a request reads, what its prompts share counted once."""
        return self.context.tokens_read(request)


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
    validation_users: int = 16,
    validation_items: int = 16,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> FineTuned:
    """Trains a copy of a causal LM on users' histories and keeps what is best on validation users.

    Args:
        backbone: The model; it stays as it is.
        template: The task's prompt.
        interactions: The dataset.
        users: The meta-training users that `prior` was fitted on.
        prior: The item prior; a user's own ratings are taken out of it in training.
        validation: Episodes of validation users; they choose when to stop.
        threshold: Ratings from here on are likes.
        recipe: Which parameters are trained.
        config: The loop's settings; `shots` are the lengths of histories, 0 keeps prompts without one in distribution.
            None takes what `FINE_TUNING` has.
        limit: Examples in a history at most.
        validation_users: Validation reads so many users with both classes.
        validation_items: Validation reads so many of a user's candidates.
        seed: Of the batches and of the examples' order.
        checkpoint: Where the training state is kept; None keeps it in a temporary directory.
        resume: Goes on from `checkpoint` if it is there.

    Raises:
        ConfigError: The model is not a causal LM, is of low precision and all of it is to be trained, or PEFT knows no
            targets for it.
        DataError: No user has enough ratings.
        ArtifactError: The checkpoint is damaged or of another run.
    """
    config = config or FINE_TUNING[recipe.trainable]
    history = History(template, interactions.catalog, threshold, limit, seed)
    InContext(backbone, history)  # refuses other kinds of model before anything is copied
    student = _student(backbone, recipe)
    context = InContext(student.backbone, history)
    name = NAMES[recipe.trainable]
    initial = {key: parameter.detach() for key, parameter in student.parameters.items()}
    weight = torch.tensor(config.adapter_weight, device=backbone.device)

    def gradient_at(meta: MetaState, step: int) -> MetaGradient:
        student.take(meta.init)
        batch = training_batch(
            interactions,
            users,
            batch_users=config.users,
            shots=config.shots,
            max_query=config.max_query,
            min_query=config.min_query,
            seed=seed,
            step=step,
        )
        leaves = {**student.parameters, _WEIGHT: meta.init[_WEIGHT].detach().clone().requires_grad_()}
        losses = []
        for episode in batch:
            loss = _loss(context, prior, leaves[_WEIGHT], episode, config.sharpness)
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

    asked = _asked(validation, threshold, validation_users, validation_items)

    def validate(meta: MetaState) -> float:
        student.take(meta.init)
        scorer = _Weighted(context, prior, float(meta.init[_WEIGHT]), name)
        shots = [max(config.shots)]
        report = evaluate(
            [scorer],
            asked,
            shots,
            interactions.catalog,
            threshold=threshold,
            seed=seed,
            baseline=name,
            left_out={},
            short_supports=True,
        )
        return mean_auc(report, name, shots)

    identity = {
        "base": backbone.fingerprint,
        "data": interactions.digest,
        "users": content_hash(users.tolist()),
        "prompt": content_hash([template.text, template.positive, template.negative]),
        "recipe": content_hash(asdict(recipe)),
        "config": config.model_dump(mode="json"),
        "seed": seed,
        "limit": limit,
    }
    with tempfile.TemporaryDirectory() as scratch:
        trained = train(
            MetaState({**initial, _WEIGHT: weight}, {}),
            gradient_at,
            validate,
            config,
            checkpoint=checkpoint or Path(scratch) / "checkpoint",
            identity=identity,
            resume=resume,
            description=name,
        )
    best = dict(trained.best.init)
    learned = float(best.pop(_WEIGHT))
    training = {
        "best_step": trained.best_step,
        "best_validation_auc": trained.best_value,
        "steps": trained.steps,
        "diverged": trained.diverged,
        "history": tuple(
            {"step": step, "query_loss": loss, "validation_auc": value} for step, loss, value in trained.history
        ),
    }
    return FineTuned(backbone, history, prior, learned, recipe, best, training, name)


def _loss(context: InContext, prior: ItemPrior, weight: Tensor, episode: Episode, sharpness: float) -> Tensor:
    """Pairwise loss of one training user's query; a query of one class says nothing and is not read."""
    query = episode.query
    liked = torch.from_numpy(query.likes(context.history.threshold)).to(weight.device)
    if liked.all() or not liked.any():
        return torch.zeros((), device=weight.device)
    # The history shows what a person would have given, labelled as it will be for new users.
    odds = context.log_odds(Request(episode.user, episode.support.unlabelled(), query.items))
    scores = torch.from_numpy(prior.values_without(query)).to(odds.device) + weight * odds
    return pairwise_logistic(scores[None], liked[None], torch.ones_like(liked)[None], sharpness)[0]


def _asked(episodes: Sequence[Episode], threshold: float, users: int, items: int) -> list[Episode]:
    """Returns the first users whose first candidates hold both classes."""
    short = [replace(episode, query=episode.query.head(items)) for episode in episodes]
    return [episode for episode in short if len(set(episode.query.likes(threshold).tolist())) == 2][:users]


@dataclass(frozen=True)
class _Student:
    """A copy of a model that shares its frozen parameters and owns the trained ones."""

    backbone: Backbone
    parameters: Mapping[str, torch.nn.Parameter]
    wrapped: Any

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Lets the model compute with these tensors, without copying them."""
        for name, parameter in self.parameters.items():
            parameter.data = tensors[name]

    def finish(self) -> None:
        """Folds a LoRA into weights of its own and freezes everything."""
        if self.wrapped is not None:
            for module in self.wrapped.modules():
                if hasattr(module, "lora_A"):
                    base = module.get_base_layer()
                    base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            self.wrapped.merge_and_unload()
        self.backbone.model.requires_grad_(False)


def _student(backbone: Backbone, recipe: Recipe) -> _Student:
    full = recipe.trainable == "all"
    if full and backbone.dtype.itemsize < torch.float32.itemsize:
        raise ConfigError(
            f"'{backbone.name}' is loaded as {backbone.dtype}, too coarse for small steps", "Load it as float32"
        )
    # Modules are copied; every parameter keeps its memory, which nothing below writes to.
    shared: dict[int, Any] = {
        id(parameter): torch.nn.Parameter(parameter.data, requires_grad=True) if full else parameter
        for parameter in backbone.model.parameters()
    }
    model = copy.deepcopy(backbone.model, shared)
    wrapped = None if full else _with_lora(model, recipe, backbone)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    model.eval()
    return _Student(replace(backbone, model=model), parameters, wrapped)


def _with_lora(model: Any, recipe: Recipe, backbone: Backbone) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # the factor is a quotient; any number does
        target_modules=None if recipe.targets is None else list(recipe.targets),
        # GPT-2 keeps its weights as (in, out).
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        task_type=backbone.task_type,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            return get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            f"no LoRA fits '{backbone.name}': {str(error).splitlines()[0]}", "Name its linear layers as 'targets'"
        ) from None


def then_per_user_lora(
    tuned: FineTuned,
    *,
    layers: int = 4,
    rank: int = 1,
    alpha: float = 2.0,
    steps: int = 5,
    inner_lr: float = 0.3,
    shrinkage: float = 5.0,
    seed: int = 0,
    name: str | None = None,
) -> MetaScorer:
    """Gives every user a fresh LoRA on a fine-tuned model, fitted to the support by plain gradient steps.

    Prompts are about one item, without history. The score starts as the fine-tuned model's own,
    ``prior + weight * log-odds``, the log-odds around the catalog's mean. Opening it reads the whole catalog once.

    Args:
        tuned: The fine-tuned model.
        layers: How many topmost blocks carry the adapter.
        rank: Of the adapter.
        alpha: The adapter is scaled by ``alpha / rank``.
        steps: Gradient steps per user.
        inner_lr: Their rate, the same for all tensors.
        shrinkage: Pseudo-count in the support loss's denominator.
        seed: Of the adapter's A.
        name: How the method is called in tables; None names the fine-tuning and what follows.
    """
    backbone, history = tuned.context.backbone, tuned.context.history
    prompts = tokenize_catalog(backbone, history.template, history.catalog)
    placement = default_placement(
        backbone, prompts, layers=layers, targets=None, rank=rank, alpha=alpha, active_tokens="auto"
    )
    answer_model = open_answer_model(backbone, prompts, placement)
    score = {"item mean": ITEM_MEAN, "prompt": PROMPT, ADAPTER_TERM: ADAPTER}
    meta = initial_state(score, answer_model, inner_lr=inner_lr, adapter_weight=1.0, seed=seed, device=backbone.device)
    prompt_weight = weight_name("prompt")
    return MetaScorer(
        replace(meta, init={**meta.init, prompt_weight: meta.init[prompt_weight].new_tensor(tuned.weight)}),
        {"item mean": ItemMeanTerm(tuned.prior), "prompt": PromptTerm(answer_model)},
        tuned.prior,
        answer_model,
        InnerLoop(steps, shrinkage, user_bias_damping=1.0, storage=torch.float16),
        history.threshold,
        name=name or f"{tuned.name}, then per-user LoRA",
    )
