"""Settings of the outer loop, of privacy, and of fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from metarec.config.section import Section, checked
from metarec.registries import LOSSES


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
    keep: Literal["best", "last"] = Field(
        "best",
        description="which meta-parameters are kept: those that are best for validation users, or the last step's",
        exclude_if=lambda name: name == "best",
    )
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
