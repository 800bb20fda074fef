"""Measures what re-adapting is worth over time: each chunk of a test user's ratings is predicted by those before.

    python benchmarks/stream.py --run runs/fast       # a run whose data have times; writes results/stream.json

Three ways: never adapted (no rating is known), adapted once to the first chunk and kept, adapted anew after every
chunk. The value is the AUC of the next chunk, where it has likes and others. Every user counts once, by the mean of
their chunks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metarec import MetaRecommender
from metarec.data.interactions import Codes, Interactions, Ratings
from metarec.errors import DataError
from metarec.evaluation.metrics import auc, bootstrap_interval
from metarec.files.artifacts import write_json
from metarec.scorer import Request, Scorer
from metarec.system.doctor import environment

RESULT = Path(__file__).parent / "results" / "stream.json"
WAYS = ("never", "once", "anew")
# A service adapts to so many of the latest ratings at most.
MOST = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--chunk", type=int, default=10, help="ratings that are predicted at a time, and then known")
    parser.add_argument("--chunks", type=int, default=6, help="of each user at most, the first one included")
    parser.add_argument("--users", type=int, default=100, help="test users at most")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    recommender = MetaRecommender.from_pretrained(given.run)
    data = recommender.fitted.split.without_seen(recommender.task_data())
    whole = data.interactions if data.held_out is None else data.held_out
    users = in_order(whole, data.parts["test"], given.chunk, given.chunks)[: given.users]
    found = measured(recommender.scorer(), users, given.chunk, data.task.like_threshold)
    results = {"task": data.task.name, "chunk": given.chunk, **summary(found)}
    for way in WAYS:
        print(f"{way:6s} {results[way]['auc']:.4f}  " + " ".join(f"{value:.4f}" for value in results[way]["by_chunk"]))
    write_json(given.out, {**results, **environment()})


def in_order(data: Interactions, users: Codes, chunk: int, chunks: int) -> list[Ratings]:
    """Returns the ratings of those users who have two chunks at least, in the order of time, so many chunks at most.

    Raises:
        DataError: The data have no times.
    """
    if data.timestamp is None:
        raise DataError("the data have no times", "Choose a task whose ratings have timestamps")
    found = []
    for user in users:
        rows = data.rows_of_user[user]
        rows = rows[np.argsort(data.timestamp[rows], kind="stable")]
        rows = rows[np.sort(np.unique(data.item[rows], return_index=True)[1])]
        if len(rows) >= 2 * chunk:
            found.append(data.ratings(rows[: len(rows) // chunk * chunk][: chunk * chunks]))
    return found


def measured(scorer: Scorer, users: Sequence[Ratings], chunk: int, threshold: float) -> dict[str, np.ndarray]:
    """Returns of every way the AUC of each user's chunks after the first, NaN where it has none, (users, chunks)."""
    requests: list[Request] = []
    places: list[tuple[str, int, int]] = []
    for row, ratings in enumerate(users):
        for place in range(1, len(ratings) // chunk):
            asked = ratings.items[place * chunk : (place + 1) * chunk]
            known = ratings.rows(np.arange(max(0, place * chunk - MOST), place * chunk)).unlabelled()
            for way, support in zip(WAYS, (Ratings.empty(), ratings.head(chunk).unlabelled(), known), strict=True):
                requests.append(Request("", support, asked))
                places.append((way, row, place - 1))
    longest = max((place for _, _, place in places), default=0) + 1
    found = {way: np.full((len(users), longest), np.nan) for way in WAYS}
    for (way, row, place), scores in zip(places, scorer.score(requests), strict=True):
        asked_about = users[row].rows(np.arange((place + 1) * chunk, (place + 2) * chunk))
        value = auc(scores.numpy(), asked_about.likes(threshold))
        found[way][row, place] = np.nan if value is None else value
    return found


def summary(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns means over users, by chunk, and each way's paired difference to the one before it."""
    counted = ~np.isnan(found[WAYS[0]]).all(1)
    means = {way: np.nanmean(values[counted], 1) for way, values in found.items()}
    rows: dict[str, Any] = {"users": int(counted.sum())}
    for way, before in zip(WAYS, (None, *WAYS), strict=False):
        known = ~np.isnan(found[way]).all(0)
        rows[way] = {"auc": float(means[way].mean()), "by_chunk": np.nanmean(found[way][:, known], 0).tolist()}
        if before is not None:
            difference = means[way] - means[before]
            low, high = bootstrap_interval(difference, 0)
            rows[way] |= {"against": before, "difference": float(difference.mean()), "low": low, "high": high}
    return rows


if __name__ == "__main__":
    main()
