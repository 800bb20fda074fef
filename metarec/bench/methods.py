"""Every method there is, by the name it has in tables: one function from a split to the rows of a benchmark.

Ties the scorers to a task's data, each part that several methods share computed once. Knows nothing of tables,
statistics or files, but for where a long training keeps its checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from metarec.config import MetaConfig, RunConfig, override, validated
from metarec.data.episodes import Episode
from metarec.data.interactions import Codes, Interactions
from metarec.data.task_data import TaskData
from metarec.lm.answer_model import AnswerModel
from metarec.lm.backbone import Backbone, load_backbone
from metarec.recommender import BASELINE, MetaRecommender
from metarec.scorer import Request, Scorer
from metarec.scorers.collaborative.features import Features, item_features, unrated_features
from metarec.scorers.collaborative.foldin import fit_als, fit_ease, fit_item_knn, fit_user_knn
from metarec.scorers.collaborative.gp import fit_process
from metarec.scorers.collaborative.item_mean import ItemPrior, fit_item_mean
from metarec.scorers.collaborative.networks import Form, Network, fit_network
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.text import fit_text_logistic, fit_text_ridge, fit_two_tower
from metarec.scorers.collaborative.trivial import Constant, ItemMean, Popularity, Random
from metarec.scorers.language.finetuned import FINE_TUNING, FineTuned, Recipe, Trainable, fine_tune, then_per_user_lora
from metarec.scorers.language.in_context import History, InContext, Listwise
from metarec.scorers.language.item_vectors import text_vectors
from metarec.scorers.language.zero_shot import ZeroShot, calibrated_zero_shot
from metarec.scorers.serialization import load_scorer, save_scorer

_COMPONENTS = 48


@dataclass(frozen=True)
class MethodContext:
    """One split of a task, with what methods are fitted from.

    Args:
        data: The task's data.
        workspace: Where a long training keeps its checkpoint and its result.
        train_users: Only so many of the meta-training users, drawn by the split's seed; None for all.
    """

    data: TaskData
    workspace: Path
    train_users: int | None = None

    @property
    def seed(self) -> int:
        """Seed of the split, and of everything a method draws."""
        return self.data.seed

    @cached_property
    def users(self) -> Codes:
        """The meta-training users."""
        users = self.data.parts["train"]
        if self.train_users is None:
            return users
        return np.sort(np.random.default_rng(self.seed).permutation(users)[: self.train_users])

    @cached_property
    def task_data(self) -> TaskData:
        """The task's data with no other meta-training users than `users`."""
        return replace(self.data, parts={**self.data.parts, "train": self.users})

    @property
    def interactions(self) -> Interactions:
        """What training may see."""
        return self.data.interactions

    @property
    def threshold(self) -> float:
        """Ratings from here on are likes."""
        return self.data.task.like_threshold

    @cached_property
    def mean(self) -> ItemPrior:
        """Shrunk item means."""
        return fit_item_mean(self.interactions, self.users)

    @cached_property
    def prior(self) -> ItemPrior:
        """Item means smoothed by text."""
        return self.known.smoothed(self.mean, self.seed)

    @cached_property
    def vectors(self) -> Floats:
        """The sentence encoder's vector of every item's text, shape (items, features)."""
        return text_vectors(self.interactions.catalog)

    @cached_property
    def fields(self) -> dict[str, Floats]:
        """Features of items from the catalog's fields, block by block."""
        return item_features(self.interactions.catalog)

    @cached_property
    def known(self) -> Features:
        """What is known of items beside ratings: text by the sentence encoder, and the fields."""
        read = {"text": self.vectors}
        if self.data.task.split.asks_unrated:
            return unrated_features(read, self.fields)
        return Features({**read, **self.fields}, self.vectors)

    @cached_property
    def features(self) -> Floats:
        """Text's principal components and the fields side by side, each block of mean length one."""
        left, values, _ = np.linalg.svd(self.vectors - self.vectors.mean(0), full_matrices=False)
        blocks = {"text": left[:, :_COMPONENTS] * values[:_COMPONENTS], **self.fields}
        return np.concatenate([block / np.sqrt((block**2).sum(1).mean()) for block in blocks.values()], 1)

    @cached_property
    def untrained(self) -> MetaRecommender:
        """The default language model on the task's prompts with the item prior, not meta-trained, without the GP."""
        config = RunConfig(seed=self.seed, score=("item mean", "prompt", "adapter"))
        return MetaRecommender.from_pretrained(config.backbone, config).prepare(self.task_data)

    @cached_property
    def backbone(self) -> Backbone:
        """The default language model, frozen."""
        return load_backbone(RunConfig().backbone)

    def history(self, limit: int) -> History:
        """Returns how a user's ratings are told in a prompt, so many at most."""
        return History(self.data.task.template, self.interactions.catalog, self.threshold, limit, self.seed)

    @cached_property
    def validation(self) -> Sequence[Episode]:
        """Episodes of the validation users, for early stopping."""
        return self.data.episodes("validation")[0]


