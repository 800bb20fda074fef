"""Measures what each block of side information gains where it carries taste, and where it is noise, on a made shop.

    python benchmarks/made_blocks.py     # writes results/made-blocks.json; some minutes

For blocks that no real data at hand have. Each block is fitted to shops of several seeds, with it and without it; the
difference in AUC is paired within test users, with a 95% bootstrap interval over them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from made_pictures import covers_read
from made_shop import (
    ITEMS,
    KINDS,
    MANY_SUBJECTS,
    PLAIN,
    USERS,
    Shop,
    bookshop,
    by_group,
    own_tastes,
    pictures,
    reviewed,
    shop,
    write_friends,
    write_graph,
    write_sentences,
    write_two_shops,
    write_users,
    write_vectors,
)

from metarec import MetaRecommender
from metarec.config import RunConfig, validated
from metarec.data.task import Task
from metarec.data.task_data import load_task_data
from metarec.evaluation.metrics import bootstrap_interval
from metarec.files.artifacts import write_json
from metarec.system.doctor import environment
from metarec.system.progress import progress

RESULT = Path(__file__).parent / "results" / "made-blocks.json"
SPLIT = {"fractions": [0.6, 0.1, 0.3]}
NEW_ITEMS = {"by": "item", "unseen": 0.2, **SPLIT}
SHOTS = (0, 5)
ROW = "metarec, adapted"
ACROSS = "people in two shops"
TWO_SHOPS: dict[str, Any] = {
    "name": "made/two-shops",
    "version": 1,
    "description": "Two shops with the same people.",
    "licence": "none",
    "split": {**SPLIT, "cross": {"support": "movies", "query": "books"}},
    "shots": [0, 10],
    "query": {"max": 20, "min": 4},
    "label": "rating >= 4",
    "prompt": {"text": "{{ title }}", "positive": " Yes", "negative": " No"},
}


@dataclass(frozen=True)
class Block:
    """One block, and the shop that it is measured on.

    Args:
        world: Seed to the shop.
        files: Seed, shop and folder to the options that name the block.
        split: How the shop is split.
        features: What is read of items beside vectors and graphs that the block brings.
        off: Setting that is turned off to measure without the block; None leaves its files out.
    """

    world: Callable[[int], Shop]
    files: Callable[[int, Shop, Path], dict[str, Any]]
    split: Mapping[str, Any]
    features: tuple[str, ...] = ("fields",)
    off: str | None = None


def of_kinds(seed: int) -> Shop:
    return shop(own_tastes(seed + 1), seed=seed)


def of_groups(seed: int) -> Shop:
    return shop(by_group(seed)[1], seed=seed)


def of_moments(seed: int) -> Shop:
    everybodys = np.resize([1.0, -1.0], KINDS)
    return shop(np.tile(everybodys, (USERS, 1)), flipped=np.ones(1), seed=seed)


def of_other_reviews(seed: int) -> Shop:
    world = reviewed(of_kinds(seed), seed)
    other = np.random.default_rng([seed, 17]).permutation(len(world.orders))
    return replace(world, orders=world.orders.assign(text=world.orders["text"].to_numpy()[other]))


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 10]).normal(size=(ITEMS, 16))


def other_kinds(seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 16]).integers(0, KINDS, ITEMS)


def shuffled(seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 11]).permutation(by_group(seed)[0])


def books(seed: int) -> Shop:
    return bookshop(seed)[0]


def many_books(seed: int) -> tuple[Shop, np.ndarray]:
    return bookshop(seed, MANY_SUBJECTS, items=576, users=480)


def sentences(seed: int, world: Shop, folder: Path) -> dict[str, Any]:
    return {"users": write_sentences(folder / "u.csv", bookshop(seed)[1])}


def many_sentences(seed: int, world: Shop, folder: Path) -> dict[str, Any]:
    return {"users": write_sentences(folder / "u.csv", many_books(seed)[1], MANY_SUBJECTS)}


def shuffled_sentences(seed: int, world: Shop, folder: Path) -> dict[str, Any]:
    liked = np.random.default_rng([seed, 13]).permutation(bookshop(seed)[1])
    return {"users": write_sentences(folder / "u.csv", liked)}


TEXT = ("text", "fields")
BLOCKS: dict[str, Block] = {
    "vectors of items": Block(
        of_kinds,
        lambda seed, world, folder: {"vectors": {"v": write_vectors(folder / "v.npz", pictures(world.kind, seed))}},
        NEW_ITEMS,
    ),
    "vectors that are noise": Block(
        of_kinds,
        lambda seed, world, folder: {"vectors": {"v": write_vectors(folder / "v.npz", noise(seed))}},
        NEW_ITEMS,
    ),
    "pictures of items": Block(
        of_kinds,
        lambda seed, world, folder: {"vectors": {"cover": covers_read(folder, world.kind, seed)}},
        NEW_ITEMS,
    ),
    "pictures that are noise": Block(
        of_kinds,
        lambda seed, world, folder: {"vectors": {"cover": covers_read(folder, other_kinds(seed), seed)}},
        NEW_ITEMS,
    ),
    "a graph of items": Block(
        of_kinds, lambda seed, world, folder: {"item_graph": write_graph(folder / "g.csv", world.kind)}, NEW_ITEMS
    ),
    "a graph of items that is noise": Block(
        of_kinds,
        lambda seed, world, folder: {"item_graph": write_graph(folder / "g.csv", other_kinds(seed))},
        NEW_ITEMS,
    ),
    "fields of users": Block(
        of_groups, lambda seed, world, folder: {"users": write_users(folder / "u.csv", by_group(seed)[0], seed)}, SPLIT
    ),
    "fields of users that are noise": Block(
        of_groups, lambda seed, world, folder: {"users": write_users(folder / "u.csv", shuffled(seed), seed)}, SPLIT
    ),
    "sentences of users": Block(books, sentences, SPLIT, TEXT),
    "sentences of users, two towers alone": Block(books, sentences, SPLIT, TEXT, off="towers"),
    "sentences of users that are noise": Block(books, shuffled_sentences, SPLIT, TEXT),
    "sentences about 144 subjects": Block(lambda seed: many_books(seed)[0], many_sentences, SPLIT, TEXT),
    "sentences about 144 subjects, two towers alone": Block(
        lambda seed: many_books(seed)[0], many_sentences, SPLIT, TEXT, off="towers"
    ),
    "friends": Block(
        of_groups,
        lambda seed, world, folder: {"friends": write_friends(folder / "f.csv", by_group(seed)[0], seed)},
        SPLIT,
    ),
    "friends that are noise": Block(
        of_groups,
        lambda seed, world, folder: {"friends": write_friends(folder / "f.csv", shuffled(seed), seed)},
        SPLIT,
    ),
    "moments": Block(of_moments, lambda seed, world, folder: {"context": ["device"]}, SPLIT),
    "moments that are noise": Block(of_kinds, lambda seed, world, folder: {"context": ["device"]}, SPLIT),
    "reviews": Block(
        lambda seed: reviewed(of_kinds(seed), seed), lambda seed, world, folder: {"review": "text"}, SPLIT
    ),
    "reviews that are noise": Block(of_other_reviews, lambda seed, world, folder: {"review": "text"}, SPLIT),
}


def per_user(world: Shop, block: Block, seed: int, files: Mapping[str, Any], off: str | None = None) -> dict[int, Any]:
    """Returns each test user's AUC at every K, fitted with some files, and one setting turned off."""
    features = [*block.features, *(["vectors"] if {"vectors", "item_graph"} & set(files) else [])]
    collaborative = {**PLAIN["collaborative"], "features": features, **({} if off is None else {off: False})}
    settings = {**PLAIN, "seed": seed, "collaborative": collaborative}
    recommender = MetaRecommender.from_pretrained("smollm2-135m-instruct", validated(RunConfig, settings, "benchmark"))
    task = {"split": dict(block.split), "shots": list(SHOTS), "query": {"max": 10, "min": 3}, "label": "rating >= 4"}
    recommender.fit(world.orders, items=world.items, **task, **files)
    report = recommender.evaluate()
    return {count: report.values(ROW, count) for count in SHOTS}


