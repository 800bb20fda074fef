"""Evaluation of scorers on episodes: every method at every K becomes values of each user, in a `Report`.

All methods and all K share the same users and the same query of each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from metarec.calibration import Calibration, fit_calibration
from metarec.data.episodes import Episode
from metarec.data.interactions import Catalog, Flags
from metarec.data.task import Task
from metarec.errors import EvaluationError
from metarec.meta.distributed import ALONE, Ranks
from metarec.metrics import (
    ERRORS,
    METRICS,
    OF_A_TABLE,
    POOLED,
    RECBOLE,
    at_cutoff,
    auc,
    check_scores,
    recbole_ndcg,
)
from metarec.report import Report
from metarec.scorer import OwnLikeShare, Scorer, request

if TYPE_CHECKING:
    import pandas as pd


def evaluate(
    scorers: Sequence[Scorer],
    episodes: Sequence[Episode],
    shots: Sequence[int],
    catalog: Catalog,
    *,
    threshold: float,
    seed: int,
    baseline: str,
    left_out: Mapping[str, int],
    metrics: Sequence[str] = METRICS,
    calibration: Sequence[Episode] = (),
    calibrated: Mapping[tuple[str, int], Calibration] | None = None,
    short_supports: bool = False,
    hashes: Mapping[str, str] | None = None,
) -> Report:
    """Scores every episode's query with every method at every K.

    Args:
        scorers: The methods; their names are distinct.
        episodes: The users.
        shots: The support sizes K; a support is the first K ratings of the episode's.
        catalog: For item ids, which break ties.
        threshold: Ratings from here on are likes, in episodes that carry no labels.
        seed: Seed of tie-breaking and bootstrap.
        baseline: Name of the scorer that paired differences are taken to.
        left_out: Users already left out, by reason; those whose query holds one class only are added.
        metrics: What is measured; `METRICS` always come first. ``mae`` and ``rmse`` are a user's mean error, in the
            rating's units; they, ``recbole-*`` and metrics of a table are defined for users of one class too.
        calibration: Validation users, on whom the line from score to rating is fitted that ``mae`` and ``rmse`` need.
        calibrated: Lines that are there already, by method and K.
        short_supports: Users with fewer than K ratings are evaluated with all of theirs.
        hashes: Content hashes that the report carries.

    Raises:
        EvaluationError: A scorer returns something that cannot be ranked, no user has both classes, a support is
            smaller than K, the baseline is not among the scorers, or errors are asked for without validation users.
    """
    if not episodes:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in left_out.items())
        raise EvaluationError(f"there is no user to evaluate{f': {reasons}' if reasons else ''}", "Give episodes")
    metrics = tuple(dict.fromkeys((*METRICS, *metrics)))
    _check_request(scorers, baseline, metrics, calibration)
    queries = [_LabelledEpisode.of(episode, catalog, threshold) for episode in episodes]
    whole = bool(set(metrics) & {POOLED, *ERRORS, *_names(metrics, RECBOLE)})
    both = _with_both_classes(queries, together=POOLED in metrics)
    kept = queries if whole else both
    if not short_supports and max(shots) > min(len(query.episode.support) for query in kept):
        raise EvaluationError(f"K = {max(shots)} asks for more ratings than some support has")
    one_class = len(episodes) - len(both)
    by_user = [metric for metric in metrics if metric not in OF_A_TABLE]

    def line(scorer: Scorer, count: int) -> Calibration | None:
        if not set(metrics) & set(ERRORS):
            return None
        known = (calibrated or {}).get((scorer.name, count))
        return known or fit_calibration(scorer, calibration, count, threshold)

    measured = [
        _measure_at(scorer, count, kept, by_user, line(scorer, count), seed) for scorer in scorers for count in shots
    ]
    import pandas as pd

    return Report(
        per_user=pd.DataFrame([row for cell in measured for row in cell.rows]).astype(dict.fromkeys(by_user, float)),
        costs=pd.DataFrame([cell.cost for cell in measured]),
        predictions=pd.concat([part for cell in measured for part in cell.predictions], ignore_index=True),
        baseline=baseline,
        seed=seed,
        left_out={**left_out, **({"query of one class": one_class} if one_class else {})},
        metrics=metrics,
        hashes=hashes or {},
    )


def beside_pooled(task: Task, catalog: Catalog) -> list[Scorer]:
    """Returns the row that belongs beside a task's pooled AUC, each user's own share of likes; none without it."""
    return [OwnLikeShare(len(catalog), task.like_threshold)] if POOLED in task.metrics else []


def validation_auc(
    scorer: Scorer, episodes: Sequence[Episode], shots: Sequence[int], threshold: float, ranks: Ranks = ALONE
) -> float:
    """Returns a scorer's mean AUC over users with both classes, averaged over some K.

    Where no user has both, as with queries of one item, it is the AUC of all users' items together.

    Args:
        scorer: The method.
        episodes: The validation users; those with fewer than K ratings are evaluated with all of theirs.
        shots: The support sizes K.
        threshold: Ratings from here on are likes, in episodes that carry no labels.
        ranks: The processes that score a share of the users each.

    Raises:
        EvaluationError: A score is not finite, or all labels are the same.
    """
    queries = [_LabelledEpisode.of(episode, None, threshold) for episode in episodes]
    both = _with_both_classes(queries, together=True)
    kept = both or queries
    means = []
    for count in shots:
        own = [request(query.episode, count) for query in ranks.share(kept)]
        scored = ranks.collect(scorer.score(own) if own else [], [len(query.liked) for query in kept])
        values: list[tuple[str, float | None]] = []
        if not both:
            everything = np.concatenate([scores.detach().numpy() for scores in scored])
            check_scores(everything, f"method '{scorer.name}', K = {count}")
            means.append(auc(everything, np.concatenate([query.liked for query in kept])) or 0.0)
            continue
        for query, scores in zip(kept, scored, strict=True):
            found = scores.detach().numpy()
            check_scores(found, f"method '{scorer.name}', K = {count}")
            values.append((query.episode.user, auc(found, query.liked)))
        # In the order of user ids, as in a report: a sum depends on its order in the last bit.
        means.append(np.array([value for _, value in sorted(values)], np.float64).mean())
    return float(np.mean(means))


@dataclass(frozen=True)
class _LabelledEpisode:
    """An episode, whether each item of its query is a like, and the items' ids where they are needed."""

    episode: Episode
    liked: Flags
    items: Sequence[str]

    @classmethod
    def of(cls, episode: Episode, catalog: Catalog | None, threshold: float) -> _LabelledEpisode:
        items = [] if catalog is None else [catalog.ids[code] for code in episode.query.items]
        return cls(episode, episode.query.likes(threshold), items)


