"""What the cells of a benchmark say together: users of all seeds pooled, paired differences, tests, calibration, costs.

Reads the folders that `metarec.bench.cells` writes. A person who is tested in several seeds is several episodes but one
person: intervals and tests are over people. Knows nothing of how a method was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from metarec.artifacts import load_json, verify_dir
from metarec.errors import ArtifactError
from metarec.evaluate import Report
from metarec.metrics import METRICS, bootstrap_interval, calibrated, calibration_error, paired_p_value
from metarec.progress import progress

CELL_FACTS = "cell.json"
CELL_TABLES = ("per_user", "costs", "predictions")


@dataclass(frozen=True)
class MethodFacts:
    """What is known of a method beside its scores, averaged over its cells.

    Args:
        name: How it is called in tables.
        group: What kind of method it is.
        parameters: Numbers that fitting learned and all users share.
        tokens: Tokens read to answer a request, by K.
        fit_seconds: Wall-clock time of fitting; rows that share a fit share its time.
        log_odds: Whether its scores are log-odds of a like as they are.
        step: The inner step it is, where it is a point of a trajectory; None for a row of the table.
        seeds: Split seeds it was measured on.
        prompts: What a language model read, by user and item.
    """

    name: str
    group: str
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
    def rows(self, reference: str | None = None) -> list[dict[str, Any]]:
        """Summarizes method by method, K by K, as plain JSON values.

        Args:
            reference: The method that every other is compared with beside it; None for no such comparison.

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
                versus = {f"versus {other}": self._comparison(name, count, other) for other in others if other != name}
                rows.append({**self._row(name, count), **versus})
                advance(len(rows), name)
        for other in others:
            compared = [row for row in rows if row["method"] != other]
            corrected = holm([row[f"versus {other}"]["p"] for row in compared])
            for row, p_value in zip(compared, corrected, strict=True):
                row[f"versus {other}"]["p_holm"] = p_value
        return rows

    def ranked(self, reference: str | None = None) -> dict[str, dict[int, dict[str, Any]]]:
        """Returns `rows` by method and K; what gains most over the baseline at the largest K comes first.

        By the paired difference, for methods that were measured on other users have another AUC to begin with.
        """
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for row in self.rows(reference):
            found.setdefault(row["method"], {})[row["shots"]] = row

        def gain(name: str) -> float:
            last = found[name][max(found[name])]
            return float(last.get(f"versus {self.report.baseline}", {"difference": 0.0})["difference"])

        return {name: found[name] for name in sorted(found, key=gain, reverse=True)}

    def _row(self, name: str, shots: int) -> dict[str, Any]:
        report, method = self.report, self.methods[name]
        values = report.values(name, shots)
        cost = report.costs[(report.costs["method"] == name) & (report.costs["shots"] == shots)].iloc[0]
        fewest = min(int(count) for count in report.costs["shots"])
        moved = report.paired(name, shots, name, fewest)
        mean, (low, high) = report.difference(name, shots, name, fewest)
        return {
            "method": name,
            "group": method.group,
            "shots": shots,
            "episodes": len(values),
            "people": len({report.people.get(user, user) for user in values.index}),
            "seeds": len(method.seeds),
            **{metric: float(report.values(name, shots, metric).mean()) for metric in METRICS},
            "hurt": float((moved < 0).mean()),
            "over no ratings": {"difference": mean, "low": low, "high": high},
            **self._calibration(name, shots),
            "fit_seconds": method.fit_seconds,
            "seconds_per_user": float(cost["seconds_per_user"]),
            "bytes_per_user": int(cost["bytes_per_user"]),
            "parameters": method.parameters,
            "tokens": method.tokens[shots],
        }

    def _comparison(self, name: str, shots: int, other: str) -> dict[str, float]:
        mean, (low, high) = self.report.difference(name, shots, other, shots)
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


def read_cells(out: Path, baseline: str, folders: Sequence[Path] | None = None) -> list[Summary]:
    """Reads measured cells and pools those of the same task and size of meta-training.

    Args:
        out: A benchmark's folder.
        baseline: What gains are measured from.
        folders: Only these cells, below ``out/cells``; None takes all.

    Raises:
        ArtifactError: There are none, or one is damaged.
    """
    root = out / "cells"
    found = _cell_folders(root) if folders is None else [root / f for f in folders]
    if not found:
        raise ArtifactError(f"'{out}' holds no measured cells", f"Run: metarec bench --out {out}")
    groups: dict[tuple[str, int | None], list[tuple[dict[str, Any], dict[str, pd.DataFrame]]]] = {}
    for folder in found:
        verify_dir(folder, "cell")
        facts = load_json(folder / CELL_FACTS)
        tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in CELL_TABLES}
        key = (facts["identity"]["task"], facts["identity"]["train_users"])
        groups.setdefault(key, []).append((facts, tables))
    return [_pool(task, size, group, baseline) for (task, size), group in groups.items()]


def _cell_folders(root: Path) -> list[Path]:
    """Returns the cells below a folder in the order they were measured in, so that tables keep a plan's order."""
    files = sorted(root.rglob(CELL_FACTS), key=lambda file: (file.stat().st_mtime, str(file)))
    return [file.parent for file in files]


