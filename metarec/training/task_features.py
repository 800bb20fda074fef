"""What a task's data say of its items, as features for the collaborative term and for rarely rated items' means."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from metarec.config import RunConfig
from metarec.data.item_vectors import centred_vectors
from metarec.data.task import Task
from metarec.errors import ConfigError
from metarec.evaluation.evaluate import validation_auc
from metarec.registries import TERMS
from metarec.scorers.collaborative.block_worth import block_worth
from metarec.scorers.collaborative.features import (
    PROJECTION,
    Features,
    item_features,
    side_by_side,
    state_vectors,
    unrated_features,
    word_vectors,
)
from metarec.scorers.collaborative.linear_kernel import fit_linear_kernel
from metarec.scorers.collaborative.projection import projected_features
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.text import unit_vectors
from metarec.scorers.language.encoder_tuning import tuned_text_vectors
from metarec.scorers.language.item_vectors import hidden_state_vectors, text_vectors

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData
    from metarec.lm.answer_model import AnswerModel

_LOG = logging.getLogger(__name__)
SIDE_TERM = "side information"


def for_task(config: RunConfig, task: Task) -> RunConfig:
    """Returns the settings with what they leave to the task filled in: features of items, and side information.

    Hidden states of the language model take a reading of the whole catalog. They help where nobody rated the items that
    a task asks about, and nowhere else (docs/benchmark.md), so they are left out elsewhere. Vectors that the data bring
    are read wherever there are any.
    """
    if task.brings_side and config.collaborative.side and SIDE_TERM not in config.score:
        config = config.model_copy(update={"score": (*config.score, SIDE_TERM)})
    named = config.collaborative.features
    if named is not None and (task.brings_vectors or "vectors" not in named):
        return config
    features: tuple[str, ...] = ("text", "fields")
    if named is not None:
        features = tuple(name for name in named if name != "vectors")
    else:
        features += ("lm",) * task.split.asks_unrated + ("vectors",) * task.brings_vectors
    return config.model_copy(update={"collaborative": config.collaborative.model_copy(update={"features": features})})


def side_note(task: Task, score: Collection[str]) -> str | None:
    """Says which terms of a score read what a task brings of users and moments; None where it brings nothing.

    Args:
        task: The task.
        score: Names of terms; see `for_task`.
    """
    if not task.brings_side:
        return None
    own = [name for name in score if name in TERMS.names()]
    reading = [name for name in own if name == SIDE_TERM or TERMS.get(name).reads_person]
    alone = [name for name in own if TERMS.get(name).needs_model and name not in reading]
    brought = ", ".join(task.side_named)
    if not reading:
        return f"{brought}: read by no term of the score (leave collaborative.side on, or add 'history' to score)"
    other = f"; {_listed(alone)} read{'s' * (len(alone) == 1)} items alone" if alone else ""
    return f"{brought}: read by {_listed(reading)}{other}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)


def collaborative_features(answer_model: AnswerModel | None, data: TaskData, config: RunConfig) -> Features:
    """Returns what the collaborative term, and the means of rarely rated items, know of items.

    Args:
        answer_model: The language model over the catalog; None where the settings leave its states out.
        data: The task's data; the task says what is read of an item: text, fields, and sentences where unrated items
            are queried.
        config: The settings; `collaborative.features` says what is read.
    """
    task, catalog = data.task, data.interactions.catalog
    wanted = for_task(config, task).collaborative.features or ()
    read: dict[str, Floats] = {}
    if "lm" in wanted:
        assert answer_model is not None
        read["lm"] = language_model_vectors(answer_model, data)
    if "text" in wanted:
        read["text"] = text_vectors(catalog, task.item_text, config.collaborative.encoder)
    if "words" in wanted:
        read["words"] = word_vectors([task.item_text.render(catalog, code) for code in range(len(catalog))])
    fields = item_features(catalog, task.read_fields(catalog).read) if "fields" in wanted else {}
    if "vectors" in wanted:
        read |= significant_vectors(data, {**read, **fields}, config.seed)
    elif data.interactions.item_vectors:
        named = ", ".join(f"'{name}'" for name in data.interactions.item_vectors)
        _LOG.warning("vectors %s are not read: 'collaborative.features' does not name 'vectors'", named)
    if "tuned text" in wanted:
        read["tuned text"] = tuned_text_vectors(
            data,
            config.collaborative.encoder,
            config.collaborative.tuning,
            config.seed,
            [*read.values(), *fields.values()],
            config.collaborative.linear,
        )
    if PROJECTION in wanted:
        if not read and not fields:
            raise ConfigError(
                "collaborative.features names nothing that a projection could read", "Name 'words' or 'text' beside it"
            )
        settings = config.collaborative.projection
        beside = side_by_side([*read.values(), *fields.values()])
        projected = {**read, PROJECTION: projected_features(data, beside, settings, config.seed)}
        if settings.keep == "always" or _orders_better(data, config, projected, read, fields):
            read = projected
    return features_of_blocks(data, read, fields)


def language_model_vectors(answer_model: AnswerModel, data: TaskData) -> Floats:
    """Returns features of a language model's states of every item, shape (items, features).

    They are hidden states of the task's sentences where a causal model reads any; else the prompt's own, which are read
    anyway where items are rated.

    Args:
        answer_model: The language model over the catalog.
        data: The task's data.
    """
    task, backbone = data.task, answer_model.backbone
    if task.hidden_states and backbone.kind == "causal":
        return hidden_state_vectors(backbone, data.interactions.catalog, task.hidden_states, task.prompt.characters)
    return state_vectors(answer_model.states)


def features_of_blocks(data: TaskData, read: Mapping[str, Floats], fields: Mapping[str, Floats]) -> Features:
    """Returns blocks of items' features as a task reads them, with what predicts the means of unrated items.

    Args:
        data: The task's data.
        read: Vectors of the items' text by the name of the model that read it, each of shape (items, features).
        fields: The blocks of `item_features`; where these are none either, a block that tells no items apart stands in.
    """
    if not read and not fields:
        read = {"nothing": np.zeros((len(data.interactions.catalog), 1))}
    if data.task.split.asks_unrated:
        return unrated_features(read, fields)
    unit = [unit_vectors(vectors) for vectors in (read or fields).values()]
    return Features({**read, **fields}, np.concatenate(unit, 1))


def _orders_better(
    data: TaskData,
    config: RunConfig,
    projected: Mapping[str, Floats],
    read: Mapping[str, Floats],
    fields: Mapping[str, Floats],
) -> bool:
    """Says whether a linear kernel orders validation users' items better with a projection than without it."""
    episodes, _ = data.evaluated("validation")
    threshold = data.task.like_threshold
    shots = [count for count in data.task.shots if count] or [0]
    found = {}
    for name, blocks in {"with": projected, "without": read}.items():
        kernel = fit_linear_kernel(
            data.interactions,
            data.parts["train"],
            features_of_blocks(data, blocks, fields).linear,
            name=f"linear kernel {name} a projection",
            unrated=data.task.split.asks_unrated,
            **config.collaborative.linear.model_dump(),
        )
        found[name] = validation_auc(kernel, episodes, shots, threshold)
    better = found["with"] > found["without"]
    _LOG.info(
        "a kernel orders validation users' items with AUC %.4f with a projection and %.4f without: it is %s",
        *(found["with"], found["without"], "kept" if better else "left out"),
    )
    return better


def significant_vectors(data: TaskData, others: Mapping[str, Floats], seed: int) -> dict[str, Floats]:
    """Returns the vectors that the data bring of items, without those that explain nothing beside what else is read."""
    brought = data.interactions.item_vectors
    found = {name: centred_vectors(vectors) for name, vectors in brought.items()}
    if not found:
        return {}
    worth = block_worth(data.interactions, data.parts["train"], {**others, **found}, seed)
    for name in found:
        one = worth[name]
        _LOG.log(
            logging.INFO if one.significant else logging.WARNING,
            "vectors '%s' explain %.3f (error %.3f) of taste, %.3f (%.3f) of quality%s",
            *(name, one.taste, one.taste_error, one.quality, one.quality_error),
            "" if one.significant else ", which is not distinguishable from 0: they are left out",
        )
    return {name: vectors for name, vectors in found.items() if worth[name].significant}
