"""How a task's data become a fitted recommender: features, score terms, meta-parameters."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from metarec.config import RunConfig
from metarec.data.episodes import Episode, items_in
from metarec.data.interactions import Catalog, RatingScale
from metarec.data.seen_texts import check_texts
from metarec.data.split_record import SplitRecord
from metarec.data.task import Task
from metarec.data.templates import PromptTemplate
from metarec.errors import ConfigError
from metarec.evaluation.calibration import Calibration, fit_calibration
from metarec.lm.answer_model import AnswerModel, open_answer_model
from metarec.lm.backbone import Backbone
from metarec.lm.loading import load_backbone
from metarec.lm.placement import default_placement
from metarec.lm.rounded import Bits
from metarec.lm.smaller import rounded
from metarec.lm.tokenized import CatalogPrompts, tokenize_catalog
from metarec.meta.heads import ClosedFormHead, closed_form_head, takes_steps
from metarec.meta.inner_loop import MetaState
from metarec.registries import ADAPTER_KINDS, TERMS
from metarec.scorer import Scorer
from metarec.scorers.collaborative.features import Features
from metarec.scorers.collaborative.item_mean import ItemPrior, fit_item_mean
from metarec.scorers.collaborative.side_fitting import FittedSide, fit_side
from metarec.scorers.collaborative.side_readers import reader_of
from metarec.scorers.collaborative.terms import CollaborativeTerm
from metarec.scorers.collaborative.trivial import ItemMean
from metarec.scorers.language.adapted import InnerLoop, MetaScorer
from metarec.scorers.language.encoded_text import encoded_reader
from metarec.scorers.language.expected_rating import expected_rating
from metarec.scorers.language.score import initial_state
from metarec.scorers.language.weight_prior import fit_head_start
from metarec.scorers.language.zero_shot import ZeroShot
from metarec.scorers.term import ADAPTER_TERM, CrossFitted, ScoreTerm, Term, TermContext, weight_name
from metarec.system.tensors import AdapterState
from metarec.training.stack_files import cached_stack
from metarec.training.task_features import SIDE_TERM, collaborative_features, for_task, side_note

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData

# Of a weight, by `RunConfig.backbone_precision`.
_BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """What fitting a task leaves behind: everything a recommender needs to serve without the dataset.

    Args:
        task: The task, with its prompt and label rule.
        catalog: The items.
        scale: The rating scale.
        prior: Shrunk item means smoothed by text; they standardize ratings and are the baseline.
        terms: The score's terms by name, but for the adapter.
        meta: The meta-parameters.
        answer_model: The language model over this catalog; None where neither the score nor its features read one.
        split: The data it was fitted on, and the users it saw.
        training: A JSON-able summary of the training.
        calibration: What turns scores into ratings and probabilities, for each K of the task; empty where no validation
            user has enough ratings.
    """

    task: Task
    catalog: Catalog
    scale: RatingScale
    prior: ItemPrior
    terms: Mapping[str, Term]
    meta: MetaState
    answer_model: AnswerModel | None
    split: SplitRecord
    training: dict[str, Any]
    calibration: tuple[Calibration, ...] = ()

    def __repr__(self) -> str:
        return f"Fitted(task={self.task.name!r}, items={len(self.catalog)}, terms={list(self.terms)})"

    @property
    def cheap_terms(self) -> tuple[str, ...]:
        """The terms that read no language model."""
        return tuple(name for name in self.terms if not TERMS.get(name).needs_model)

    @property
    def reads_items(self) -> bool:
        """Whether the language model reads items once for all users, as the adapter and most terms have it do."""
        reading = (TERMS.get(name) for name in self.terms)
        adapted = weight_name(ADAPTER_TERM) in self.meta.init
        return adapted or any(term.needs_model and not term.reads_person for term in reading)

    @property
    def reads_person(self) -> bool:
        """Whether the language model reads every item again for every user."""
        return any(TERMS.get(name).reads_person for name in self.terms)


@dataclass(frozen=True)
class Prepared:
    """A fitted recommender before meta-training, and its parts as meta-training users may see them.

    Args:
        fitted: The recommender.
        crossed: Its terms, also without each fold of the meta-training users.
        context: What the terms were fitted on.
        head_shifts: See `HeadStart.shifts`.
    """

    fitted: Fitted
    crossed: Mapping[str, CrossFitted]
    context: TermContext
    head_shifts: tuple[AdapterState, ...] = ()

    def head_shift(self, users: Sequence[str]) -> AdapterState:
        """Returns how far the head's parameters are, for meta-training users, from those that have seen them."""
        if not self.head_shifts:
            return {}
        folds = [self.head_shifts[self.context.stack.out_of_fold.fold[user]] for user in users]
        return {name: torch.stack([fold[name] for fold in folds]) for name in folds[0]}

    def __repr__(self) -> str:
        return f"Prepared({self.fitted!r})"


