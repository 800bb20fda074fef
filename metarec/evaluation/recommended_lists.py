"""Metrics of what a method recommends out of the whole catalog: coverage, diversity, novelty, popularity bias.

Metrics of a query ask about items that the user rated. These rank all items that the user has not rated in the support.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from metarec.data.episodes import Episode
from metarec.data.interactions import Catalog, Codes
from metarec.data.item_fields import choose_fields, tokens_in
from metarec.data.titles import words
from metarec.evaluation.metric_names import LIST_OF_A_USER
from metarec.evaluation.metrics import check_scores, rank_order
from metarec.scorer import Scorer, request

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData

# Users whose whole catalog is scored at once.
_USERS_AT_ONCE = 8
_NORMAL_95 = 1.96
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CatalogFacts:
    """What the metrics know of items, the same for every method.

    Args:
        raters: How many meta-training users rated each item, shape (items,).
        users: How many meta-training users there are.
        vectors: Rows of length one of what items are, a sparse matrix of shape (items, tokens).
        ids: The items' ids, which break ties.
    """

    raters: NDArray[np.int64]
    users: int
    vectors: Any
    ids: Sequence[str]


def catalog_facts(data: TaskData) -> CatalogFacts:
    """Returns the facts of a task's catalog; ratings of validation and test users count nowhere."""
    seen, catalog = data.interactions, data.interactions.catalog
    trained = np.isin(seen.user, data.parts["train"])
    pairs = np.unique(seen.user[trained] * len(catalog) + seen.item[trained])
    raters = np.bincount(pairs % len(catalog), minlength=len(catalog))
    return CatalogFacts(raters, len(data.parts["train"]), token_vectors(catalog), catalog.ids)


def token_vectors(catalog: Catalog) -> Any:
    """Returns sparse vectors of length one of the items' categories; where no field holds any, of all words.

    Args:
        catalog: The items. Categories are those of `metarec.data.item_fields.choose_fields`, e.g. genres.

    Returns:
        A matrix of shape (items, tokens); an item without a token has a row of zeros.
    """
    from scipy import sparse

    read = choose_fields(catalog).read
    named = [name for name, kind in read.items() if kind == "category"]
    columns = [tokens_in(catalog.fields[name]) for name in named]
    if not columns:
        named = list(catalog.fields)
        columns = [[set(words(text)) for text in column] for column in catalog.fields.values()]
    place: dict[tuple[str, str], int] = {}
    rows, at = [], []
    for name, column in zip(named, columns, strict=True):
        for code, tokens in enumerate(column):
            for token in sorted(tokens):
                rows.append(code)
                at.append(place.setdefault((name, token), len(place)))
    shape = (len(catalog), max(len(place), 1))
    found = sparse.csr_matrix((np.ones(len(rows)), (rows, at)), shape)
    lengths = np.sqrt(np.asarray(found.sum(1)).ravel())
    return sparse.diags(np.divide(1, lengths, out=np.zeros(len(lengths)), where=lengths > 0)) @ found


def best_lists(
    scorer: Scorer, episodes: Sequence[Episode], shots: int, cutoff: int, facts: CatalogFacts, seed: int
) -> NDArray[np.int64]:
    """Returns each user's best items, best first, shape (users, cutoff).

    Args:
        scorer: The method; it scores the whole catalog for every user.
        episodes: The users.
        shots: K; the first K ratings of a support are given, and their items are not recommended.
        cutoff: How many items; a catalog with fewer gives shorter lists.
        facts: The catalog.
        seed: Another seed breaks ties in another order.

    Raises:
        EvaluationError: A score is not finite.
    """
    everything = np.arange(len(facts.ids))
    tie = np.empty(len(facts.ids), np.int64)
    tie[rank_order(np.zeros(len(facts.ids)), facts.ids, seed)] = everything
    most = max((len(episode.support.head(shots)) for episode in episodes), default=0)
    count = min(cutoff, len(facts.ids) - most)
    lists = []
    for start in range(0, len(episodes), _USERS_AT_ONCE):
        asked = [request(episode, shots) for episode in episodes[start : start + _USERS_AT_ONCE]]
        unrated = [np.setdiff1d(everything, one.support.items) for one in asked]
        whole = [one.instead(codes) for one, codes in zip(asked, unrated, strict=True)]
        for codes, found in zip(unrated, scorer.score(whole), strict=True):
            scores = found.detach().numpy()
            check_scores(scores, f"method '{scorer.name}', K = {shots}, whole catalog")
            lists.append(codes[np.lexsort((tie[codes], -scores.astype(np.float64)))[:count]])
    return np.array(lists, np.int64).reshape(len(lists), count)