@dataclass(frozen=True)
class MethodRow:
    """One row of a benchmark: a scorer, and what it costs beside time and memory.

    Args:
        scorer: The fitted method.
        parameters: How many numbers fitting learned that all users share; tables of counts and means not included.
        tokens: How many tokens of text a language model reads to answer a request.
        prompt: The text it reads for one candidate of a request, or None where it reads none.
        log_odds: Whether scores are meant as log-odds of a like, so that their calibration can be looked at as it is.
        step: The inner step whose scores these are, where they are a point of the adaptation's trajectory alone.
    """

    scorer: Scorer
    parameters: int = 0
    tokens: Callable[[Request], int] = lambda _: 0
    prompt: Callable[[Request, int], str] | None = None
    log_odds: bool = False
    step: int | None = None


@dataclass(frozen=True)
class Method:
    """How a row, or several that share a fit, come from a setting.

    Args:
        fit: Fits the method.
        group: ``trivial``, ``fold-in``, ``prompt``, ``fine-tuning``, ``meta``, ``algorithm``,
            ``adapter`` or ``ablation``.
        about: One line that says what it is.
        options: What `fit` was called with beside the setting; part of a cell's identity.
    """

    fit: Callable[..., Sequence[MethodRow]]
    group: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, setting: MethodContext) -> Sequence[MethodRow]:
        """Fits the method with its options."""
        return self.fit(setting, **self.options)


def _plain(
    fit: Callable[..., Scorer], parameters: Callable[[Any], int] = lambda _: 0
) -> Callable[..., Sequence[MethodRow]]:
    def rows(setting: MethodContext, **options: Any) -> Sequence[MethodRow]:
        scorer = fit(setting, **options)
        return [MethodRow(scorer, parameters(scorer))]

    return rows


def _network(form: Form, setting: MethodContext, **options: Any) -> Scorer:
    return fit_network(
        form,
        setting.interactions,
        setting.users,
        setting.prior,
        setting.features,
        validation=setting.validation,
        threshold=setting.threshold,
        seed=setting.seed,
        **options,
    )


def _network_size(network: Network) -> int:
    return sum(value.numel() for value in network.meta.tensors().values())


def _llm_two_tower(setting: MethodContext) -> Sequence[MethodRow]:
    answer_model = setting.untrained.fitted.answer_model
    states = answer_model.states.cpu().numpy().astype(np.float64)
    return [MethodRow(fit_two_tower(states, threshold=setting.threshold, name="two-tower cosine, LLM"))]


def _prompted(scorer: ZeroShot | InContext | Listwise | FineTuned, *, log_odds: bool = False) -> MethodRow:
    parameters = scorer.parameters if isinstance(scorer, FineTuned) else 0
    return MethodRow(scorer, parameters, scorer.tokens_read, scorer.prompt_text, log_odds)


def _zero_shot(setting: MethodContext) -> Sequence[MethodRow]:
    fitted = setting.untrained.fitted
    calibrated = calibrated_zero_shot(fitted.answer_model, fitted.task.template, fitted.catalog)
    return [_prompted(scorer, log_odds=True) for scorer in (ZeroShot(fitted.answer_model), calibrated)]


