"""Measures how much of what a language model says of people's tastes their ratings hold.

    python benchmarks/profiles.py --run runs/fast --users 16     # benchmarks/results/profiles.json

Test users of the run's task at their largest K; the run's language model writes, whether or not its score reads it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from metarec import MetaRecommender
from metarec.evaluation.metrics import bootstrap_interval
from metarec.files.artifacts import write_json
from metarec.system.doctor import environment

RESULT = Path(__file__).parent / "results" / "profiles.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--users", type=int, default=16, help="how many test users")
    arguments = parser.parse_args()
    recommender = MetaRecommender.from_pretrained(arguments.run)
    data = recommender.task_data()
    held, kept, claims = [], [], 0
    for episode in data.episodes("test")[0][: arguments.users]:
        support = episode.support.head(data.task.shots[-1]).unlabelled()
        user = recommender.adapted_user(support, recommender.fitted.meta.init, False, 0.0)
        said = recommender.profile(user, generate=True)
        print(f"{said.source}: {said.text}")
        claims += len(said.claims)
        held.append(float(np.mean([claim.held for claim in said.claims] or [False])))
        kept.append(float(said.source == "model"))
    row = {"users": len(held), "claims": claims}
    for name, values in (("claims that hold", np.array(held)), ("users with one left", np.array(kept))):
        low, high = bootstrap_interval(values, 0)
        row |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    facts = {"task": data.task.name, "K": data.task.shots[-1], "backbone": recommender.backbone.fingerprint}
    write_json(RESULT, {**facts, "profiles": row, **environment()})


if __name__ == "__main__":
    main()
