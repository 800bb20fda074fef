"""Scorers meet episodes: per-user values first, and every mean, interval and paired difference from them.

All methods and all K share the same users and the same query of each. Knows nothing of how a scorer was made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from metarec.artifacts import SCHEMA_VERSION
from metarec.episodes import Episode
from metarec.errors import EvaluationError
from metarec.interactions import Catalog
from metarec.metrics import auc, bootstrap_interval, check_scores, ndcg
from metarec.scorer import Request, Scorer

CUTOFF = 10
METRICS = ("auc", f"ndcg@{CUTOFF}")


@dataclass(frozen=True)
class Cell:
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
        baseline: The method that paired differences are taken to.
        seed: Seed of tie-breaking and bootstrap.
        left_out: How many users were left out, by reason.
    """

    per_user: pd.DataFrame
    costs: pd.DataFrame
    baseline: str
    seed: int
    left_out: Mapping[str, int]

    def values(self, method: str, shots: int, metric: str = "auc") -> pd.Series:
        """Returns a metric by user, sorted by user id."""
        rows = self.per_user[(self.per_user["method"] == method) & (self.per_user["shots"] == shots)]
        return rows.set_index("user")[metric].sort_index()

    def difference(
        self, method: str, shots: int, other: str, other_shots: int, metric: str = "auc"
    ) -> tuple[float, tuple[float, float]]:
        """Returns the mean paired difference between two cells and its 95% bootstrap interval."""
        paired = self.values(method, shots, metric) - self.values(other, other_shots, metric)
        return float(paired.mean()), bootstrap_interval(paired.to_numpy(), self.seed)

    def cells(self) -> Iterator[Cell]:
        """Summarizes method by method, K by K, in the order they were evaluated in."""
        for row in self.costs.to_dict("records"):
            method, shots = str(row["method"]), int(row["shots"])
            gain, interval = self.difference(method, shots, self.baseline, shots)
            means = {metric: float(self.values(method, shots, metric).mean()) for metric in METRICS}
            yield Cell(
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
) -> Report:
    """Scores every episode's query with every method at every K.

    Args:
        scorers: The methods; their names are distinct.
        episodes: The users.
        shots: The support sizes K; each support is the first K ratings of the episode's.
        catalog: For item ids, which break ties.
        threshold: Ratings from here on are likes.
        seed: Seed of tie-breaking and bootstrap.
        baseline: Name of the scorer that paired differences are taken to.
        left_out: Users already left out, by reason; those whose query holds one class only are added.

    Raises:
        EvaluationError: A scorer returns something that cannot be ranked, no user has both classes, a support is
            smaller than K, or the baseline is not among the scorers.
    """
    names = [scorer.name for scorer in scorers]
    if len(set(names)) != len(names) or baseline not in names:
        raise EvaluationError(f"scorers are named {names}, the baseline '{baseline}'")
    labels = {episode.user: episode.query.values >= threshold for episode in episodes}
    kept = [episode for episode in episodes if 0 < labels[episode.user].sum() < len(episode.query)]
    if not kept:
        raise EvaluationError(f"none of {len(episodes)} users both likes and dislikes something in the query")
    if max(shots) > min(len(episode.support) for episode in kept):
        raise EvaluationError(f"K = {max(shots)} asks for more ratings than some support has")
    one_class = len(episodes) - len(kept)
    rows: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
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
            for episode, scores in zip(kept, scored, strict=True):
                values = scores.detach().numpy()
                check_scores(values, f"method '{scorer.name}', K = {count}")
                liked = labels[episode.user]
                items = [catalog.ids[code] for code in episode.query.items]
                rows.append(
                    {
                        "method": scorer.name,
                        "shots": count,
                        "user": episode.user,
                        "auc": auc(values, liked),
                        f"ndcg@{CUTOFF}": ndcg(values, liked, items, CUTOFF, seed),
                    }
                )
    return Report(
        per_user=pd.DataFrame(rows),
        costs=pd.DataFrame(costs),
        baseline=baseline,
        seed=seed,
        left_out={**left_out, **({"query of one class": one_class} if one_class else {})},
    )


def request(episode: Episode, shots: int) -> Request:
    """Returns what a scorer may see of an episode: K ratings, and the query without its labels."""
    return Request(episode.user, episode.support.head(shots), episode.query.items)


def mean_auc(report: Report, method: str, shots: Sequence[int]) -> float:
    """Returns the mean AUC of a method over users and over some K."""
    return float(np.mean([report.values(method, count).mean() for count in shots]))
