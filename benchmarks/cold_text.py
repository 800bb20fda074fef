"""What text tells of movies that nobody rated: AUC at K = 0 of item-cold users, by what is read and how.

    python benchmarks/cold_text.py --seeds 4      # benchmarks/results/cold-text.json

Item means of meta-training users are regressed on text; validation and test users of every split are asked about unseen
movies. It says how much there is to be had; no table reports it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import RidgeCV

from metarec.artifacts import write_json
from metarec.doctor import environment
from metarec.methods import Setting
from metarec.metrics import auc
from metarec.progress import progress
from metarec.scorers.features import item_features, state_vectors
from metarec.scorers.text import unit_vectors
from metarec.task import load_task, load_task_data

RESULT = Path(__file__).parent / "results" / "cold-text.json"
TASK = "movielens/item-cold"
PENALTIES = np.logspace(-1, 3, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="how many split seeds, from 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    with progress("splits", arguments.seeds) as advance:
        for seed in range(arguments.seeds):
            setting = Setting(load_task_data(load_task(TASK), seed), Path("runs") / "cold-text")
            for name, predicted in predictions(setting).items():
                found.setdefault(name, []).append(mean_auc(setting, predicted))
            advance(seed + 1)
    rows = {name: {"auc": float(np.mean(values)), "by_seed": values} for name, values in found.items()}
    command = f"python benchmarks/cold_text.py --seeds {arguments.seeds}"
    write_json(RESULT, {"command": command, "task": TASK, "rows": rows, **environment()})
    for name, row in rows.items():
        print(f"{name:44s}{row['auc']:.4f}")


def predictions(setting: Setting) -> dict[str, np.ndarray]:
    """Returns every way's prediction of every item's mean."""
    mean = setting.mean
    rated = np.flatnonzero(mean.count > 0)
    target = mean.total[rated] / mean.count[rated]
    weight = mean.count[rated] / (mean.count[rated] + mean.strength)
    blocks = item_features(setting.interactions.catalog)
    read = {
        "encoder": unit_vectors(setting.vectors),
        "language model": unit_vectors(state_vectors(setting.untrained.fitted.reader)),
        "fields": 0.5 * np.concatenate(list(blocks.values()), 1),
    }
    ways = [["encoder"], ["language model"], ["fields"], ["encoder", "fields"], list(read)]
    result = {}
    for names in ways:
        features = np.concatenate([read[name] for name in names], 1)
        model = RidgeCV(PENALTIES).fit(features[rated], target, sample_weight=weight)
        result[f"ridge: {', '.join(names)}"] = model.predict(features)
    everything = np.concatenate(list(read.values()), 1)
    centred = target - np.average(target, weights=weight)
    kernel = KernelRidge(kernel="rbf", alpha=0.5, gamma=0.3).fit(everything[rated], centred, sample_weight=weight)
    result["kernel ridge: all three"] = kernel.predict(everything)
    trees = ExtraTreesRegressor(200, min_samples_leaf=5, max_features=0.3, random_state=setting.seed)
    result["extra trees: all three"] = trees.fit(everything[rated], target, sample_weight=weight).predict(everything)
    return result


def mean_auc(setting: Setting, predicted: np.ndarray) -> float:
    episodes = [*setting.data.episodes("validation")[0], *setting.data.episodes("test")[0]]
    values = [auc(predicted[one.query.items], one.query.likes(setting.threshold)) for one in episodes]
    return float(np.mean([value for value in values if value is not None]))


if __name__ == "__main__":
    main()
