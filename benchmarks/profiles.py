"""Measures how much of what a language model says of people's tastes, and of items, the evidence holds.

    metarec train --preset fast --name fast
    python benchmarks/profiles.py --run runs/fast --users 16 --items 48     # benchmarks/results/profiles.json

Test users of the run's task at their largest K, and items of its catalog, drawn; the run's language model writes,
whether or not its score reads it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metarec import MetaRecommender
from metarec.evaluation.metrics import bootstrap_interval
from metarec.files.artifacts import write_json
from metarec.recommending.profiles import Profile
from metarec.system.doctor import environment

RESULT = Path(__file__).parent / "results" / "profiles.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--users", type=int, default=16, help="how many test users")
    parser.add_argument("--items", type=int, default=48, help="how many items")
    arguments = parser.parse_args()
    recommender = MetaRecommender.from_pretrained(arguments.run)
    data = recommender.task_data()
    supports = [episode.support.head(data.task.shots[-1]) for episode in data.episodes("test")[0][: arguments.users]]
    tastes = [
        recommender.profile(
            recommender.adapted_user(support.unlabelled(), recommender.fitted.meta.init, False, 0.0), generate=True
        )
        for support in supports
    ]
    ids = recommender.fitted.catalog.ids
    drawn = np.random.default_rng(0).choice(len(ids), min(arguments.items, len(ids)), replace=False)
    described = [recommender.describe(ids[code], generate=True) for code in drawn]
    facts = {"task": data.task.name, "K": data.task.shots[-1], "backbone": recommender.backbone.fingerprint}
    rows = {"profiles of people": _row(tastes), "descriptions of items": _row(described)}
    write_json(RESULT, {**facts, **rows, **environment()})


def _row(written: Sequence[Profile]) -> dict[str, float]:
    """Returns how many claims were made, and the shares of those that hold and of texts with one left."""
    for said in written:
        print(f"{said.source}: {said.text}")
    held = [float(np.mean([claim.held for claim in said.claims] or [False])) for said in written]
    kept = [float(said.source == "model") for said in written]
    row: dict[str, float] = {"written": len(written), "claims": sum(len(said.claims) for said in written)}
    for name, values in (("claims that hold", np.array(held)), ("with one left", np.array(kept))):
        low, high = bootstrap_interval(values, 0)
        row |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    return row


if __name__ == "__main__":
    main()