def score_terms(config: RunConfig, *, from_file: bool = False) -> dict[str, ScoreTerm]:
    """Returns the terms that the settings name, in their order; see `metarec.registry.Registry.get`."""
    return {name: TERMS.get(name, from_file=from_file) for name in config.score}


def adapted_model(config: RunConfig, answer_model: AnswerModel | None) -> AnswerModel | None:
    """Returns the language model that carries the users' adapters; None where the score has no adapter."""
    return answer_model if ADAPTER_TERM in config.score else None


def needs_model(config: RunConfig) -> bool:
    """Says whether the score, or the features that the settings name, read the language model."""
    reads_states = "lm" in (config.collaborative.features or ())
    return reads_states or any(term.needs_model for term in score_terms(config).values())


def prepare(data: TaskData, config: RunConfig, backbone: Backbone | None) -> Prepared:
    """Fits everything but the meta-parameters, which stay as they start.

    Args:
        data: The task's data.
        config: The settings.
        backbone: The language model; None where `needs_model` says so of the settings `for_task`.

    Raises:
        ConfigError: All items read the same, a text is longer than the model reads, or the settings do not fit.
    """
    catalog, config = data.interactions.catalog, for_task(config, data.task)
    reads_text = "text" in (config.collaborative.features or ())
    for sentence in check_texts(data.task, catalog, prompt=backbone is not None, text=reads_text):
        _LOG.warning("%s", sentence)
    if note := side_note(data.task, config.score):
        _LOG.log(logging.INFO if SIDE_TERM in config.score else logging.WARNING, "%s", note)
    answer_model = None if backbone is None else catalog_answer_model(backbone, config, data.task.template, catalog)
    collaborative = config.collaborative
    if "collaborative" not in config.score:
        collaborative = collaborative.model_copy(update={"members": "none"})
    features = collaborative_features(answer_model, data, config)
    side = _side(data, config, features)
    stack = cached_stack(
        data.interactions if side is None else side.interactions,
        data.parts["train"],
        features,
        collaborative,
        threshold=data.task.like_threshold,
        hide=collaborative.stack.hidden_share if data.task.split.asks_unrated else 0.0,
        query_items=data.query_items,
        seed=config.seed,
    )
    train = data.parts["train"]
    prior = stack.prior if side is None else features.smoothed(fit_item_mean(data.interactions, train), config.seed)
    if "item mean" not in config.score:
        stack = stack.with_zero_mean()
    terms = score_terms(config)
    context = TermContext(
        data.interactions,
        data.parts["train"],
        data.task.like_threshold,
        config.seed,
        config.score,
        stack,
        answer_model,
        side,
        data.task.template,
        config.history,
    )
    crossed = {name: term.fit(context) for name, term in terms.items() if term.fit is not None}
    head = fit_head_start(head_of(config), terms, crossed, context, answer_model, config.collaborative.linear)
    fitted = Fitted(
        task=data.task,
        catalog=catalog,
        scale=data.interactions.scale,
        prior=prior,
        terms={name: found.term for name, found in head.crossed.items()},
        meta=initial_state(
            terms,
            adapted_model(config, answer_model),
            inner_lr=config.meta.inner_lr or ADAPTER_KINDS.get(config.adapter.kind).inner_rate,
            adapter_weight=config.train.adapter_weight,
            seed=config.seed,
            top_only=config.meta.adapt == "top",
            steps_with_rates=max(config.meta.inner_steps, 1) if config.meta.rates == "step" else 1,
            elementwise_rates=config.meta.rates == "number",
            head=head.parameters,
            steps=takes_steps(config.meta.algorithm),
            device=config.device,
        ),
        answer_model=answer_model,
        split=SplitRecord.of(data),
        training={},
    )
    return Prepared(fitted, head.crossed, context, head.shifts)


def _side(data: TaskData, config: RunConfig, features: Features) -> FittedSide | None:
    """Returns the effects of side information; None where the score reads none."""
    if SIDE_TERM not in config.score or not data.interactions.side:
        return None
    settings = config.collaborative
    return fit_side(
        data.interactions,
        data.parts["train"],
        features,
        threshold=data.task.like_threshold,
        folds=settings.stack.folds,
        seed=config.seed,
        text_reader=encoded_reader(settings.encoder) if "text" in (settings.features or ()) else reader_of,
        towers=settings.towers,
    )


def meta_scorer(
    fitted: Fitted,
    config: RunConfig,
    *,
    rate_scale: float = 1.0,
    steps: int | None = None,
    name: str = "metarec, adapted",
) -> MetaScorer:
    """Returns a fitted recommender as a `Scorer`."""
    inner = InnerLoop(
        steps=config.meta.inner_steps if steps is None else steps,
        shrinkage=config.meta.shrinkage,
        user_bias_damping=config.meta.user_bias_damping,
        algorithm=config.meta.algorithm,
        start=config.meta.start,
        storage=getattr(torch, config.adapter.storage),
        half_life=half_life_of(config, fitted),
    )
    return MetaScorer(
        fitted.meta,
        fitted.terms,
        fitted.prior,
        adapted_model(config, fitted.answer_model),
        inner,
        fitted.task.like_threshold,
        rate_scale=rate_scale,
        name=name,
    )


