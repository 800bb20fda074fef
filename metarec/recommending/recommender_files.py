"""Recommenders and adapted users as directories; neither holds the backbone's weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from metarec.config import RunConfig, validated
from metarec.data.interactions import Catalog, RatingScale
from metarec.data.split_record import SplitRecord
from metarec.data.task import Task
from metarec.errors import ArtifactError
from metarec.evaluation.calibration import Calibration
from metarec.files.artifacts import dump_json, load_json, replace_dir, verify_dir
from metarec.files.run_directory import FACTS, tuned_model
from metarec.lm.backbone import Backbone
from metarec.lm.output_layer import NO_PLACE, output_layer
from metarec.lm.peft_files import load_adapter, save_adapter
from metarec.lm.prompt_files import read_prompts, write_prompts
from metarec.meta.inner_loop import MetaState
from metarec.registries import ADAPTER_KINDS, ALGORITHMS, LOSSES
from metarec.scorers.language.score import HEAD, HEAD_PARAMETER
from metarec.scorers.serialization import read_scorer, write_scorer
from metarec.system.devices import check_device
from metarec.system.tensors import AdapterState, read_tensors, write_tensors
from metarec.training.fitting import Fitted, adapted_model, catalog_answer_model, open_backbone, score_terms

_LOG = logging.getLogger(__name__)
# The fact that says how a head becomes an update of the output layer.
OUTPUT_LAYER = "output_layer"
# Directories of another format are refused: their settings and tensors have other names.
_FORMAT = 3
# What meta-parameters were called before heads could have several.
_RENAMED = {f"init/score.{name}": f"init/{HEAD_PARAMETER}{name}" for name in ("log_penalty", "log_scale")}
_TERMS, _USERS = "terms", "users.safetensors"
_WEIGHTS, _USER = "score.safetensors", "user.json"


def write_recommender(path: Path, fitted: Fitted, config: RunConfig) -> None:
    """Writes a fitted recommender; the directory appears complete or not at all.

    Raises:
        ArtifactError: The directory exists and holds something else, or a term's class cannot be saved.
    """
    model = fitted.answer_model
    facts = {
        "format": _FORMAT,
        "metarec": version("metarec"),
        "backbone_fingerprint": None if model is None else model.backbone.fingerprint,
        "config": config.model_dump(mode="json"),
        "task": fitted.task.model_dump(mode="json"),
        "scale": [fitted.scale.low, fitted.scale.high],
        "hashes": dict(fitted.split.hashes),
        "training": fitted.training,
        "calibration": [found.to_json() for found in fitted.calibration],
    }
    users = {"train": fitted.split.train, "validation": fitted.split.validation}
    catalog = {"ids": fitted.catalog.ids, "fields": dict(fitted.catalog.fields)}
    parts = {"prior": fitted.prior, "terms": dict(fitted.terms)}
    with replace_dir(path, "recommender") as directory:
        write_tensors(directory / "meta.safetensors", fitted.meta.tensors())
        write_tensors(directory / _USERS, {part: torch.from_numpy(digests) for part, digests in users.items()})
        write_scorer(directory, _TERMS, parts, classes=_classes(config))
        if model is not None:
            write_prompts(directory, model.prompts)
        (directory / "catalog.json").write_text(dump_json(catalog), encoding="utf-8")
        (directory / FACTS).write_text(dump_json(facts), encoding="utf-8")


def read_recommender(path: Path, place: Mapping[str, str]) -> tuple[Backbone | None, RunConfig, Fitted]:
    """Reads what `write_recommender` wrote.

    Args:
        path: The directory.
        place: Settings that say where and in which precision it runs, instead of the saved ones.

    Returns:
        The backbone, None where no part reads one; the settings; and what was fitted.

    Raises:
        ArtifactError: The directory is damaged, of another format, or was made with other weights.
        ConfigError: A part is code outside metarec that was not allowed, see `metarec.registry.Registry.get`; or this
            machine has no such device.
    """
    verify_dir(path, "recommender")
    facts = load_json(path / FACTS)
    if facts.get("format") != _FORMAT:
        raise ArtifactError(
            f"'{path}' was saved by metarec {facts.get('metarec')}, in format {facts.get('format', 1)} "
            f"instead of {_FORMAT}",
            "Train it again, or install the metarec that saved it",
        )
    where = str(path / FACTS)
    config = validated(RunConfig, {**facts["config"], **place}, where)
    config = config.model_copy(update={"backbone": tuned_model(path, config.backbone)})
    check_device(config.device, "device" if "device" in place else where)
    task = validated(Task, facts["task"], where)
    for registry, name in (
        (ALGORITHMS, config.meta.algorithm),
        (ADAPTER_KINDS, config.adapter.kind),
        (LOSSES, config.train.loss),
    ):
        registry.get(name, from_file=True)
    classes = _classes(config)
    listed = load_json(path / "catalog.json")
    fields = {name: tuple(column) for name, column in listed["fields"].items()}
    catalog = Catalog(tuple(listed["ids"]), fields)
    backbone, answer_model = None, None
    if facts["backbone_fingerprint"] is not None:
        backbone = open_backbone(config, blocks_alone=True)
        if backbone.fingerprint != facts["backbone_fingerprint"]:
            raise ArtifactError(
                f"'{path}' was made with other weights of '{config.backbone}'", "Install the backbone it was made with"
            )
        prompts = read_prompts(path, backbone, task.template, catalog)
        answer_model = catalog_answer_model(backbone, config, task.template, catalog, prompts)
    users = read_tensors(path / _USERS)
    learned = read_tensors(path / "meta.safetensors", config.device)
    parts: Any = read_scorer(path, _TERMS, answer_model=answer_model, classes=classes)
    fitted = Fitted(
        task=task,
        catalog=catalog,
        scale=RatingScale(*facts["scale"]),
        prior=parts["prior"],
        terms=parts["terms"],
        meta=MetaState.from_tensors({_RENAMED.get(name, name): tensor for name, tensor in learned.items()}),
        answer_model=answer_model,
        split=SplitRecord(facts["hashes"], **{part: digests.numpy() for part, digests in users.items()}),
        training=facts["training"],
        calibration=tuple(Calibration.from_json(found) for found in facts["calibration"]),
    )
    return backbone, config, fitted


def _classes(config: RunConfig) -> dict[str, type[Any]]:
    """Returns the classes that the settings' own terms bring, by the names that files know them by."""
    terms = score_terms(config, from_file=True)
    return {f"{name}/{cls.__name__}": cls for name, term in terms.items() for cls in term.classes}


