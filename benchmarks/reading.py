"""How fast a language model reads items into the cache, beside what the processor can do, and what bfloat16 costs.

    python benchmarks/reading.py
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/reading.py --label AVX2

writes ``benchmarks/results/reading.json``, beside the other labels there; the second line computes with an older
processor's instructions. The most rated movies of MovieLens latest-small are read on one thread, in float32 and in
bfloat16: items per processor second, and the share of the rate at which this process multiplies large
matrices of the same type. Products are counted by torch while it reads. Then the frozen prompt's log-odds in bfloat16
are compared with float32's, and the AUC that they give each test user's ratings of these movies.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from metarec.config import RunConfig
from metarec.data.interactions import Catalog
from metarec.data.task_data import TaskData, load_task_data
from metarec.data.task_files import load_task
from metarec.evaluation.metrics import auc, bootstrap_interval
from metarec.files.artifacts import cache_dir, load_json, write_json
from metarec.lm.answer_model import AnswerModel
from metarec.system.doctor import environment
from metarec.system.threads import use_threads
from metarec.training.fitting import catalog_answer_model, open_backbone

RESULT = Path(__file__).parent / "results" / "reading.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Products of matrices of this width, as often as it takes; the fastest of several counts.
WIDTH, TRIES = 1024, 20
INSTRUCTIONS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=512, help="the most rated ones (default: 512)")
    parser.add_argument("--task", default="movielens/user-cold")
    parser.add_argument("--backbone", default=RunConfig().backbone)
    parser.add_argument("--label", default="this processor", help="what the measurement is called in the file")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(given)
    use_threads(1)
    data = load_task_data(load_task(arguments.task), 0)
    counts = np.bincount(data.interactions.item, minlength=len(data.interactions.catalog))
    chosen = np.sort(np.argsort(-counts, kind="stable")[: arguments.items])
    rows: dict[str, dict[str, Any]] = {}
    odds: dict[str, np.ndarray] = {}
    for dtype in DTYPES:
        with fresh_cache():
            model = answer_model(data, chosen, arguments.backbone, dtype)
            rows[dtype] = {**reading(model), "gemm_gflop_per_second": gemm_rate(DTYPES[dtype])}
            odds[dtype] = log_odds(model)
        rows[dtype]["share_of_gemm"] = rows[dtype]["gflop_per_second"] / rows[dtype]["gemm_gflop_per_second"]
        print(dtype, rows[dtype])
    result = {
        "command": f"python benchmarks/reading.py --items {len(chosen)} --label '{arguments.label}'",
        "instructions": {name: os.environ[name] for name in INSTRUCTIONS if name in os.environ},
        "main_figure": "processor seconds of one thread: other processes were running, see load_before",
        "load_before": round(os.getloadavg()[0], 1),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "items": len(chosen),
        "rows": rows,
        "bfloat16_against_float32": compared(odds, data, chosen),
        **environment(),
    }
    others = load_json(arguments.out) if arguments.out.exists() else {}
    write_json(arguments.out, {**others, arguments.label: result})
    print(result["bfloat16_against_float32"])


@contextmanager
def fresh_cache() -> Iterator[None]:
    """Has nothing read yet while the body runs; models stay unpacked."""
    before, models = os.environ.get("METAREC_CACHE"), cache_dir() / "models"
    with tempfile.TemporaryDirectory() as folder:
        if models.is_dir():
            (Path(folder) / "models").symlink_to(models.absolute())
        os.environ["METAREC_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("METAREC_CACHE")
            if before is not None:
                os.environ["METAREC_CACHE"] = before


def answer_model(data: TaskData, chosen: np.ndarray, backbone: str, dtype: str) -> AnswerModel:
    """Returns the language model over some items, with the default adapter where it has the layers for it."""
    catalog = data.interactions.catalog
    fields = {name: tuple(column[code] for code in chosen) for name, column in catalog.fields.items()}
    config = RunConfig.model_validate({"backbone": backbone, "dtype": dtype})
    opened = open_backbone(config)
    layers = min(config.adapter.layers, int(opened.modules.config.num_hidden_layers) - 1)
    config = config.model_copy(update={"adapter": config.adapter.model_copy(update={"layers": layers})})
    some = Catalog(tuple(catalog.ids[code] for code in chosen), fields)
    return catalog_answer_model(opened, config, data.task.template, some)


def reading(model: AnswerModel) -> dict[str, float]:
    """Reads all items; returns how fast, in processor seconds of this one thread."""
    items = np.arange(len(model.prompts.tokens))
    model.read(items[:2])  # what all prompts begin with, and memory
    rest = items[2:]
    with FlopCounterMode(display=False) as counted:
        wall, began = time.perf_counter(), time.process_time()
        model.read(rest)
        seconds, wall = time.process_time() - began, time.perf_counter() - wall
    return {
        "items_per_cpu_second": len(rest) / seconds,
        "items_per_second_by_the_clock": len(rest) / wall,
        "tokens_per_item": float(model.prompts.lengths[rest].mean()) - model.prompts.prefix,
        "gflop_per_item": counted.get_total_flops() / len(rest) / 1e9,
        "gflop_per_second": counted.get_total_flops() / seconds / 1e9,
    }


def gemm_rate(dtype: torch.dtype) -> float:
    """Returns how many billion operations a processor second takes, in products of large square matrices."""
    one, other = (torch.randn(WIDTH, WIDTH).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(TRIES):
        began = time.process_time()
        one @ other
        best = min(best, time.process_time() - began)
    return 2 * WIDTH**3 / best / 1e9


def log_odds(model: AnswerModel) -> np.ndarray:
    """Returns every item's log-odds in the frozen model."""
    blocks = torch.arange(len(model.prompts.tokens)).split(64)
    with torch.no_grad():
        return np.concatenate([model.log_odds(model.gather(block[None]), None)[0].float().numpy() for block in blocks])


def compared(odds: Mapping[str, np.ndarray], data: TaskData, chosen: np.ndarray) -> dict[str, Any]:
    """Returns how far log-odds are apart, and the AUC that they give test users' ratings of these items."""
    exact, rounded = odds["float32"], odds["bfloat16"]
    error = np.abs(rounded - exact)
    place = np.full(len(data.interactions.catalog), -1)
    place[chosen] = np.arange(len(chosen))
    pairs = []
    for user in data.parts["test"]:
        rated = data.interactions.ratings(data.interactions.rows_of_user[user])
        inside = rated.rows(np.flatnonzero(place[rated.items] >= 0))
        if len(inside):
            liked, at = inside.likes(data.task.like_threshold), place[inside.items]
            pairs.append((auc(exact[at], liked), auc(rounded[at], liked)))
    known = np.array([pair for pair in pairs if None not in pair], np.float64)
    gained = known[:, 1] - known[:, 0]
    return {
        "log_odds_deviation": float(exact.std()),
        "log_odds_mean_error": float(error.mean()),
        "log_odds_largest_error": float(error.max()),
        "users": len(known),
        "auc": {"float32": float(known[:, 0].mean()), "bfloat16": float(known[:, 1].mean())},
        "auc_difference": [float(gained.mean()), *bootstrap_interval(gained, 0)],
        "auc_largest_difference": float(np.abs(gained).max()),
    }


if __name__ == "__main__":
    main()
