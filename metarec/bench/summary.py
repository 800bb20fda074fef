"""The statistics of a benchmark's table: means, paired differences, intervals, tests, calibration, costs.

A person who is tested in several seeds is several episodes but one person: intervals and tests are over people.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from metarec.evaluation.metric_names import has_interval
from metarec.evaluation.metrics import calibrated, calibration_error, paired_p_value
from metarec.evaluation.report import Report
from metarec.system.progress import progress

# The method that every other is compared with, beside the baseline.
REFERENCE = "metarec"


@dataclass(frozen=True)
class MethodFacts:
    """A row's facts beside its scores, averaged over its cells.

    Args:
        name: The row's name in tables, settings included.
        group: The method's group.
        settings: The settings that it was measured with and that differ from the defaults, by dotted key.
        parameters: Number of learned parameters that all users share.
        tokens: Tokens read to answer a request, by K.
        fit_seconds: Wall-clock time of fitting; rows that share a fit share its time.
        log_odds: Whether its scores are log-odds of a like as they are.
        step: The inner step it is, where it is a point of a trajectory; None for a row of the table.
        seeds: Split seeds it was measured on.
        prompts: What a language model read, by user and item.
    """

    name: str
    group: str
    settings: Mapping[str, Any]
    parameters: int
    tokens: Mapping[int, float]
    fit_seconds: float
    log_odds: bool
    step: int | None
    seeds: tuple[int, ...]
    prompts: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, eq=False)
class Summary:
    """All cells of one task and one size of meta-training.

    Args:
        task: The task's name.
        train_users: How many meta-training users there were at most; None for all.
        report: The users of all seeds, each called ``seed/user``.
        methods: By name, in the order they were measured in.
        made: What the figures are a function of: the task's digest, versions, hardware, the data by seed, and when
            they were measured.
    """

    task: str
    train_users: int | None
    report: Report
    methods: Mapping[str, MethodFacts]
    made: Mapping[str, Any]

    @cache  # noqa: B019 - thousands of resamples per row; a table, its JSON and its page share them
    def rows(self, reference: str | None = None, crossed: bool = False) -> list[dict[str, Any]]:
        """Summarizes method by method, K by K, as plain JSON values.

        Args:
            reference: The method that every other is compared with beside it; None for no such comparison.
            crossed: Intervals are over people and items, see `metarec.evaluation.resampling`; otherwise over people.

        Returns:
            One row per method and K. P-values are corrected by Holm's method (1979) over all comparisons with the
            same method. ``over no ratings`` is what K ratings are worth to a method, ``hurt`` the share of users whom
            they gave a lower AUC than the same method's none.
        """
        names = [name for name, method in self.methods.items() if method.step is None]
        shots = sorted({int(count) for count in self.report.costs["shots"]})
        others = [other for other in (self.report.baseline, reference) if other in names]
        rows = []
        with progress(f"comparing on {self.task}", len(names) * len(shots), after=2.0) as advance:
            for name, count in product(names, shots):
                versus = {
                    f"versus {other}": self._comparison(name, count, other, crossed)
                    for other in others
                    if other != name
                }
                rows.append({**self._row(name, count, crossed), **versus})
                advance(len(rows), name)
        for other in others:
            compared = [row for row in rows if row["method"] != other]
            corrected = holm([row[f"versus {other}"]["p"] for row in compared])
            for row, p_value in zip(compared, corrected, strict=True):
                row[f"versus {other}"]["p_holm"] = p_value
        return rows

    def ranked(self, reference: str | None = None, crossed: bool = False) -> dict[str, dict[int, dict[str, Any]]]:
        """Returns `rows` by method and K; what gains most over the baseline at the largest K comes first."""
        return ranked(self.rows(reference, crossed), self.report.baseline)

    def _difference(
        self, name: str, shots: int, other: str, other_shots: int, crossed: bool
    ) -> tuple[float, tuple[float, float]]:
        compare = self.report.crossed_difference if crossed else self.report.difference
        return compare(name, shots, other, other_shots)

    def _row(self, name: str, shots: int, crossed: bool) -> dict[str, Any]:
        report, method = self.report, self.methods[name]
        values = report.values(name, shots)
        cost = report.costs[(report.costs["method"] == name) & (report.costs["shots"] == shots)].iloc[0]
        fewest = min(int(count) for count in report.costs["shots"])
        moved = report.paired(name, shots, name, fewest)
        mean, (low, high) = self._difference(name, shots, name, fewest, crossed)
        return {
            "method": name,
            "group": method.group,
            **({"settings": dict(method.settings)} if method.settings else {}),
            "shots": shots,
            "episodes": len(values),
            "people": len({report.people.get(user, user) for user in values.index}),
            "seeds": len(method.seeds),
            **self._metrics(name, shots),
            "hurt": float((moved < 0).mean()),
            "over no ratings": {"difference": mean, "low": low, "high": high},
            **self._calibration(name, shots),
            "fit_seconds": method.fit_seconds,
            "seconds_per_user": float(cost["seconds_per_user"]),
            "bytes_per_user": int(cost["bytes_per_user"]),
            "parameters": method.parameters,
            "tokens": method.tokens[shots],
        }

    def _metrics(self, name: str, shots: int) -> dict[str, float]:
        """Means over users, and metrics of all users together with the ends of their intervals."""
        found = {}
        for metric in self.report.metrics:
            if not has_interval(metric):
                found[metric] = float(self.report.values(name, shots, metric).mean())
                continue
            found[metric], ends = self.report.of_table(name, shots, metric)
            found |= {f"{metric}_{end}": value for end, value in zip(("low", "high"), ends, strict=True)}
        return found

    def _comparison(self, name: str, shots: int, other: str, crossed: bool) -> dict[str, float]:
        mean, (low, high) = self._difference(name, shots, other, shots, crossed)
        paired = self.report.paired(name, shots, other, shots)
        people = paired.groupby([self.report.people.get(user, user) for user in paired.index]).mean()
        return {"difference": mean, "low": low, "high": high, "p": paired_p_value(people.to_numpy())}

    def _calibration(self, name: str, shots: int) -> dict[str, float]:
        """Calibration error of scores turned into probabilities on other people; of log-odds also as they are."""
        table = self.report.predictions
        rows = table[(table["method"] == name) & (table["shots"] == shots)]
        scores, liked = rows["score"].to_numpy(np.float64), rows["liked"].to_numpy(bool)
        people = [self.report.people.get(user, user) for user in rows["user"]]
        errors = {"ece": calibration_error(calibrated(scores, liked, people), liked)}
        if self.methods[name].log_odds:
            errors["ece_uncalibrated"] = calibration_error(1 / (1 + np.exp(-scores)), liked)
        return errors

    def curve(self, name: str) -> dict[int, float]:
        """Returns the mean AUC of a method by K."""
        shots = sorted({int(count) for count in self.report.costs["shots"]})
        return {count: float(self.report.values(name, count).mean()) for count in shots}

    def crossings(self, reference: str) -> dict[str, float | None]:
        """Returns from how many ratings on a method is ahead of every other one: `crossing`, by the other's name.

        On the users that both have, for some methods are measured on a few of them; who shares none is left out.
        """
        if reference not in self.methods:
            return {}
        others = [name for name, method in self.methods.items() if method.step is None and name != reference]
        gaps = {name: self._gaps(reference, name) for name in others}
        return {
            name: crossing(gap, dict.fromkeys(gap, 0.0))
            for name, gap in gaps.items()
            if np.isfinite(list(gap.values())).all()
        }

    def _gaps(self, name: str, other: str) -> dict[int, float]:
        paired = self.report.paired
        return {count: float(paired(name, count, other, count).mean()) for count in self.curve(name)}


def ranked(rows: Iterable[dict[str, Any]], baseline: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Returns a table's rows by method and K; what gains most over the baseline at the largest K comes first.

    By the paired difference, for methods that were measured on other users have another AUC to begin with.

    Args:
        rows: One per method and K, as `Summary.rows` gives them.
        baseline: The row that gains are measured from.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["shots"]] = row

    def gain(name: str) -> float:
        last = found[name][max(found[name])]
        return float(last.get(f"versus {baseline}", {"difference": 0.0})["difference"])

    return {name: found[name] for name in sorted(found, key=gain, reverse=True)}


def crossing(first: Mapping[int, float], second: Mapping[int, float]) -> float | None:
    """Says from how many ratings on one method is better than another.

    Args:
        first: Mean AUC by K.
        second: Another method's, at the same K.

    Returns:
        The K from which on `first` stays at least as good, linear between measured ones; 0 where it always is, None
        where it is not even at the largest.
    """
    shots = sorted(first)
    ahead = [first[count] - second[count] for count in shots]
    if ahead[-1] < 0:
        return None
    last_behind = max((place for place, gap in enumerate(ahead) if gap < 0), default=None)
    if last_behind is None:
        return float(shots[0])
    low, high = shots[last_behind], shots[last_behind + 1]
    gap, next_gap = ahead[last_behind], ahead[last_behind + 1]
    return low + (high - low) * gap / (gap - next_gap)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for how many there are, by Holm's step-down method (1979)."""
    if not p_values:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(value) for value in multipletests(list(p_values), method="holm")[1]]
