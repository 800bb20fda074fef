"""What low precision costs: AUC of a trained recommender's test users when it is loaded in mixed precision or bfloat16.

    python benchmarks/precision.py runs/quickstart

writes ``benchmarks/results/precision.json``: paired differences of per-user AUC to float32. The meta-gradient's own
error is in ``speed.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import numpy as np

from metarec.artifacts import write_json
from metarec.cli.runs import load_run, provenance
from metarec.config import Dtype

RESULT = Path(__file__).parent / "results" / "precision.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a run")
    parser.add_argument("--dtype", action="append", choices=get_args(Dtype), help="default: mixed; may be repeated")
    arguments = parser.parse_args()
    values, seconds = {}, {}
    for dtype in ("float32", *(arguments.dtype or ("mixed",))):
        recommender = load_run(arguments.run, dtype=dtype)
        scorer = recommender.scorer()
        report = recommender.evaluate(scorers=[recommender.scorers()[0], scorer])
        shots = recommender.fitted.task.shots
        values[dtype] = {count: report.values(scorer.name, count).to_numpy() for count in shots}
        seconds[dtype] = {cell.shots: cell.seconds_per_user for cell in report.cells() if cell.method == scorer.name}
    rows = []
    for dtype in values:
        for count, found in values[dtype].items():
            difference = found - values["float32"][count]
            rows.append(
                {
                    "dtype": dtype,
                    "shots": count,
                    "users": len(found),
                    "auc": float(found.mean()),
                    "mean_difference": float(difference.mean()),
                    "largest_difference": float(np.abs(difference).max()),
                    "seconds_per_user": seconds[dtype][count],
                }
            )
            print(rows[-1])
    write_json(
        RESULT, {"command": f"python benchmarks/precision.py {arguments.run}", "rows": rows, **provenance(recommender)}
    )


if __name__ == "__main__":
    main()