def _in_context(setting: MethodContext, *, limit: int) -> Sequence[MethodRow]:
    backbone, history = setting.backbone, setting.history(limit)
    calibrated = InContext(backbone, history, calibrated=True, name="in-context, calibrated")
    return [_prompted(scorer, log_odds=True) for scorer in (InContext(backbone, history), calibrated)]


def _listwise(setting: MethodContext, *, limit: int, rounds: int) -> Sequence[MethodRow]:
    return [_prompted(Listwise(setting.backbone, setting.history(limit), rounds=rounds))]


def _fine_tuned(
    setting: MethodContext, *, trainable: Trainable, lr: float | None = None, longer: int = 1
) -> Sequence[MethodRow]:
    """One model for all users, in so many times the steps; the whole model also with every user's own LoRA on top."""
    data, task, path = setting.interactions, setting.data.task, setting.workspace / "model"
    config = FINE_TUNING[trainable]
    config = config.model_copy(
        update={
            "lr": config.lr if lr is None else lr,
            "steps": longer * config.steps,
            "validate_every": longer * config.validate_every,
        }
    )
    if path.exists():
        tuned = cast("FineTuned", load_scorer(path, backbone=setting.backbone))
    else:
        tuned = fine_tune(
            setting.backbone,
            task.template,
            data,
            setting.users,
            setting.prior,
            validation=setting.validation,
            threshold=setting.threshold,
            recipe=Recipe(trainable, seed=setting.seed),
            config=config,
            seed=setting.seed,
            checkpoint=setting.workspace / "checkpoint",
            resume=True,
        )
        save_scorer(path, tuned)
        # Four copies of a whole model are worth keeping only as long as they can be resumed from.
        shutil.rmtree(setting.workspace / "checkpoint")
    rows = [_prompted(tuned)]
    if trainable == "all" and setting.train_users is None:
        adapted = then_per_user_lora(tuned, seed=setting.seed)
        rows += [MethodRow(adapted, tuned.parameters, _tokens_read(adapted.answer_model))]
    return rows


def _per_user_lora(setting: MethodContext, *, inner_lr: float, steps: int) -> Sequence[MethodRow]:
    """Every user's own LoRA from a fresh one, by plain gradient steps: what meta-training saves."""
    config = setting.untrained.config.model_copy(
        update={"meta": MetaConfig(inner_lr=inner_lr, inner_steps=steps, shrinkage=0.0)}
    )
    recommender = MetaRecommender(setting.untrained.backbone, config).prepare(setting.task_data)
    scorer = recommender.scorer(name="per-user LoRA")
    return [MethodRow(scorer, 0, _tokens_read(recommender.fitted.answer_model), _item_prompt(recommender))]


def _recommender(setting: MethodContext, settings: Mapping[str, Any]) -> MetaRecommender:
    """Trains a recommender on the setting, or loads the one that was trained there before."""
    model = setting.workspace / "model"
    if (model / "recommender.json").exists():
        return MetaRecommender.from_pretrained(model)
    assignments = [f"{key}={value}" for key, value in settings.items()]
    config = validated(RunConfig, override({"seed": setting.seed}, assignments), "method options")
    recommender = MetaRecommender.from_pretrained(config.backbone, config)
    recommender.fit(setting.task_data, checkpoint=setting.workspace / "checkpoint", resume=True)
    recommender.save_pretrained(model)
    return recommender


def _metarec(setting: MethodContext, *, name: str = "metarec", **settings: Any) -> Sequence[MethodRow]:
    """Adapted, and step by step on the way there; the default also without adaptation and without the LLM."""
    recommender = _recommender(setting, settings)
    answer_model, meta = recommender.fitted.answer_model, recommender.fitted.meta
    parameters = sum(value.numel() for value in meta.tensors().values())
    read = _tokens_read(answer_model)

    def row(steps: int | None, called: str, step: int | None = None) -> MethodRow:
        return MethodRow(
            recommender.scorer(steps=steps, name=called), parameters, read, _item_prompt(recommender), step=step
        )

    rows = [row(None, name)]
    if name == "metarec":
        rows += [row(0, "metarec, no adaptation")]
        # The steps in between are a picture, not a row: one split is enough for it.
        between = range(1, recommender.config.meta.inner_steps) if setting.seed == 0 else ()
        rows += [row(step, f"metarec, step {step}", step) for step in between]
    return rows


