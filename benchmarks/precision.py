"""What low precision costs: AUC and log-odds of a trained recommender that is loaded in other precisions.

    metarec train --preset quick --name no-stack --set "score=[item mean,prompt,adapter]"
    python benchmarks/precision.py runs/no-stack

writes ``benchmarks/results/precision.json``: of test users, paired differences of AUC to float32; of the items of their
queries, differences of log-odds before and after adapting to ten ratings; bytes that the cache takes for an item.
``cache`` is the precision of the keys and values that are kept of items, ``dtype`` that of the weights. The
meta-gradient's own error is in ``speed.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metarec.cli.runs import load_run, provenance
from metarec.files.artifacts import write_json
from metarec.lm.cached_forward import CachedForward
from metarec.recommender import MetaRecommender

RESULT = Path(__file__).parent / "results" / "precision.json"
EXACT: dict[str, Any] = {"dtype": "float32", "cache": "float32"}
OTHERS: dict[str, dict[str, Any]] = {
    "mixed": {"dtype": "mixed", "cache": "float32"},
    "float16": {"dtype": "float32", "cache": "float16"},
    "int8": {"dtype": "float32", "cache": "int8"},
}
_SHOTS, _USERS = 10, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a run")
    parser.add_argument("--precision", action="append", choices=list(OTHERS), help="default: float16 and int8")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    exact = load_run(given.run, **EXACT)
    auc, odds = auc_by_shots(exact), log_odds(exact)
    rows = [{**EXACT, "bytes_per_item": bytes_per_item(exact), "auc": {k: float(v.mean()) for k, v in auc.items()}}]
    for name in given.precision or ["float16", "int8"]:
        rounded = load_run(given.run, **OTHERS[name])
        rows.append({**OTHERS[name], "bytes_per_item": bytes_per_item(rounded), **compared(rounded, auc, odds)})
        print(rows[-1])
    facts = {"command": f"python benchmarks/precision.py runs/{given.run.name}", "rows": rows, **provenance(exact)}
    write_json(given.out, facts)


def auc_by_shots(recommender: MetaRecommender) -> dict[int, np.ndarray]:
    """Returns every test user's AUC of the adapted score, by K."""
    scorer = recommender.scorer()
    report = recommender.evaluate(scorers=[recommender.scorers()[0], scorer])
    return {count: report.values(scorer.name, count).to_numpy() for count in recommender.fitted.task.shots}


def log_odds(recommender: MetaRecommender) -> np.ndarray:
    """Returns log-odds of test users' queries, of the frozen model and of their own adapters, shape (2, items)."""
    model = recommender.fitted.answer_model
    assert model is not None
    scorer = recommender.scorer()
    episodes = recommender.task_data().evaluated("test")[0][:_USERS]
    found = []
    for episode in episodes:
        state = scorer.adapt([episode.support.head(_SHOTS)]).state
        batch = model.gather(torch.from_numpy(episode.query.items)[None])
        adapters = {name: value for name, value in state.items() if name in model.spec.tensor_shapes}
        with torch.no_grad():
            found.append([model.log_odds(batch, None)[0].numpy(), model.log_odds(batch, adapters)[0].numpy()])
    return np.concatenate([np.stack(pair) for pair in found], 1)


def bytes_per_item(recommender: MetaRecommender) -> int:
    """Returns the bytes that the cache takes for an item, on average."""
    model = recommender.fitted.answer_model
    assert model is not None
    assert isinstance(model.forward, CachedForward)
    return round(model.forward.bytes_per_item)


def compared(rounded: MetaRecommender, auc: dict[int, np.ndarray], odds: np.ndarray) -> dict[str, Any]:
    """Returns how far AUC and log-odds are from those in float32."""
    differences = {count: values - auc[count] for count, values in auc_by_shots(rounded).items()}
    error = np.abs(log_odds(rounded) - odds)
    return {
        "auc_mean_difference": {count: float(found.mean()) for count, found in differences.items()},
        "auc_largest_difference": {count: float(np.abs(found).max()) for count, found in differences.items()},
        "log_odds_deviation": [float(value) for value in odds.std(1)],
        "log_odds_mean_error": [float(value) for value in error.mean(1)],
        "log_odds_largest_error": [float(value) for value in error.max(1)],
    }


if __name__ == "__main__":
    main()