def diversity(lists: NDArray[np.int64], vectors: Any) -> Floats:
    """Returns each list's mean distance between two of its items, one minus the cosine, shape (users,).

    Source: Ziegler et al. 2005, "Improving recommendation lists through topic diversification", eq. 6, as a distance.
    """
    length = lists.shape[1]
    if length < 2:
        return np.zeros(len(lists))
    found = []
    for codes in lists:
        rows = vectors[codes]
        own = np.asarray(rows.multiply(rows).sum() if hasattr(rows, "multiply") else (rows * rows).sum())
        total = np.asarray(rows.sum(0)).ravel()
        found.append(1 - (total @ total - float(own)) / (length * (length - 1)))
    return np.array(found)


def novelty(lists: NDArray[np.int64], raters: NDArray[np.int64], users: int) -> Floats:
    """Returns each list's mean self-information in bits, shape (users,): an item that half the users rated has one.

    Counts are smoothed by one, so that an item that nobody rated has log2(users + 1) bits.

    Source: Zhou et al. 2010, "Solving the apparent diversity-accuracy dilemma of recommender systems".
    """
    bits: Floats = -np.log2((raters + 1) / (users + 1))
    found: Floats = bits[lists].mean(1)
    return found


def popularity(lists: NDArray[np.int64], raters: NDArray[np.int64]) -> Floats:
    """Returns how many times as many raters a list's items have as the catalog's on average, shape (users,).

    Source: Abdollahpouri et al. 2019, "Managing popularity bias in recommender systems", ARP, by the catalog's mean.
    """
    times: Floats = raters[lists].mean(1) / max(raters.mean(), 1e-12)
    return times


def coverage(counts: NDArray[np.int64]) -> float:
    """Returns the share of the catalog that is recommended to anybody.

    Args:
        counts: How many users each item is recommended to, shape (items,).
    """
    return float((counts > 0).mean())


def gini(counts: NDArray[np.int64]) -> float:
    """Returns the Gini coefficient of how often items are recommended: 0 all alike, near 1 always the same few.

    Args:
        counts: How many users each item is recommended to, shape (items,).

    Source: Gini 1912; of recommendations, Fleder and Hosanagar 2009, "Blockbuster culture's next rise or fall".
    """
    ordered, total = np.sort(counts).astype(np.float64), counts.sum()
    if total == 0:
        return 0.0
    ranks = np.arange(1, len(ordered) + 1)
    return float((2 * ranks - len(ordered) - 1) @ ordered / (len(ordered) * total))


_TOGETHER = {"coverage": coverage, "gini": gini}


def of_all_users(measure: str, lists: NDArray[np.int64], items: int) -> tuple[float, tuple[float, float]]:
    """Returns ``coverage`` or ``gini`` over all users' lists, and its 95% interval by the jackknife.

    Users who are drawn twice cover nothing new, so a bootstrap would be biased.

    Source: Efron and Tibshirani 1993, "An introduction to the bootstrap", eq. 11.5.
    """
    value, counts = _TOGETHER[measure], np.bincount(lists.ravel(), minlength=items)
    whole = value(counts)
    if len(lists) < 2:
        return whole, (whole, whole)
    without = []
    for codes in lists:
        counts[codes] -= 1
        without.append(value(counts))
        counts[codes] += 1
    left = np.array(without)
    error = np.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum())
    return whole, (float(whole - _NORMAL_95 * error), float(whole + _NORMAL_95 * error))


def measure_lists(
    metrics: Sequence[str],
    scorer: Scorer,
    episodes: Sequence[Episode],
    shots: int,
    facts: CatalogFacts,
    seed: int,
) -> tuple[dict[str, Floats], dict[str, float]]:
    """Measures what a method recommends at one K.

    Args:
        metrics: Names with a cutoff, e.g. ``diversity@10``.
        scorer: The method.
        episodes: The users.
        shots: K.
        facts: The catalog.
        seed: Seed of tie-breaking.

    Returns:
        The metrics of a user, each of shape (users,); and those of all users, each with its ``_low`` and ``_high``.
    """
    by_user: dict[str, Floats] = {}
    together: dict[str, float] = {}
    split = [(metric, *metric.partition("@")[::2]) for metric in metrics]
    longest: Codes = best_lists(scorer, episodes, shots, max(int(cutoff) for *_, cutoff in split), facts, seed)
    for metric, measure, cutoff in split:
        lists = longest[:, : int(cutoff)]
        if measure in LIST_OF_A_USER:
            by_user[metric] = {
                "diversity": lambda lists: diversity(lists, facts.vectors),
                "novelty": lambda lists: novelty(lists, facts.raters, facts.users),
                "popularity": lambda lists: popularity(lists, facts.raters),
            }[measure](lists)
        else:
            together[metric], (low, high) = of_all_users(measure, lists, len(facts.ids))
            together |= {f"{metric}_low": low, f"{metric}_high": high}
    return by_user, together
