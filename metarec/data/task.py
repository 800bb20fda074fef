"""Tasks are data: what a YAML file may say, as settings that refuse what they do not know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from metarec.config import Section
from metarec.data.episodes import Candidates, Order
from metarec.data.interactions import PART_NAMES, Catalog, SplitPart
from metarec.data.item_fields import FieldChoice, FieldKind, choose_fields
from metarec.data.labels import LabelRule, read_rule
from metarec.data.source_options import SourceOptions
from metarec.data.templates import MAX_FIELD_CHARACTERS, PromptTemplate, item_text, review_sentence
from metarec.evaluation.metric_names import METRICS, check_metric
from metarec.files.artifacts import content_hash


class DatasetConfig(Section):
    """Which dataset, and where it is."""

    source: str
    path: Path | None = None
    options: SourceOptions = SourceOptions()
    fields: dict[str, str] = Field({}, description="catalog fields made from others, by Jinja2 templates")
    ratings_per_user: tuple[int, int | None] = Field((1, None), description="users with fewer or more are left out")
    parts: dict[str, DatasetConfig] = Field({}, description="of source 'mix': the datasets that are joined")
    shared_users: bool = Field(
        False,
        description="of source 'mix': an id that stands in several parts is one person",
        # Mixes without shared users keep the digest they had before there were any.
        exclude_if=lambda shared: not shared,
    )

    @model_validator(mode="after")
    def _only_a_mix_has_parts(self) -> DatasetConfig:
        if bool(self.parts) != (self.source == "mix"):
            raise ValueError("'parts' and source 'mix' belong together")
        if self.shared_users and not self.parts:
            raise ValueError("'shared_users' is of source 'mix'")
        return self


class UnseenFrom(Section):
    """Items count as unseen from a value of a field on, e.g. movies released since a year."""

    field: str
    since: float


class TransferConfig(Section):
    """Which part of a mix is meta-trained on, and which one is adapted to."""

    train: str
    test: str


class CrossConfig(Section):
    """Of a mix with shared users: which part a person's support is from, and which one they are asked about."""

    support: str
    query: str


def _unset(value: object) -> bool:
    """Says whether a setting is left out, so that tasks without it keep the digest they had before there was one."""
    return value is None


