"""Measures what each member of the stack, and all together, gain over one Gaussian process on validation users.

    python benchmarks/members.py                            # three seeds; benchmarks/results/members.json
    METAREC_DATA=... python benchmarks/members.py --task ml-1m/user-cold --seeds 1

Text is what the sentence encoder says of it; the language model's own states are left out, so nothing is read first.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from metarec.bench.context import MethodContext
from metarec.config import CollaborativeConfig
from metarec.data.task_data import load_task_data
from metarec.data.task_files import load_task
from metarec.evaluation.evaluate import evaluate
from metarec.evaluation.metrics import BASELINE, bootstrap_interval
from metarec.files.artifacts import load_json, write_json
from metarec.scorers.collaborative.gp_fitting import fit_process
from metarec.scorers.collaborative.stack import fit_stack
from metarec.scorers.collaborative.trivial import ItemMean
from metarec.system.progress import progress

RESULT = Path(__file__).parent / "results" / "members.json"
NAMES = ("meta-learned kernel", "one factor", "text ridge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="movielens/user-cold", help="whose validation users")
    parser.add_argument("--seeds", type=int, default=3, help="how many split seeds, from 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gains: dict[str, dict[int, list[np.ndarray]]] = {}
    with progress("measuring members", arguments.seeds) as advance:
        for seed in range(arguments.seeds):
            for name, by_shots in gains_over_the_process(arguments.task, seed).items():
                for count, values in by_shots.items():
                    gains.setdefault(name, {}).setdefault(count, []).append(values)
            advance(seed + 1)
    table = {
        name: {
            str(count): {
                "gain": float(np.concatenate(values).mean()),
                "interval": bootstrap_interval(np.concatenate(values), seed=0),
                "episodes": sum(map(len, values)),
            }
            for count, values in by_shots.items()
        }
        for name, by_shots in gains.items()
    }
    results = load_json(RESULT) if RESULT.exists() else {}
    write_json(RESULT, {**results, arguments.task: {"seeds": arguments.seeds, "gain in AUC over GP": table}})


def gains_over_the_process(task: str, seed: int) -> dict[str, dict[int, np.ndarray]]:
    """Returns every validation user's AUC less that of the process alone, by method and K."""
    context = MethodContext(load_task_data(load_task(task), seed), Path("runs") / "members")
    data, users = context.interactions, context.users
    features = context.known
    stack = fit_stack(data, users, features, CollaborativeConfig(), threshold=context.threshold, seed=seed).stack
    process = fit_process(data, users, features, seed=seed)
    members = [replace(member, name=name) for member, name in zip(stack.members, NAMES, strict=True)]
    report = evaluate(
        [ItemMean(context.mean, name=BASELINE), process, *members, stack],
        context.validation,
        context.data.task.shots,
        data.catalog,
        threshold=context.threshold,
        seed=seed,
        baseline=BASELINE,
        left_out={},
        short_supports=context.data.task.short_supports,
    )
    shots = context.data.task.shots
    return {
        name: {count: report.values(name, count) - report.values("GP", count) for count in shots}
        for name in (*NAMES, stack.name)
    }


if __name__ == "__main__":
    main()
