"""Configuration lives at the edge: YAML under command-line overrides, unknown keys refused with a suggestion.

Knows the shape of the settings and their defaults, and where the defaults come from; nothing of what they do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from metarec.errors import ConfigError, shown, suggest
from metarec.registries import ADAPTER_KINDS, ALGORITHMS, LOSSES, TERMS
from metarec.registry import Registry

_MAX_YAML_BYTES = 256_000

Dtype = Literal["float32", "mixed", "bfloat16"]
Precision = Literal["float32", "float16", "int8"]
# What gradient steps start from: the initialization, or beside it the posterior of `metarec.meta.heads.DKT`.
Start = Literal["initialization", "posterior"]
FeatureName = Literal["words", "text", "tuned text", "fields", "vectors", "lm", "projection"]
Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)


def checked(registry: Registry[Any], name: str) -> str:
    """Returns a name that a registry has, for validators.

    Raises:
        ValueError: It has not.
    """
    try:
        return registry.check(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None


class AdapterConfig(Section):
    """Where the adapters sit; see `metarec.lm.answer_model.Placement`."""

    kind: str = Field(
        "lora",
        description="lora: low-rank updates; bias; prefix: virtual tokens that attention sees in front of the prompt; "
        "soft-prompt: vectors in front of the embeddings; bottleneck: a narrow layer behind attention and MLP; or "
        "module:attribute",
    )
    layers: int = Field(4, ge=1, description="how many topmost blocks carry adapters")
    targets: tuple[str, ...] | None = Field(
        None, description="linear layers that carry one; null: the attention's usual ones, for biases all"
    )
    rank: int = Field(1, ge=1)
    alpha: float = Field(2.0, gt=0)
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    virtual_tokens: int = Field(8, ge=1, description="length of a prefix, and of a soft prompt")
    storage: Literal["float16", "float32"] = Field("float16", description="type that users' adapters are kept in")
    active_tokens: int | Literal["auto"] | None = Field(
        "auto", description="last tokens that carry the adapter; null for all; auto takes what the prompts share"
    )

    @field_validator("kind")
    @classmethod
    def _kind_is_known(cls, name: str) -> str:
        return checked(ADAPTER_KINDS, name)


class MetaConfig(Section):
    """The meta-learning algorithm and its inner loop."""

    algorithm: str = Field(
        "fomaml",
        description="fomaml, maml, maml++, imaml, reptile; ridge, prototypes and dkt, which fit a head in closed form "
        "instead of taking inner steps; or module:attribute",
    )
    start: Start = Field(
        "initialization",
        description="what inner steps start from; posterior: users have the head of dkt too, and the steps lower its "
        "leave-one-out error on the support",
    )
    engine: Literal["batched", "learn2learn"] = Field(
        "batched", description="learn2learn: fomaml and maml through that library, one user after another"
    )
    adapt: Literal["all", "top"] = Field("all", description="top: the topmost block alone, as in ANIL")
    rates: Literal["tensor", "step", "number"] = Field(
        "tensor", description="one learned inner rate per tensor; per tensor and step (MAML++); per number (Meta-SGD)"
    )
    inner_steps: int = Field(3, ge=0, le=100)
    inner_lr: float | None = Field(
        None,
        gt=0,
        description="where every inner rate starts; null takes the adapter kind's: lora and bottleneck 0.3, bias and "
        "prefix 3",
    )
    shrinkage: float = Field(5.0, ge=0, description="pseudo-count in the support loss's denominator")
    user_bias_damping: float = Field(1.0, gt=0, description="pseudo-ratings that shrink the user bias to 0")
    half_life: Annotated[float, Field(gt=0)] | Literal["learned"] | None = Field(
        None,
        description="days after which a rating counts half in the inner loop; learned: a meta-parameter, kept where it "
        "is better for validation users than a few fixed values; null: all ratings count alike",
        exclude_if=lambda days: days is None,
    )

    @model_validator(mode="after")
    def _learn2learn_starts_at_the_initialization(self) -> MetaConfig:
        if self.engine == "learn2learn" and self.start == "posterior":
            raise ValueError("engine is learn2learn, which takes steps from the initialization, and start posterior")
        return self

    @field_validator("algorithm")
    @classmethod
    def _algorithm_is_known(cls, name: str) -> str:
        return checked(ALGORITHMS, name)


class GPConfig(Section):
    """The Gaussian process over items; see `metarec.scorers.collaborative.gp_fitting.fit_gp`."""

    factors: int = Field(16, ge=0, description="factors learned beside the features")
    noise: float = Field(0.6, gt=0, description="variance of a rating around the user's taste")
    level_variance: float = Field(0.2, gt=0, description="variance of user biases")
    factor_variance: float = Field(0.02, gt=0, description="where the variance of factors starts")
    components: int = Field(48, ge=1, description="principal components kept of each block of features")
    sweeps: int = Field(8, ge=1, description="rounds of expectation maximization")
    selection_effect: float = Field(4.0, description="how far having rated an item at all moves the user towards it")
    selection_damping: float = Field(3.0, gt=0, description="pseudo-ratings that shrink the selection effect")
    mean_damping: float = Field(4.0, gt=0, description="pseudo-ratings that shrink an item's mean to its prediction")


class StackConfig(Section):
    """How collaborative predictors are weighted against each other."""

    folds: int = Field(3, ge=2, description="of the meta-training users, for cross-fitting")
    hidden_share: float = Field(
        0.2, ge=0, lt=1, description="share of items hidden from each fold where a task queries unrated items"
    )
    first_weight: float = Field(0.8, description="default weight of the first predictor")
    other_weight: float = Field(0.2, description="default weight of every other predictor")
    weight_damping: float = Field(15.0, ge=0, description="users that the default weights stand for")
    sharpness: float = Field(2.0, gt=0, description="factor on score differences in the loss that fits the weights")
    pairs: int = Field(40, ge=1, description="pairs of a liked and a disliked item drawn from each user")
    narrow_components: int = Field(32, ge=1, description="of the second process: components of each block")
    narrow_sweeps: int = Field(4, ge=1, description="of the second process: rounds of expectation maximization")


class LinearConfig(Section):
    """The linear kernel over items' features; see `metarec.scorers.collaborative.linear_kernel`."""

    sweeps: int = Field(8, ge=1, description="rounds of expectation maximization")
    damping: float = Field(20.0, ge=0, description="pseudo-users of independent weights that shrink the covariance")
    item_damping: float = Field(4.0, gt=0, description="pseudo-ratings that shrink an item's own effect to 0")
    shrinkage: float | None = Field(
        None,
        ge=0,
        le=1,
        description="how far the covariance of weights is shrunk towards equal variances; null: as far as orders "
        "held-out users' ratings best, asked about items that the fit has not met where the task asks about such",
    )


