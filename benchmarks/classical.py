"""Every plain baseline on one task, over several split seeds: who gains how much over the shrunk item mean.

    python benchmarks/classical.py                            # ten seeds of the default data
    python benchmarks/classical.py --data DIR --task ml1m     # or goodbooks; CSV files that are not part of metarec
    python benchmarks/classical.py --tune                     # chooses hyper-parameters on validation users

writes ``benchmarks/results/classical.json`` (``classical-TASK.json`` for other data), and with ``--tune``
``classical-tuning.json``. A method that is done on a seed is kept in ``runs/`` and not run again. Users are pooled
over seeds; differences are paired within user and seed.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from headline import markdown, pool

from metarec.artifacts import load_json, replace_file, write_json
from metarec.backbone import load_backbone
from metarec.episodes import split_users
from metarec.evaluate import Report, evaluate, request
from metarec.interactions import Catalog, Interactions
from metarec.metrics import auc
from metarec.priors import ItemPrior, fit_item_mean, smooth_by_text
from metarec.progress import progress
from metarec.prompts import PromptTemplate, tokenize_catalog
from metarec.reader import default_placement, open_reader
from metarec.recommender import BASELINE
from metarec.scorer import Scorer
from metarec.scorers.features import item_features
from metarec.scorers.foldin import fit_als, fit_ease, fit_item_knn, fit_user_knn
from metarec.scorers.gp import fit_gp
from metarec.scorers.networks import fit_network
from metarec.scorers.text import fit_text_logistic, fit_text_ridge, fit_two_tower
from metarec.scorers.trivial import Constant, ItemMean, Popularity, Random
from metarec.sources import assemble
from metarec.task import Task, TaskData, load_task

ROOT = Path(__file__).parent
ENCODER = "minilm-l6-v2"
TEXT = PromptTemplate(
    "{{ title }}{% if year %} ({{ year }}){% endif %}"
    "{% for field in [genres, authors] if field %}, {{ field }}{% endfor %}",
    "good",
    "bad",
)
PCA_COMPONENTS = 48


class Setting:
    """One split with everything methods are fitted from, each part computed once."""

    def __init__(self, data: TaskData, vectors: np.ndarray) -> None:
        self.data, self.vectors, self.seed = data.interactions, vectors, data.seed
        self.users, self.threshold = data.parts["train"], data.task.like_threshold
        self.mean = fit_item_mean(self.data, self.users)
        self.prior: ItemPrior = smooth_by_text(self.mean, vectors, self.seed)
        self.blocks = item_features(self.data.catalog)
        self.task_data = data
        left, values, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
        text = left[:, :PCA_COMPONENTS] * values[:PCA_COMPONENTS]
        self.features = np.concatenate(
            [block / np.sqrt((block**2).sum(1).mean()) for block in (text, *self.blocks.values())], 1
        )


def network(form: Any, setting: Setting, **options: Any) -> Scorer:
    held_out, _ = setting.task_data.episodes("validation")
    return fit_network(
        form,
        setting.data,
        setting.users,
        setting.prior,
        setting.features,
        validation=held_out,
        threshold=setting.threshold,
        seed=setting.seed,
        **options,
    )


Fit = Callable[..., Scorer]
FITS: dict[str, Fit] = {
    BASELINE: lambda s: ItemMean(s.mean),
    "random": lambda s: Random(s.data.catalog, s.seed),
    "constant": lambda s: Constant(s.data.catalog),
    "popularity": lambda s: Popularity(s.mean),
    "item mean with text": lambda s: ItemMean(s.prior, name="item mean with text"),
    "text ridge, no prior": lambda s, **o: fit_text_ridge(s.prior, s.vectors, offset=False, **o),
    "text logistic, no prior": lambda s, **o: fit_text_logistic(
        s.data, s.users, s.prior, s.vectors, threshold=s.threshold, offset=False, **o
    ),
    "two-tower cosine": lambda s: fit_two_tower(s.vectors, threshold=s.threshold),
    "user-kNN": lambda s, **o: fit_user_knn(s.data, s.users, s.prior, **o),
    "item-kNN": lambda s, **o: fit_item_knn(s.data, s.users, s.prior, **o),
    "EASE": lambda s, **o: fit_ease(s.data, s.users, s.prior, **o),
    "ALS": lambda s, **o: fit_als(s.data, s.users, s.prior, seed=s.seed, **o),
    "text logistic": lambda s, **o: fit_text_logistic(s.data, s.users, s.prior, s.vectors, threshold=s.threshold, **o),
    "text ridge": lambda s, **o: fit_text_ridge(s.prior, s.vectors, **o),
    "MeLU": partial(network, "melu"),
    "neural process": partial(network, "neural process"),
    "GP": lambda s, **o: fit_gp(s.data, s.users, {"text": s.vectors, **s.blocks}, seed=s.seed, **o),
}
GRIDS: dict[str, Mapping[str, tuple[Any, ...]]] = {
    "text ridge, no prior": {"penalty": (0.3, 1.0, 3.0), "bias_strength": (0.0, 2.0)},
    "text logistic, no prior": {"penalty": (0.03, 0.3, 3.0)},
    "user-kNN": {"neighbours": (50, 200), "shrinkage": (5.0, 20.0), "strength": (0.3, 1.0, 3.0)},
    "item-kNN": {"shrinkage": (10.0, 30.0, 100.0), "strength": (0.1, 0.3, 1.0)},
    "EASE": {"penalty": (100.0, 300.0, 1000.0), "min_ratings": (5, 10)},
    "ALS": {"factors": (8, 16), "item_penalty": (10.0, 30.0), "user_penalty": (1.0, 3.0, 10.0)},
    "text logistic": {"penalty": (0.3, 1.0, 3.0)},
    "text ridge": {"penalty": (1.0, 3.0, 10.0), "bias_strength": (0.0, 2.0)},
    "MeLU": {"lr": (1e-3, 3e-3), "inner_lr": (0.03, 0.1), "weight_decay": (0.1,)},
    "neural process": {"lr": (1e-3, 3e-3), "weight_decay": (0.1, 1.0)},
    "GP": {"noise": (0.5, 0.7), "choice": (2.0, 4.0), "choice_strength": (3.0, 10.0)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many split seeds, from 0")
    parser.add_argument("--task", default="movielens/user-cold", help="a task, or ml1m or goodbooks with --data")
    parser.add_argument("--data", type=Path, help="directory of ml1m_*.csv and goodbooks_*.csv")
    parser.add_argument("--methods", nargs="*", default=list(FITS), help="only these, beside the baseline")
    parser.add_argument("--tune", action="store_true", help="choose hyper-parameters on validation users instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, interactions = read(arguments.task, arguments.data)
    vectors = text_vectors(interactions.catalog)
    label = "" if arguments.data is None else f"-{arguments.task}"
    if arguments.tune:
        tune(task, interactions, vectors, arguments.seeds, arguments.methods, f"classical{label}-tuning")
        return
    methods = [name for name in FITS if name == BASELINE or name in arguments.methods]
    reports, fit_seconds = [], []
    with progress("cells", arguments.seeds * len(methods)) as advance:
        for seed in range(arguments.seeds):
            data = TaskData(task, interactions, split_users(interactions, task.split.fractions, seed), seed)
            setting = cache(partial(Setting, data, vectors))
            cells = []
            for name in methods:
                cells.append(measure(data, setting, name, Path("runs") / f"classical{label}" / str(seed)))
                advance(seed * len(methods) + len(cells), name)
            users, costs, left_out, seconds = zip(*cells, strict=True)
            reports.append((pd.concat(users).assign(seed=seed), pd.concat(costs), left_out[0]))
            fit_seconds.append(dict(zip(methods, seconds, strict=True)))
    pooled = pool(reports)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT)
    write_json(
        ROOT / "results" / f"classical{label}.json",
        {
            "command": f"python benchmarks/classical.py --task {arguments.task} --seeds {arguments.seeds}"
            + (" --data DIR" if arguments.data else "")
            + (f" --methods {shlex.join(methods)}" if len(methods) < len(FITS) else ""),
            "task": task.name,
            "task_digest": task.digest,
            "commit": commit.stdout.strip(),
            "encoder": ENCODER,
            "seeds": list(range(arguments.seeds)),
            "fit_seconds": {name: float(np.mean([entry[name] for entry in fit_seconds])) for name in methods},
            "gain_by_seed": {
                name: [by_seed(users, name) for users, *_ in reports] for name in methods if name != BASELINE
            },
            **pooled.to_json(),
        },
    )
    print(markdown(pooled))


def measure(
    data: TaskData, setting: Callable[[], Setting], name: str, run: Path
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int], float]:
    """Fits and tests one method on one split, or reads what was measured before from `run`."""
    cell = run / name.replace(" ", "-").replace(",", "")
    if not (cell / "done.json").exists():
        parts = setting()
        started = time.perf_counter()
        scorer = FITS[name](parts)
        seconds = time.perf_counter() - started
        report = tested(data, [scorer], "test")
        cell.mkdir(parents=True, exist_ok=True)
        replace_file(cell / "per_user.parquet", report.per_user.to_parquet)
        replace_file(cell / "costs.parquet", report.costs.to_parquet)
        write_json(cell / "done.json", {"fit_seconds": seconds, "left_out": dict(report.left_out)})
    done = load_json(cell / "done.json")
    users, costs = (pd.read_parquet(cell / f"{table}.parquet") for table in ("per_user", "costs"))
    return users, costs, done["left_out"], done["fit_seconds"]


def tested(data: TaskData, scorers: list[Scorer], part: Any) -> Report:
    episodes, short = data.episodes(part)
    return evaluate(
        scorers,
        episodes,
        data.task.shots,
        data.interactions.catalog,
        threshold=data.task.like_threshold,
        seed=data.seed,
        baseline=scorers[0].name,
        left_out={"too few ratings": short} if short else {},
    )


def by_seed(users: pd.DataFrame, name: str) -> dict[str, float]:
    """Returns one seed's mean gain of a method over the baseline at each K."""
    table = users.pivot(index="user", columns=["method", "shots"], values="auc")
    gain = (table[name] - table[BASELINE]).mean()
    return {f"K={count}": float(value) for count, value in gain.items()}


