"""Saving and loading of scorers; a loaded scorer gives the same scores.

A scorer is a frozen dataclass; its fields are numbers, texts, arrays and further frozen dataclasses. Numbers and texts
are written as JSON, arrays as safetensors without loss. Classes are looked up by name in `CLASSES` alone: a file cannot
create other objects. A language model is not written: the file has its fingerprint, and the caller passes the
model again; of a fine-tuned model the trained tensors are written too. Cached private state is not written.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from metarec.data.interactions import Catalog
from metarec.data.templates import PromptTemplate
from metarec.errors import ArtifactError
from metarec.files.artifacts import dump_json, load_json, replace_dir, verify_dir
from metarec.lm.answer_model import AnswerModel
from metarec.lm.backbone import Backbone
from metarec.meta.inner_loop import MetaState
from metarec.scorer import Scorer
from metarec.scorers.collaborative.foldin import ALS, EASE, ItemKNN, UserKNN
from metarec.scorers.collaborative.gp import GaussianProcess
from metarec.scorers.collaborative.graph_network import GraphNetwork
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.networks import Network
from metarec.scorers.collaborative.review_head import ReviewHead
from metarec.scorers.collaborative.side_effects import SideEffects
from metarec.scorers.collaborative.side_inputs import SideInputs
from metarec.scorers.collaborative.side_readers import Categories, Friends, Numbers
from metarec.scorers.collaborative.stack import Stacked
from metarec.scorers.collaborative.terms import CollaborativeTerm, ItemMeanTerm, SideTerm
from metarec.scorers.collaborative.text import TextLogistic, TextRidge, TwoTower
from metarec.scorers.collaborative.trivial import Constant, ItemMean, Popularity, Random
from metarec.scorers.collaborative.two_towers import TowerText
from metarec.scorers.ensemble import Ensemble
from metarec.scorers.language.adapted import InnerLoop, MetaScorer
from metarec.scorers.language.encoded_text import EncodedText
from metarec.scorers.language.expected_rating import ExpectedRating
from metarec.scorers.language.finetuned import FineTuned
from metarec.scorers.language.in_context import History, InContext
from metarec.scorers.language.listwise import Listwise
from metarec.scorers.language.prompt_term import PromptTerm
from metarec.scorers.language.trainable_copy import Recipe
from metarec.scorers.language.weight_prior import KernelMean
from metarec.scorers.language.zero_shot import ZeroShot
from metarec.scorers.term import ItemValues
from metarec.system.tensors import read_tensors, write_tensors

KIND = "scorer"
# Version of the files' layout and names; scorers of another version are refused.
_FORMAT = 2
CLASSES: dict[str, type[Any]] = {
    "ALS": ALS,
    "Catalog": Catalog,
    "Categories": Categories,
    "CollaborativeTerm": CollaborativeTerm,
    "Constant": Constant,
    "EASE": EASE,
    "EncodedText": EncodedText,
    "Ensemble": Ensemble,
    "ExpectedRating": ExpectedRating,
    "FineTuned": FineTuned,
    "Friends": Friends,
    "GaussianProcess": GaussianProcess,
    "GraphNetwork": GraphNetwork,
    "History": History,
    "InContext": InContext,
    "InnerLoop": InnerLoop,
    "ItemKNN": ItemKNN,
    "ItemMean": ItemMean,
    "ItemMeanTerm": ItemMeanTerm,
    "ItemPrior": ItemPrior,
    "ItemValues": ItemValues,
    "KernelMean": KernelMean,
    "Listwise": Listwise,
    "MetaScorer": MetaScorer,
    "MetaState": MetaState,
    "Network": Network,
    "Numbers": Numbers,
    "Popularity": Popularity,
    "PromptTemplate": PromptTemplate,
    "PromptTerm": PromptTerm,
    "Random": Random,
    "Recipe": Recipe,
    "ReviewHead": ReviewHead,
    "SideEffects": SideEffects,
    "SideInputs": SideInputs,
    "SideTerm": SideTerm,
    "Stacked": Stacked,
    "TextLogistic": TextLogistic,
    "TextRidge": TextRidge,
    "TowerText": TowerText,
    "TwoTower": TwoTower,
    "UserKNN": UserKNN,
    "ZeroShot": ZeroShot,
}
_Model = TypeVar("_Model", AnswerModel, Backbone)
_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
_MAPPED_BYTES = 64 << 20
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def save_scorer(path: str | Path, scorer: Scorer) -> None:
    """Writes a scorer as JSON and safetensors with a manifest; the directory appears complete or not at all.

    Args:
        path: The directory to create or replace.
        scorer: Any scorer whose classes are in `CLASSES`.

    Raises:
        ArtifactError: A part of the scorer is of no known kind, `path` holds something else, or the disk is full.
    """
    with replace_dir(Path(path), KIND) as directory:
        write_scorer(directory, KIND, scorer)


def write_scorer(directory: Path, name: str, scorer: Any, *, classes: Mapping[str, type[Any]] | None = None) -> None:
    """Writes the two files of a scorer, or of its parts, into a directory that the caller makes.

    Args:
        directory: The directory.
        name: Name of the files, without their endings.
        scorer: See `save_scorer`; or a mapping of its parts.
        classes: More classes than `CLASSES` has, by name.

    Raises:
        ArtifactError: See `save_scorer`.
    """
    packer = _Packer({}, [], {cls: known for known, cls in {**CLASSES, **(classes or {})}.items()})
    document = {"format": _FORMAT, "scorer": packer.pack(scorer, "scorer"), "answer_model": None, "backbone": None}
    document |= {_argument(model): _identity(model) for model in packer.models}
    (directory / f"{name}.json").write_text(dump_json(document), encoding="utf-8")
    write_tensors(directory / f"{name}.safetensors", packer.tensors)


def load_scorer(
    path: str | Path, *, answer_model: AnswerModel | None = None, backbone: Backbone | None = None
) -> Scorer:
    """Reads a scorer written by `save_scorer`; its scores are the same, bit for bit.

    Args:
        path: The directory.
        answer_model: The language model over the catalog's prompts, for a scorer that uses one. It may be on another
            device than when the scorer was saved, or its adapted blocks of another precision; then the scores
            differ by rounding.
        backbone: The language model itself, for a scorer whose prompts are histories; for a fine-tuned one, the
            model before fine-tuning. It may be on another device.

    Raises:
        ArtifactError: The directory is missing, damaged or of another kind; or the scorer uses a language model that
            is not passed, or another backbone is passed (one loaded in another precision is another), other prompts or
            another placement of adapters.
    """
    verify_dir(Path(path), KIND)
    return read_scorer(Path(path), KIND, answer_model=answer_model, backbone=backbone)


def read_scorer(
    path: Path,
    name: str,
    *,
    answer_model: AnswerModel | None = None,
    backbone: Backbone | None = None,
    classes: Mapping[str, type[Any]] | None = None,
) -> Scorer:
    """Reads the files of `write_scorer` from a directory that was verified.

    Args:
        path: The directory.
        name: Name of the files, without their endings.
        answer_model: See `load_scorer`.
        backbone: See `load_scorer`.
        classes: More classes than `CLASSES` has, by name.

    Raises:
        ArtifactError: See `load_scorer`.
    """
    document = load_json(path / f"{name}.json")
    if document.get("format") != _FORMAT:
        raise ArtifactError(
            f"'{path}' was written by another metarec, in format {document.get('format', 1)} instead of {_FORMAT}",
            "Fit and save it again, or install the metarec that wrote it",
        )
    device = torch.device("cpu")
    if document["answer_model"] is not None:
        device = _checked(path, document["answer_model"], "answer_model", answer_model).backbone.device
    if document["backbone"] is not None:
        device = _checked(path, document["backbone"], "backbone", backbone).device
    unpacker = _Unpacker(
        path, read_tensors(path / f"{name}.safetensors"), answer_model, backbone, device, {**CLASSES, **(classes or {})}
    )
    return cast("Scorer", unpacker.unpack(document["scorer"]))


def _has_no_default(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _is_sparse(value: object) -> bool:
    """Says whether a value is a sparse array; without scipy's module, which takes long to import, nothing is."""
    sparse = sys.modules.get("scipy.sparse")
    return sparse is not None and isinstance(value, sparse.csr_array)


