"""`MetaRecommender`: fit on a task, evaluate, adapt to a person, recommend, save and load.

The one object that a program embeds. The work is done by the layers below. Knows nothing of the command line.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarec.adapted_user import AdaptedUser
from metarec.config import Dtype, Precision, RunConfig, validated
from metarec.data.frames import is_frame
from metarec.data.given_ratings import GivenRatings
from metarec.data.interactions import Ratings
from metarec.data.source_options import is_table
from metarec.data.split_record import refuse_other_catalog
from metarec.data.task import Task
from metarec.data.training_users import refuse_small_data
from metarec.errors import ArtifactError, ConfigError
from metarec.evaluation.evaluate import beside_pooled, evaluate_on
from metarec.evaluation.metric_names import check_metrics
from metarec.evaluation.metrics import BASELINE
from metarec.evaluation.report import Report
from metarec.files.artifacts import recover_dir
from metarec.files.run_directory import recommender_dir
from metarec.lm.answer_model import AnswerModel
from metarec.lm.backbone import Backbone
from metarec.meta import learn2learn
from metarec.meta.checkpoints import (
    check_checkpoint,
    clear_checkpoint,
    refuse_overwriting,
    refuse_what_is_no_checkpoint,
)
from metarec.meta.distributed import ALONE, Ranks
from metarec.recommending.profiles import WritesProfiles
from metarec.recommending.recommender_files import digest_of, read_recommender, read_user, write_recommender
from metarec.recommending.search import SearchesItems
from metarec.scorer import Scorer
from metarec.scorers.language.adapted import MetaScorer
from metarec.system.devices import check_device
from metarec.system.notebook import facts_table
from metarec.system.tensors import AdapterState, select_user
from metarec.training.continual import OldRun, forgetting
from metarec.training.fitting import (
    Fitted,
    Prepared,
    adapted_model,
    calibrated,
    meta_scorer,
    needs_model,
    open_backbone,
    prepare,
    read_items,
    unadapted_rows,
)
from metarec.training.given_side import About, Moment, given_support, saved_support, warn_of_unknown_values
from metarec.training.meta_training import meta_train, training_identity
from metarec.training.task_features import for_task

if TYPE_CHECKING:
    import pandas as pd

    from metarec.data.given_task import TaskLike
    from metarec.data.task_data import TaskData


class MetaRecommender(SearchesItems, WritesProfiles):
    """A few-shot recommender: a language model whose adapter was meta-learned to fit new users in a few steps.

    Example:
        >>> recommender = MetaRecommender.from_pretrained("smollm2-135m-instruct")
        >>> recommender.fit("movielens/user-cold")
        >>> user = recommender.adapt([("Toy Story", 5), ("Heat", 2)])
        >>> user.recommend(10)
    """

    def __init__(self, backbone: Backbone | None, config: RunConfig, fitted: Fitted | None = None) -> None:
        self._backbone = backbone
        self.config = config
        self._fitted = fitted
        self._place: dict[str, str] = {}
        self._saved: Path | None = None
        self._data: TaskData | None = None
        self._from_file = False

    def __repr__(self) -> str:
        return f"MetaRecommender({', '.join(f'{name}={value!r}' for name, value in self._facts().items())})"

    def _repr_html_(self) -> str:
        return facts_table("MetaRecommender", self._facts())

    def _facts(self) -> dict[str, object]:
        reads = needs_model(self.config) if self._fitted is None else self._fitted.answer_model is not None
        backbone = self.config.backbone if reads else None
        facts: dict[str, object] = {"backbone": backbone, "score": list(self.config.score)}
        if self._fitted is None:
            return {**facts, "fitted": False}
        task, items = self._fitted.task.name, len(self._fitted.catalog)
        return {**facts, "task": task, "items": items, "device": self.config.device}

    def __reduce__(self) -> tuple[Callable[..., MetaRecommender], tuple[object, ...]]:
        """A recommender is pickled as the directory that it was loaded from or saved to, never by its content."""
        if self._saved is None or self._fitted is None:
            raise ConfigError(
                "a recommender that was not saved is not pickled",
                "Call save_pretrained(path); then it is pickled as the path, or pass the path, and call "
                "MetaRecommender.from_pretrained(path) in the worker",
            )
        return _load_same, (str(self._saved), self._place, self.digest)

    @property
    def backbone(self) -> Backbone:
        """The language model; loaded when it is first asked for where no part of the score reads it."""
        if self._backbone is None:
            self._backbone = open_backbone(self.config)
        return self._backbone

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        config: RunConfig | None = None,
        *,
        device: str | None = None,
        dtype: Dtype | None = None,
        cache: Precision | None = None,
    ) -> MetaRecommender:
        """Loads a saved recommender, or a backbone to fit one on.

        Args:
            name: A directory written by `save_pretrained`, or a run's directory; or a backbone: an embedded name, a
                directory or a Hugging Face name.
            config: Settings for fitting; a saved recommender brings its own.
            device: Where it runs, instead of where the settings say.
            dtype: Precision of the frozen weights, instead of what the settings say.
            cache: Precision in which the cache keeps items' keys and values, instead of what the settings say.

        Raises:
            BackboneError: The backbone cannot be loaded.
            ArtifactError: The saved recommender is damaged, or the backbone is not the one it was made with.
            ConfigError: `config` is given for a saved recommender, or this machine has no such device.
        """
        saved = recommender_dir(Path(name))
        asked = {"device": device, "dtype": dtype, "cache": cache}
        place = {key: value for key, value in asked.items() if value is not None}
        if saved is not None:
            if config is not None:
                raise ConfigError(f"'{saved}' brings its own settings", "Leave 'config' out")
            loaded = cls(*read_recommender(saved, place))
            loaded._from_file, loaded._saved, loaded._place = True, saved.absolute(), place
            return loaded
        given = (config or RunConfig()).model_dump()
        config = validated(RunConfig, {**given, "backbone": str(name), **place}, "from_pretrained")
        check_device(config.device)
        return cls(open_backbone(config) if needs_model(config) else None, config)

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
        task: TaskLike | None = None,
        *,
        checkpoint: str | Path | None = None,
        resume: bool = False,
        fresh: bool = False,
        clear: Callable[[], None] | None = None,
        start: MetaRecommender | str | Path | None = None,
        ranks: Ranks = ALONE,
        **own: Any,
    ) -> MetaRecommender:
        """Meta-trains on a task's meta-training users; hyper-parameters stop early on its validation users.

        Args:
            task: A task's name, a YAML file's path, or a loaded task; None takes the configuration's. Or a table of
                ratings: a DataFrame with the columns ``user``, ``item``, ``rating``, ``title``, optionally
                ``timestamp``, and columns that describe items (or ``items=``, a DataFrame of items: ``item``, ``title``
                and fields); or the path of a CSV, TSV, JSON lines or Parquet file.
            checkpoint: Where the training state is kept; None keeps it in a temporary directory.
            resume: Goes on from `checkpoint` if it is there, of the same data and settings; `train.steps` may be more.
            fresh: Trains anew, and deletes `checkpoint` once the first gradient is there: settings that cannot be
                trained cost nothing. Without either, a checkpoint that is there is refused.
            clear: With `fresh`, what is called to delete, in place of deleting `checkpoint` alone.
            start: An old run, or a recommender, whose meta-parameters meta-training goes on from; `train.replay` and
                `train.anchor` keep it from forgetting the old run's users.
            ranks: The processes that train together, from `metarec.meta.distributed.launched`; the first writes.
            **own: Of a table: columns by our name (``title="name"``, or ``columns={"title": "name"}``), options of the
                file (``separator``, ``encoding``, ``scale``, ``items``, ``bad_rows``), and keys of a task (``shots``,
                ``label``, ``prompt``, ``split``, ...); see docs/own-data.md for what is taken where they are left out.

        Returns:
            Itself, fitted.

        Raises:
            MetarecError: The task or its data are not usable, or the checkpoint is of another run or to be overwritten.
        """
        if resume and fresh:
            raise ConfigError("resume and fresh are both given", "Choose one of the two")
        kept = Path(checkpoint) if checkpoint is not None and ranks.leads else None
        if kept and not fresh:
            refuse_overwriting(kept, resume=resume)
        if self.config.meta.engine == "learn2learn":
            learn2learn.check(self.config.meta.algorithm)
        data = self.task_data(task, **own)
        refuse_small_data(data, self.config.train)
        data.evaluated("validation")  # now, not after minutes of fitting
        identity = training_identity(data, for_task(self.config, data.task), self._backbone_for(data.task))
        old = None if start is None else self._old_run(start)
        identity |= {} if old is None else {"from": old.digest}
        deletes = None
        if kept and fresh:
            refuse_what_is_no_checkpoint(kept)
            deletes = clear or partial(clear_checkpoint, kept)
        elif kept and resume and recover_dir(kept):
            check_checkpoint(kept, identity, self.config.train.steps)
        with tempfile.TemporaryDirectory() as scratch:
            where = kept or Path(scratch) / "checkpoint"
            fitted = meta_train(
                data, self._prepare(data), self.config, identity, where, resume, ranks, old, clear=deletes
            )
        self._keep(fitted, data)
        return self

    def _old_run(self, start: MetaRecommender | str | Path) -> OldRun:
        before = start if isinstance(start, MetaRecommender) else MetaRecommender.from_pretrained(start)
        if not self.config.train.replay:
            return OldRun(before.fitted, before.digest)
        data = before.task_data()
        return OldRun(before.fitted, before.digest, (data, self._prepare(data)))

    def forgetting(self, old: MetaRecommender | str | Path, **own: Any) -> list[dict[str, Any]]:
        """Returns what going on from an old run did to its users and to the new ones.

        Args:
            old: The old run, or its recommender; see `fit`.
            **own: See `fit`.

        Returns:
            See `metarec.training.continual.forgetting`.
        """
        before = old if isinstance(old, MetaRecommender) else MetaRecommender.from_pretrained(old)
        return forgetting(
            self.fitted, self.task_data(None, **own), before.fitted, before.task_data(), self.config, before.config
        )

    def prepare(self, task: TaskLike | None = None, **own: Any) -> MetaRecommender:
        """Fits everything but the meta-parameters, which stay as they start; returns itself, ready to score and adapt.

        Args:
            task: See `fit`.
            **own: See `fit`.
        """
        data = self.task_data(task, **own)
        self._keep(self._prepare(data).fitted, data)
        return self

    def _keep(self, fitted: Fitted, data: TaskData) -> None:
        from metarec.data.task_data import IN_MEMORY

        self._fitted = calibrated(fitted, self.config, data)
        self._saved = None
        self._data = data if data.task.dataset.source == IN_MEMORY else None

    def _prepare(self, data: TaskData) -> Prepared:
        return prepare(data, self.config, self._backbone_for(data.task))

    def _backbone_for(self, task: Task) -> Backbone | None:
        """Returns the language model, or None where neither the score nor the features read one on this task."""
        return self.backbone if needs_model(for_task(self.config, task)) else None

    def task_data(self, task: TaskLike | None = None, **own: Any) -> TaskData:
        """Loads a task's data, split by the configuration's seed; None takes the fitted or configured task.

        Args:
            task: See `fit`.
            **own: See `fit`.

        Raises:
            ConfigError: `task` is none of what `fit` takes, or choices are given for a task that brings its own.
        """
        from metarec.data.given_task import load_given, load_saved

        if task is None and own:
            raise ConfigError(f"'{min(own)}' is given without a table", "Give the table, too")
        if task is None and self._data is not None:
            return self._data
        if task is None and self._from_file and self._fitted:
            return load_saved(self._fitted.task, self.config.seed)
        known = self._fitted.task if self._fitted else self.config.task
        return load_given(known if task is None else task, own, self.config.seed)

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

        Before adaptation the adapter is everybody's; the collaborative term knows the support all the same. Parts that
        the score leaves out have no row; a task whose prompt names an answer word per rating gets the expected rating.
        """
        rows = unadapted_rows(self.fitted, BASELINE)
        return [*rows, self.scorer(steps=0, name="metarec, before adaptation"), self.scorer()]

    def evaluate(
        self,
        task: TaskLike | None = None,
        scorers: Sequence[Scorer] | None = None,
        *,
        items: pd.DataFrame | None = None,
        metrics: Sequence[str] = (),
    ) -> Report:
        """Scores the test users of a task.

        Users are tested that fitting did not see, whatever changed since; see `SplitRecord.without_seen`.

        Args:
            task: None takes the task it was fitted on. Another task must have the same catalog. A table is read and
                split as the one it was fitted on; a recommender that was fitted on a DataFrame and loaded needs it.
            scorers: The methods to compare; None takes `scorers()`. One of them is called ``item mean``.
            items: The items, where `task` is a DataFrame that was fitted with items of their own.
            metrics: What is measured beside the task's metrics, e.g. `metarec.evaluation.metric_names.BEYOND`.

        Raises:
            ConfigError: The task has another catalog.
            DataError: Fitting saw all users.
            EvaluationError: A score cannot be ranked, or there is no such metric.
        """
        check_metrics(metrics)
        if is_frame(task) or (isinstance(task, str | Path) and is_table(task)):
            from metarec.data.own_data import reload_own

            data = reload_own(task, self.fitted.task, self.config.seed, items)
        else:
            data = self.task_data(task)
        refuse_other_catalog(data.task.name, self.fitted.catalog, data.interactions.catalog)
        data = self.fitted.split.without_seen(data)
        episodes, too_few = data.evaluated("test")
        if scorers is None:
            read_items(self.fitted, episodes)
        return evaluate_on(
            data,
            [*(self.scorers() if scorers is None else scorers), *beside_pooled(data.task, data.interactions.catalog)],
            episodes,
            seed=self.config.seed,
            baseline=BASELINE,
            left_out={"too few ratings": too_few} if too_few else {},
            metrics=metrics,
            calibrated={} if scorers else {(self.scorer().name, at.shots): at for at in self.fitted.calibration},
        )

    def adapt(
        self, ratings: GivenRatings, *, about: About = None, friends: Sequence[str] = (), context: Moment = None
    ) -> AdaptedUser:
        """Adapts to one person.

        Args:
            ratings: ``(title or id, rating)`` pairs, a dictionary ``{title or id: rating}``, or a DataFrame with the
                columns ``item`` and ``rating``; with none, the person gets the unadapted ranking.
            about: A sentence about the person, or fields of users to their values.
            friends: Ids of friends among the users it was fitted on.
            context: Columns of the data's `context` to their values now; `AdaptedUser.at` asks in another moment.

        Raises:
            UnknownItemError: An item is not in the catalog.
            RatingError: A rating is not finite, off the scale, or an item is rated twice.
            ConfigError: The recommender knows no such field, or no side information at all.
        """
        support = given_support(self.fitted, ratings, about, friends, context)
        warn_of_unknown_values(self.fitted, support.side)
        started = time.perf_counter()
        adapted = self.scorer().adapt([support])
        seconds = time.perf_counter() - started
        return self.adapted_user(support, select_user(adapted.state, 0), bool(adapted.diverged[0]), seconds)

    def adapted_user(self, support: Ratings, state: AdapterState, diverged: bool, seconds: float) -> AdaptedUser:
        """Returns a person whose adapter was computed elsewhere; see `AdaptedUser`."""
        return AdaptedUser(self.fitted, self.config, support, state, diverged, seconds)

    def load_user(self, path: str | Path) -> AdaptedUser:
        """Loads a person saved with `AdaptedUser.save`; their scores are those they had.

        Raises:
            ArtifactError: The files are damaged, or belong to another recommender.
        """
        state, user = read_user(Path(path), self.fitted, self.config)
        if user["recommender"] != self.digest:
            raise ArtifactError(f"'{path}' was adapted from another recommender", "Load it with the one that made it")
        support = saved_support(self.fitted, user)
        return self.adapted_user(support, state, bool(user["diverged"]), float(user["seconds"]))

    @property
    def adapted_model(self) -> AnswerModel | None:
        """The language model that carries the users' adapters; None where the score has no adapter."""
        return adapted_model(self.config, self.fitted.answer_model)

    @property
    def digest(self) -> str:
        """Names the recommender by the content of its meta-parameters and its backbone."""
        return digest_of(self.fitted)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes everything that recommending needs, but neither the backbone's weights nor anybody's ratings.

        Users that were seen in fitting are there as digests, see `metarec.data.split_record.SplitRecord`.

        Raises:
            ConfigError: The recommender has not been fitted.
            ArtifactError: The directory exists and holds something else.
        """
        write_recommender(Path(path), self.fitted, self.config)
        self._saved, self._place = Path(path).absolute(), {}


def _load_same(path: str, place: dict[str, Any], digest: str) -> MetaRecommender:
    """Loads the recommender that was pickled as its path; refuses another one that lies there now."""
    found = MetaRecommender.from_pretrained(path, **place)
    if found.digest != digest:
        raise ArtifactError(f"'{path}' holds another recommender than the one that was pickled", "Save it elsewhere")
    return found
