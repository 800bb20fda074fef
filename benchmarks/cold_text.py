"""What text tells of movies that nobody rated: AUC at K = 0 of item-cold users, by what is read and how.

    python benchmarks/cold_text.py --first 20 --seeds 6      # benchmarks/results/cold-text.json

Item means of meta-training users are regressed on text; validation and test users of every split are asked about unseen
movies. It says how much there is to be had, on splits that no table reports.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.ensemble import ExtraTreesRegressor

from metarec.artifacts import write_json
from metarec.doctor import environment
from metarec.methods import Setting
from metarec.metrics import auc
from metarec.priors import predict_unrated, smooth_by_text
from metarec.progress import progress
from metarec.scorers.features import state_vectors, unrated_features
from metarec.scorers.residuals import Floats
from metarec.task import load_task, load_task_data

RESULT = Path(__file__).parent / "results" / "cold-text.json"
TASK = "movielens/item-cold"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=20, help="the first split seed")
    parser.add_argument("--seeds", type=int, default=6, help="how many split seeds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    with progress("splits", arguments.seeds) as advance:
        for done in range(arguments.seeds):
            seed = arguments.first + done
            setting = Setting(load_task_data(load_task(TASK), seed), Path("runs") / "cold-text")
            for name, predicted in predictions(setting).items():
                found.setdefault(name, []).append(mean_auc(setting, predicted))
            advance(done + 1)
    rows = {name: {"auc": float(np.mean(values)), "by_seed": values} for name, values in found.items()}
    command = f"python benchmarks/cold_text.py --first {arguments.first} --seeds {arguments.seeds}"
    write_json(RESULT, {"command": command, "task": TASK, "rows": rows, **environment()})
    for name, row in rows.items():
        print(f"{name:52s}{row['auc']:.4f}")


def predictions(setting: Setting) -> dict[str, Floats]:
    """Returns every way's prediction of every item's mean."""
    mean = setting.mean
    everything = np.arange(len(mean.count))
    texts = {"encoder": setting.vectors, "language model": state_vectors(setting.untrained.fitted.reader)}
    log_count = np.log1p(mean.count)[:, None].astype(np.float64)
    every_way = (*texts, "fields")
    ways = [("encoder",), ("language model",), ("fields",), ("encoder", "fields"), every_way]
    features = {}
    for names in ways:
        told = ", ".join(names)
        read = {name: texts[name] for name in names if name in texts}
        known = unrated_features(read, setting.fields if "fields" in names else {})
        features[f"ridge: {told}"], features[f"kernel: {told}"] = known.unrated, known.text
    for name in list(features)[-2:]:
        features[f"{name}, and counts"] = np.concatenate([features[name], log_count, log_count**2], 1)
    result = {name: smooth_by_text(mean, told, setting.seed).values(everything) for name, told in features.items()}
    for names in ways[-2:]:
        told = ", ".join(names)
        result[f"process: {told}"] = predict_unrated(mean, features[f"ridge: {told}"]).values(everything)
    rated = np.flatnonzero(mean.count > 0)
    weight = mean.count[rated] / (mean.count[rated] + mean.strength)
    joined = features[f"ridge: {', '.join(every_way)}"]
    trees = ExtraTreesRegressor(200, min_samples_leaf=5, max_features=0.3, random_state=setting.seed)
    trees.fit(joined[rated], mean.total[rated] / mean.count[rated], sample_weight=weight)
    return {**result, "extra trees: encoder, language model, fields": trees.predict(joined)}


def mean_auc(setting: Setting, predicted: Floats) -> float:
    episodes = [*setting.data.episodes("validation")[0], *setting.data.episodes("test")[0]]
    values = [auc(predicted[one.query.items], one.query.likes(setting.threshold)) for one in episodes]
    return float(np.mean([value for value in values if value is not None]))


if __name__ == "__main__":
    main()
