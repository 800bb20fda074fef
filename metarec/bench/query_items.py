"""A query-item task: texts that people might type, made from a catalog, and the items that answer each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarec.bench.robustness import noisy
from metarec.data.interactions import Catalog, Codes
from metarec.data.item_fields import tokens_in
from metarec.errors import DataError
from metarec.evaluation.metrics import bootstrap_interval

# What is done to a title, or said instead of it.
DROPPED, SHUFFLED, MISSPELT, DESCRIBED = "words dropped", "words shuffled", "misspelt", "categories and year"
KINDS = (DROPPED, SHUFFLED, MISSPELT, DESCRIBED)
_NOISE = 0.1
_FEWEST_WORDS, _MOST_RELEVANT = 2, 20


@dataclass(frozen=True)
class ItemQuery:
    """A text, and the items that answer it."""

    text: str
    relevant: frozenset[int]


def make_queries(catalog: Catalog, kind: str, count: int, seed: int) -> list[ItemQuery]:
    """Returns queries of one kind, of items that are drawn without replacement.

    Args:
        catalog: The items.
        kind: `DROPPED`: a third of a title's words is left out; `SHUFFLED`: its words are in another order;
            `MISSPELT`: a tenth of its characters is wrong; all of titles of two words or more, answered by the items of
            that title. `DESCRIBED`: an item's categories and year, answered by all items of these, twenty at most.
        count: How many; fewer where the catalog has fewer.
        seed: Seed of the draw and of what is done to titles.

    Raises:
        DataError: The catalog has no genres or no year, and `DESCRIBED` is asked for.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.permutation(len(catalog))
    found = []
    describe = _descriptions(catalog) if kind == DESCRIBED else None
    for code in drawn.tolist():
        query = _titled(catalog, code, kind, generator) if describe is None else describe.get(code)
        if query is not None:
            found.append(query)
        if len(found) == count:
            break
    return found


def _titled(catalog: Catalog, code: int, kind: str, generator: np.random.Generator) -> ItemQuery | None:
    titles = catalog.fields["title"]
    words = titles[code].split()
    if len(words) < _FEWEST_WORDS:
        return None
    if kind == DROPPED:
        kept = np.sort(generator.choice(len(words), len(words) - max(1, len(words) // 3), replace=False))
        words = [words[place] for place in kept]
    elif kind == SHUFFLED:
        order = generator.permutation(len(words))
        words = [words[place] for place in (order if (np.diff(order) != 1).any() else order[::-1])]
    else:
        words = [noisy(" ".join(words), _NOISE, generator)]
    same = [other for other in range(len(titles)) if titles[other] == titles[code]]
    return ItemQuery(" ".join(words), frozenset(same))


def _descriptions(catalog: Catalog) -> Mapping[int, ItemQuery]:
    for name in ("genres", "year"):
        if name not in catalog.fields:
            raise DataError(f"the catalog has no field '{name}' to describe items by", f"Leave out '{DESCRIBED}'")
    keys = [
        (tuple(sorted(genres)), year)
        for genres, year in zip(tokens_in(catalog.fields["genres"]), catalog.fields["year"], strict=True)
    ]
    groups: dict[tuple[tuple[str, ...], str], list[int]] = {}
    for code, key in enumerate(keys):
        groups.setdefault(key, []).append(code)
    return {
        code: ItemQuery(f"{' '.join(genres)} {year}", frozenset(groups[genres, year]))
        for code, (genres, year) in enumerate(keys)
        if genres and year and len(groups[genres, year]) <= _MOST_RELEVANT
    }


def recall(order: Sequence[int], relevant: frozenset[int], k: int) -> float:
    """Returns the share of the relevant items, of `k` at most, that is among the first `k`."""
    return len(relevant & set(order[:k])) / min(len(relevant), k)


def ndcg(order: Sequence[int], relevant: frozenset[int], k: int) -> float:
    """Returns the normalized discounted cumulative gain of the first `k` (Jarvelin and Kekalainen 2002)."""
    gains = sum(1 / np.log2(place + 2) for place, code in enumerate(order[:k]) if code in relevant)
    return float(gains / sum(1 / np.log2(place + 2) for place in range(min(len(relevant), k))))


def measure(
    find: Callable[[str, int], Codes | Sequence[int]], queries: Sequence[ItemQuery], k: int, seed: int = 0
) -> dict[str, Any]:
    """Measures a search.

    Args:
        find: Returns the codes of the best items for a text, best first; called with the text and `k`.
        queries: The queries.
        k: Ranks that count.
        seed: Seed of the bootstrap over queries.

    Returns:
        ``queries``, and recall and nDCG at `k` with their 95% intervals.
    """
    orders = [[int(code) for code in find(query.text, k)] for query in queries]
    pairs = list(zip(orders, queries, strict=True))
    return {
        "queries": len(queries),
        **_with_interval(f"recall@{k}", np.array([recall(order, query.relevant, k) for order, query in pairs]), seed),
        **_with_interval(f"ndcg@{k}", np.array([ndcg(order, query.relevant, k) for order, query in pairs]), seed),
    }


def _with_interval(name: str, values: NDArray[np.float64], seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(values, seed)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
