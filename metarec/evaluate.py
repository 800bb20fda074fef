"""Scorers meet episodes: per-user values first, and every mean, interval and paired difference from them.

All methods and all K share the same users and the same query of each. Knows nothing of how a scorer was made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from metarec.artifacts import SCHEMA_VERSION
from metarec.data.episodes import Episode
from metarec.data.interactions import Catalog, Flags, Ratings
from metarec.errors import EvaluationError
from metarec.metrics import ERRORS, METRICS, RECBOLE, at_cutoff, auc, bootstrap_interval, check_scores, recbole_ndcg
from metarec.scorer import Request, Scorer

# The row that gains are measured from, in every table.
BASELINE = "item mean"
# How many ratings the mean residual of a support counts as, when scores are turned into ratings.
_LEVEL_STRENGTH = 1.0


@dataclass(frozen=True)
class ShotSummary:
    """One method at one K, summarized.

    Args:
        method: The scorer's name.
        shots: K.
        users: How many users the means are over.
        means: Mean of each metric over users.
        gain: Mean paired difference in AUC to the baseline.
        interval: 95% paired bootstrap interval of `gain`.
        seconds_per_user: Wall-clock time of scoring, adaptation included.
        bytes_per_user: What has to be kept for a user between two requests.
    """

    method: str
    shots: int
    users: int
    means: Mapping[str, float]
    gain: float
    interval: tuple[float, float]
    seconds_per_user: float
    bytes_per_user: int


@dataclass(frozen=True)
class Report:
    """What an evaluation measured.

    Args:
        per_user: One row per method, K and user: columns ``method``, ``shots``, ``user`` and the metrics.
        costs: One row per method and K: columns ``method``, ``shots``, ``seconds_per_user``, ``bytes_per_user``.
        predictions: One row per method, K, user and candidate: columns ``method``, ``shots``, ``user``, ``item``,
            ``rating``, ``liked`` and ``score``.
        baseline: The method that paired differences are taken to.
        seed: Seed of tie-breaking and bootstrap.
        left_out: How many users were left out, by reason.
        metrics: The metrics there are, the first of which differences and intervals are taken of.
        hashes: Content hashes of what was evaluated on: data, split, prompt.
        people: Whose episode each user is, where one person has several, as over split seeds; empty: each their own.
    """

    per_user: pd.DataFrame
    costs: pd.DataFrame
    predictions: pd.DataFrame
    baseline: str
    seed: int
    left_out: Mapping[str, int]
    metrics: tuple[str, ...] = METRICS
    hashes: Mapping[str, str] = field(default_factory=dict)
    people: Mapping[str, str] = field(default_factory=dict)

    def values(self, method: str, shots: int, metric: str = "auc") -> pd.Series:
        """Returns a metric by user, sorted by user id; users for whom it is not defined are left out."""
        rows = self.per_user[(self.per_user["method"] == method) & (self.per_user["shots"] == shots)]
        return rows.set_index("user")[metric].dropna().sort_index()

    def difference(
        self, method: str, shots: int, other: str, other_shots: int, metric: str = "auc"
    ) -> tuple[float, tuple[float, float]]:
        """Returns the mean paired difference between two cells and its 95% bootstrap interval over people."""
        paired = self.paired(method, shots, other, other_shots, metric)
        people = [self.people.get(user, user) for user in paired.index]
        return float(paired.mean()), bootstrap_interval(paired.to_numpy(), self.seed, people)

    def paired(self, method: str, shots: int, other: str, other_shots: int, metric: str = "auc") -> pd.Series:
        """Returns the difference between two cells by user, of the users that both have."""
        return (self.values(method, shots, metric) - self.values(other, other_shots, metric)).dropna()

    def cells(self) -> Iterator[ShotSummary]:
        """Summarizes method by method, K by K, in the order they were evaluated in."""
        for row in self.costs.to_dict("records"):
            method, shots = str(row["method"]), int(row["shots"])
            gain, interval = self.difference(method, shots, self.baseline, shots)
            means = {metric: float(self.values(method, shots, metric).mean()) for metric in self.metrics}
            yield ShotSummary(
                method=method,
                shots=shots,
                users=len(self.values(method, shots)),
                means=means,
                gain=gain,
                interval=interval,
                seconds_per_user=float(row["seconds_per_user"]),
                bytes_per_user=int(row["bytes_per_user"]),
            )

    def to_json(self) -> dict[str, Any]:
        """Returns the table as plain JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "baseline": self.baseline,
            "seed": self.seed,
            "left_out": dict(self.left_out),
            "hashes": dict(self.hashes),
            "rows": [
                {
                    "method": cell.method,
                    "shots": cell.shots,
                    "users": cell.users,
                    **cell.means,
                    "auc_gain": cell.gain,
                    "auc_gain_low": cell.interval[0],
                    "auc_gain_high": cell.interval[1],
                    "seconds_per_user": cell.seconds_per_user,
                    "bytes_per_user": cell.bytes_per_user,
                }
                for cell in self.cells()
            ],
        }


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
    short_supports: bool = False,
    hashes: Mapping[str, str] | None = None,
) -> Report:
    """Scores every episode's query with every method at every K.

    Args:
        scorers: The methods; their names are distinct.
        episodes: The users.
        shots: The support sizes K; each support is the first K ratings of the episode's.
        catalog: For item ids, which break ties.
        threshold: Ratings from here on are likes, in episodes that carry no labels.
        seed: Seed of tie-breaking and bootstrap.
        baseline: Name of the scorer that paired differences are taken to.
        left_out: Users already left out, by reason; those whose query holds one class only are added.
        metrics: What is measured; `METRICS` come first in any case. ``mae`` and ``rmse`` are a user's mean error, in
            the rating's units; they and ``recbole-*`` are defined for users of one class too.
        calibration: Validation users, on whom the line from score to rating is fitted that ``mae`` and ``rmse`` need.
        short_supports: Users with fewer than K ratings give what they have.
        hashes: Content hashes that the report carries.

    Raises:
        EvaluationError: A scorer returns something that cannot be ranked, no user has both classes, a support is
            smaller than K, the baseline is not among the scorers, or errors are asked for without validation users.
    """
    names = [scorer.name for scorer in scorers]
    if len(set(names)) != len(names) or baseline not in names:
        raise EvaluationError(f"scorers are named {names}, the baseline '{baseline}'")
    metrics = tuple(dict.fromkeys((*METRICS, *metrics)))
    if set(metrics) & set(ERRORS) and not calibration:
        raise EvaluationError("mae and rmse need validation users", "Scores become ratings on them")
    labels = {episode.user: episode.query.likes(threshold) for episode in episodes}
    both = [episode for episode in episodes if 0 < labels[episode.user].sum() < len(episode.query)]
    kept = list(episodes) if set(metrics) & {*ERRORS, *_names(metrics, RECBOLE)} else both
    if not both:
        raise EvaluationError(f"none of {len(episodes)} users both likes and dislikes something in the query")
    if not short_supports and max(shots) > min(len(episode.support) for episode in kept):
        raise EvaluationError(f"K = {max(shots)} asks for more ratings than some support has")
    one_class = len(episodes) - len(both)
    rows: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    predictions: list[pd.DataFrame] = []
    for scorer in scorers:
        for count in shots:
            requests = [request(episode, count) for episode in kept]
            started = time.perf_counter()
            scored = scorer.score(requests)
            seconds = (time.perf_counter() - started) / len(requests)
            costs.append(
                {
                    "method": scorer.name,
                    "shots": count,
                    "seconds_per_user": seconds,
                    "bytes_per_user": scorer.bytes_per_user if count else 0,
                }
            )
            to_rating = _line(scorer, calibration, count) if set(metrics) & set(ERRORS) else None
            for episode, scores in zip(kept, scored, strict=True):
                values = scores.detach().numpy()
                check_scores(values, f"method '{scorer.name}', K = {count}")
                items = [catalog.ids[code] for code in episode.query.items]
                liked = labels[episode.user]
                predictions.append(_predictions(scorer.name, count, episode, items, liked, values))
                error = None if to_rating is None else to_rating(episode, values) - episode.query.values
                measured = {
                    metric: _measure(metric, values, episode.query, liked, items, error, seed) for metric in metrics
                }
                rows.append({"method": scorer.name, "shots": count, "user": episode.user, **measured})
    return Report(
        per_user=pd.DataFrame(rows).astype(dict.fromkeys(metrics, float)),
        costs=pd.DataFrame(costs),
        predictions=pd.concat(predictions, ignore_index=True),
        baseline=baseline,
        seed=seed,
        left_out={**left_out, **({"query of one class": one_class} if one_class else {})},
        metrics=metrics,
        hashes=hashes or {},
    )


