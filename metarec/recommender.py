"""`MetaRecommender`: fit on a task, evaluate, adapt to a person, recommend, save and load.

The one object that a program embeds. It ties a backbone, an item prior and meta-parameters to a catalog; the work is
done by the layers below. Knows nothing of the command line.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarec.artifacts import dump_json, load_json, replace_dir, verify_dir
from metarec.config import Dtype, RunConfig, validated
from metarec.data.interactions import Catalog, Codes, Ratings, RatingScale, Values, read_ratings
from metarec.data.task import Task
from metarec.data.task_data import TaskData, load_task_data
from metarec.data.task_files import load_task
from metarec.errors import ArtifactError, ConfigError
from metarec.evaluate import Report, evaluate
from metarec.fitting import (
    HIDDEN_SHARE,
    PRIOR_COLUMNS,
    PRIOR_NUMBERS,
    TASTE,
    Fitted,
    catalog_answer_model,
    closed_form_head,
    collaborative_features,
    meta_scorer,
    meta_train,
    open_backbone,
)
from metarec.lm.backbone import Backbone
from metarec.lm.peft_files import load_adapter, save_adapter
from metarec.meta.inner_loop import MetaState
from metarec.metrics import rank_order
from metarec.progress import progress
from metarec.scorer import Scorer
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.stack import CrossFitted, Stacked, fit_stack
from metarec.scorers.collaborative.trivial import ItemMean
from metarec.scorers.language.adapted import MetaScorer
from metarec.scorers.language.expected_rating import expected_rating
from metarec.scorers.language.score import TASTE_WEIGHT, candidates, initial_state, score
from metarec.scorers.language.zero_shot import ZeroShot
from metarec.scorers.serialization import read_scorer, write_scorer
from metarec.tensors import AdapterState, expand_users, read_tensors, select_user, write_tensors

BASELINE = "item mean"
_ITEMS_AT_ONCE = 512


@dataclass(frozen=True)
class Recommendation:
    """One recommended item: its id, its title and its score (higher is better, comparable within one user)."""

    item: str
    title: str
    score: float


class MetaRecommender:
    """A few-shot recommender: a language model whose adapter was meta-learned to fit new users in a few steps.

    Example:
        >>> recommender = MetaRecommender.from_pretrained("smollm2-135m-instruct")
        >>> recommender.fit("movielens/user-cold")
        >>> user = recommender.adapt([("Toy Story", 5), ("Heat", 2)])
        >>> user.recommend(10)
    """

    def __init__(self, backbone: Backbone, config: RunConfig, fitted: Fitted | None = None) -> None:
        self.backbone = backbone
        self.config = config
        self._fitted = fitted

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        config: RunConfig | None = None,
        *,
        device: str | None = None,
        dtype: Dtype | None = None,
    ) -> MetaRecommender:
        """Loads a saved recommender, or a backbone to fit one on.

        Args:
            name: A directory written by `save_pretrained`; or a backbone: an embedded name, a directory or a
                Hugging Face name.
            config: Settings for fitting; a saved recommender brings its own.
            device: Where it runs, instead of where the settings say.
            dtype: Precision of the frozen weights, instead of what the settings say.

        Raises:
            BackboneError: The backbone cannot be loaded.
            ArtifactError: The saved recommender is damaged, or the backbone is not the one it was made with.
            ConfigError: `config` is given for a saved recommender.
        """
        path = Path(name)
        place = {key: value for key, value in {"device": device, "dtype": dtype}.items() if value is not None}
        if (path / "recommender.json").exists():
            if config is not None:
                raise ConfigError(f"'{path}' brings its own settings", "Leave 'config' out")
            return _load(path, place)
        config = (config or RunConfig()).model_copy(update={"backbone": str(name), **place})
        return cls(open_backbone(config), config)

    @property
    def fitted(self) -> Fitted:
        """What fitting left behind.

        Raises:
            ConfigError: The recommender has not been fitted.
        """
        if self._fitted is None:
            raise ConfigError("the recommender has not been fitted", "Call fit(task), or load a saved one")
        return self._fitted

    def fit(
        self,
        task: str | Task | TaskData | None = None,
        *,
        checkpoint: str | Path | None = None,
        resume: bool = False,
    ) -> MetaRecommender:
        """Meta-trains on a task's meta-training users; hyper-parameters stop early on its validation users.

        Args:
            task: A task's name, a YAML file's path, or a loaded task; None takes the configuration's.
            checkpoint: Where the training state is kept; None keeps it in a temporary directory.
            resume: Goes on from `checkpoint` if it is there.

        Returns:
            Itself, fitted.

        Raises:
            MetarecError: The task or its data are not usable, or the checkpoint is of another run.
        """
        data = self.task_data(task)
        prepared, out_of_fold = self._prepare(data)
        if checkpoint is None:
            with tempfile.TemporaryDirectory() as scratch:
                return self._fit(data, prepared, out_of_fold, Path(scratch) / "checkpoint", resume)
        return self._fit(data, prepared, out_of_fold, Path(checkpoint), resume)

    def prepare(self, task: str | Task | TaskData | None = None) -> MetaRecommender:
        """Fits everything but the meta-parameters, which stay as they start: nothing is meta-trained.

        Args:
            task: See `fit`.

        Returns:
            Itself, ready to score and to adapt from a fresh adapter.
        """
        self._fitted, _ = self._prepare(self.task_data(task))
        return self

    def _fit(
        self, data: TaskData, prepared: Fitted, out_of_fold: CrossFitted, checkpoint: Path, resume: bool
    ) -> MetaRecommender:
        trained = meta_train(data, prepared, out_of_fold, self.config, self._identity(data), checkpoint, resume)
        training = {
            "best_step": trained.best_step,
            "best_validation_auc": trained.best_value,
            "steps": trained.steps,
            "diverged_inner_loops": trained.diverged,
            "history": [
                {"step": step, "query_loss": loss, "validation_auc": value} for step, loss, value in trained.history
            ],
        }
        self._fitted = replace(prepared, meta=trained.best, training=training)
        return self

    def task_data(self, task: str | Task | TaskData | None = None) -> TaskData:
        """Loads a task's data, split by the configuration's seed; None takes the fitted or configured task."""
        if isinstance(task, TaskData):
            return task
        if task is None:
            task = self._fitted.task if self._fitted else self.config.task
        return load_task_data(load_task(task) if isinstance(task, str) else task, self.config.seed)

    def _identity(self, data: TaskData) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json", exclude={"task": True, "device": True}),
            "task": data.task.digest,
            "backbone": self.backbone.fingerprint,
        }

    def _prepare(self, data: TaskData) -> tuple[Fitted, CrossFitted]:
        answer_model = catalog_answer_model(self.backbone, self.config, data.task.template, data.interactions.catalog)
        prior, taste, out_of_fold = fit_stack(
            data.interactions,
            data.parts["train"],
            collaborative_features(answer_model, data.interactions.catalog, self.config.encoder, data.task),
            self.config.taste,
            threshold=data.task.like_threshold,
            hide=HIDDEN_SHARE if data.task.split.asks_unrated else 0.0,
            seed=self.config.seed,
        )
        if self.config.prior == "none":
            prior, taste, out_of_fold = prior.with_zero_mean(), taste.with_zero_mean(), out_of_fold.with_zero_mean()
        fitted = Fitted(
            task=data.task,
            catalog=data.interactions.catalog,
            scale=data.interactions.scale,
            prior=prior,
            taste=taste,
            meta=initial_state(
                answer_model,
                inner_lr=self.config.inner_lr,
                llm_weight=self.config.train.llm_weight,
                seed=self.config.seed,
                top_only=self.config.meta.adapt == "top",
                steps_with_rates=max(self.config.meta.inner_steps, 1) if self.config.meta.rates == "step" else 1,
                elementwise_rates=self.config.meta.rates == "number",
                head=closed_form_head(self.config),
            ),
            answer_model=answer_model,
            training={},
        )
        return fitted, out_of_fold

    def scorer(
        self, *, rate_scale: float = 1.0, steps: int | None = None, name: str = "metarec, adapted"
    ) -> MetaScorer:
        """Returns the recommender as a `Scorer`.

        Args:
            rate_scale: Factor on every learned inner rate; 0 gives exactly the scores before adaptation.
            steps: Inner steps; None takes the configuration's.
            name: How it is called in tables.
        """
        return meta_scorer(self.fitted, self.config, rate_scale=rate_scale, steps=steps, name=name)

    def scorers(self) -> list[Scorer]:
        """Returns the rows of the default table: item mean, stack, zero-shot prompt, before and after adaptation.

        Before adaptation the adapter is everybody's; the stack knows the support all the same.
        A task whose prompt names an answer word per rating gets the expected rating as well.
        """
        fitted = self.fitted
        words, template = fitted.task.prompt.ratings, fitted.task.template
        expected = (
            [expected_rating(fitted.answer_model, template, fitted.catalog, words, fitted.scale)] if words else []
        )
        return [
            ItemMean(fitted.prior.without_text(), name=BASELINE),
            *([fitted.taste] if fitted.taste.members else []),
            ZeroShot(fitted.answer_model),
            *expected,
            self.scorer(steps=0, name="metarec, before adaptation"),
            self.scorer(),
        ]

    def evaluate(self, task: str | Task | TaskData | None = None, scorers: Sequence[Scorer] | None = None) -> Report:
        """Scores the test users of a task.

        Args:
            task: None takes the task it was fitted on. Another task must have the same catalog.
            scorers: The methods to compare; None takes `scorers()`. One of them is called ``item mean``.

        Raises:
            ConfigError: The task has another catalog.
            EvaluationError: A score cannot be ranked.
        """
        data = self.task_data(task)
        if data.interactions.catalog.ids != self.fitted.catalog.ids:
            raise ConfigError(
                f"task '{data.task.name}' has another catalog than '{self.fitted.task.name}'", "Fit on that task"
            )
        episodes, too_few = data.episodes("test")
        return evaluate(
            self.scorers() if scorers is None else scorers,
            episodes,
            data.task.shots,
            data.interactions.catalog,
            threshold=data.task.like_threshold,
            seed=self.config.seed,
            baseline=BASELINE,
            left_out={"too few ratings": too_few} if too_few else {},
            metrics=data.task.metrics,
            calibration=data.episodes("validation")[0] if {"mae", "rmse"} & set(data.task.metrics) else (),
            short_supports=data.task.short_supports,
            hashes=data.hashes,
        )

    def adapt(self, ratings: Sequence[tuple[str, float]]) -> AdaptedUser:
        """Adapts to one person.

        Args:
            ratings: ``(title or id, rating)`` pairs; with none, the person gets the unadapted ranking.

        Raises:
            UnknownItemError: An item is not in the catalog.
            RatingError: A rating is not finite, off the scale, or an item is rated twice.
        """
        support = read_ratings(ratings, self.fitted.catalog, self.fitted.scale)
        started = time.perf_counter()
        adapted = self.scorer().adapt([support])
        seconds = time.perf_counter() - started
        return AdaptedUser(self, support, select_user(adapted.state, 0), bool(adapted.diverged[0]), seconds)

    def load_user(self, path: str | Path) -> AdaptedUser:
        """Loads a person saved with `AdaptedUser.save`; their scores are those they had.

        Raises:
            ArtifactError: The files are damaged, or belong to another recommender.
        """
        state, user = load_adapter(Path(path), self.fitted.answer_model.spec, self.config.device)
        if user["recommender"] != self.digest:
            raise ArtifactError(f"'{path}' was adapted from another recommender", "Load it with the one that made it")
        support = read_ratings(
            [(item, rating) for item, rating in user["ratings"]], self.fitted.catalog, self.fitted.scale
        )
        return AdaptedUser(self, support, state, bool(user["diverged"]), float(user["seconds"]))

    @property
    def digest(self) -> str:
        """Names the recommender by the content of its meta-parameters and its backbone."""
        digest = hashlib.sha256(self.backbone.fingerprint.encode())
        for name, tensor in sorted(self.fitted.meta.tensors().items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, path: str | Path) -> None:
        """Writes everything that recommending needs, but neither the backbone's weights nor anybody's ratings.

        Raises:
            ConfigError: The recommender has not been fitted.
            ArtifactError: The directory exists and holds something else.
        """
        fitted = self.fitted
        columns = {name: torch.from_numpy(getattr(fitted.prior, name)) for name in PRIOR_COLUMNS}
        facts = {
            "metarec": version("metarec"),
            "backbone_fingerprint": self.backbone.fingerprint,
            "config": self.config.model_dump(mode="json"),
            "task": fitted.task.model_dump(mode="json"),
            "scale": [fitted.scale.low, fitted.scale.high],
            "prior": {name: getattr(fitted.prior, name) for name in PRIOR_NUMBERS},
            "training": fitted.training,
        }
        catalog = {"ids": fitted.catalog.ids, "fields": dict(fitted.catalog.fields)}
        with replace_dir(Path(path), "recommender") as directory:
            write_tensors(directory / "meta.safetensors", fitted.meta.tensors())
            write_tensors(directory / "prior.safetensors", columns)
            write_scorer(directory, TASTE, fitted.taste)
            (directory / "catalog.json").write_text(dump_json(catalog), encoding="utf-8")
            (directory / "recommender.json").write_text(dump_json(facts), encoding="utf-8")


@dataclass(frozen=True)
class AdaptedUser:
    """One person's adapter over a recommender.

    Args:
        recommender: Where it came from.
        support: What the person rated.
        state: The person's tensors, without a user dimension.
        diverged: Whether adapting met a non-finite number, so that the unadapted ranking is served.
        seconds: How long adapting took.
    """

    recommender: MetaRecommender
    support: Ratings
    state: AdapterState
    diverged: bool
    seconds: float

    def score(self, items: Sequence[str]) -> list[float]:
        """Scores items by id or title; higher is better.

        Raises:
            UnknownItemError: An item is not in the catalog.
        """
        catalog = self.recommender.fitted.catalog
        codes = np.array([catalog.find(item) for item in items], np.int64)
        return [float(value) for value in self.scores(codes)]

    def recommend(self, k: int = 10, *, exclude: Sequence[str] = ()) -> list[Recommendation]:
        """Ranks the whole catalog and returns its best items that the person has not rated.

        Args:
            k: How many items.
            exclude: More items to leave out, by id or title.

        Raises:
            ConfigError: `k` is not positive or exceeds what is left of the catalog.
        """
        catalog = self.recommender.fitted.catalog
        left_out = {*self.support.items.tolist(), *(catalog.find(item) for item in exclude)}
        codes = np.array([code for code in range(len(catalog)) if code not in left_out], np.int64)
        if not 1 <= k <= len(codes):
            raise ConfigError(f"k is {k}", f"There are {len(codes)} items to recommend: choose 1 to {len(codes)}")
        scores = self.scores(codes).numpy()
        order = rank_order(scores, [catalog.ids[code] for code in codes], self.recommender.config.seed)
        return [
            Recommendation(catalog.ids[codes[row]], catalog.title(int(codes[row])), float(scores[row]))
            for row in order[:k]
        ]

    def taste(self) -> Values:
        """What users of like taste add to every item's score because of the person's ratings, shape (items,)."""
        fitted = self.recommender.fitted
        everything = np.arange(len(fitted.catalog))
        told = fitted.taste.posterior_mean(self.support, everything)
        silent = fitted.taste.posterior_mean(Ratings.empty(), everything)
        return (told - silent) * float(self.state[TASTE_WEIGHT])

    def save(self, path: str | Path) -> None:
        """Writes the adapter as a PEFT directory, with the person's ratings beside it.

        Raises:
            ArtifactError: The directory exists and holds something else.
        """
        recommender = self.recommender
        catalog = recommender.fitted.catalog
        rated = zip(self.support.items.tolist(), self.support.values.tolist(), strict=True)
        save_adapter(
            Path(path),
            self.state,
            recommender.fitted.answer_model.spec,
            base_model=recommender.backbone.location,
            task_type=recommender.backbone.task_type,
            invocation_tokens=recommender.fitted.answer_model.invocation_tokens,
            user={
                "recommender": recommender.digest,
                "ratings": [[catalog.ids[code], rating] for code, rating in rated],
                "diverged": self.diverged,
                "seconds": self.seconds,
            },
            dtype=getattr(torch, recommender.config.adapter.storage),
        )

    @torch.no_grad()
    def scores(self, codes: Codes) -> Tensor:
        """Scores items by code, shape (items,); higher is better."""
        fitted = self.recommender.fitted
        state = expand_users(self.state, 1)
        blocks = np.array_split(codes, max(1, -(-len(codes) // _ITEMS_AT_ONCE)))
        values = []
        with progress("ranking", len(blocks), after=2.0) as advance:
            for done, block in enumerate(blocks, start=1):
                expected = [fitted.taste.posterior_mean(self.support, block)]
                batch = candidates([block], fitted.prior, fitted.answer_model, expected)
                values.append(score(state, batch, fitted.answer_model)[0].cpu())
                advance(done)
        return torch.cat(values)


def _load(path: Path, place: Mapping[str, str]) -> MetaRecommender:
    verify_dir(path, "recommender")
    facts = load_json(path / "recommender.json")
    where = str(path / "recommender.json")
    config = validated(RunConfig, {**facts["config"], **place}, where)
    task = validated(Task, facts["task"], where)
    backbone = open_backbone(config)
    if backbone.fingerprint != facts["backbone_fingerprint"]:
        raise ArtifactError(
            f"'{path}' was made with other weights of '{config.backbone}'", "Install the backbone it was made with"
        )
    listed = load_json(path / "catalog.json")
    fields = {name: tuple(column) for name, column in listed["fields"].items()}
    catalog = Catalog(tuple(listed["ids"]), fields)
    tensors = read_tensors(path / "prior.safetensors")
    columns: dict[str, Any] = {name: tensors[name].numpy() for name in PRIOR_COLUMNS}
    taste = read_scorer(path, TASTE)
    if not isinstance(taste, Stacked):
        raise ArtifactError(f"'{path}' holds a {type(taste).__name__} for what users of like taste say", "Train again")
    fitted = Fitted(
        task=task,
        catalog=catalog,
        scale=RatingScale(*facts["scale"]),
        prior=ItemPrior(**facts["prior"], **columns),
        taste=taste,
        meta=MetaState.from_tensors(read_tensors(path / "meta.safetensors", config.device)),
        answer_model=catalog_answer_model(backbone, config, task.template, catalog),
        training=facts["training"],
    )
    return MetaRecommender(backbone, config, fitted)
