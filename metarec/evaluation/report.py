"""The results of an evaluation: per-user values, and means, intervals and paired differences computed from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from metarec.evaluation.metric_names import GROUPED, METRICS, OF_A_TABLE, OF_ALL_LISTS, has_interval
from metarec.evaluation.metrics import bootstrap_interval, table_interval, table_metric
from metarec.evaluation.resampling import crossed_interval
from metarec.files.artifacts import SCHEMA_VERSION

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ShotSummary:
    """One method at one K, summarized.

    Args:
        method: The scorer's name.
        shots: K.
        users: How many users were asked.
        means: Mean of each metric over the users that it is defined for; metrics of a table as they are.
        gain: Mean paired difference in AUC to the baseline.
        interval: 95% paired bootstrap interval of `gain`.
        seconds_per_user: Wall-clock time of scoring, adaptation included.
        bytes_per_user: Bytes that are kept for a user between two requests.
        intervals: 95% intervals over people of the metrics that `metarec.evaluation.metric_names.has_interval`.
    """

    method: str
    shots: int
    users: int
    means: Mapping[str, float]
    gain: float
    interval: tuple[float, float]
    seconds_per_user: float
    bytes_per_user: int
    intervals: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Report:
    """The results of an evaluation.

    Args:
        per_user: One row per method, K and user: columns ``method``, ``shots``, ``user`` and the metrics.
        costs: One row per method and K: columns ``method``, ``shots``, ``seconds_per_user``, ``bytes_per_user``.
        predictions: One row per method, K, user and candidate: columns ``method``, ``shots``, ``user``, ``item``,
            ``rating``, ``liked`` and ``score``.
        baseline: The method that paired differences are taken to.
        seed: Seed of tie-breaking and bootstrap.
        left_out: How many users were left out, by reason.
        metrics: The metrics; differences and intervals are of the first.
        hashes: Content hashes of data, split and prompt.
        people: The person of each user, where one person has several episodes, as over split seeds; else empty.
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

    def __repr__(self) -> str:
        shots, methods = (list(dict.fromkeys(self.costs[name])) for name in ("shots", "method"))
        users = self.per_user["user"].nunique()
        return f"Report(methods={methods}, shots={shots}, users={users}, baseline={self.baseline!r})"

    def _repr_html_(self) -> str:
        table: str = self.to_frame().to_html(index=False, float_format="{:.4f}".format, na_rep="")
        return table

    def to_frame(self) -> pd.DataFrame:
        """Returns the table: one row per method and K, with the means of all metrics, gains and costs."""
        import pandas as pd

        return pd.DataFrame(self.to_json()["rows"])

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

    def crossed_difference(
        self, method: str, shots: int, other: str, other_shots: int
    ) -> tuple[float, tuple[float, float]]:
        """Returns what `difference` does for the AUC, with an interval over people and items."""
        keys = ["user", "item"]
        both = self._predicted(method, shots).merge(
            self._predicted(other, other_shots), on=keys, suffixes=("", "_other")
        )
        interval = crossed_interval(
            both["score"].to_numpy(np.float64),
            both["score_other"].to_numpy(np.float64),
            both["liked"].to_numpy(bool),
            both["user"].tolist(),
            both["item"].tolist(),
            [self.people.get(user, user) for user in both["user"]],
            self.seed,
        )
        return float(self.paired(method, shots, other, other_shots).mean()), interval

    @cached_property
    def _predictions_of(self) -> Mapping[tuple[str, int], NDArray[np.intp]]:
        """Where the predictions of every method at every K are; comparing names row by row takes longer each time."""
        places: Mapping[Any, Any] = self.predictions.groupby(["method", "shots"]).indices
        return places

    def _predicted(self, method: str, shots: int, column: str = "score") -> pd.DataFrame:
        rows = self.predictions.iloc[self._predictions_of.get((method, shots), [])]
        return rows[["user", "item", column, "liked"]].rename(columns={column: "score"})

    def _grouped(self, method: str, shots: int, metric: str) -> pd.Series:
        """Returns a metric by user; of a metric of a group, the AUC of that group's users."""
        name, _, group = metric.partition(":")
        if not name.startswith(GROUPED):
            return self.values(method, shots, metric)
        rows = self.per_user[(self.per_user["method"] == method) & (self.per_user["shots"] == shots)]
        return self.values(method, shots).loc[lambda values: values.index.isin(rows["user"][rows[name] == group])]

    def paired(self, method: str, shots: int, other: str, other_shots: int, metric: str = "auc") -> pd.Series:
        """Returns the difference between two cells by user, for the users that both have."""
        return (self.values(method, shots, metric) - self.values(other, other_shots, metric)).dropna()

    def of_table(self, method: str, shots: int, metric: str) -> tuple[float, tuple[float, float]]:
        """Returns a metric and its 95% interval over people; NaN where undefined.

        Of all users together, of a group of users (``auc_by_activity:few``), or a mean over users.
        """
        if metric.partition("@")[0] in OF_ALL_LISTS:
            cost = self.costs[(self.costs["method"] == method) & (self.costs["shots"] == shots)].iloc[0]
            return float(cost[metric]), (float(cost[f"{metric}_low"]), float(cost[f"{metric}_high"]))
        if metric not in OF_A_TABLE:
            means = self._grouped(method, shots, metric)
            found = [self.people.get(user, user) for user in means.index]
            return float(means.mean()), bootstrap_interval(means.to_numpy(), self.seed, found)
        rows = self._predicted(method, shots, "chance" if metric == "f1" else "score")
        scores, liked, users = rows["score"].to_numpy(), rows["liked"].to_numpy(bool), rows["user"].tolist()
        value = table_metric(metric, scores, liked, users)
        people = [self.people.get(user, user) for user in users]
        return np.nan if value is None else value, table_interval(metric, scores, liked, users, self.seed, people)

    def cells(self) -> Iterator[ShotSummary]:
        """Yields a summary of every method at every K, in the order of evaluation."""
        for row in self.costs.to_dict("records"):
            method, shots = str(row["method"]), int(row["shots"])
            gain, interval = self.difference(method, shots, self.baseline, shots)
            table = {metric: self.of_table(method, shots, metric) for metric in self.metrics if has_interval(metric)}
            means = {
                metric: table[metric][0] if metric in table else float(self.values(method, shots, metric).mean())
                for metric in self.metrics
            }
            asked = (self.per_user["method"] == method) & (self.per_user["shots"] == shots)
            yield ShotSummary(
                method=method,
                shots=shots,
                users=int(asked.sum()),
                means=means,
                gain=gain,
                interval=interval,
                seconds_per_user=float(row["seconds_per_user"]),
                bytes_per_user=int(row["bytes_per_user"]),
                intervals={metric: interval for metric, (_, interval) in table.items()},
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
                    **{metric: _number(value) for metric, value in cell.means.items()},
                    **{
                        f"{metric}_{end}": _number(value)
                        for metric, interval in cell.intervals.items()
                        for end, value in zip(("low", "high"), interval, strict=True)
                    },
                    "auc_gain": _number(cell.gain),
                    "auc_gain_low": _number(cell.interval[0]),
                    "auc_gain_high": _number(cell.interval[1]),
                    "seconds_per_user": cell.seconds_per_user,
                    "bytes_per_user": cell.bytes_per_user,
                }
                for cell in self.cells()
            ],
        }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
