"""Measures what going on from an old run does to its users, with and without what keeps from forgetting.

    metarec train movielens/brief --config old.yaml --name old      # old.yaml: what the result's "settings" say
    METAREC_DATA=... python benchmarks/forgetting.py --run runs/old --task games/brief

Three times meta-training goes on from the old run on the other task, by the old run's settings: plainly, with half of
every step's users drawn from the old task, and pulled to the old meta-parameters. Of each: the AUC of test users of the
old and of the new task before and after. With `train.keep=best` a step that validation users gain nothing from is not
kept, and then nothing is learned or forgotten. Writes results/forgetting.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from metarec import MetaRecommender
from metarec.bench.settings import canonical
from metarec.config import RunConfig, override, validated
from metarec.files.artifacts import write_json
from metarec.system.doctor import environment

RESULT = Path(__file__).parent / "results" / "forgetting.json"
GUARDS = {"plain": [], "replay 0.5": ["train.replay=0.5"], "anchor 0.1": ["train.anchor=0.1"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the old run")
    parser.add_argument("--task", required=True, help="the task that it goes on with")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    old = MetaRecommender.from_pretrained(given.run)
    found = {name: gone_on(old, given.task, guards) for name, guards in GUARDS.items()}
    for name, rows in found.items():
        for whose, row in rows.items():
            change = f"{row['difference']:+.4f} [{row['low']:+.4f} {row['high']:+.4f}]"
            print(f"{name:12s} {whose} users of {row['task']}: {row['before']:.4f} {row['after']:.4f} {change}")
    facts = {"old": old.fitted.task.name, "new": given.task, "score": list(old.config.score)}
    facts["settings"] = canonical(old.config.model_dump(mode="json", exclude={"task", "seed"}), "--run")
    write_json(given.out, {**facts, "ways": found, **environment()})


def gone_on(old: MetaRecommender, task: str, guards: list[str]) -> dict[str, dict[str, Any]]:
    """Returns what `MetaRecommender.forgetting` says of old and new users after going on from an old run."""
    values = {**old.config.model_dump(mode="json"), "task": task}
    config = validated(RunConfig, override(values, guards), "--run")
    table = MetaRecommender.from_pretrained(config.backbone, config).fit(task, start=old).forgetting(old)
    return {
        row["users"]: {
            "task": row["task"],
            "users": row["count"],
            "K": row["shots"],
            "before": row["auc_before"],
            "after": row["auc_after"],
            "difference": row["difference"],
            "low": row["interval"][0],
            "high": row["interval"][1],
        }
        for row in table
    }


if __name__ == "__main__":
    main()
