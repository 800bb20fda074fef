"""The headline table: the default recommender on the default task, over several split seeds.

Every seed is a split, a training and a test of its own; users are pooled over seeds and differences are paired within
user and seed. A seed that is done is not run again, so the command can be stopped and repeated.

    python benchmarks/headline.py --seeds 5

writes ``benchmarks/results/headline.json``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import time
from pathlib import Path

import pandas as pd

from metarec.artifacts import load_json, replace_file, write_json
from metarec.cli.runs import provenance
from metarec.config import RunConfig, override, validated
from metarec.evaluate import Report
from metarec.recommender import BASELINE, MetaRecommender
from metarec.report import findings
from metarec.task import load_task, load_task_data

ROOT = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many split seeds, from 0")
    parser.add_argument("--set", action="append", default=[], help="override one setting, e.g. train.steps=100")
    parser.add_argument("--name", default="headline", help="name of the result file and of the runs")
    arguments = parser.parse_args()
    reports, facts, seconds = [], {}, []
    for seed in range(arguments.seeds):
        run = Path("runs") / f"{arguments.name}-{seed}"
        config = validated(RunConfig, override({"seed": seed}, arguments.set), "--set")
        if not (run / "done.json").exists():
            started = time.perf_counter()
            recommender = MetaRecommender.from_pretrained(config.backbone, config)
            recommender.fit(checkpoint=run / "checkpoint", resume=True)
            fit_seconds = time.perf_counter() - started
            recommender.save_pretrained(run / "model")
            report = recommender.evaluate()
            replace_file(run / "per_user.parquet", report.per_user.to_parquet)
            replace_file(run / "costs.parquet", report.costs.to_parquet)
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
            done = {"seconds": fit_seconds, "left_out": dict(report.left_out), "commit": commit.stdout.strip()}
            write_json(run / "done.json", {**done, **provenance(recommender)})
        facts = load_json(run / "done.json")
        seconds.append(facts.pop("seconds"))
        users = pd.read_parquet(run / "per_user.parquet").assign(seed=seed)
        reports.append((users, pd.read_parquet(run / "costs.parquet"), facts.pop("left_out")))
    pooled = pool(reports)
    result = {
        "command": f"python benchmarks/headline.py --seeds {arguments.seeds}"
        + "".join(f" --set {assignment}" for assignment in arguments.set),
        "seeds": list(range(arguments.seeds)),
        "fit_seconds": seconds,
        "gain_by_seed": gain_by_seed(reports),
        "hashes_by_seed": [load_task_data(load_task(config.task), seed).hashes for seed in range(arguments.seeds)],
        "findings": findings(pooled, "metarec, adapted", "metarec, before adaptation"),
        **facts,
        **pooled.to_json(),
    }
    write_json(ROOT / "results" / f"{arguments.name}.json", result)
    print(markdown(pooled))
    for line in result["findings"]:
        print("-", line)


def markdown(report: Report) -> str:
    """Returns the README's table: AUC, then the paired difference to the baseline with its 95% interval."""
    cells = list(report.cells())
    shots = sorted({cell.shots for cell in cells})
    lines = [
        f"| AUC (difference to {BASELINE}) | " + " | ".join(f"K = {count}" for count in shots) + " | s/user | B/user |",
        "|---" * (len(shots) + 3) + "|",
    ]
    for method in dict.fromkeys(cell.method for cell in cells):
        row = {cell.shots: cell for cell in cells if cell.method == method}
        texts = []
        for count in shots:
            cell = row[count]
            text = short(f"{cell.means['auc']:.4f}")
            if method != BASELINE:
                low, high = cell.interval
                text += short(f" {cell.gain:+.4f} [{low:+.4f} {high:+.4f}]")
            texts.append(text)
        last = row[shots[-1]]
        cost = f"{last.seconds_per_user:.3f} | {last.bytes_per_user:,}"
        lines.append(f"| {method} | " + " | ".join(texts) + f" | {cost} |")
    return "\n".join(lines)


def short(text: str) -> str:
    """Drops the zero before the point."""
    return re.sub(r"0(?=[.])", "", text)


def gain_by_seed(reports: list[tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]]) -> list[dict[str, float]]:
    """Returns, for every seed, the number of users and the mean gain over the baseline at each K."""
    gains = []
    for users, _, _ in reports:
        table = users.pivot(index="user", columns=["method", "shots"], values="auc")
        ours, baseline = table["metarec, adapted"], table[BASELINE]
        gains.append({"users": len(table), **{f"K={count}": float((ours - baseline)[count].mean()) for count in ours}})
    return gains


def pool(reports: list[tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]]) -> Report:
    """Pools users of all seeds; a user of two seeds counts twice, each time against the same user's baseline."""
    per_user = pd.concat([users for users, _, _ in reports], ignore_index=True)
    per_user["user"] = per_user["seed"].astype(str) + "/" + per_user["user"]
    costs = pd.concat([costs for _, costs, _ in reports])
    costs = costs.groupby(["method", "shots"], sort=False, as_index=False).mean()
    left_out: dict[str, int] = {}
    for _, _, counts in reports:
        for reason, count in counts.items():
            left_out[reason] = left_out.get(reason, 0) + count
    return Report(per_user.drop(columns="seed"), costs, BASELINE, 0, left_out)


if __name__ == "__main__":
    main()