def _sparse(parts: tuple[Any, ...], shape: tuple[int, ...]) -> Any:
    from scipy.sparse import csr_array

    return csr_array(parts, shape)


def _argument(model: AnswerModel | Backbone) -> str:
    return "answer_model" if isinstance(model, AnswerModel) else "backbone"


def _identity(model: AnswerModel | Backbone) -> dict[str, str]:
    return model.identity if isinstance(model, AnswerModel) else {"backbone": model.fingerprint}


def _checked(path: Path, needed: Mapping[str, str], argument: str, model: _Model | None) -> _Model:
    if model is None:
        raise ArtifactError(
            f"'{path}' reads the language model {needed['backbone']}", f"Pass it: load_scorer(path, {argument}=)"
        )
    for part, digest in _identity(model).items():
        if needed[part] != digest:
            raise ArtifactError(
                f"'{path}' was made with another {part} ({needed[part]}) than the {argument}'s ({digest})",
                f"Pass the {argument} it was made with",
            )
    return model


@dataclass(frozen=True)
class _Packer:
    """Turns values into JSON; collects their tensors and language models."""

    tensors: dict[str, Tensor]
    models: list[AnswerModel | Backbone]
    names: Mapping[type[Any], str]

    def pack(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool | str) or type(value) is int:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, torch.dtype) and str(value) in _DTYPES:
            return {"dtype": str(value)}
        if isinstance(value, Tensor):
            return {"tensor": self._keep(where, value.detach().cpu().contiguous().clone())}
        if isinstance(value, np.ndarray | np.generic):
            return self._array(value, where)
        if _is_sparse(value):
            parts = {name: getattr(value, name) for name in ("data", "indices", "indptr")}
            return {
                "csr": {name: self._array(part, f"{where}.{name}") for name, part in parts.items()},
                "shape": list(value.shape),
            }
        if isinstance(value, tuple):
            return {"tuple": [self.pack(part, f"{where}.{at}") for at, part in enumerate(value)]}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            # As pairs: the order of a state's tensors changes sums in the last bit.
            return {"map": [[key, self.pack(part, f"{where}.{key}")] for key, part in value.items()]}
        if isinstance(value, AnswerModel | Backbone):
            if any(other is not value for other in self.models):
                raise ArtifactError(f"{where} is a second language model", "A scorer can be saved with one")
            self.models.append(value)
            return {_argument(value): True}
        if type(value) in self.names:
            parts = {field.name: getattr(value, field.name) for field in fields(value)}
            packed = {name: self.pack(part, f"{where}.{name}") for name, part in parts.items()}
            return {"class": self.names[type(value)], "fields": packed}
        raise ArtifactError(
            f"{where} is a {type(value).__name__}, which cannot be saved",
            "Add its class to metarec.scorers.serialization.CLASSES",
        )

    def _array(self, value: Any, where: str) -> Any:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise ArtifactError(f"{where} is an array of {array.dtype}, which cannot be saved", "Make it numbers")
        # Linear algebra rounds differently for the two memory layouts, so the layout is written too.
        columns_first = array.flags.f_contiguous and not array.flags.c_contiguous
        name = self._keep(where, torch.tensor(array.T if columns_first else array))
        return {"scalar": name} if isinstance(value, np.generic) else {"array": name, "columns_first": columns_first}

    def _keep(self, name: str, tensor: Tensor) -> str:
        self.tensors[name] = tensor
        return name