def digest_of(fitted: Fitted) -> str:
    """Names a fitted recommender by the content of its meta-parameters and its backbone."""
    model = fitted.answer_model
    digest = hashlib.sha256(b"" if model is None else model.backbone.fingerprint.encode())
    for name, tensor in sorted(fitted.meta.tensors().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_user(
    path: Path, state: AdapterState, facts: dict[str, Any], fitted: Fitted, config: RunConfig, *, whole: bool
) -> None:
    """Writes a user's adapter as a PEFT directory with the score's weights and the facts beside it.

    A score without an adapter leaves nothing that PEFT knows; the directory then holds weights and facts alone.

    Args:
        path: Directory to create or replace; only its owner may read it.
        state: The user's tensors, without a user dimension.
        facts: JSON values to keep with the adapter: the user's ratings among them.
        fitted: What the user was adapted from.
        config: Its settings.
        whole: Whether a head is also written as an update of the output layer, which is as long as the vocabulary.

    Raises:
        ArtifactError: The directory exists and holds something else.
    """
    model = adapted_model(config, fitted.answer_model)
    if model is None:
        with replace_dir(path, "adapter", private=True) as directory:
            write_tensors(directory / _WEIGHTS, {name: value.cpu().contiguous() for name, value in state.items()})
            (directory / _USER).write_text(dump_json(facts), encoding="utf-8")
        return
    layer = output_layer(model) if HEAD in state else None
    if layer is not None:
        facts = {**facts, OUTPUT_LAYER: vars(layer)}
    elif whole and HEAD in state:
        _LOG.warning("%s. It lies in '%s' beside PEFT's files", NO_PLACE, path / _WEIGHTS)
    save_adapter(
        path,
        state,
        model.spec,
        base_model=model.backbone.location,
        task_type=model.backbone.task_type,
        invocation_tokens=model.invocation_tokens,
        user=facts,
        head=(layer, state[HEAD]) if whole and layer is not None else None,
        dtype=getattr(torch, config.adapter.storage),
    )


def read_user(path: Path, fitted: Fitted, config: RunConfig) -> tuple[AdapterState, dict[str, Any]]:
    """Reads what `write_user` wrote: the user's tensors, without a user dimension, and the facts.

    Raises:
        ArtifactError: A file is missing or altered, or the adapter is of another kind or shape.
    """
    model = adapted_model(config, fitted.answer_model)
    if model is not None:
        return load_adapter(path, model.spec, config.device)
    verify_dir(path, "adapter")
    return read_tensors(path / _WEIGHTS, config.device), load_json(path / _USER)
