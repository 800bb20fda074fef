"""Chooses the plain baselines' hyper-parameters on validation users of the default task.

    python benchmarks/tuning.py                      # two split seeds; benchmarks/results/tuning.json
    python benchmarks/tuning.py --methods ALS EASE

What counts is the gain in AUC over the item mean, averaged over K > 0 and seeds. A validation user of one split is a
test user of another, as in any repeated split. The winners are the defaults of the `fit_*` functions.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metarec.artifacts import load_json, write_json
from metarec.evaluate import evaluate
from metarec.methods import METHODS, Setting
from metarec.progress import progress
from metarec.recommender import BASELINE
from metarec.scorer import Scorer
from metarec.task import load_task, load_task_data

RESULT = Path(__file__).parent / "results" / "tuning.json"
TASK = "movielens/user-cold"
GRIDS: dict[str, Mapping[str, tuple[Any, ...]]] = {
    "text ridge, no prior": {"penalty": (0.1, 0.3, 1.0), "bias_strength": (0.0, 2.0)},
    "text logistic, no prior": {"penalty": (0.03, 0.3, 3.0)},
    "user-kNN": {"neighbours": (50, 200, 800), "shrinkage": (20.0, 60.0), "strength": (1.0, 3.0, 10.0)},
    "item-kNN": {"shrinkage": (30.0, 100.0, 300.0), "strength": (0.3, 1.0, 3.0)},
    "EASE": {"penalty": (30.0, 100.0, 300.0), "min_ratings": (5, 10, 20)},
    "ALS": {"factors": (8, 16), "item_penalty": (10.0, 30.0), "user_penalty": (1.0, 3.0, 10.0)},
    "text logistic": {"penalty": (1.0, 3.0, 10.0, 30.0)},
    "text ridge": {"penalty": (1.0, 3.0, 10.0), "bias_strength": (0.0, 2.0)},
    "MeLU": {"lr": (1e-3, 3e-3), "inner_lr": (0.03, 0.1)},
    "neural process": {"lr": (1e-3, 3e-3), "weight_decay": (0.1, 1.0)},
    "per-user LoRA": {"inner_lr": (0.1, 0.3, 1.0), "steps": (3, 10)},
    "GP": {"factors": (16, 32), "noise": (0.5, 0.7), "choice": (2.0, 4.0)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="how many split seeds, from 0")
    parser.add_argument("--methods", nargs="*", default=list(GRIDS), choices=list(GRIDS), help="only these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = [
        Setting(load_task_data(load_task(TASK), seed), Path("runs") / "tuning" / str(seed))
        for seed in range(arguments.seeds)
    ]
    tried = {
        method: [dict(zip(GRIDS[method], values, strict=True)) for values in itertools.product(*GRIDS[method].values())]
        for method in arguments.methods
    }
    done = 0
    with progress("tuning", len(settings) * sum(map(len, tried.values()))) as advance:
        for method, options in tried.items():
            gains = np.zeros((len(settings), len(options)))
            for (row, setting), (column, chosen) in itertools.product(enumerate(settings), enumerate(options)):
                scorer = METHODS[method].fit(setting, **{**METHODS[method].options, **chosen})[0].scorer
                gains[row, column] = gain(setting, scorer)
                done += 1
                advance(done, method)
            keep(method, options, gains.mean(0), arguments.seeds)


def gain(setting: Setting, scorer: Scorer) -> float:
    """Returns the gain over the item mean on validation users, averaged over K > 0."""
    baseline = METHODS[BASELINE].rows(setting)[0].scorer
    report = evaluate(
        [baseline, scorer],
        setting.validation,
        setting.data.task.shots,
        setting.interactions.catalog,
        threshold=setting.threshold,
        seed=setting.seed,
        baseline=BASELINE,
        left_out={},
    )
    shots = [count for count in setting.data.task.shots if count]
    return float(np.mean([report.paired(scorer.name, count, BASELINE, count).mean() for count in shots]))


def keep(method: str, options: list[dict[str, Any]], gains: np.ndarray, seeds: int) -> None:
    """Adds a method to the result file; what other methods got stays."""
    before = load_json(RESULT)["methods"] if RESULT.exists() else {}
    found = {
        "best": options[int(gains.argmax())],
        "seeds": seeds,
        "tried": [{"options": option, "gain": float(value)} for option, value in zip(options, gains, strict=True)],
    }
    command = f"python benchmarks/tuning.py --seeds {seeds}"
    write_json(RESULT, {"command": command, "task": TASK, "methods": {**before, method: found}})
    print(f"{method}: {found['best']}  {gains.max():+.4f}  (worst {gains.min():+.4f})", flush=True)


if __name__ == "__main__":
    main()