def tune(
    task: Task, interactions: Interactions, vectors: np.ndarray, seeds: int, methods: list[str], name: str
) -> None:
    """Tries every method's grid; the gain over the item mean on validation users, averaged over K > 0, counts."""
    tried: dict[str, list[dict[str, Any]]] = {
        method: [dict(zip(GRIDS[method], values, strict=True)) for values in itertools.product(*GRIDS[method].values())]
        for method in methods
        if method in GRIDS
    }
    gains: dict[str, np.ndarray] = {method: np.zeros((seeds, len(options))) for method, options in tried.items()}
    with progress("tuning", seeds * sum(map(len, tried.values()))) as advance:
        done = 0
        for seed in range(seeds):
            data = TaskData(task, interactions, split_users(interactions, task.split.fractions, seed), seed)
            setting = Setting(data, vectors)
            for method, options in tried.items():
                for at, chosen in enumerate(options):
                    gains[method][seed, at] = validation_gain(data, setting, FITS[method](setting, **chosen))
                    done += 1
                    advance(done, method)
    result: dict[str, Any] = {}
    for method, options in tried.items():
        mean = gains[method].mean(0)
        result[method] = {
            "best": options[int(mean.argmax())],
            "tried": [{"options": option, "gain": float(gain)} for option, gain in zip(options, mean, strict=True)],
        }
        print(f"{method}: {result[method]['best']}  {mean.max():+.4f}  (worst {mean.min():+.4f})")
    path = ROOT / "results" / f"{name}.json"
    before = load_json(path)["methods"] if path.exists() else {}
    write_json(path, {"command": f"python benchmarks/classical.py --tune --seeds {seeds}", "methods": before | result})


