"""Reads the cells that `metarec.bench.cells` writes, and pools users of all seeds into a `Summary` per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from metarec.bench.settings import label
from metarec.bench.summary import MethodFacts, Summary, holm
from metarec.data.sources.arrow import parquet_table
from metarec.errors import ArtifactError
from metarec.evaluation.metric_names import METRICS
from metarec.evaluation.metrics import BASELINE, bootstrap_interval, paired_p_value
from metarec.evaluation.report import Report
from metarec.files.artifacts import load_json, recover_dir, verify_dir
from metarec.files.exchange import belongs_at, is_temporary

CELL_FACTS = "cell.json"
CELL_TABLES = ("per_user", "costs", "predictions")
_Measured = tuple[dict[str, Any], dict[str, pd.DataFrame]]


def read_cells(out: Path, baseline: str = BASELINE, folders: Sequence[Path] | None = None) -> list[Summary]:
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
    groups: dict[tuple[str, int | None], list[_Measured]] = {}
    for folder in found:
        verify_dir(folder, "cell")
        facts = load_json(folder / CELL_FACTS)
        tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in CELL_TABLES}
        key = (facts["identity"]["task"], facts["identity"]["train_users"])
        groups.setdefault(key, []).append((facts, tables))
    return [_pool(task, size, _with_row_names(group), baseline) for (task, size), group in groups.items()]


def _with_row_names(group: Sequence[_Measured]) -> list[_Measured]:
    """Returns cells whose rows are called apart: by the settings, and by the method where two give a row one name.

    The first of the methods in the alphabet keeps the plain name, whichever was measured first: with several jobs,
    that order differs from run to run.
    """
    methods_of_rows = ((row["method"], facts["identity"]["method"]) for facts, _ in group for row in facts["rows"])
    owners = dict(sorted(methods_of_rows, reverse=True))
    methods = {facts["identity"]["method"] for facts, _ in group}
    owners |= {name: name for name in owners if name in methods}
    renamed = []
    for facts, tables in group:
        method, behind = facts["identity"]["method"], label(facts["identity"].get("settings", {}))
        names = {
            row["method"]: row["method"] + (f" ({method})" if owners[row["method"]] != method else "") + behind
            for row in facts["rows"]
        }
        rows = [{**row, "method": names[row["method"]]} for row in facts["rows"]]
        columns = {name: table.assign(method=table["method"].map(names)) for name, table in tables.items()}
        renamed.append(({**facts, "rows": rows}, columns))
    return renamed


def _cell_folders(root: Path) -> list[Path]:
    """Returns the cells below a folder in the order they were measured in, so that tables keep a plan's order.

    One that a killed process had put aside is put back first.
    """
    for home in {belongs_at(file.parent) for file in root.rglob(CELL_FACTS)}:
        if home is not None:
            recover_dir(home)
    whole = (file for file in root.rglob(CELL_FACTS) if not is_temporary(file.parent))
    files = sorted(whole, key=lambda file: (file.stat().st_mtime, str(file)))
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
        file = path / "per_user.parquet"
        table: pd.DataFrame = parquet_table(file.read_bytes(), f"'{file}'").to_pandas()
        task = load_json(path / "table.json")["task"]["name"] if (path / "table.json").exists() else path.name
        table = table.assign(task=task, person=table["user"])
    else:
        parts = [
            group.report.per_user.assign(task=group.task, person=group.report.per_user["user"].map(group.report.people))
            for group in read_cells(path)
            if group.train_users is None
        ]
        table = pd.concat(parts)
    return table[["task", "method", "shots", "user", "person", "auc"]]


def _pool(task: str, train_users: int | None, group: Sequence[_Measured], baseline: str) -> Summary:
    people: dict[str, str] = {}
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in CELL_TABLES}
    for facts, tables in group:
        seed = facts["identity"]["seed"]
        for name, table in tables.items():
            if "user" in table:
                called = str(seed) + "/" + table["user"].astype(str)
                people |= dict(zip(called, table["user"].astype(str), strict=True))
                table = table.assign(user=called)
            parts[name].append(table)
    per_user, costs, predictions = (pd.concat(parts[name], ignore_index=True) for name in CELL_TABLES)
    # A method that was measured on some users and on all has those users twice.
    report = Report(
        per_user=per_user.drop_duplicates(["method", "shots", "user"]),
        costs=costs.groupby(["method", "shots"], sort=False, as_index=False).mean(),
        predictions=predictions.drop_duplicates(["method", "shots", "user", "item"]),
        baseline=baseline,
        seed=0,
        left_out=_left_out([facts for facts, _ in group]),
        # Cells that were measured before a task asked for more have the usual ones alone.
        metrics=tuple(dict.fromkeys(name for facts, _ in group for name in facts.get("metrics", METRICS))),
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
    entries_by_name: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for facts in cells:
        for row in facts["rows"]:
            entries_by_name.setdefault(row["method"], []).append((facts, row))
    methods = {}
    for name, entries in entries_by_name.items():
        first, row = entries[0]
        prompts = {
            f"{facts['identity']['seed']}/{user}": texts
            for facts, shown in entries
            for user, texts in shown["prompts"].items()
        }
        methods[name] = MethodFacts(
            name=name,
            group=first["group"],
            settings=first["identity"].get("settings", {}),
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


def as_json(summaries: Sequence[Summary], reference: str, crossed: bool = False) -> dict[str, Any]:
    """Returns a benchmark's tables as JSON values: what ``metarec report --results`` writes.

    Args:
        summaries: The tables, one per task and size of meta-training.
        reference: The method that every other is compared with, beside the baseline.
        crossed: See `Summary.rows`.
    """
    tables = {
        **({"intervals": "over people and items"} if crossed else {}),
        "baseline": summaries[0].report.baseline,
        "tables": [
            {
                "task": group.task,
                "train_users": group.train_users,
                "left_out": dict(group.report.left_out),
                **group.made,
                "rows": group.rows(reference, crossed),
                f"{reference} is ahead from": group.crossings(reference),
            }
            for group in summaries
        ],
    }
    return dict(_without_nan(tables))


def _without_nan(value: Any) -> Any:
    """Returns JSON values with null for numbers that are not defined, as a user's AUC in queries of one item."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
