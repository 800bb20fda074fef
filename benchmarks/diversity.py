"""Measures what `recommend(diversity=...)` gains in diversity and costs in hits, on test users of MovieLens.

    python benchmarks/diversity.py --run runs/fast     # a run of movielens/user-cold; writes results/diversity.json

Ten movies out of the whole catalog for every test user at K = 20. A hit is a movie of the list that the user likes in
their query; lists hold few of these, for users rated few of all movies.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from metarec import MetaRecommender
from metarec.evaluation.metrics import bootstrap_interval
from metarec.evaluation.recommended_lists import catalog_facts, diversity, of_all_users, popularity
from metarec.files.artifacts import write_json
from metarec.system.doctor import environment

RESULT = Path(__file__).parent / "results" / "diversity.json"
WEIGHTS, LENGTH = (0.0, 0.1, 0.3, 0.5, 1.0), 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run of movielens/user-cold")
    recommender = MetaRecommender.from_pretrained(parser.parse_args().run)
    data = recommender.task_data()
    facts, shots = catalog_facts(data), data.task.shots[-1]
    episodes = data.episodes("test")[0]
    supports = [episode.support.head(shots).unlabelled() for episode in episodes]
    adapted = recommender.scorer().adapt(supports)
    code = {item: place for place, item in enumerate(facts.ids)}
    lists: dict[float, np.ndarray] = {}
    for weight in WEIGHTS:
        found = []
        for row, support in enumerate(supports):
            state = {name: value[row] for name, value in adapted.state.items()}
            user = recommender.adapted_user(support, state, False, 0.0)
            found.append([code[entry.item] for entry in user.recommend(LENGTH, diversity=weight)])
        lists[weight] = np.array(found)
        print(f"diversity={weight:g} done")
    liked = [episode.query.items[episode.query.likes(data.task.like_threshold)] for episode in episodes]
    measured = {weight: measures(codes, facts, liked) for weight, codes in lists.items()}
    results: dict[str, Any] = {"task": data.task.name, "K": shots, "users": len(episodes)}
    for weight, values in measured.items():
        row: dict[str, Any] = {}
        for name, own in values.items():
            low, high = bootstrap_interval(own, 0)
            row |= {name: float(own.mean()), f"{name}_low": low, f"{name}_high": high}
        coverage, (low, high) = of_all_users("coverage", lists[weight], len(facts.ids))
        row |= {"coverage@10": coverage, "coverage@10_low": low, "coverage@10_high": high}
        difference = values["hits"] - measured[0.0]["hits"]
        low, high = bootstrap_interval(difference, 0)
        results[f"diversity {weight:g}"] = {**row, "difference": float(difference.mean()), "low": low, "high": high}
    write_json(RESULT, {**results, **environment()})


def measures(lists: np.ndarray, facts: Any, liked: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Returns every user's diversity, popularity and number of hits."""
    hits = [float(np.isin(codes, own).sum()) for codes, own in zip(lists, liked, strict=True)]
    return {
        "diversity@10": diversity(lists, facts.vectors),
        "popularity@10": popularity(lists, facts.raters),
        "hits": np.array(hits),
    }


if __name__ == "__main__":
    main()
