"""Measures what it gains to rate informative items first, against popular ones and random ones.

    python benchmarks/first_items.py --seeds 5     # MovieLens; writes benchmarks/results/first-items.json

Each user is shown six items at a time, as on the service's page, until five of them are items that the user has rated;
the recommender is adapted to these five, and its AUC is measured on the user's query, which is the same for all ways:

- `informative`: what `AdaptedUser.informative` chooses, given the answers so far; each item's gain is weighed by the
  square root of its number of raters (`by raters`: by the number; `known`: of the items that the user has rated, by
  gain alone);
- `popular`: most raters among the meta-training users first;
- `random`: drawn from what the user has rated, so that nothing else is shown;
- `none`: no answer at all.

Validation users and test users are reported apart: the default was chosen by the former.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metarec import MetaRecommender
from metarec.config import RunConfig, validated
from metarec.data.episodes import seeded
from metarec.data.interactions import Ratings
from metarec.data.task_data import TaskData, load_task_data
from metarec.data.task_files import load_task
from metarec.evaluation.metrics import auc, bootstrap_interval
from metarec.files.artifacts import write_json
from metarec.recommending.preferences import BY_RATERS, PreferenceModel
from metarec.scorer import Request
from metarec.system.doctor import environment
from metarec.system.progress import progress

RESULT = Path(__file__).parent / "results" / "first-items.json"
ANSWERS, SHOWN = 5, 6
PARTS = ("validation", "test")
WAYS = ("informative", "by raters", "known", "popular", "random", "none")
# Item means and one Gaussian process, on the catalog's fields: what informative items are chosen by.
SETTINGS: dict[str, Any] = {
    "score": ["item mean", "collaborative"],
    "collaborative": {"features": ["fields"], "members": "gp", "stack": {"folds": 2}},
    "train": {"steps": 20, "validate_every": 20},
}
# Shows so many items to a user who has answered, of those that are left: what was answered, and which items are left.
Show = Callable[[Ratings, np.ndarray], list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="movielens/user-cold")
    parser.add_argument("--seeds", type=int, default=5, help="how many split seeds, from 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with progress("measuring first items", arguments.seeds) as advance:
        for seed in range(arguments.seeds):
            rows += measure(load_task_data(load_task(arguments.task), seed))
            results = {part: summary([row for row in rows if row["part"] == part]) for part in PARTS}
            write_json(
                RESULT, {"task": arguments.task, "seeds": seed + 1, "answers": ANSWERS, **results, **environment()}
            )
            advance(seed + 1)


def measure(data: TaskData) -> list[dict[str, Any]]:
    """Returns a row for each validation and test user: by way, AUC and how many items were shown."""
    recommender = MetaRecommender(None, validated(RunConfig, SETTINGS, "first_items")).fit(data)
    fitted, scorer = recommender.fitted, recommender.scorer()
    model = PreferenceModel.of(fitted)
    assert model is not None
    position = {item: code for code, item in enumerate(fitted.catalog.ids)}
    user_code = {user: code for code, user in enumerate(data.interactions.users)}
    raters = np.asarray(fitted.prior.count)
    by_raters = np.argsort(-raters, kind="stable")

    def informative(power: float) -> Show:
        return lambda answered, left: [
            position[one.item] for one in model.informative(answered, SHOWN, left, by_raters=power)
        ]

    def popular(answered: Ratings, left: np.ndarray) -> list[int]:
        return by_raters[left[by_raters]][:SHOWN].tolist()

    found = []
    for part in PARTS:
        for episode in data.episodes(part)[0]:
            own = data.interactions.ratings(data.interactions.rows_of_user[user_code[episode.user]])
            known = own.rows(np.flatnonzero(~np.isin(own.items, episode.query.items))).unlabelled()
            theirs = np.isin(np.arange(len(raters)), known.items) & (raters > 0)
            drawn = seeded(data.seed, f"first {episode.user}").permutation(len(known))[:ANSWERS]
            supports = {
                "informative": answers(known, episode.query.items, raters > 0, informative(BY_RATERS)),
                "by raters": answers(known, episode.query.items, raters > 0, informative(1.0)),
                "known": answers(known, episode.query.items, theirs, informative(0.0)),
                "popular": answers(known, episode.query.items, raters > 0, popular),
                "random": (known.rows(drawn), ANSWERS),
                "none": (known.rows(drawn[:0]), 0),
            }
            liked = episode.query.likes(data.task.like_threshold)
            row: dict[str, Any] = {"user": episode.user, "part": part}
            for way, (support, shown) in supports.items():
                (scores,) = scorer.score([Request(episode.user, support, episode.query.items)])
                row |= {way: auc(scores.numpy(), liked), f"{way} shown": shown}
            found.append(row)
    return [row for row in found if row["random"] is not None]


def answers(known: Ratings, query: np.ndarray, open_items: np.ndarray, show: Show) -> tuple[Ratings, int]:
    """Returns what a user answers who is shown items until `ANSWERS` of them are known, and how many were shown.

    Args:
        known: What the user has rated but for the query.
        query: Items of the query, which are never shown.
        open_items: Items that may be shown, shape (items,).
        show: What is shown next.
    """
    left = open_items.copy()
    left[query] = False
    place = {int(item): row for row, item in enumerate(known.items)}
    rows: list[int] = []
    shown = 0
    while len(rows) < ANSWERS and (items := show(known.rows(np.array(rows, np.int64)), left)):
        for item in items:
            left[item] = False
            shown += 1
            if item in place:
                rows.append(place[item])
            if len(rows) == ANSWERS:
                break
    return known.rows(np.array(rows, np.int64)), shown


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns means and paired differences to informative items, with intervals over people."""
    people = [row["user"] for row in rows]
    results: dict[str, Any] = {"users": len(set(people)), "episodes": len(rows)}
    for way in WAYS:
        values, shown = (np.array([row[name] for row in rows], np.float64) for name in (way, f"{way} shown"))
        low, high = bootstrap_interval(values, 0, people)
        results[way] = {"auc": float(values.mean()), "low": low, "high": high, "shown": float(np.median(shown))}
    for way, other in itertools.product(WAYS[:3], WAYS[3:]):
        gains = np.array([row[way] - row[other] for row in rows])
        low, high = bootstrap_interval(gains, 0, people)
        results[f"{way} less {other}"] = {"difference": float(gains.mean()), "low": low, "high": high}
    return results


if __name__ == "__main__":
    main()