class KernelConfig(Section):
    """How the first process's kernel is meta-learned; see `metarec.scorers.collaborative.kernel_learning`."""

    steps: int = Field(400, ge=0, description="steps of Adam with `min_users` users a step")
    lr: float = Field(1e-3, gt=0, description="rate with `min_users` users a step")
    min_users: int = Field(64, ge=1)
    max_users: int = Field(256, ge=1)
    sharpness: float = Field(2.0, gt=0, description="factor on score differences in the loss")


class PosteriorTuningConfig(Section):
    """How the LoRA goes on to learn through users' posteriors; see `metarec.scorers.language.posterior_tuning`."""

    steps: int = Field(0, ge=0, description="steps at most; the best by validation users is kept; 0 leaves it out")
    users: int = Field(32, ge=1, description="users per step")
    shots: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="support sizes to draw from; null takes the task's"
    )
    max_query: int = Field(20, ge=2)
    layers: int | None = Field(
        None, ge=1, description="how many topmost blocks of the encoder learn; lower ones are cached; null for all"
    )
    rank: int = Field(8, ge=1)
    lr: float = Field(3e-4, gt=0)
    sharpness: float = Field(2.0, gt=0, description="factor on scores' differences in the loss")
    validate_every: int = Field(25, ge=1)
    validation_users: int = Field(200, ge=1, description="validate on the first so many validation users at most")


class EncoderTuningConfig(Section):
    """How the LoRA of `tuned text` is learned; see `metarec.scorers.language.encoder_tuning`."""

    steps: int = Field(
        300, ge=0, description="steps at most; the best by validation users is kept; 0 leaves the pairs out"
    )
    pairs: int = Field(64, ge=2, description="users per step, each with a pair of liked items")
    rank: int = Field(16, ge=1)
    lr: float = Field(6e-4, gt=0)
    temperature: float = Field(0.05, gt=0, description="divides the cosine of two items")
    frequency: float = Field(0.5, ge=0, description="share of an item's log frequency that is taken off its score")
    validate_every: int = Field(50, ge=1)
    validation_users: int = Field(100, ge=1, description="validate on the first so many validation users at most")
    posterior: PosteriorTuningConfig = PosteriorTuningConfig()


