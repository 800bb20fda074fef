"""Turns a graph of items, as of a knowledge graph, into a vector of each item.

Items that share neighbours, or neighbours' neighbours, get vectors that point the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from metarec.data.interactions import Values
from metarec.data.side_table import side_table
from metarec.errors import DataError

_COMPONENTS = 64
# Share of a random walk that goes on at each node: how far similarity spreads.
_WALK = 0.7
_COLUMNS = ("item", "relation", "other")

Edges = list[tuple[str, str, str]]


def read_item_graph(path: Path, ids: Sequence[str] = (), encoding: str = "utf-8") -> Edges:
    """Reads a table of edges: ``item``, ``relation``, ``other``, or three columns that mean these in this order.

    Args:
        path: The file.
        ids: The items' ids, to tell a row from a header.
        encoding: The file's encoding where it is not UTF-8.

    Raises:
        DataError: The file is missing or malformed, or holds no edge.
    """
    frame = side_table(path, _COLUMNS, encoding=encoding, ids=frozenset(ids))
    frame = frame[frame["other"] != ""]  # what has no name joins nothing
    if frame.empty:
        raise DataError(f"no row of '{path}' names an 'other'", "Write one edge in each row")
    return list(zip(*(frame[name] for name in _COLUMNS), strict=True))


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

    from metarec.system.threads import one_thread  # loads torch

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
    # Graphs have equal eigenvalues: the search starts anew inside their spaces, from vectors that it draws.
    drawn: dict[str, Any] = {"rng": np.random.default_rng(0)} if "rng" in signature(eigsh).parameters else {}
    start = np.linspace(1.0, 2.0, len(place))
    with one_thread():
        values, vectors = eigsh(walk, k=max(width, 1), which="LA", v0=start, **drawn)
    kernel = 1.0 / (1.0 - _WALK * np.clip(values, -1.0, 1.0)) - 1.0
    found: Values = (vectors * np.sqrt(np.clip(kernel, 0.0, None)))[:items].astype(np.float32)
    found[degree[:items] == 0] = np.nan
    return found


def graph_digest(edges: Edges) -> str:
    """Names a graph by its edges; its vectors differ in their last bits from one processor to another."""
    text = "\1".join("\0".join(edge) for edge in edges)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