def half_life_of(config: RunConfig, fitted: Fitted) -> float | None:
    """Returns the half-life of ratings in days: as set, or as meta-training learned it; None where all count alike."""
    days = config.meta.half_life
    return fitted.training.get("half_life") if days == "learned" else days


def read_items(fitted: Fitted, episodes: Sequence[Episode]) -> None:
    """Reads all at once what scoring some episodes asks of the language model about items alone, if there is any."""
    if fitted.answer_model is not None and fitted.reads_items:
        fitted.answer_model.read(items_in(episodes))


def calibrated(fitted: Fitted, config: RunConfig, data: TaskData) -> Fitted:
    """Returns a fitted recommender with its calibration, fitted on the task's validation users.

    Shares of meta-training users' ratings by tenth of the scale are kept, which a service compares feedback with.
    """
    rows = np.isin(data.interactions.user, data.parts["train"])
    tenths = data.interactions.scale.tenths(data.interactions.rating[rows])
    shares = np.bincount(tenths, minlength=10) / max(len(tenths), 1)
    fitted = replace(fitted, training={**fitted.training, "rating_shares": shares.tolist()})
    episodes = data.episodes("validation")[0][: config.train.validation_users]
    if not episodes:
        return fitted
    read_items(fitted, episodes)
    scorer, threshold = meta_scorer(fitted, config), data.task.like_threshold
    found = tuple(fit_calibration(scorer, episodes, shots, threshold) for shots in data.task.shots)
    return replace(fitted, calibration=found)


def head_of(config: RunConfig) -> ClosedFormHead | None:
    """Returns the head that the settings fit in closed form, None where users have none.

    Raises:
        ConfigError: There is a head, and no adapter in the score whose features it could read.
    """
    found = closed_form_head(config.meta.algorithm, config.meta.start)
    if found is not None and ADAPTER_TERM not in config.score:
        named = (
            f"algorithm '{config.meta.algorithm}'" if not takes_steps(config.meta.algorithm) else "start 'posterior'"
        )
        raise ConfigError(
            f"meta.{named} reads the adapter's features, and the score has no adapter",
            "Add 'adapter' to score, or choose an algorithm with gradient steps from the initialization",
        )
    return found


def open_backbone(config: RunConfig, *, blocks_alone: bool = False) -> Backbone:
    """Loads the backbone that the settings name; see `metarec.lm.loading.load_backbone`."""
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    found = load_backbone(config.backbone, device=config.device, dtype=dtype, blocks_alone=blocks_alone)
    bits = _BITS.get(config.backbone_precision)
    return found if bits is None else rounded(found, bits)


def catalog_answer_model(
    backbone: Backbone,
    config: RunConfig,
    template: PromptTemplate,
    catalog: Catalog,
    prompts: CatalogPrompts | None = None,
) -> AnswerModel:
    """Returns the language model over a catalog's prompts, with adapters where the settings want them.

    Args:
        backbone: The model.
        config: The settings.
        template: The prompt.
        catalog: The items.
        prompts: The catalog's prompts where they are tokens already; None makes them.
    """
    prompts = prompts or tokenize_catalog(backbone, template, catalog)
    adapter = config.adapter
    placement = default_placement(
        backbone,
        prompts,
        layers=adapter.layers,
        targets=adapter.targets,
        rank=adapter.rank,
        alpha=adapter.alpha,
        active_tokens=adapter.active_tokens,
        kind=adapter.kind,
        rslora=adapter.rslora,
        virtual_tokens=adapter.virtual_tokens,
    )
    block_dtype = torch.bfloat16 if config.dtype == "mixed" else None
    return open_answer_model(backbone, prompts, placement, block_dtype, config.cache)


def unadapted_rows(fitted: Fitted, baseline: str) -> list[Scorer]:
    """Returns scorers of a fitted recommender's parts: item means, stack, zero-shot prompt, expected rating.

    Args:
        fitted: What was fitted; parts that it does not have are left out.
        baseline: How the row of item means is called.
    """
    collaborative = fitted.terms.get("collaborative")
    rows: list[Scorer] = [ItemMean(fitted.prior.without_text(), name=baseline)]
    if isinstance(collaborative, CollaborativeTerm) and collaborative.stack.members:
        rows.append(collaborative.stack)
    model = fitted.answer_model
    if model is not None:
        rows.append(ZeroShot(model))
        words = fitted.task.prompt.ratings
        if words:
            rows.append(expected_rating(model, fitted.task.template, fitted.catalog, words, fitted.scale))
    return rows