def compare_runs(first: Path, second: Path) -> list[dict[str, Any]]:
    """Compares two evaluated runs, or two benchmarks, on the users that both tested.

    Args:
        first: A run's directory or a benchmark's folder.
        second: Another one.

    Returns:
        Per task, method and K the paired difference in AUC (second minus first), its interval over people and its
        p-value, corrected by Holm's method over all of them; as plain JSON values.

    Raises:
        ArtifactError: One of them holds no results, or no method, K and user in common.
    """
    sides = [_per_user(path) for path in (first, second)]
    keys = ["task", "method", "shots", "user"]
    both = sides[0].merge(sides[1], on=keys, suffixes=("_first", "_second")).dropna()
    if both.empty:
        raise ArtifactError(
            f"'{first}' and '{second}' have no method, K and user in common", "Compare runs of the same task and seed"
        )
    both["difference"] = both["auc_second"] - both["auc_first"]
    rows: list[dict[str, Any]] = []
    for _, group in both.groupby(keys[:3], sort=False):
        first_row = group.iloc[0]
        differences, people = group["difference"].to_numpy(np.float64), group["person_first"].tolist()
        low, high = bootstrap_interval(differences, 0, people)
        by_person = group.groupby("person_first")["difference"].mean().to_numpy()
        rows.append(
            {
                "task": str(first_row["task"]),
                "method": str(first_row["method"]),
                "shots": int(first_row["shots"]),
                "episodes": len(group),
                "difference": float(np.mean(differences)),
                "low": low,
                "high": high,
                "p": paired_p_value(by_person),
            }
        )
    return [{**row, "p_holm": p} for row, p in zip(rows, holm([float(row["p"]) for row in rows]), strict=True)]


def _per_user(path: Path) -> pd.DataFrame:
    """Returns the AUC of every task, method, K and user of a run or a benchmark, with whose episode it is."""
    if (path / "per_user.parquet").exists():
        table = pd.read_parquet(path / "per_user.parquet")
        task = load_json(path / "table.json")["task"]["name"] if (path / "table.json").exists() else path.name
        table = table.assign(task=task, person=table["user"])
    else:
        parts = [
            group.report.per_user.assign(task=group.task, person=group.report.per_user["user"].map(group.report.people))
            for group in read_cells(path, "")
            if group.train_users is None
        ]
        table = pd.concat(parts)
    return table[["task", "method", "shots", "user", "person", "auc"]]


def _pool(
    task: str, train_users: int | None, group: Sequence[tuple[dict[str, Any], dict[str, pd.DataFrame]]], baseline: str
) -> Summary:
    people: dict[str, str] = {}
    summaries: dict[str, list[pd.DataFrame]] = {name: [] for name in CELL_TABLES}
    for facts, tables in group:
        seed = facts["identity"]["seed"]
        for name, table in tables.items():
            if "user" in table:
                called = str(seed) + "/" + table["user"].astype(str)
                people |= dict(zip(called, table["user"].astype(str), strict=True))
                table = table.assign(user=called)
            summaries[name].append(table)
    per_user, costs, predictions = (pd.concat(summaries[name], ignore_index=True) for name in CELL_TABLES)
    # A method that was measured on some users and on all has those users twice.
    report = Report(
        per_user=per_user.drop_duplicates(["method", "shots", "user"]),
        costs=costs.groupby(["method", "shots"], sort=False, as_index=False).mean(),
        predictions=predictions.drop_duplicates(["method", "shots", "user", "item"]),
        baseline=baseline,
        seed=0,
        left_out=_left_out([facts for facts, _ in group]),
        hashes={},
        people=people,
    )
    cells = [facts for facts, _ in group]
    made = {
        "task_digest": sorted({facts["identity"]["task_digest"] for facts in cells}),
        "versions": cells[-1]["versions"],
        "hardware": cells[-1]["hardware"],
        "hashes_by_seed": {str(facts["identity"]["seed"]): facts["hashes"] for facts in cells},
        **_measured(cells),
    }
    return Summary(task, train_users, report, _methods(cells), made)


def _measured(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns when the first cell began, when the last ended, and the seconds of all; nothing if one lacks them."""
    if not all("began" in facts for facts in cells):
        return {}
    spans = [(datetime.fromisoformat(facts["began"]), timedelta(seconds=facts["seconds"])) for facts in cells]
    first, last = min(began for began, _ in spans), max(began + took for began, took in spans)
    return {
        "measured": {
            "began": first.isoformat(timespec="seconds"),
            "ended": last.isoformat(timespec="seconds"),
            "seconds": (last - first).total_seconds(),
            "process_seconds": sum(facts["seconds"] for facts in cells),
        }
    }


def _left_out(cells: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Returns how many users were left out over all splits, each split counted once."""
    by_seed = {facts["identity"]["seed"]: facts["left_out"] for facts in cells}
    reasons = dict.fromkeys(reason for counts in by_seed.values() for reason in counts)
    return {reason: sum(counts.get(reason, 0) for counts in by_seed.values()) for reason in reasons}


def _methods(cells: Sequence[Mapping[str, Any]]) -> dict[str, MethodFacts]:
    item_batch: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for facts in cells:
        for row in facts["rows"]:
            item_batch.setdefault(row["method"], []).append((facts, row))
    methods = {}
    for name, entries in item_batch.items():
        first, row = entries[0]
        prompts = {
            f"{facts['identity']['seed']}/{user}": texts
            for facts, shown in entries
            for user, texts in shown["prompts"].items()
        }
        methods[name] = MethodFacts(
            name=name,
            group=first["group"],
            parameters=row["parameters"],
            tokens={
                int(shots): float(np.mean([shown["tokens"][shots] for _, shown in entries])) for shots in row["tokens"]
            },
            fit_seconds=float(np.mean([facts["fit_seconds"] for facts, _ in entries])),
            log_odds=row["log_odds"],
            step=row["step"],
            seeds=tuple(sorted({facts["identity"]["seed"] for facts, _ in entries})),
            prompts=prompts,
        )
    return methods
