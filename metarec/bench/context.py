"""What a method of a benchmark is: `Method` has a name in `METHODS`, takes a `MethodContext`, returns `MethodRow`s.

Methods are listed, and their names checked, before anything is fitted: what fits them is imported where it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarec.bench.settings import run_config

if TYPE_CHECKING:
    from metarec.config import RunConfig
    from metarec.data.episodes import Episode
    from metarec.data.interactions import Codes, Interactions
    from metarec.data.task_data import TaskData
    from metarec.lm.answer_model import AnswerModel
    from metarec.lm.backbone import Backbone
    from metarec.scorer import Request, Scorer
    from metarec.scorers.collaborative.features import Features
    from metarec.scorers.collaborative.item_mean import ItemPrior
    from metarec.scorers.collaborative.residuals import Floats
    from metarec.scorers.collaborative.side_inputs import SideInputs
    from metarec.scorers.language.in_context import History

_COMPONENTS = 48
# What methods read of the settings, for `Method.settings`.
NO_SETTINGS: tuple[str, ...] = ()
ENCODER = ("collaborative.encoder",)
LANGUAGE_MODEL = ("backbone", "device", "dtype", "cache")


@dataclass(frozen=True)
class MethodContext:
    """One split of a task, with what methods are fitted from; parts that several methods share are computed once.

    Args:
        data: The task's data.
        workspace: Folder in which a long training keeps its checkpoint and its result.
        train_users: Number of meta-training users, drawn by the split's seed; None for all.
        settings: What differs from the defaults of `RunConfig`, by dotted key.
    """

    data: TaskData
    workspace: Path
    train_users: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def config(self) -> RunConfig:
        """The settings with the split's seed: the backbone, the encoder and the device a method uses."""
        return self.configured({})

    def configured(self, options: Mapping[str, Any]) -> RunConfig:
        """Returns `config` with a method's own keys, by dotted key, above the benchmark's settings.

        Raises:
            ConfigError: A key is unknown or a value does not fit.
        """
        return run_config({**self.settings, **options, "seed": self.seed}, "settings and method options")

    @property
    def seed(self) -> int:
        """Seed of the split, and of everything a method draws."""
        return self.data.seed

    @cached_property
    def users(self) -> Codes:
        """The meta-training users."""
        import numpy as np

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
        from metarec.scorers.collaborative.item_mean import fit_item_mean

        return fit_item_mean(self.interactions, self.users)

    @cached_property
    def prior(self) -> ItemPrior:
        """Item means smoothed by text."""
        return self.known.smoothed(self.mean, self.seed)

    @cached_property
    def vectors(self) -> Floats:
        """The sentence encoder's vector of every item's text, shape (items, features)."""
        from metarec.scorers.language.item_vectors import text_vectors

        catalog, text = self.interactions.catalog, self.data.task.item_text
        return text_vectors(catalog, text, self.config.collaborative.encoder)

    @cached_property
    def fields(self) -> dict[str, Floats]:
        """Features of items from the catalog's fields, block by block."""
        from metarec.scorers.collaborative.features import item_features

        catalog = self.interactions.catalog
        return item_features(catalog, self.data.task.read_fields(catalog).read)

    @cached_property
    def brought(self) -> dict[str, Floats]:
        """Vectors of items that the data bring, without those that explain nothing, each of shape (items, width)."""
        if not self.interactions.item_vectors:
            return {}
        from metarec.training.task_features import significant_vectors

        return significant_vectors(self.task_data, {"text": self.vectors, **self.fields}, self.seed)

    @cached_property
    def known(self) -> Features:
        """Features of items beside ratings: text by the sentence encoder, vectors that the data bring, and fields."""
        from metarec.scorers.collaborative.features import Features, unrated_features

        read = {"text": self.vectors, **self.brought}
        if self.data.task.split.asks_unrated:
            return unrated_features(read, self.fields)
        return Features({**read, **self.fields}, self.vectors)

    @cached_property
    def known_without_text(self) -> Features:
        """Features of items from the catalog's fields alone."""
        from metarec.training.task_features import features_of_blocks

        return features_of_blocks(self.task_data, {}, self.fields)

    @cached_property
    def features(self) -> Floats:
        """Principal components of text and of brought vectors, and fields, each block of mean length one."""
        import numpy as np

        blocks = {}
        for name, vectors in {"text": self.vectors, **self.brought}.items():
            left, values, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
            blocks[name] = left[:, :_COMPONENTS] * values[:_COMPONENTS]
        blocks |= self.fields
        return np.concatenate([block / np.sqrt((block**2).sum(1).mean()) for block in blocks.values()], 1)

    @cached_property
    def side(self) -> SideInputs | None:
        """What reads side information that helps meta-training users held out; None where the data bring none."""
        if not self.interactions.side:
            return None
        from metarec.scorers.collaborative.side_fitting import fit_effects
        from metarec.scorers.collaborative.side_inputs import side_inputs
        from metarec.scorers.language.encoded_text import encoded_reader

        read = encoded_reader(self.config.collaborative.encoder)
        effects = fit_effects(
            self.interactions, self.users, self.known, threshold=self.threshold, seed=self.seed, text_reader=read
        )
        return side_inputs(effects, self.interactions, self.users)

    @cached_property
    def backbone(self) -> Backbone:
        """The language model that the settings name, frozen."""
        from metarec.training.fitting import open_backbone

        return open_backbone(self.config)

    @cached_property
    def answer_model(self) -> AnswerModel:
        """The language model over the task's prompts, frozen."""
        from metarec.training.fitting import catalog_answer_model

        template, catalog = self.data.task.template, self.interactions.catalog
        # It carries no adapter, so a model of fewer blocks than adapters take by default does as well.
        adapter = self.config.adapter
        layers = min(adapter.layers, int(self.backbone.modules.config.num_hidden_layers))
        config = self.config.model_copy(update={"adapter": adapter.model_copy(update={"layers": layers})})
        return catalog_answer_model(self.backbone, config, template, catalog)

    def history(self, limit: int) -> History:
        """Returns how a prompt lists a user's ratings, `limit` at most."""
        from metarec.scorers.language.in_context import History

        return History(self.data.task.template, self.interactions.catalog, self.threshold, limit, self.seed)

    @cached_property
    def validation(self) -> Sequence[Episode]:
        """Episodes of the validation users, for early stopping."""
        return self.data.evaluated("validation")[0]