def _tokens_read(answer_model: AnswerModel) -> Callable[[Request], int]:
    """What all prompts share counts once, as it is read once."""
    shared = answer_model.prompts.prefix
    own = np.array([len(ids) - shared for ids in answer_model.prompts.tokens])
    return lambda request: shared + int(own[request.support.items].sum() + own[request.candidates].sum())


def _item_prompt(recommender: MetaRecommender) -> Callable[[Request, int], str]:
    fitted, special = recommender.fitted, recommender.backbone.special_tokens
    return lambda _, code: fitted.task.template.render(fitted.catalog, code, special)


# Without the stack, which would have the last word on what little they differ by: name, group, in words, settings.
_VARIANTS: tuple[tuple[str, str, str, Mapping[str, Any]], ...] = (
    ("MAML", "algorithm", "meta-trained by second-order MAML", {"meta.algorithm": "maml"}),
    ("MAML++", "algorithm", "meta-trained by MAML with a loss after every step", {"meta.algorithm": "maml++"}),
    ("iMAML", "algorithm", "meta-trained by implicit gradients", {"meta.algorithm": "imaml"}),
    ("Reptile", "algorithm", "meta-trained by Reptile", {"meta.algorithm": "reptile"}),
    ("ANIL", "algorithm", "adapted in the topmost block alone", {"meta.adapt": "top"}),
    ("Meta-SGD", "algorithm", "with an inner rate per number", {"meta.rates": "number"}),
    ("ridge head", "algorithm", "a ridge regression in closed form in place of steps", {"meta.algorithm": "ridge"}),
    ("prototypes", "algorithm", "prototypes in place of steps", {"meta.algorithm": "prototypes"}),
    ("rank 8", "adapter", "adapters of rank 8", {"adapter.rank": 8, "adapter.alpha": 16}),
    ("12 layers", "adapter", "adapters in the twelve topmost blocks", {"adapter.layers": 12}),
    ("biases", "adapter", "biases in place of low-rank updates", {"adapter.kind": "bias"}),
    ("prefix", "adapter", "virtual tokens in place of low-rank updates", {"adapter.kind": "prefix"}),
    ("every token", "adapter", "adapters that every token of a prompt carries", {"adapter.active_tokens": "null"}),
)
METHODS: dict[str, Method] = {
    BASELINE: Method(_plain(lambda s: ItemMean(s.mean)), "trivial", "shrunk item means; what gains are measured from"),
    "random": Method(_plain(lambda s: Random(s.interactions.catalog, s.seed)), "trivial", "a hash of user and item"),
    "constant": Method(_plain(lambda s: Constant(s.interactions.catalog)), "trivial", "what ties are worth"),
    "popularity": Method(_plain(lambda s: Popularity(s.mean)), "trivial", "how often an item was rated"),
    "item mean with text": Method(
        _plain(lambda s: ItemMean(s.prior, name="item mean with text")), "trivial", "means shrunk towards a text ridge"
    ),
    "ALS": Method(
        _plain(
            lambda s, **o: fit_als(s.interactions, s.users, s.prior, seed=s.seed, **o), lambda als: als.factors.size
        ),
        "fold-in",
        "matrix factorization of residuals",
    ),
    "EASE": Method(
        _plain(lambda s, **o: fit_ease(s.interactions, s.users, s.prior, **o), lambda ease: ease.weights.size),
        "fold-in",
        "a linear autoencoder of residuals",
    ),
    "item-kNN": Method(
        _plain(lambda s, **o: fit_item_knn(s.interactions, s.users, s.prior, **o)), "fold-in", "similar items"
    ),
    "user-kNN": Method(
        _plain(lambda s, **o: fit_user_knn(s.interactions, s.users, s.prior, **o)), "fold-in", "similar users"
    ),
    "text ridge": Method(
        _plain(lambda s, **o: fit_text_ridge(s.prior, s.vectors, **o)), "fold-in", "ridge on text, prior as offset"
    ),
    "text ridge, no prior": Method(
        _plain(lambda s, **o: fit_text_ridge(s.prior, s.vectors, offset=False, **o)),
        "fold-in",
        "ridge on text alone",
        {"penalty": 0.3},
    ),
    "text logistic": Method(
        _plain(
            lambda s, **o: fit_text_logistic(s.interactions, s.users, s.prior, s.vectors, threshold=s.threshold, **o)
        ),
        "fold-in",
        "logistic regression on text, prior as offset",
    ),
    "text logistic, no prior": Method(
        _plain(
            lambda s, **o: fit_text_logistic(
                s.interactions, s.users, s.prior, s.vectors, threshold=s.threshold, offset=False, **o
            )
        ),
        "fold-in",
        "logistic regression on text alone",
        {"penalty": 0.3},
    ),
    "two-tower cosine": Method(
        _plain(lambda s: fit_two_tower(s.vectors, threshold=s.threshold)), "fold-in", "retrieval by MiniLM vectors"
    ),
    "two-tower cosine, LLM": Method(_llm_two_tower, "fold-in", "retrieval by the language model's own states"),
    "zero-shot prompt": Method(_zero_shot, "prompt", "the frozen model's answer, whoever asks; also calibrated"),
    "in-context prompt": Method(
        _in_context, "prompt", "the user's history in the prompt; also calibrated", {"limit": 16}
    ),
    "in-context, listwise": Method(
        _listwise, "prompt", "history and a lettered list of candidates, shuffled", {"limit": 8, "rounds": 4}
    ),
    "joint LoRA": Method(
        _fine_tuned, "fine-tuning", "one LoRA for all users, history in the prompt (TALLRec)", {"trainable": "lora"}
    ),
    "full fine-tuning": Method(
        _fine_tuned,
        "fine-tuning",
        "every parameter of the model, history in the prompt; then a LoRA per user",
        {"trainable": "all"},
    ),
    "per-user LoRA": Method(
        _per_user_lora,
        "fine-tuning",
        "a fresh LoRA per user, item prior as offset",
        {"inner_lr": 0.3, "steps": 10},
    ),
    "GP": Method(
        _plain(
            lambda s, **o: fit_process(s.interactions, s.users, s.known, seed=s.seed, **o),
            lambda gp: gp.loadings.size,
        ),
        "fold-in",
        "Gaussian process with learned item covariance, text and fields",
    ),
    "MeLU": Method(_plain(partial(_network, "melu"), _network_size), "meta", "decision layers adapted by MAML"),
    "neural process": Method(
        _plain(partial(_network, "neural process"), _network_size),
        "meta",
        "the support is read in one pass",
        {"weight_decay": 1.0},
    ),
    "metarec": Method(_metarec, "meta", "the default: item prior, stack and adapted language model"),
    **{
        f"metarec, no stack, {called}": Method(
            _metarec,
            group,
            f"prior and language model, {how}",
            {"name": f"metarec, no stack, {called}", "score": "[item mean, prompt, adapter]", **settings},
        )
        for called, group, how, settings in _VARIANTS
    },
    "metarec, no stack": Method(
        _metarec,
        "ablation",
        "prior and adapted language model",
        {"name": "metarec, no stack", "score": "[item mean, prompt, adapter]"},
    ),
    "metarec, no prior": Method(
        _metarec,
        "ablation",
        "no item means at all",
        {"name": "metarec, no prior", "score": "[collaborative, prompt, adapter]"},
    ),
    "metarec, text only": Method(
        _metarec,
        "ablation",
        "the adapted language model alone",
        {"name": "metarec, text only", "score": "[prompt, adapter]"},
    ),
}
