"""Measures smaller frozen models: bytes, items read a second, and what is left of the AUC, as one table.

    python benchmarks/smaller.py        # writes results/smaller.json; a few minutes of one CPU core

Of each it is the answer of the frozen model to the task's prompt, the same for every user: the AUC of test users by it,
and how alike its log-odds are to the whole model's. `--backbone runs/tuned/backbone` measures a fine-tuned model. A
distilled score is a ridge regression of the log-odds on a sentence encoder's vectors of the items, fitted on other
items than it is tested on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from metarec.data.episodes import Episode
from metarec.data.task_data import load_task_data
from metarec.data.task_files import load_task
from metarec.data.templates import PromptTemplate
from metarec.evaluation.metrics import auc, bootstrap_interval
from metarec.files.artifacts import write_json
from metarec.lm.answer_model import AnswerModel
from metarec.lm.backbone import Backbone
from metarec.lm.loading import load_backbone
from metarec.lm.placement import default_placement
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.smaller import influence, rounded, weight_bytes, with_blocks
from metarec.lm.tokenized import tokenize_catalog
from metarec.scorers.language.item_vectors import unkept_text_vectors
from metarec.system.doctor import environment

RESULT = Path(__file__).parent / "results" / "smaller.json"
# Texts by which blocks are compared, and the ridge regression's penalty.
_SAMPLE, _PENALTY = 16, 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="movielens/user-cold")
    parser.add_argument("--backbone", default="smollm2-135m-instruct")
    parser.add_argument("--encoder", default="minilm-l6-v2", help="of distilled scores")
    parser.add_argument("--users", type=int, default=20, help="test users at most")
    parser.add_argument("--items", type=int, default=120, help="items that are read at most, the most often queried")
    parser.add_argument("--fewer", type=float, nargs="+", default=[0.8, 0.6], help="shares of blocks to keep")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    data = load_task_data(load_task(given.task), 0)
    episodes = data.evaluated("test")[0][: given.users]
    asked = np.concatenate([episode.query.items for episode in episodes])
    counted = np.bincount(asked, minlength=len(data.interactions.catalog))
    items = np.sort(np.argsort(-counted, kind="stable")[: min(given.items, int((counted > 0).sum()))])
    task, catalog = data.task, data.interactions.catalog
    texts = [task.template.render(catalog, int(code)) for code in items]
    whole = load_backbone(given.backbone)
    measured = measure(whole, variants(whole, given.fewer, texts[:_SAMPLE]), task.template, catalog, items)
    teacher = measured[0]["log_odds"]
    started = time.perf_counter()
    encoder = load_backbone(given.encoder)
    vectors = unkept_text_vectors([task.item_text.render(catalog, int(code)) for code in items], encoder)
    seconds = time.perf_counter() - started
    measured.append(
        {
            "model": f"distilled into {given.encoder}",
            "bytes": weight_bytes(encoder),
            "items_per_second": len(items) / seconds,
            "log_odds": distilled(vectors, teacher),
        }
    )
    rows = table(measured, episodes, items, task.like_threshold)
    for row in rows:
        size, speed = f"{row['bytes'] / 2**20:7.1f} MiB", f"{row['items_per_second']:7.1f} items/s"
        change = f"{row['difference']:+.4f} [{row['low']:+.4f} {row['high']:+.4f}]"
        print(f"{row['model']:42s} {size} {speed}  AUC {row['auc']:.4f} {change}  r {row['correlation']:.3f}")
    facts = {"task": given.task, "backbone": given.backbone, "users": len(episodes), "items": len(items)}
    named = {row["model"]: {**row, "MiB": row["bytes"] / 2**20, "items/s": row["items_per_second"]} for row in rows}
    write_json(given.out, {**facts, "rows": named, **environment()})


def variants(whole: Backbone, shares: Sequence[float], texts: Sequence[str]) -> list[Backbone]:
    """Returns the whole model, it in fewer bits, and it without blocks at the top or of least influence."""
    count = int(whole.modules.config.num_hidden_layers)
    order = influence(whole, texts).argsort(descending=True).tolist()
    found = [whole, rounded(whole, 8), rounded(whole, 4)]
    for share in shares:
        kept = max(1, round(share * count))
        for name, blocks in (("lowest", range(kept)), ("most influential", order[:kept])):
            named = f"{whole.name}, {kept} {name} of {count} blocks"
            found.append(replace(with_blocks(whole, blocks), name=named))
    return found


def measure(
    whole: Backbone, models: Sequence[Backbone], template: PromptTemplate, catalog: Any, items: np.ndarray
) -> list[dict[str, Any]]:
    """Returns of every model its bytes, how fast it reads, and its log-odds of some items."""
    prompts = tokenize_catalog(whole, template, catalog)
    found = []
    for model in models:
        placed = default_placement(model, prompts, layers=1, targets=None, rank=1, alpha=1.0, active_tokens=None)
        answers = AnswerModel(model, prompts, placed, ReferenceForward(model, prompts, placed))
        answers.frozen_log_odds(items[:2])
        started = time.perf_counter()
        odds = answers.frozen_log_odds(items).numpy()
        seconds = time.perf_counter() - started
        size = weight_bytes(model)
        found.append({"model": model.name, "bytes": size, "items_per_second": len(items) / seconds, "log_odds": odds})
    return found


def distilled(vectors: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Returns what a ridge regression predicts of a teacher's numbers, each half of the items by the other."""
    found = np.zeros(len(teacher))
    for half in (0, 1):
        own = np.arange(len(teacher)) % 2 == half
        centre, mean = vectors[~own].mean(0), teacher[~own].mean()
        known = vectors[~own] - centre
        gram = known.T @ known + _PENALTY * np.eye(known.shape[1]) / len(known)
        found[own] = mean + (vectors[own] - centre) @ np.linalg.solve(gram, known.T @ (teacher[~own] - mean))
    return found


def table(
    measured: Sequence[dict[str, Any]], episodes: Sequence[Episode], items: np.ndarray, threshold: float
) -> list[dict[str, Any]]:
    """Returns the rows: AUC over users whose query has both classes, and its paired difference to the first row's."""
    place = {int(code): row for row, code in enumerate(items)}
    rows, first = [], None
    for one in measured:
        values = []
        for episode in episodes:
            known = np.array([int(code) in place for code in episode.query.items], bool)
            scores = np.array([one["log_odds"][place[int(code)]] for code in episode.query.items[known]])
            value = auc(scores, episode.query.likes(threshold)[known]) if known.any() else None
            values.append(np.nan if value is None else value)
        own = np.array(values)
        first = own if first is None else first
        both = ~np.isnan(own) & ~np.isnan(first)
        low, high = bootstrap_interval(own[both] - first[both], 0)
        rows.append(
            {
                **{key: value for key, value in one.items() if key != "log_odds"},
                "users": int(both.sum()),
                "auc": float(own[both].mean()),
                "difference": float((own[both] - first[both]).mean()),
                "low": float(low),
                "high": float(high),
                "correlation": float(np.corrcoef(one["log_odds"], measured[0]["log_odds"])[0, 1]),
            }
        )
    return rows


if __name__ == "__main__":
    main()
