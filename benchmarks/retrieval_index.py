"""What an approximate index of a large catalog would save, and what it would miss.

    pip install usearch faiss-cpu
    python benchmarks/retrieval_index.py       # benchmarks/results/retrieval-index.json

The default score without a language model is, for one user, an inner product of the user's weights with every item's
loadings and mean. Items, users and their ratings are made: loadings whose variances fall off, as learned ones do. The
exact order is the service's own, `CollaborativeTerm.values` over blocks of the catalog and `metrics.leaders`. An index
holds the same vectors. Processor seconds are those of all threads, on two threads for building and one for asking.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metarec.data.interactions import Ratings
from metarec.evaluation.metrics import leaders
from metarec.files.artifacts import write_json
from metarec.scorers.collaborative.gp import GaussianProcess
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.stack import Stacked
from metarec.scorers.collaborative.terms import CollaborativeTerm

RESULT = Path(__file__).parent / "results" / "retrieval-index.json"
WIDTHS = (66, 35)  # of the two processes of the default stack
BLOCK = 65_536
Vectors = np.ndarray[Any, np.dtype[np.float32]]


def made(items: int) -> Stacked:
    """A stack of two processes over made items."""
    generator = np.random.default_rng(0)
    count = generator.geometric(0.02, items).astype(np.float32)
    total = (count * generator.normal(scale=0.5, size=items)).astype(np.float32)
    prior = ItemPrior(3.5, 1.1, total, count, np.zeros(items, np.float32), 4.0)
    members = []
    for width in WIDTHS:
        spread = 0.3 / np.sqrt(1 + np.arange(width))
        loadings = generator.normal(size=(items, width)) * spread
        loadings[:, -1] = 0.4
        members.append(
            GaussianProcess(
                3.5, 1.1, prior.values(np.arange(items)).astype(np.float64), loadings, np.full(items, 0.6),
                loadings.mean(0), np.ones(width), 3.0,
            )
        )  # fmt: skip
    return Stacked(prior, tuple(members), (0,), np.array([[0.6, 0.4]]))


def supports(items: int, users: int) -> list[Ratings]:
    generator = np.random.default_rng(1)
    return [
        Ratings(np.sort(generator.choice(items, 20, replace=False)), generator.integers(1, 6, 20).astype(np.float32))
        for _ in range(users)
    ]


def scores(stack: Stacked, support: Ratings) -> np.ndarray[Any, Any]:
    """Every item's score for a user: item means, and what the stack adds to them."""
    term, everything = CollaborativeTerm(stack), np.arange(len(stack.prior.count))
    blocks = np.array_split(everything, max(1, -(-len(everything) // BLOCK)))
    return np.concatenate([term.values([support], [block])[0] + stack.prior.values(block) for block in blocks])


def best(values: np.ndarray[Any, Any], k: int) -> np.ndarray[Any, Any]:
    front = leaders(values, k)
    return front[np.argsort(-values[front], kind="stable")[:k]]


def timed(ask: Callable[[], Any]) -> tuple[Any, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = ask()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def milliseconds(seconds: list[float]) -> float:
    return round(1000 * float(np.median(seconds)), 1)


def exact(items: int, users: int, k: int) -> dict[str, Any]:
    stack = made(items)
    people = supports(items, users)
    best(scores(stack, people[0]), k)
    taken = [timed(lambda person=person: best(scores(stack, person), k)) for person in people]
    return {
        "items": items,
        "p50_ms": milliseconds([wall for _, wall, _ in taken]),
        "p50_cpu_ms": milliseconds([cpu for *_, cpu in taken]),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def vectors_of(stack: Stacked) -> Vectors:
    """Items whose inner product with `query_of` a user is the score."""
    weights = stack.weights[0]
    parts = [weight * member.loadings for weight, member in zip(weights, stack.members, strict=True)]
    base = stack.prior.values(np.arange(len(stack.prior.count)))
    means = base + sum(w * (m.mean - base) for w, m in zip(weights, stack.members, strict=True))
    return np.ascontiguousarray(np.concatenate([means[:, None], *parts], 1), np.float32)


def query_of(stack: Stacked, support: Ratings) -> Vectors:
    weights = [member.user_weights(support) for member in stack.members]
    return np.concatenate([np.ones(1), *weights]).astype(np.float32)


def usearch(vectors: Vectors) -> Callable[[Vectors, int], Any]:
    from usearch.index import Index

    index = Index(ndim=vectors.shape[1], metric="ip", dtype="f32", connectivity=32, expansion_add=128)
    index.add(np.arange(len(vectors)), vectors, threads=2)
    index.expansion_search = 512
    return lambda query, k: index.search(query, k, threads=1).keys


def faiss_graph(vectors: Vectors) -> Callable[[Vectors, int], Any]:
    import faiss

    faiss.omp_set_num_threads(2)
    index = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 128
    index.add(vectors)
    index.hnsw.efSearch = 512
    faiss.omp_set_num_threads(1)
    return lambda query, k: index.search(query[None], k)[1][0]


def faiss_cells(vectors: Vectors) -> Callable[[Vectors, int], Any]:
    import faiss

    faiss.omp_set_num_threads(2)
    cells = int(4 * np.sqrt(len(vectors)))
    coarse = faiss.IndexFlatIP(vectors.shape[1])
    index = faiss.IndexIVFFlat(coarse, vectors.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:: max(1, len(vectors) // (40 * cells))])
    index.add(vectors)
    index.nprobe = cells // 16
    faiss.omp_set_num_threads(1)
    return lambda query, k: index.search(query[None], k)[1][0]


INDEXES: Mapping[str, tuple[str, Callable[[Vectors], Callable[[Vectors, int], Any]]]] = {
    "usearch, a graph": ("usearch", usearch),
    "faiss, a graph": ("faiss-cpu", faiss_graph),
    "faiss, cells": ("faiss-cpu", faiss_cells),
}


def indexes(items: int, users: int, k: int) -> dict[str, Any]:
    stack, people = made(items), supports(items, users)
    vectors, queries = vectors_of(stack), [query_of(stack, person) for person in people]
    exhaustive = [set(best(scores(stack, person), k).tolist()) for person in people]
    found: dict[str, Any] = {}
    for name, (package, build) in INDEXES.items():
        try:
            row: dict[str, Any] = {"version": version(package)}
        except PackageNotFoundError:
            found[name] = {"missing": package}
            continue
        ask, wall, cpu = timed(lambda build=build: build(vectors))
        answers = [timed(lambda query=query, ask=ask: ask(query, k)) for query in queries]
        overlap = [len(set(map(int, keys)) & truth) / k for (keys, *_), truth in zip(answers, exhaustive, strict=True)]
        found[name] = {
            **row,
            "build_cpu_seconds": round(cpu, 1),
            "build_seconds": round(wall, 1),
            "p50_cpu_ms": milliseconds([cpu for *_, cpu in answers]),
            f"recall_at_{k}": round(float(np.mean(overlap)), 3),
        }
    return {"items": items, "width": vectors.shape[1], "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000, help="of the exact order")
    parser.add_argument("--indexed", type=int, default=100_000, help="items of the indexes")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = round(os.getloadavg()[0], 1)
    found = {
        "command": "python benchmarks/retrieval_index.py",
        "cores": os.cpu_count(),
        "load_before": load,
        "exact": exact(arguments.items, arguments.users, arguments.k),
        "exact_of_as_many": exact(arguments.indexed, arguments.users, arguments.k),
        "indexes": indexes(arguments.indexed, arguments.users, arguments.k),
    }
    write_json(arguments.out, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