@dataclass(frozen=True)
class _Unpacker:
    """Inverts `_Packer`."""

    path: Path
    tensors: Mapping[str, Tensor]
    answer_model: AnswerModel | None
    backbone: Backbone | None
    device: torch.device
    classes: Mapping[str, type[Any]]

    def unpack(self, packed: Any) -> Any:
        if not isinstance(packed, dict):
            return packed
        kinds: dict[str, Callable[[Any], Any]] = {
            "float": lambda value: _NON_FINITE[value],
            "dtype": lambda value: _DTYPES[value],
            # Copies, because the memory of a file is aligned differently from new memory.
            "tensor": lambda value: self.tensors[value].clone().to(self.device),
            "scalar": lambda value: self.tensors[value].numpy()[()],
            "array": lambda value: self._array(value, columns_first=packed["columns_first"]),
            "csr": lambda parts: _sparse(
                tuple(self.unpack(parts[name]) for name in ("data", "indices", "indptr")), tuple(packed["shape"])
            ),
            "tuple": lambda parts: tuple(map(self.unpack, parts)),
            "map": lambda pairs: {key: self.unpack(part) for key, part in pairs},
            "answer_model": lambda _: self.answer_model,
            "backbone": lambda _: self.backbone,
            "class": lambda name: self._make(name, packed["fields"]),
        }
        for kind, read in kinds.items():
            if kind in packed:
                return read(packed[kind])
        raise ArtifactError(f"'{self.path}' holds a part of no known kind: {sorted(packed)}", "Save the scorer again")

    def _array(self, name: str, *, columns_first: bool) -> np.ndarray:
        tensor = self.tensors[name]
        # A large one stays in the file that it is mapped from: its rows are copied when they are asked for.
        array: np.ndarray = (tensor if tensor.nbytes >= _MAPPED_BYTES else tensor.clone()).numpy()
        return array.T if columns_first else array

    def _make(self, name: str, packed: Mapping[str, Any]) -> Any:
        cls = self.classes.get(name)
        names = {field.name for field in fields(cls)} if cls is not None else set()
        # A field that files of before do not have takes its default.
        needed = {field.name for field in fields(cls) if _has_no_default(field)} if cls is not None else set()
        if cls is None or not needed <= set(packed) <= names:
            raise ArtifactError(
                f"'{self.path}' holds a '{name}' as this metarec does not know it",
                "Save the scorer again, or install the metarec that wrote it",
            )
        return cls(**{key: self.unpack(part) for key, part in packed.items()})
