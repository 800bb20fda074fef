"""Settings of the adapters that users have, and of the meta-algorithm."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from metarec.config.section import Section, checked
from metarec.registries import ADAPTER_KINDS, ALGORITHMS

# What gradient steps start from: the initialization, or beside it the posterior of `metarec.meta.heads.DKT`.
Start = Literal["initialization", "posterior"]


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
        description="where every inner rate starts; null takes the adapter kind's: lora and bottleneck 0.3, bias, "
        "prefix and soft-prompt 3",
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