def _with_both_classes(queries: Sequence[_LabelledEpisode], *, together: bool = False) -> list[_LabelledEpisode]:
    """Returns the queries with likes and others; there may be none where all queries together hold both."""
    both = [query for query in queries if 0 < query.liked.sum() < len(query.liked)]
    classes = {bool(liked) for query in queries for liked in query.liked}
    if not both and not (together and len(classes) == 2):
        liking = sum(bool(query.liked.all()) for query in queries)
        raise EvaluationError(
            f"none of {len(queries)} users both likes and dislikes something in the query: {liking} like all of it, "
            f"{len(queries) - liking} nothing",
            "Raise query.max or change the task's 'label'; of queries of one item, measure metrics: [pooled_auc]",
        )
    return both


def _check_request(
    scorers: Sequence[Scorer], baseline: str, metrics: Sequence[str], calibration: Sequence[Episode]
) -> None:
    names = [scorer.name for scorer in scorers]
    if len(set(names)) != len(names) or baseline not in names:
        raise EvaluationError(f"scorers are named {names}, the baseline '{baseline}'")
    if set(metrics) & set(ERRORS) and not calibration:
        raise EvaluationError("mae and rmse need validation users", "Scores become ratings on them")


@dataclass(frozen=True)
class _Measured:
    """One method at one K: a row of metrics per user, the row of costs, and every user's predictions."""

    rows: list[dict[str, Any]]
    cost: dict[str, Any]
    predictions: list[pd.DataFrame]


def _measure_at(
    scorer: Scorer,
    shots: int,
    queries: Sequence[_LabelledEpisode],
    metrics: Sequence[str],
    line: Calibration | None,
    seed: int,
) -> _Measured:
    """Scores all queries with one method at one K, and measures each."""
    requests = [request(query.episode, shots) for query in queries]
    started = time.perf_counter()
    scored = scorer.score(requests)
    seconds = (time.perf_counter() - started) / len(requests)
    cost = {
        "method": scorer.name,
        "shots": shots,
        "seconds_per_user": seconds,
        "bytes_per_user": scorer.bytes_per_user if shots else 0,
    }
    rows, predictions = [], []
    for query, scores in zip(queries, scored, strict=True):
        episode, values = query.episode, scores.detach().numpy()
        check_scores(values, f"method '{scorer.name}', K = {shots}")
        predictions.append(_predictions(scorer.name, shots, query, values))
        given = episode.support.head(shots).values
        error = None if line is None else line.ratings(given, values) - episode.query.values
        found = {metric: _measure(metric, values, query, error, seed) for metric in metrics}
        rows.append({"method": scorer.name, "shots": shots, "user": episode.user, **found})
    return _Measured(rows, cost, predictions)


def _predictions(method: str, shots: int, query: _LabelledEpisode, scores: NDArray[np.floating]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {
            "method": method,
            "shots": shots,
            "user": query.episode.user,
            "item": query.items,
            "rating": query.episode.query.values,
            "liked": query.liked,
            "score": scores.astype(np.float32),
        }
    )


def _names(metrics: Sequence[str], measures: Sequence[str]) -> set[str]:
    return {metric for metric in metrics if metric.partition("@")[0] in measures}


def _measure(
    metric: str,
    scores: NDArray[np.floating],
    query: _LabelledEpisode,
    error: NDArray[np.floating] | None,
    seed: int,
) -> float | None:
    """Returns one metric of one user; None where it is not defined."""
    measure, _, cutoff = metric.partition("@")
    if metric == "auc":
        return auc(scores, query.liked)
    if error is not None and metric in ERRORS:
        return float(np.abs(error).mean() if metric == "mae" else np.sqrt((error**2).mean()))
    if measure in RECBOLE:
        clicks = measure != RECBOLE[0]
        relevance = query.liked.astype(np.float32) if clicks else query.episode.query.values
        return recbole_ndcg(scores, relevance, int(cutoff), clicks=clicks)
    return at_cutoff(measure, scores, query.liked, query.items, int(cutoff), seed)