class SplitConfig(Section):
    """How users, items and ratings are divided: by a seed, or as files of ratings say."""

    train: str | None = Field(None, description="of a given split: the file of its training ratings", exclude_if=_unset)
    validation: str | None = Field(
        None, description="its file of validation ratings; null: a share of the training users", exclude_if=_unset
    )
    test: str | None = Field(None, description="its file of test ratings", exclude_if=_unset)
    by: Literal["user", "item", "both", "time"] = "user"
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    order: Order = "random"
    unseen: Annotated[float, Field(gt=0, lt=1)] | UnseenFrom | None = Field(
        None, description="which items meta-training never sees; by user, nobody is asked about them either"
    )
    users: Literal["new", "known"] = Field("new", description="known: test users' other ratings are trained on")
    transfer: TransferConfig | None = None
    cross: CrossConfig | None = Field(
        None, description="supports from one part of a mix, queries from another", exclude_if=_unset
    )
    seed: int | None = Field(None, ge=0, description="null takes the run's")

    @property
    def files(self) -> dict[SplitPart, str]:
        """The file of each part, where the split is given; nothing where a seed divides."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {part: named[part] for part in PART_NAMES if named[part]}  # type: ignore[misc]

    @property
    def asks_unrated(self) -> bool:
        """Whether users are asked about items that nobody in meta-training rated."""
        return self.by in ("item", "both")

    @model_validator(mode="after")
    def _combinations(self) -> SplitConfig:
        if self.by == "time" and (self.users == "known" or self.transfer or self.unseen):
            raise ValueError("a split by time has new users, all items and one dataset")
        if self.by in ("item", "both") and self.unseen is None:
            raise ValueError(f"a split by {self.by} says which items are 'unseen', e.g. 0.2 of them")
        if self.cross and (self.by != "user" or self.transfer or self.files):
            raise ValueError("'cross' has a split by user, without 'transfer' or files")
        if self.files and not (self.train and self.test):
            raise ValueError(
                "a split by files names those of 'train' and 'test', and of 'validation' where there is one"
            )
        if self.files and (self.by != "user" or self.unseen or self.transfer):
            raise ValueError("a split by files says all there is to divide: leave out 'by', 'unseen' and 'transfer'")
        if self.files and self.users == "known" and not self.validation:
            raise ValueError("known users need a file of 'validation' ratings beside those of 'train' and 'test'")
        return self


class QueryConfig(Section):
    """How much of a user is held out, and what it is ranked among."""

    max: int = Field(50, ge=1)
    min: int = Field(5, ge=1)
    candidates: Candidates = "rated"
    sampled: int = Field(0, ge=0, description="unrated items per query, where candidates are 'sampled'")

    @property
    def min_to_train(self) -> int:
        """The smallest query of meta-training, whose loss compares two ratings at least."""
        return max(self.min, 2)

    @model_validator(mode="after")
    def _sampled_says_how_many(self) -> QueryConfig:
        if (self.candidates == "sampled") != (self.sampled > 0):
            raise ValueError("'sampled' says how many unrated items join a query whose candidates are 'sampled'")
        return self


class PromptConfig(Section):
    """How an item is put to the language model."""

    text: str
    positive: str
    negative: str
    ratings: tuple[str, ...] = Field((), description="answer words from the lowest to the highest rating")
    characters: int = Field(
        MAX_FIELD_CHARACTERS,
        ge=1,
        le=10_000,
        description="how many characters of a field the language model and the sentence encoder are given",
        # Tasks that leave it keep the digest they had before it could be set.
        exclude_if=lambda characters: characters == MAX_FIELD_CHARACTERS,
    )
    hidden_states: tuple[str, ...] = Field(
        (),
        description="sentences about an item that go on with what is known of it, read for items that nobody rated",
        # Tasks without any keep the digest they had before there were any.
        exclude_if=lambda sentences: not sentences,
    )


class FeaturesConfig(Section):
    """What is known of an item beside its ratings: its text, and its fields."""

    text: str | None = Field(
        None, description="Jinja2 template that the sentence encoder reads; null: the fields that the prompt names"
    )
    fields: tuple[str, ...] | dict[str, FieldKind] | None = Field(
        None, description="fields that are read beside it, or {field: category or number}; null: by what they hold"
    )


class DomainConfig(Section):
    """Which field of an item names its domain."""

    field: str
    separator: str = ", "


class NegativesConfig(Section):
    """How many items nobody touched stand beside each one that somebody did, in implicit data."""

    per_positive: int = Field(1, ge=1, le=100)
    draw: Literal["even", "popular"] = "even"


class RatingConfig(Section):
    """What is done to ratings before anything reads them."""

    transform: Literal["none", "log"] = Field(
        "none", description="log: log(1 + rating), of hours and counts; thresholds of 'label' stay as they are written"
    )


class Task(Section):
    """What is measured: a dataset, its episodes, the prompt and the label rule."""

    name: str
    version: int = Field(ge=1)
    description: str
    licence: str
    origin: str = Field("", description="where the data comes from, or how to cite it")
    dataset: DatasetConfig
    by: Literal["user", "domain"] = "user"
    domain: DomainConfig | None = None
    split: SplitConfig = SplitConfig()
    shots: tuple[int, ...] = (0, 5, 10, 20)
    short_supports: bool = Field(False, description="users with fewer than K ratings give what they have")
    query: QueryConfig = QueryConfig()
    rating: RatingConfig = Field(
        RatingConfig(),
        # Tasks without a transform keep the digest they had before there was one.
        exclude_if=lambda rating: rating.transform == "none",
    )
    label: str
    negatives: NegativesConfig | None = None
    metrics: tuple[str, ...] = METRICS
    prompt: PromptConfig
    features: FeaturesConfig = Field(
        FeaturesConfig(),
        # Tasks that leave it to the data keep the digest they had before there was a choice.
        exclude_if=lambda features: features == FeaturesConfig(),
    )

    @model_validator(mode="before")
    @classmethod
    def _threshold_is_a_label_rule(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "like_threshold" in values and "label" not in values:
            rest = {key: value for key, value in values.items() if key != "like_threshold"}
            return {**rest, "label": f"rating >= {values['like_threshold']}"}
        return values

    @field_validator("label")
    @classmethod
    def _label_is_a_rule(cls, text: str) -> str:
        read_rule(text)
        return text

    @field_validator("metrics")
    @classmethod
    def _metrics_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            check_metric(name)
        return tuple(dict.fromkeys((*METRICS, *names)))

    @model_validator(mode="after")
    def _shots_ascend(self) -> Task:
        if not self.shots or self.shots[0] < 0 or list(self.shots) != sorted(set(self.shots)):
            raise ValueError(f"shots {list(self.shots)} are not ascending numbers from 0 on")
        return self

    @property
    def brings_vectors(self) -> bool:
        """Whether the data bring vectors of items, or a graph that becomes some."""
        parts = (self.dataset, *self.dataset.parts.values())
        return any(part.options.vectors or part.options.item_graph for part in parts)

    @property
    def brings_side(self) -> bool:
        """Whether the data bring side information of users or of moments."""
        return bool(self.side_named)

    @property
    def side_named(self) -> tuple[str, ...]:
        """What the data bring of users and moments, in words: files and columns as they are named."""
        options = [part.options for part in (self.dataset, *self.dataset.parts.values())]
        said = {
            "fields of users": [one.users for one in options if one.users],
            "friends": [one.friends for one in options if one.friends],
            "moments": [name for one in options for name in one.context],
            "reviews": [one.review for one in options if one.review],
        }
        return tuple(f"{what} ({', '.join(dict.fromkeys(names))})" for what, names in said.items() if names)

    @property
    def hidden_states(self) -> tuple[str, ...]:
        """Sentences that a causal language model reads of each item where ones are asked about that nobody rated."""
        if not self.split.asks_unrated:
            return ()
        return self.prompt.hidden_states or (review_sentence(self.prompt.text),)

    @property
    def item_text(self) -> PromptTemplate:
        """The text of an item that a sentence encoder reads, ready to render."""
        text, where = self.features.text, "features.text"
        if text is None:
            text, where = item_text(self.prompt.text), "prompt.text"
        return PromptTemplate(text, "good", "bad", where, self.prompt.characters)

    def read_fields(self, catalog: Catalog) -> FieldChoice:
        """Returns which fields of a catalog become features of its items.

        Raises:
            ConfigError: A field that 'features.fields' names is not there or cannot be read.
        """
        made = [name for part in (self.dataset, *self.dataset.parts.values()) for name in part.fields]
        return choose_fields(catalog, self.features.fields, made)

    @model_validator(mode="after")
    def _parts_fit(self) -> Task:
        if (self.by == "domain") != (self.domain is not None):
            raise ValueError("'by: domain' and a 'domain' belong together")
        if self.by == "domain" and (self.query.candidates != "rated" or self.rule.kind == "implicit"):
            raise ValueError("episodes by domain ask about rated items")
        if self.rule.kind == "implicit" and self.negatives is None:
            raise ValueError("label 'implicit' needs 'negatives' beside it, e.g. negatives: {per_positive: 1}")
        if self.rule.kind != "implicit" and self.negatives is not None:
            raise ValueError(f"'negatives' are of label 'implicit', and the label is '{self.label}'")
        if self.rule.kind == "implicit" and self.rating.transform != "none":
            raise ValueError("label 'implicit' reads no ratings that 'rating.transform' could change")
        if self.rule.kind == "rating" and self.query.candidates != "rated":
            raise ValueError("label 'rating' asks about rated items, the others have no rating")
        if self.split.files and (self.by == "domain" or self.dataset.source != "table"):
            raise ValueError("a split by files divides users of source 'table'")
        if self.split.files and self.dataset.options.ratings:
            raise ValueError("'split' names the files of ratings: leave out 'ratings' in the dataset's options")
        transfer = self.split.transfer
        if transfer and not {transfer.train, transfer.test} <= set(self.dataset.parts):
            raise ValueError(f"split.transfer names no parts of the mix: {sorted(self.dataset.parts)}")
        cross = self.split.cross
        if cross and (not self.dataset.shared_users or not {cross.support, cross.query} <= set(self.dataset.parts)):
            raise ValueError(f"split.cross names two parts of a mix with shared_users: {sorted(self.dataset.parts)}")
        return self

    @property
    def rule(self) -> LabelRule:
        """The label rule, read; on the scale that 'rating.transform' gives."""
        rule = read_rule(self.label)
        if self.rating.transform == "log" and rule.kind == "threshold":
            return rule.on_log_scale()
        return rule

    @property
    def like_threshold(self) -> float:
        """Ratings from here on are likes; NaN where the user's own mean decides."""
        return self.rule.threshold

    @property
    def template(self) -> PromptTemplate:
        """The prompt, ready to render."""
        prompt = self.prompt
        return PromptTemplate(prompt.text, prompt.positive, prompt.negative, characters=prompt.characters)

    @property
    def digest(self) -> str:
        """Names the task by its content; where the data lies on this disk does not count."""
        values = self.model_dump(mode="json")
        for dataset in (values["dataset"], *values["dataset"]["parts"].values()):
            del dataset["path"]
        return content_hash(values)


class GroupConfig(Section):
    """A suite of tasks."""

    group: str
    description: str = ""
    tasks: tuple[str, ...] = Field(min_length=1)
