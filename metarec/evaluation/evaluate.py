"""Evaluation of scorers on episodes: every method at every K becomes values of each user, in a `Report`.

All methods and all K share the same users and the same query of each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from metarec.data.episodes import Episode
from metarec.data.interactions import Catalog, Flags
from metarec.data.task import Task
from metarec.data.user_groups import UserGroups, user_groups
from metarec.errors import EvaluationError
from metarec.evaluation.calibration import Calibration, fit_calibration
from metarec.evaluation.metric_names import (
    CALIBRATED,
    ERRORS,
    GROUPED,
    METRICS,
    POOLED,
    RECBOLE,
    asks_lists,
    needs_calibration,
    of_the_query,
)
from metarec.evaluation.metrics import at_cutoff, auc, check_scores, log_loss, recbole_ndcg
from metarec.evaluation.recommended_lists import CatalogFacts, catalog_facts, measure_lists
from metarec.evaluation.report import Report
from metarec.meta.distributed import ALONE, Ranks
from metarec.scorer import OwnLikeShare, Scorer, request

if TYPE_CHECKING:
    import pandas as pd

    from metarec.data.task_data import TaskData


def evaluate_on(
    data: TaskData,
    scorers: Sequence[Scorer],
    episodes: Sequence[Episode],
    *,
    seed: int,
    baseline: str,
    left_out: Mapping[str, int],
    metrics: Sequence[str] = (),
    calibrated: Mapping[tuple[str, int], Calibration] | None = None,
) -> Report:
    """Scores episodes of a task as the task says; see `evaluate`.

    Args:
        data: The task's data.
        scorers: The methods.
        episodes: The users.
        seed: Seed of tie-breaking and bootstrap.
        baseline: Name of the scorer that paired differences are taken to.
        left_out: Users already left out, by reason.
        metrics: What is measured beside the task's own metrics.
        calibrated: Lines from scores to ratings that are there already, by method and K.
    """
    task, metrics = data.task, tuple(dict.fromkeys((*data.task.metrics, *metrics)))
    grouped = [metric.removeprefix(GROUPED) for metric in metrics if metric.startswith(GROUPED)]
    return evaluate(
        scorers,
        episodes,
        task.shots,
        data.interactions.catalog,
        threshold=task.like_threshold,
        seed=seed,
        baseline=baseline,
        left_out=left_out,
        metrics=metrics,
        calibration=data.episodes("validation")[0] if needs_calibration(metrics) else (),
        calibrated=calibrated,
        short_supports=task.short_supports,
        hashes=data.hashes,
        facts=catalog_facts(data) if asks_lists(metrics) else None,
        groups={name: user_groups(name, data, episodes) for name in grouped},
    )


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
    facts: CatalogFacts | None = None,
    groups: Mapping[str, UserGroups] | None = None,
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
            rating's units; they, ``recbole-*``, metrics of a table, of probabilities and of recommended lists are
            defined for users of one class too.
        calibration: Validation users, on whom the line from score to rating, or to the probability of a like, is
            fitted that the metrics `metarec.evaluation.metric_names.CALIBRATED` need.
        calibrated: Lines that are there already, by method and K.
        short_supports: Users with fewer than K ratings are evaluated with all of theirs.
        hashes: Content hashes that the report carries.
        facts: The catalog, which metrics of recommended lists need.
        groups: Groups of the users, which metrics ``auc_by_*`` need.

    Raises:
        EvaluationError: A scorer returns something that cannot be ranked, no user has both classes, a support is
            smaller than K, the baseline is not among the scorers, or something that a metric needs is missing.
    """
    if not episodes:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in left_out.items())
        raise EvaluationError(f"there is no user to evaluate{f': {reasons}' if reasons else ''}", "Give episodes")
    metrics = tuple(dict.fromkeys((*METRICS, *metrics)))
    _check_request(scorers, baseline, metrics, calibration, facts, groups or {})
    import pandas as pd

    queries = [_LabelledEpisode.of(episode, catalog, threshold) for episode in episodes]
    lists = asks_lists(metrics)
    whole = bool(set(metrics) & {POOLED, *CALIBRATED, *lists, *_names(metrics, RECBOLE)})
    both = _with_both_classes(queries, together=POOLED in metrics)
    kept = queries if whole else both
    if not short_supports and max(shots) > min(len(query.episode.support) for query in kept):
        raise EvaluationError(f"K = {max(shots)} asks for more ratings than some support has")
    one_class = len(episodes) - len(both)

    def line(scorer: Scorer, count: int) -> Calibration | None:
        if not needs_calibration(metrics):
            return None
        known = (calibrated or {}).get((scorer.name, count))
        return known or fit_calibration(scorer, calibration, count, threshold)

    by_user = of_the_query(metrics)
    measured = []
    for scorer, count in product(scorers, shots):
        cell = _measure_at(scorer, count, kept, by_user, line(scorer, count), seed)
        if lists and facts is not None:
            whole_lists = measure_lists(lists, scorer, [query.episode for query in kept], count, facts, seed)
            cell = cell.with_lists(*whole_lists)
        measured.append(cell)
    return Report(
        per_user=_per_user(measured, by_user, groups or {}),
        costs=pd.DataFrame([cell.cost for cell in measured]),
        predictions=pd.concat([part for cell in measured for part in cell.predictions], ignore_index=True),
        baseline=baseline,
        seed=seed,
        left_out={**left_out, **({"query of one class": one_class} if one_class else {})},
        metrics=_with_groups(metrics, groups or {}),
        hashes=hashes or {},
    )


