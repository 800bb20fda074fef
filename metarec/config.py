"""Configuration lives at the edge: YAML under command-line overrides, unknown keys refused with a suggestion.

Knows the shape of the settings and their defaults, and where the defaults come from; nothing of what they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metarec.errors import ConfigError, suggest

_MAX_YAML_BYTES = 256_000

Dtype = Literal["float32", "mixed", "bfloat16"]
Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AdapterConfig(Section):
    """Where the adapters sit; see `metarec.lm.answer_model.Placement`."""

    kind: Literal["lora", "bias", "prefix"] = Field(
        "lora", description="low-rank updates, biases, or virtual tokens that attention sees in front of the prompt"
    )
    layers: int = Field(4, ge=1, description="how many topmost blocks carry adapters")
    targets: tuple[str, ...] | None = Field(
        None, description="linear layers that carry one; null: the attention's usual ones, for biases all"
    )
    rank: int = Field(1, ge=1)
    alpha: float = Field(2.0, gt=0)
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    virtual_tokens: int = Field(8, ge=1, description="length of a prefix")
    storage: Literal["float16", "float32"] = Field("float16", description="type that users' adapters are kept in")
    active_tokens: int | Literal["auto"] | None = Field(
        "auto", description="last tokens that carry the adapter; null for all; auto takes what the prompts share"
    )


class MetaConfig(Section):
    """The meta-learning algorithm and its inner loop."""

    algorithm: Literal["fomaml", "maml", "maml++", "imaml", "reptile", "ridge", "prototypes"] = Field(
        "fomaml", description="ridge and prototypes fit a head in closed form instead of taking inner steps"
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
        None, gt=0, description="where every learned inner rate starts; null: 0.3 for lora, 3 for bias and prefix"
    )
    shrinkage: float = Field(5.0, ge=0, description="ratings that the initialization counts for")
    user_bias_damping: float = Field(1.0, gt=0, description="ratings that a user's level of zero counts for")


class TrainConfig(Section):
    """The outer loop."""

    steps: int = Field(100, ge=1)
    users: int = Field(8, ge=1, description="users per outer step")
    shots: tuple[int, ...] = Field((5, 10, 20), min_length=1, description="support sizes to draw from")
    max_query: int = Field(20, ge=2)
    min_query: int = Field(5, ge=2)
    lr: float = Field(1e-3, gt=0)
    score_lr: float = Field(1e-2, gt=0, description="outer rate of the score's weights and of the inner rates")
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(10, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the meta-gradient")
    sharpness: float = Field(2.0, gt=0, description="factor on score differences in the outer loss")
    llm_weight: float = Field(1.0, description="weight of the log-odds at the start")
    validate_every: int = Field(50, ge=1)
    validation_users: int = Field(200, ge=1, description="validate on the first so many validation users at most")
    patience: int = Field(4, ge=1, description="validations without a better one before stopping")


class RunConfig(Section):
    """Everything a run is a function of, besides its task and the model's weights."""

    task: str = "movielens/user-cold"
    backbone: str = "smollm2-135m-instruct"
    seed: int = Field(0, ge=0)
    device: str = "cpu"
    dtype: Dtype = Field(
        "float32", description="of frozen weights; mixed: caches by float32 weights, the adapted blocks bfloat16"
    )
    prior: Literal["item mean", "none"] = Field(
        "item mean", description="none: neither the score nor what users of like taste say knows any item's mean"
    )
    taste: Literal["stack", "gp", "none"] = Field(
        "stack",
        description="what users of like taste say is an input of the score: several methods stacked, a Gaussian "
        "process alone, or nothing",
    )
    encoder: str | None = Field(
        "minilm-l6-v2", description="sentence encoder read beside the language model; null: its own states alone"
    )
    adapter: AdapterConfig = AdapterConfig()
    meta: MetaConfig = MetaConfig()
    train: TrainConfig = TrainConfig()

    @property
    def inner_lr(self) -> float:
        """Where inner rates start: biases and prefixes have smaller gradients than low-rank updates."""
        return self.meta.inner_lr or (0.3 if self.adapter.kind == "lora" else 3.0)


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
        path = [str(part) for part in first["loc"]]
        name = ".".join(path)
        if first["type"] == "extra_forbidden":
            known = _fields_at(model, path[:-1])
            raise ConfigError(f"{where}: key '{name}' is unknown", suggest(path[-1], known)) from None
        raise ConfigError(f"{where}: '{name}' is {first['input']!r}", first["msg"]) from None


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def override(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Applies ``section.key=value`` assignments; values are YAML.

    Raises:
        ConfigError: An assignment has no ``=``, or goes through something that is not a section.
    """
    merged: dict[str, Any] = {**values}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment!r} has no '='", "Write --set train.steps=100")
        section = merged
        *parents, key = path.strip().split(".")
        for parent in parents:
            inner = section.get(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {assignment!r}: '{parent}' is not a section", "Check the key's path")
            section[parent] = {**inner}
            section = section[parent]
        try:
            section[key] = yaml.load(text, _PlainLoader)  # noqa: S506 - a SafeLoader
        except yaml.YAMLError:
            raise ConfigError(f"--set {assignment!r}: the value is not YAML", "Quote it") from None
    return merged
