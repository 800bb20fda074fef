"""All settings of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from metarec.config.adaptation import AdapterConfig, MetaConfig
from metarec.config.collaborative import CollaborativeConfig
from metarec.config.section import Section, checked
from metarec.config.training import PrivateConfig, TrainConfig
from metarec.registries import TERMS

Dtype = Literal["float32", "mixed", "bfloat16"]
Precision = Literal["float32", "float16", "int8"]


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