@dataclass(frozen=True)
class MethodRow:
    """One row of a benchmark's table: a scorer, and what it costs beside time and memory.

    Args:
        scorer: The fitted method.
        parameters: Number of learned parameters that all users share; tables of counts and means not included.
        tokens: Number of tokens of text a language model reads to answer a request.
        prompt: The text it reads for one candidate of a request, or None where it reads none.
        log_odds: Whether scores are log-odds of a like, so that their calibration can be measured as they are.
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
    """A function from a context to a row, or to several that share a fit; with its group and its options.

    Args:
        fit: Fits the method: called with a `MethodContext` and the options as keywords.
        group: ``trivial``, ``fold-in``, ``prompt``, ``fine-tuning``, ``fine-tuning aids``, ``meta``, ``algorithm``,
            ``adapter`` or ``ablation``, or a group of your own.
        about: One line that says what it is.
        options: Keywords of `fit`, plain JSON values; part of a cell's identity. Dotted keys of `RunConfig` among them
            come before the benchmark's settings.
        settings: Keys or sections of `RunConfig` that it reads from the context; None for all. Others do not reach it,
            and do not make another cell of it.
    """

    fit: Callable[..., Sequence[MethodRow]]
    group: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] | None = None

    def rows(self, context: MethodContext) -> Sequence[MethodRow]:
        """Fits the method with its options."""
        return self.fit(context, **self.options)

    def reads(self, key: str) -> bool:
        """Says whether a setting, by its dotted key, changes anything for this method."""
        if key in self.options:
            return False
        return self.settings is None or any(key == one or key.startswith(f"{one}.") for one in self.settings)


def one_row(
    fit: Callable[..., Scorer], parameters: Callable[[Any], int] = lambda _: 0
) -> Callable[..., Sequence[MethodRow]]:
    """Returns a `Method.fit` for a method that is one scorer and reads no prompt.

    Args:
        fit: Returns the scorer, from a context and options.
        parameters: Returns the scorer's number of learned parameters.
    """

    def rows(context: MethodContext, **options: Any) -> Sequence[MethodRow]:
        scorer = fit(context, **options)
        return [MethodRow(scorer, parameters(scorer))]

    return rows