class ProjectionConfig(Section):
    """How the projection of items' features is learned; see `metarec.scorers.collaborative.projection`."""

    keep: Literal["always", "better"] = Field(
        "always",
        description="better: only where a linear kernel that reads it orders validation users' items better than one "
        "that reads what it was learned from",
    )
    steps: int = Field(600, ge=1, description="steps at most; the best by validation users is kept")
    pairs: int = Field(512, ge=2, description="users per step, each with a pair of liked items")
    width: int = Field(256, ge=1, description="numbers of an item's vector")
    hidden: int = Field(512, ge=1, description="units of the hidden layer")
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    dropout: float = Field(0.3, ge=0, lt=1, description="share of features and of hidden units left out of a step")
    temperature: float = Field(0.1, gt=0, description="divides the cosine of two items")
    frequency: float = Field(0.5, ge=0, description="share of an item's log frequency that is taken off its score")
    validate_every: int = Field(100, ge=1)
    validation_users: int = Field(200, ge=1, description="validate on the first so many validation users at most")


class CollaborativeConfig(Section):
    """The collaborative term: what it reads of items, and how it is fitted."""

    members: Literal["stack", "gp", "linear", "none"] = Field(
        "stack",
        description="several predictors with fitted weights; one Gaussian process with learned factors; one with a "
        "linear kernel over features; or item means alone",
    )
    features: tuple[FeatureName, ...] | None = Field(
        None,
        description="what it and rarely rated items' means read: words of titles (TF-IDF), titles by the sentence "
        "encoder, by that encoder with a LoRA learned from what users like, the catalog's fields, vectors that the "
        "data bring, hidden states of the language model, and a projection of all these that is learned from what "
        "users like together; null: text and fields, vectors where there are any, and lm where a task asks about "
        "items that nobody rated",
    )
    encoder: str = Field("minilm-l6-v2", description="the sentence encoder of `text` and `tuned text`")
    side: bool = Field(True, description="where a task brings side information of users or moments, the score reads it")
    towers: bool = Field(
        True,
        description="two towers read texts about users and of items, where they lower the error of users held out",
        exclude_if=bool,
    )
    tuning: EncoderTuningConfig = EncoderTuningConfig()
    projection: ProjectionConfig = ProjectionConfig()
    gp: GPConfig = GPConfig()
    stack: StackConfig = StackConfig()
    kernel: KernelConfig = KernelConfig()
    linear: LinearConfig = LinearConfig()


class TrainConfig(Section):
    """The outer loop."""

    steps: int = Field(100, ge=1)
    users: int = Field(8, ge=1, description="users per outer step")
    shots: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="support sizes to draw from; null takes the task's above 0"
    )
    max_query: int = Field(20, ge=2)
    min_query: int | None = Field(
        None, ge=2, description="ratings a query has at least; null takes the task's query.min, 2 to max_query"
    )
    lr: float = Field(1e-3, gt=0)
    score_lr: float = Field(1e-2, gt=0, description="outer rate of the score's weights and of the inner rates")
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(10, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the meta-gradient")
    loss: str = Field("pairwise", description="outer loss: pairwise, bce, mse, ordinal, or module:attribute")
    sharpness: float = Field(2.0, gt=0, description="factor on scores, or their differences, in the outer loss")
    adapter_weight: float = Field(1.0, description="weight of the adapter's log-odds at the start")
    validate_every: int = Field(50, ge=1)
    validation_users: int = Field(200, ge=1, description="validate on the first so many validation users at most")
    patience: int = Field(4, ge=1, description="validations without a better one before stopping")
    # What is left at its default is left out of names and identities, which are those of before there was a choice.
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine",
        description="how rates fall after the warm-up: to 0 along half a cosine or a line, or not at all",
        exclude_if=lambda name: name == "cosine",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="share of the outer loss that is taken at the opposite labels",
        exclude_if=lambda share: not share,
    )
    anchor: float = Field(
        0.0,
        ge=0,
        description="of train --from: strength of an L2 pull of the meta-parameters to the old run's",
        exclude_if=lambda strength: not strength,
    )
    replay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="of train --from: share of a step's users that are drawn from the old run's task",
        exclude_if=lambda share: not share,
    )

    @model_validator(mode="after")
    def _a_query_holds_its_minimum(self) -> TrainConfig:
        if self.min_query is not None and self.min_query > self.max_query:
            raise ValueError(f"min_query is {self.min_query} and max_query {self.max_query}")
        return self

    @field_validator("loss")
    @classmethod
    def _loss_is_known(cls, name: str) -> str:
        return checked(LOSSES, name)