def _per_user(measured: Sequence[_Measured], metrics: Sequence[str], groups: Mapping[str, UserGroups]) -> pd.DataFrame:
    """Returns the rows of all users, with a column for each grouping of users."""
    import pandas as pd

    rows = pd.DataFrame([row for cell in measured for row in cell.rows]).astype(dict.fromkeys(metrics, float))
    return rows.assign(**{f"{GROUPED}{name}": rows["user"].map(found.of_user) for name, found in groups.items()})


def _with_groups(metrics: Sequence[str], groups: Mapping[str, UserGroups]) -> tuple[str, ...]:
    """Returns metrics with one for every group of users, ``auc_by_activity:few``, in place of the grouping's."""
    labels = {f"{GROUPED}{name}": found.labels for name, found in groups.items()}
    return tuple(
        one for metric in metrics for one in ([f"{metric}:{label}" for label in labels.get(metric, ())] or [metric])
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
    scorers: Sequence[Scorer],
    baseline: str,
    metrics: Sequence[str],
    calibration: Sequence[Episode],
    facts: CatalogFacts | None,
    groups: Mapping[str, UserGroups],
) -> None:
    names = [scorer.name for scorer in scorers]
    if len(set(names)) != len(names) or baseline not in names:
        raise EvaluationError(f"scorers are named {names}, the baseline '{baseline}'")
    if needs_calibration(metrics) and not calibration:
        named = " and ".join(metric for metric in metrics if metric in CALIBRATED)
        raise EvaluationError(f"{named} need validation users", "Scores become ratings and probabilities on them")
    if (lists := asks_lists(metrics)) and facts is None:
        raise EvaluationError(f"{lists[0]} needs the facts of the catalog", "Call evaluate_on(data, ...)")
    for metric in metrics:
        if metric.startswith(GROUPED) and metric.removeprefix(GROUPED) not in groups:
            raise EvaluationError(f"{metric} needs groups of users", "Call evaluate_on(data, ...)")


@dataclass(frozen=True)
class _Measured:
    """One method at one K: a row of metrics per user, the row of costs, and every user's predictions."""

    rows: list[dict[str, Any]]
    cost: dict[str, Any]
    predictions: list[pd.DataFrame]

    def with_lists(self, by_user: Mapping[str, NDArray[np.float64]], together: Mapping[str, float]) -> _Measured:
        """Returns the cell with metrics of recommended lists: of each user, and of all in the row of costs."""
        rows = [
            {**row, **{metric: float(values[place]) for metric, values in by_user.items()}}
            for place, row in enumerate(self.rows)
        ]
        return replace(self, rows=rows, cost={**self.cost, **together})


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
        given = episode.support.head(shots).values
        error = None if line is None else line.ratings(given, values) - episode.query.values
        chance = None if line is None else line.probabilities(given, values)
        predictions.append(_predictions(scorer.name, shots, query, values, chance))
        found = {metric: _measure(metric, values, query, error, chance, seed) for metric in metrics}
        rows.append({"method": scorer.name, "shots": shots, "user": episode.user, **found})
    return _Measured(rows, cost, predictions)


def _predictions(
    method: str,
    shots: int,
    query: _LabelledEpisode,
    scores: NDArray[np.floating],
    chance: NDArray[np.floating] | None,
) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(
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
    return table if chance is None else table.assign(chance=chance.astype(np.float32))


def _names(metrics: Sequence[str], measures: Sequence[str]) -> set[str]:
    return {metric for metric in metrics if metric.partition("@")[0] in measures}


def _measure(
    metric: str,
    scores: NDArray[np.floating],
    query: _LabelledEpisode,
    error: NDArray[np.floating] | None,
    chance: NDArray[np.floating] | None,
    seed: int,
) -> float | None:
    """Returns one metric of one user; None where it is not defined."""
    measure, _, cutoff = metric.partition("@")
    if metric == "auc":
        return auc(scores, query.liked)
    if error is not None and metric in ERRORS:
        return float(np.abs(error).mean() if metric == "mae" else np.sqrt((error**2).mean()))
    if chance is not None and metric == "log_loss":
        return log_loss(chance, query.liked)
    if chance is not None and metric == "accuracy":
        return float(((chance >= 0.5) == query.liked).mean())
    if measure in RECBOLE:
        clicks = measure != RECBOLE[0]
        relevance = query.liked.astype(np.float32) if clicks else query.episode.query.values
        return recbole_ndcg(scores, relevance, int(cutoff), clicks=clicks)
    return at_cutoff(measure, scores, query.liked, query.items, int(cutoff), seed)