def _predictions(
    method: str, shots: int, episode: Episode, items: Sequence[str], liked: Flags, scores: NDArray[np.floating]
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "method": method,
            "shots": shots,
            "user": episode.user,
            "item": items,
            "rating": episode.query.values,
            "liked": liked,
            "score": scores.astype(np.float32),
        }
    )


def _names(metrics: Sequence[str], measures: Sequence[str]) -> set[str]:
    return {metric for metric in metrics if metric.partition("@")[0] in measures}


def _measure(
    metric: str,
    scores: NDArray[np.floating],
    query: Ratings,
    liked: Flags,
    items: Sequence[str],
    error: NDArray[np.floating] | None,
    seed: int,
) -> float | None:
    measure, _, cutoff = metric.partition("@")
    if metric == "auc":
        return auc(scores, liked)
    if error is not None and metric in ERRORS:
        return float(np.abs(error).mean() if metric == "mae" else np.sqrt((error**2).mean()))
    if measure in RECBOLE:
        clicks = measure != RECBOLE[0]
        return recbole_ndcg(scores, liked.astype(np.float32) if clicks else query.values, int(cutoff), clicks=clicks)
    return at_cutoff(measure, scores, liked, items, int(cutoff), seed)


def _line(
    scorer: Scorer, calibration: Sequence[Episode], shots: int
) -> Callable[[Episode, NDArray[np.floating]], NDArray[np.floating]]:
    """Fits rating = a + b score + c (mean of the support's ratings, shrunk to the overall mean) on validation users.

    A score is only an order within one user; the same line for every method and K makes errors comparable.
    """
    scored = scorer.score([request(episode, shots) for episode in calibration])
    overall = float(np.concatenate([episode.query.values for episode in calibration]).mean())

    def features(episode: Episode, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        given = episode.support.head(shots).values
        level = float((given - overall).sum()) / (len(given) + _LEVEL_STRENGTH)
        return np.stack([np.ones(len(scores)), scores, np.full(len(scores), level)], axis=1).astype(np.float64)

    rows = [features(episode, scores.detach().numpy()) for episode, scores in zip(calibration, scored, strict=True)]
    target = np.concatenate([episode.query.values for episode in calibration]).astype(np.float64)
    weights = np.linalg.lstsq(np.concatenate(rows), target, rcond=None)[0]
    low, high = float(target.min()), float(target.max())
    return lambda episode, scores: np.clip(features(episode, scores) @ weights, low, high)


def request(episode: Episode, shots: int) -> Request:
    """Returns what a scorer may see of an episode: K ratings, and the query without its labels."""
    return Request(episode.user, episode.support.head(shots).unlabelled(), episode.query.items)


def mean_auc(report: Report, method: str, shots: Sequence[int]) -> float:
    """Returns the mean AUC of a method over users and over some K."""
    return float(np.mean([report.values(method, count).mean() for count in shots]))
