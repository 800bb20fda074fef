"""Reads vectors of items that somebody else computed, as of images, sounds or videos, by the items' ids.

A file holds one vector for each id. Ids without an item are ignored, items without an id have no vector (NaN). No
format that could run code is read: of NumPy's files none with objects.
"""

from __future__ import annotations

import json
import logging
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarec.data.interactions import Values
from metarec.errors import DataError

_LOG = logging.getLogger(__name__)
_FORMS = "Write arrays 'ids' and 'vectors', or one array named after each item id"


def read_item_vectors(path: Path, ids: Sequence[str]) -> Values:
    """Returns the vector of each item, shape (items, width), NaN in rows of items without one.

    Args:
        path: See `named_vectors`.
        ids: The items' ids.

    Raises:
        DataError: The file is missing or malformed, holds a number that is not finite, or no vector of any item.
    """
    named, vectors = named_vectors(path)
    return _in_order(path, named, vectors, ids)


def named_vectors(path: Path) -> tuple[list[str], Values]:
    """Returns the ids that a file names, and a vector of each, shape (ids, width); nothing is checked of them.

    Args:
        path: A ``.npz`` or ``.safetensors`` with arrays ``ids`` and ``vectors`` (of safetensors the ids stand as a JSON
            list in the metadata) or one array per item id; a ``.npy`` beside a ``.txt`` of the same name with one id a
            line; or a ``.parquet`` with a column ``item`` and one of lists, or columns of numbers.

    Raises:
        DataError: The file is missing or malformed.
    """
    if not path.is_file():
        raise DataError(
            f"the file of vectors '{path}' does not exist", "Check the path; it starts at the data's folder"
        )
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"'{path}' is of no kind that vectors are read from", f"Give one of {', '.join(_READERS)}")
    try:
        named, vectors = reader(path)
    except (OSError, ValueError, KeyError, TypeError, struct.error, zipfile.BadZipFile) as error:
        raise DataError(f"'{path}' cannot be read: {error}", _FORMS) from None
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or len(named) != len(vectors) or not vectors.shape[1]:
        raise DataError(f"'{path}' holds {len(named)} ids beside vectors of shape {vectors.shape}", _FORMS)
    if vectors.dtype.kind not in "biuf":
        raise DataError(f"'{path}' holds {vectors.dtype}, which are no real numbers", _FORMS)
    with np.errstate(over="ignore"):
        return named, vectors.astype(np.float32)


def centred_vectors(vectors: Values) -> NDArray[np.float64]:
    """Returns vectors around the mean of the known ones; unknown rows (NaN) are 0.

    Those of encoders of images point one way for the most part, which says nothing of any item.
    """
    unknown = np.asarray(np.isnan(vectors).any(axis=1), bool)
    found: NDArray[np.float64] = vectors.astype(np.float64) - vectors[~unknown].mean(0, dtype=np.float64)
    found[unknown] = 0.0
    return found


def _in_order(path: Path, named: Sequence[str], vectors: Values, ids: Sequence[str]) -> Values:
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise DataError(f"'{path}': the vector of '{named[bad[0]]}' holds a number that is not finite", "Leave it out")
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1) if isinstance(named, list) else named[0]
        raise DataError(f"'{path}' holds '{twice}' twice", "Keep one vector for each item")
    place = {name: row for row, name in enumerate(named)}
    rows = np.array([place.get(item, -1) for item in ids], np.int64)
    known = rows >= 0
    if not known.any():
        raise DataError(f"'{path}' holds no vector of any item, e.g. of '{ids[0]}'", "Name vectors by the items' ids")
    if not known.all():
        _LOG.warning("'%s': %d of %d items have no vector", path, int((~known).sum()), len(ids))
    found: Values = np.full((len(ids), vectors.shape[1]), np.nan, np.float32)
    found[known] = vectors[rows[known]]
    return found


def _text(value: Any) -> str:
    """Returns an id as text; whole numbers as they are written."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _npz(path: Path) -> tuple[list[str], Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return _named({name: arrays[name] for name in arrays.files})


def _named(arrays: Mapping[str, Any]) -> tuple[list[str], Any]:
    if set(arrays) == {"ids", "vectors"}:
        return [_text(name) for name in arrays["ids"].tolist()], arrays["vectors"]
    return list(arrays), np.stack([np.asarray(array).ravel() for array in arrays.values()])


def _npy(path: Path) -> tuple[list[str], Any]:
    return path.with_suffix(".txt").read_text("utf-8").splitlines(), np.load(path, allow_pickle=False)


def _safetensors(path: Path) -> tuple[list[str], Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            names, facts = list(tensors.keys()), tensors.metadata() or {}
            if names == ["vectors"]:
                return [_text(name) for name in json.loads(facts["ids"])], tensors.get_tensor("vectors")
            return _named({name: tensors.get_tensor(name) for name in names})
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def _parquet(path: Path) -> tuple[list[str], Any]:
    from metarec.data.sources.arrow import parquet_table

    table = parquet_table(path.read_bytes(), f"'{path}'")
    if "item" not in table.column_names:
        raise DataError(f"'{path}' has no column 'item'", "Name the column of ids 'item'")
    rest = [table.column(name).to_pylist() for name in table.column_names if name != "item"]
    listed = len(rest) == 1 and isinstance(rest[0][0], list)
    named = [_text(value) for value in table.column("item").to_pylist()]
    rows = rest[0] if listed else list(zip(*rest, strict=True))
    try:
        return named, np.array(rows, np.float32)
    except (ValueError, TypeError):
        width = len(rows[0] or ())
        at = next((at for at, row in enumerate(rows) if not _is_vector(row, width)), 0)
        raise ValueError(f"row {at + 1}, of '{named[at]}', is no vector of {width} numbers") from None


def _is_vector(row: Any, width: int) -> bool:
    try:
        return np.array(row, np.float32).shape == (width,)
    except (ValueError, TypeError):
        return False


_READERS: Mapping[str, Callable[[Path], tuple[list[str], Any]]] = {
    ".npz": _npz,
    ".npy": _npy,
    ".parquet": _parquet,
    ".safetensors": _safetensors,
}
