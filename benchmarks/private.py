"""Measures what privacy costs: the AUC of test users by the epsilon of meta-training, by noise.

    python benchmarks/private.py    # writes results/private.json; needs metarec[private]; a few minutes of one CPU core

By default a small model on few items: `--task movielens/user-cold --plain` takes the default's settings, and hours.

Federated FOMAML or Reptile as a simulation, see `metarec.meta.private`. The score has nothing that is learned from
users outside meta-training: neither item means nor a collaborative term.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from metarec import MetaRecommender
from metarec.config import RunConfig, override, validated
from metarec.files.artifacts import write_json
from metarec.system.doctor import environment

RESULT = Path(__file__).parent / "results" / "private.json"
# Small enough for a few minutes: a sentence encoder, and few steps of few users.
_SMALL = (
    "backbone=minilm-l6-v2",
    "adapter.layers=2",
    "train.steps=20",
    "train.users=8",
    "train.validate_every=10",
    "train.validation_users=30",
    "train.max_query=8",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="movielens/brief")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 1.0, 3.0])
    parser.add_argument("--clip", type=float, default=0.5)
    parser.add_argument("--algorithm", choices=["fomaml", "reptile"], default="fomaml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="a setting, e.g. train.steps=50")
    parser.add_argument("--plain", action="store_true", help="by the default's settings, but for --set")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    given.settings = [*(() if given.plain else _SMALL), *given.settings]
    asked = {name: getattr(given, name) for name in ("task", "algorithm", "clip", "seed", "settings")}
    results: dict[str, Any] = asked
    rows = curve(given.task, given.algorithm, given.noise, given.clip, given.seed, given.settings)
    results["rows"] = {"not private" if row["noise"] == "off" else f"noise {row['noise']:g}": row for row in rows}
    for row in rows:
        said = "none" if row["epsilon"] is None else f"{row['epsilon']:.2f}"
        print(
            f"noise {row['noise']:<5} epsilon {said:>7}  AUC {row['auc']:.4f} before training {row['start']:.4f} "
            f"{row['difference']:+.4f} [{row['low']:+.4f} {row['high']:+.4f}]"
        )
    write_json(given.out, {**results, **environment()})


def curve(
    task: str, algorithm: str, noises: list[float], clip: float, seed: int, settings: list[str]
) -> list[dict[str, Any]]:
    """Returns one row by noise, the plain run first: its epsilon, and AUC at the largest K against before training."""
    rows = []
    plain = {"score": ["prompt", "adapter"], "meta": {"algorithm": algorithm}, "seed": seed, "task": task}
    for noise in [None, *noises]:
        private = {} if noise is None else {"private": {"clip": clip, "noise": noise}}
        config = validated(RunConfig, override({**plain, **private}, settings), "--set")
        recommender = MetaRecommender.from_pretrained(config.backbone, config)
        recommender.fit(task)
        trained = recommender.scorer(name="trained")
        fresh = MetaRecommender(recommender.backbone, config).prepare(task).scorer(name="item mean")
        report = recommender.evaluate(scorers=[fresh, trained])
        shots = max(recommender.fitted.task.shots)
        gain, (low, high) = report.difference("trained", shots, "item mean", shots)
        privacy = recommender.fitted.training.get("privacy", {})
        rows.append(
            {
                "noise": "off" if noise is None else noise,
                "epsilon": privacy.get("epsilon"),
                "delta": privacy.get("delta"),
                "sample_rate": privacy.get("sample_rate"),
                "steps": recommender.fitted.training["steps"],
                "shots": shots,
                "users": len(report.values("trained", shots)),
                "auc": float(report.values("trained", shots).mean()),
                "start": float(report.values("item mean", shots).mean()),
                "difference": float(gain),
                "low": float(low),
                "high": float(high),
            }
        )
    return rows


if __name__ == "__main__":
    main()