def measured(block: Block, seeds: int, done: Callable[[], None]) -> dict[str, Any]:
    """Returns a block's gain at every K, pooled over seeds."""
    gains: dict[int, list[Any]] = {count: [] for count in SHOTS}
    for seed in range(seeds):
        world = block.world(seed)
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            files = block.files(seed, world, Path())
            with_it = per_user(world, block, seed, files)
            without_it = per_user(world, block, seed, files if block.off else {}, block.off)
        for count in SHOTS:
            gains[count].append(with_it[count] - without_it[count])
        done()
    row: dict[str, Any] = {}
    for count, parts in gains.items():
        pooled = np.concatenate(parts)
        low, high = bootstrap_interval(pooled, 0)
        row[f"K = {count}"] = {"users": len(pooled), "difference": float(pooled.mean()), "low": low, "high": high}
    return row


def across(seeds: int, done: Callable[[], None]) -> dict[str, Any]:
    """Returns what ten ratings in one shop are worth in the other, over none."""
    settings = validated(RunConfig, {**PLAIN, "train": {**PLAIN["train"], "shots": [10]}}, "benchmark")
    gains = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as scratch:
            values = {**TWO_SHOPS, "dataset": write_two_shops(Path(scratch), seed)}
            data = load_task_data(validated(Task, values, "benchmark"), seed)
            report = MetaRecommender.from_pretrained("smollm2-135m-instruct", settings).fit(data).evaluate(data)
        gains.append(report.values(ROW, 10) - report.values(ROW, 0))
        done()
    pooled = np.concatenate(gains)
    low, high = bootstrap_interval(pooled, 0)
    return {"K = 10": {"users": len(pooled), "difference": float(pooled.mean()), "low": low, "high": high}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--block", action="append", choices=[*BLOCKS, ACROSS], help="measure this one alone; may be repeated"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    chosen, out = arguments.block or [*BLOCKS, ACROSS], arguments.out.absolute()
    results: dict[str, Any] = {}
    with progress("fitting shops", len(chosen) * arguments.seeds) as advance:
        for name in chosen:
            count = len(results) * arguments.seeds
            steps = iter(range(count + 1, count + arguments.seeds + 1))
            tell = lambda: advance(next(steps))  # noqa: B023, E731
            block = BLOCKS.get(name)
            results[name] = across(arguments.seeds, tell) if block is None else measured(block, arguments.seeds, tell)
            write_json(out, {"seeds": arguments.seeds, **results, **environment()})
            print(name, {count: f"{cell['difference']:+.4f}" for count, cell in results[name].items()}, flush=True)


if __name__ == "__main__":
    main()