class PrivateConfig(Section):
    """Federated meta-training with differential privacy; see `metarec.meta.private`."""

    clip: float | None = Field(None, gt=0, description="largest norm of one user's delta; null: as it is")
    noise: float = Field(0.0, ge=0, description="standard deviation of the noise on the sum, in units of clip")
    delta: float = Field(1e-5, gt=0, lt=1, description="the delta that epsilon is stated at")
    secure_sum: bool = Field(False, description="refused: a simulation in one process has none")

    @property
    def on(self) -> bool:
        """Whether meta-training is federated; without bound and noise it is the plain one."""
        return self.clip is not None or self.noise > 0 or self.secure_sum


class AugmentConfig(Section):
    """How fine-tuning varies what it reads of items; validation and the fitted model read the texts as they are."""

    drop_fields: float = Field(0.0, ge=0, lt=1, description="share of fields, but for titles, that are left empty")
    shuffle_fields: bool = Field(False, description="the values of a field that holds several come in random order")
    rewrites: str | None = Field(
        None, description="a column of items with your own wording, which takes the title's place every other time"
    )
    prompts: tuple[str, ...] = Field(
        (), description="templates that say the prompt in other words, each drawn as often as the prompt itself"
    )


class FineTuneConfig(TrainConfig):
    """How one model is fine-tuned for all users; see `metarec.scorers.language.fine_tuning`."""

    trainable: Literal["lora", "all"] = Field("lora", description="one LoRA for all users, or every parameter")
    form: Literal["lora", "dora", "adalora"] = Field(
        "lora",
        description="of a LoRA: dora learns the weights' lengths beside it; adalora takes ranks away where they matter "
        "least, down to `rank` on average",
    )
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[str, ...] | None = Field(None, description="linear layers that carry the LoRA; null: PEFT's choice")
    history: int = Field(8, ge=2, description="rated items that a prompt shows at most")
    per_user: bool = Field(False, description="the fitted model gives every user a LoRA on top, and reads no history")
    classes: int | None = Field(
        None, ge=2, description="fine-tune a classifier with so many evenly spaced ratings; null: answer words"
    )
    class_loss: float = Field(0.0, ge=0, description="weight of the cross-entropy of a classifier's classes")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the LoRA's input, and of all dropout layers")
    fgm: float = Field(0.0, ge=0, description="length of an adversarial step on the embeddings of words; 0: none")
    contrastive: float = Field(0.0, ge=0, description="weight of InfoNCE over pairs of items that a user likes")
    contrastive_users: int = Field(8, ge=2, description="pairs per step, each of another user")
    temperature: float = Field(0.1, gt=0, description="divides the cosine of two items")
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _a_form_is_of_a_lora(self) -> FineTuneConfig:
        if self.trainable == "all" and self.form != "lora":
            raise ValueError(f"trainable is all, and form {self.form}, which is of a LoRA")
        return self