def validation_gain(data: TaskData, setting: Setting, scorer: Scorer) -> float:
    gains = []
    for count in (count for count in data.task.shots if count):
        for episode in data.episodes("validation")[0]:
            liked = episode.query.values >= data.task.like_threshold
            ours, base = (
                method.score([request(episode, count)])[0].numpy() for method in (scorer, ItemMean(setting.mean))
            )
            if 0 < liked.sum() < len(liked):
                gains.append((auc(ours, liked) or 0.0) - (auc(base, liked) or 0.0))
    return float(np.mean(gains))


def read(name: str, directory: Path | None) -> tuple[Task, Interactions]:
    """Reads a task's data: one that comes with metarec, or one of the CSV datasets."""
    if directory is None:
        task = load_task(name)
        from metarec.sources import read_source

        return task, read_source(task.dataset.source, task.dataset.path)
    columns = {"movie_id": "item", "book_id": "item", "user_id": "user", "original_publication_year": "year"}
    files = {
        "ml1m": ("ml1m_ratings.csv.gz", "ml1m_movies.csv"),
        "goodbooks": ("goodbooks_ratings.csv.gz", "goodbooks_books.csv"),
    }
    ratings, items = (
        pd.read_csv(directory / file, dtype=str, keep_default_na=False).rename(columns=columns) for file in files[name]
    )
    items["year"] = items["year"].str.removesuffix(".0")
    task = load_task("movielens/user-cold").model_copy(update={"name": f"{name}/user-cold"})
    return task, assemble(ratings[["user", "item", "rating"]], items, None, name)


def text_vectors(catalog: Catalog) -> np.ndarray:
    """Reads every item with the sentence encoder; cached on disk from then on."""
    fields = {"year": ("",) * len(catalog), "genres": ("",) * len(catalog), "authors": ("",) * len(catalog)}
    backbone = load_backbone(ENCODER)
    prompts = tokenize_catalog(backbone, TEXT, Catalog(catalog.ids, fields | dict(catalog.fields)))
    placement = default_placement(backbone, prompts, layers=1, targets=None, rank=1, alpha=1.0, active_tokens=None)
    return open_reader(backbone, prompts, placement).states.numpy().astype(np.float64)


if __name__ == "__main__":
    main()
