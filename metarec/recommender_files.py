"""A fitted recommender as a directory: all that recommending needs, but no backbone weights and nobody's ratings."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from metarec.artifacts import dump_json, load_json, replace_dir, verify_dir
from metarec.config import RunConfig, validated
from metarec.data.interactions import Catalog, RatingScale
from metarec.data.task import Task
from metarec.errors import ArtifactError
from metarec.fitting import Fitted, catalog_answer_model, open_backbone, score_terms
from metarec.lm.backbone import Backbone
from metarec.meta.inner_loop import MetaState
from metarec.registries import ADAPTER_KINDS, ALGORITHMS, LOSSES
from metarec.scorers.serialization import read_scorer, write_scorer
from metarec.tensors import read_tensors, write_tensors

FACTS = "recommender.json"
# Directories of another format are refused: their settings and tensors have other names.
_FORMAT = 2
_TERMS = "terms"


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
        "training": fitted.training,
    }
    catalog = {"ids": fitted.catalog.ids, "fields": dict(fitted.catalog.fields)}
    parts = {"prior": fitted.prior, "terms": dict(fitted.terms)}
    with replace_dir(path, "recommender") as directory:
        write_tensors(directory / "meta.safetensors", fitted.meta.tensors())
        write_scorer(directory, _TERMS, parts, classes=_classes(config))
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
        ConfigError: A part is code outside metarec that was not allowed, see `metarec.registry.Registry.get`.
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
        backbone = open_backbone(config)
        if backbone.fingerprint != facts["backbone_fingerprint"]:
            raise ArtifactError(
                f"'{path}' was made with other weights of '{config.backbone}'", "Install the backbone it was made with"
            )
        answer_model = catalog_answer_model(backbone, config, task.template, catalog)
    parts: Any = read_scorer(path, _TERMS, answer_model=answer_model, classes=classes)
    fitted = Fitted(
        task=task,
        catalog=catalog,
        scale=RatingScale(*facts["scale"]),
        prior=parts["prior"],
        terms=parts["terms"],
        meta=MetaState.from_tensors(read_tensors(path / "meta.safetensors", config.device)),
        answer_model=answer_model,
        training=facts["training"],
    )
    return backbone, config, fitted


def _classes(config: RunConfig) -> dict[str, type[Any]]:
    """Returns the classes that the settings' own terms bring, by the names that files know them by."""
    terms = score_terms(config, from_file=True)
    return {f"{name}/{cls.__name__}": cls for name, term in terms.items() for cls in term.classes}