class RunConfig(Section):
    """Everything a run is a function of, besides its task and the model's weights."""

    task: str = "movielens/user-cold"
    backbone: str = "smollm2-135m-instruct"
    seed: int = Field(0, ge=0)
    device: str = "cpu"
    dtype: Dtype = Field(
        "float32", description="of frozen weights; mixed: caches by float32 weights, the adapted blocks bfloat16"
    )
    backbone_precision: Literal["full", "int8", "int4"] = Field(
        "full",
        description="of the weights in the model's frozen blocks: int8 and int4 take a quarter and an eighth of their "
        "memory, and more time, since products make them long again; full: as dtype says",
        exclude_if=lambda name: name == "full",
    )
    cache: Precision = Field(
        "float32",
        description="of the keys and values of items that the cache keeps: int8 takes a quarter of the room; float16",
    )
    score: tuple[str, ...] = Field(
        ("item mean", "collaborative", "prompt", "adapter"),
        min_length=1,
        description="terms that the score sums; without the item mean, the collaborative term knows none either; "
        "module:attribute adds one of your own",
    )
    history: int = Field(
        8,
        ge=2,
        description="of the term history: how many of a user's ratings a prompt shows at most",
        exclude_if=lambda limit: limit == 8,
    )
    collaborative: CollaborativeConfig = CollaborativeConfig()
    adapter: AdapterConfig = AdapterConfig()
    meta: MetaConfig = MetaConfig()
    train: TrainConfig = TrainConfig()
    private: PrivateConfig = Field(PrivateConfig(), exclude_if=lambda private: not private.on)

    @model_validator(mode="after")
    def _rounded_weights_are_cast_by_nobody(self) -> RunConfig:
        if self.backbone_precision != "full" and self.dtype == "mixed":
            raise ValueError(f"backbone_precision is {self.backbone_precision}, and dtype mixed, which copies weights")
        return self

    @field_validator("score")
    @classmethod
    def _terms_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"{list(names)} names a term twice")
        return tuple(checked(TERMS, name) for name in names)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a small YAML mapping without anchors, tags or repeated keys.

    Raises:
        ConfigError: The file is missing, too large, not a mapping, or uses what is not needed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}", "Check the path") from None
    if len(text) > _MAX_YAML_BYTES:
        raise ConfigError(f"'{path}' has {len(text):,} characters", f"At most {_MAX_YAML_BYTES:,} are read")
    try:
        content = yaml.load(text, _PlainLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}", "Repair it") from None
    if not isinstance(content, dict):
        raise ConfigError(f"'{path}' is not a mapping of keys to values", "Write 'key: value' lines")
    return content


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases (no alias bombs) and without repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = {str(key) for key in keys if keys.count(key) > 1}
        if repeated:
            raise yaml.YAMLError(f"key {sorted(repeated)[0]!r} is written twice")
        return super().construct_mapping(node, deep)


# What pydantic adds to the place of a value that may be of several types.
_UNION_TAG = re.compile(r"constrained-\w+|literal\[.*\]|float|int|str")


def validated(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Builds a configuration, naming the first thing that is wrong with it.

    Args:
        model: The configuration's type.
        values: Raw values.
        where: The file or command line they came from.

    Raises:
        ConfigError: A key is unknown (with the closest known one) or a value does not fit.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = _path(first)
        name = ".".join(path)
        if first["type"] == "extra_forbidden":
            known = _fields_at(model, path[:-1])
            raise ConfigError(f"{where}: key '{name}' is unknown", suggest(path[-1], known)) from None
        # A value of several types is wrong in one way for each of them.
        said = [one["msg"].removeprefix("Value error, ") for one in error.errors() if _path(one) == path]
        more = [one.removeprefix("Input should be ") for one in dict.fromkeys(said[1:]) if one != said[0]]
        message = ", or ".join([said[0], *more]).replace("a valid tuple", "a list")
        if first["type"] == "value_error" and isinstance(first["input"], Mapping):  # keys that contradict each other
            section = f"'{name}': " if name else ""
            raise ConfigError(f"{where}: {section}{message}", "Change one of the keys") from None
        raise ConfigError(f"{where}: '{name}' is {shown(first['input'])}", message) from None


def _path(error: Any) -> list[str]:
    """Returns the keys that lead to what a validation error is about."""
    return [str(part) for part in error["loc"] if not _UNION_TAG.fullmatch(str(part))]


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def flattened(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns settings by dotted key; sections may be written as mappings or into the keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = value
    return flat


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns raw settings over others, section by section."""
    both = {key for key in over if isinstance(over[key], Mapping) and isinstance(base.get(key), Mapping)}
    return {**base, **over, **{key: merged(base[key], over[key]) for key in both}}


def override(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Applies ``section.key=value`` assignments; values are YAML.

    Raises:
        ConfigError: An assignment has no ``=``, or goes through something that is not a section.
    """
    changed: dict[str, Any] = {**values}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {shown(assignment)} has no '='", "Write --set train.steps=100")
        section = changed
        *parents, key = path.strip().split(".")
        for parent in parents:
            inner = section.get(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {shown(assignment)}: '{parent}' is not a section", "Check the key's path")
            section[parent] = {**inner}
            section = section[parent]
        try:
            section[key] = yaml.load(text, _PlainLoader)  # noqa: S506 - a SafeLoader
        except yaml.YAMLError:
            raise ConfigError(f"--set {shown(assignment)}: the value is not YAML", "Quote it") from None
    return changed
