"""Settings of the collaborative term: what it reads of items, and how its predictors are fitted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from metarec.config.section import Section

FeatureName = Literal["words", "text", "tuned text", "fields", "vectors", "lm", "projection"]


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
