"""Turns a graph of items, as of a knowledge graph, into a vector of each item.

Items that share neighbours, or neighbours' neighbours, get vectors that point the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metarec.data.interactions import Values
from metarec.errors import DataError

_COMPONENTS = 64
# Share of a random walk that goes on at each node: how far similarity spreads.
_WALK = 0.7
_COLUMNS = ("item", "relation", "other")

Edges = list[tuple[str, str, str]]


def read_item_graph(path: Path) -> Edges:
    """Reads a CSV or TSV with the columns ``item``, ``relation`` and ``other``; ``relation`` may be missing.

    Raises:
        DataError: The file is missing or malformed, or holds no edge.
    """
    from metarec.data.sources.delimited import delimited
    from metarec.data.sources.files import File
    from metarec.data.sources.table import guess_separator

    if not path.is_file():
        raise DataError(f"the file of edges '{path}' does not exist", "Check the path; it starts at the data's folder")
    wanted = {name: name for name in _COLUMNS}
    separator = "\t" if path.suffix == ".tsv" else guess_separator(path, "utf-8")
    frame = delimited(File(path), wanted, separator=separator, optional=("relation",))
    if frame.empty:
        raise DataError(f"'{path}' holds no edge", "Write one row for each: item, relation, other")
    relation = frame["relation"].astype(str) if "relation" in frame else [""] * len(frame)
    return list(zip(frame["item"].astype(str), relation, frame["other"].astype(str), strict=True))


def graph_vectors(edges: Edges, ids: Sequence[str]) -> Values:
    """Returns a vector of each item from a graph, shape (items, width), NaN in rows of items without an edge.

    Nodes are items, and for each relation what it leads to: the same name as director and as actor is two nodes. The
    inner products of vectors approximate a random walk's kernel over the symmetrically normalized graph.

    Args:
        edges: Item, relation and item or anything else.
        ids: The items' ids.

    Raises:
        DataError: No edge names an item.

    Source: Belkin and Niyogi 2003, "Laplacian eigenmaps"; Smola and Kondor 2003, "Kernels and regularization on
    graphs", the random walk's kernel.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import eigsh

    place: dict[tuple[str, str], int] = {("", item): code for code, item in enumerate(ids)}
    items = len(place)

    def node(relation: str, name: str) -> int:
        found = place.get(("", name))
        return place.setdefault((relation, name), len(place)) if found is None else found

    named = [(place[("", item)], node(f"={relation}", other)) for item, relation, other in edges if ("", item) in place]
    if not named:
        raise DataError(f"no edge of the graph names an item, e.g. '{edges[0][0]}'", "Name items by their ids")
    one, other = np.array(named).T
    both = np.concatenate([one, other]), np.concatenate([other, one])
    graph = csr_array((np.ones(len(both[0])), both), (len(place), len(place)))
    graph.data[:] = 1.0
    degree = np.asarray(graph.sum(1)).ravel()
    root = 1.0 / np.sqrt(np.maximum(degree, 1.0))
    walk = graph * root[:, None] * root[None, :]
    width = min(_COMPONENTS, len(place) - 2)
    values, vectors = eigsh(walk, k=max(width, 1), which="LA", v0=np.linspace(1.0, 2.0, len(place)))
    kernel = 1.0 / (1.0 - _WALK * np.clip(values, -1.0, 1.0)) - 1.0
    found: Values = (vectors * np.sqrt(np.clip(kernel, 0.0, None)))[:items].astype(np.float32)
    found[degree[:items] == 0] = np.nan
    return found
