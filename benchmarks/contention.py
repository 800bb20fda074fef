"""Fitting and adapting beside other busy processes: seconds with none, one and two of them, and the ratios.

Every number of busy processes is measured in a process of its own, with as many threads as its libraries choose. Timed
are, without a language model: a task's stack (without the kernel), its kernel, one meta-step, and one person's
adaptation and ranking. The bar: at most 2.2 times slower.

    python benchmarks/contention.py

writes ``benchmarks/results/contention.json``. Smaller: ``--set collaborative.kernel.steps=4``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metarec.config import RunConfig, override, validated
from metarec.files.artifacts import write_json

RESULT = Path(__file__).parent / "results" / "contention.json"
BAR = 2.2
BUSY = (0, 1, 2)
PEOPLE = 20
META_STEPS = 20
SETTINGS: dict[str, Any] = {"score": ["item mean", "collaborative"], "collaborative": {"features": ["text", "fields"]}}
# The libraries' own choice is measured, whatever the shell says.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def spin() -> None:
    while True:
        pass


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keeps so many other processes busy."""
    spinning = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(processes)]
    for process in spinning:
        process.start()
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.join()


def seconds(run: Callable[[], object], times: int = 1) -> float:
    """Returns the median of some runs."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def measure(config: RunConfig) -> dict[str, float]:
    """Times every stage once; loading the data and reading text is not timed."""
    import torch

    from metarec.data.task_data import load_task_data
    from metarec.data.task_files import load_task
    from metarec.recommender import MetaRecommender
    from metarec.scorers.collaborative.gp import GaussianProcess
    from metarec.scorers.collaborative.kernel_learning import learn_kernel_update, step_schedule
    from metarec.scorers.collaborative.stack import fit_stack
    from metarec.training.fitting import collaborative_features, prepare
    from metarec.training.meta_training import meta_train

    data = load_task_data(load_task(config.task), config.seed)
    interactions, users = data.interactions, data.parts["train"]
    threshold = data.task.like_threshold
    features = collaborative_features(None, data, config)
    collaborative = config.collaborative
    still = collaborative.kernel.model_copy(update={"steps": 0})
    without_kernel = collaborative.model_copy(update={"kernel": still})
    fitted: list[Any] = []
    found = {
        "stack": seconds(
            lambda: fitted.append(fit_stack(interactions, users, features, without_kernel, threshold=threshold))
        )
    }
    folds = fitted[0].out_of_fold
    processes = [fold.stack.members[0] for fold in folds.folds]
    assert all(isinstance(process, GaussianProcess) for process in processes)
    theirs = [
        users[[folds.fold[interactions.users[user]] == fold for user in users]] for fold in range(len(folds.folds))
    ]
    schedule = step_schedule(theirs, collaborative.kernel)
    found["kernel"] = seconds(
        lambda: learn_kernel_update(interactions, processes, theirs, schedule, threshold=threshold)
    )
    # What meta-training and adaptation read need not be good, so the stack without a learned kernel will do.
    quick = {"steps": META_STEPS, "validate_every": META_STEPS, "validation_users": 1}
    settings = config.model_copy(
        update={"collaborative": without_kernel, "train": config.train.model_copy(update=quick)}
    )
    prepared = prepare(data, settings, None)
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        trained = meta_train(data, prepared, settings, {}, Path(scratch) / "checkpoint", False)
        found["meta-step"] = (time.perf_counter() - started) / META_STEPS
    recommender = MetaRecommender(None, settings, trained)
    episode = data.episodes("test")[0][0]
    ten = [
        (interactions.catalog.ids[code], float(value))
        for code, value in zip(episode.support.items[:10], episode.support.values[:10], strict=True)
    ]
    found["adapt"] = seconds(lambda: recommender.adapt(ten).recommend(10), PEOPLE)
    found["threads"] = float(torch.get_num_threads())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], dest="assignments", help="a setting, as of metarec train")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = validated(RunConfig, override(SETTINGS, arguments.assignments), "settings")
    if arguments.measure:
        print(json.dumps(measure(config)))
        return
    command = [sys.executable, __file__, "--measure"]
    command += [part for assignment in arguments.assignments for part in ("--set", assignment)]
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        # Its own cache: a stack that is read is not fitted.
        environment = {key: value for key, value in os.environ.items() if key not in THREAD_VARIABLES}
        models = Path(environment.get("METAREC_CACHE") or Path.home() / ".cache" / "metarec")
        for part in ("models", "data"):
            if (models / part).is_dir():
                (Path(cache) / part).symlink_to(models / part)
        for processes in BUSY:
            with busy(processes):
                done = subprocess.run(
                    command, env={**environment, "METAREC_CACHE": cache}, stdout=subprocess.PIPE, text=True, check=True
                )
            found = json.loads(done.stdout.splitlines()[-1])
            threads = int(found.pop("threads"))
            ratios = {stage: value / rows[0]["seconds"][stage] for stage, value in found.items()} if rows else {}
            rows.append({"busy_processes": processes, "threads": threads, "seconds": found, "times_slower": ratios})
            print(rows[-1], file=sys.stderr)
    worst = max(ratio for row in rows for ratio in row["times_slower"].values())
    result = {
        "command": " ".join(["python benchmarks/contention.py", *(f"--set {one}" for one in arguments.assignments)]),
        "config": config.model_dump(mode="json"),
        "cores": os.cpu_count(),
        "bar": BAR,
        "worst": worst,
        "held": worst <= BAR,
        "rows": rows,
        **_environment(),
    }
    write_json(arguments.out, result)
    print(f"at most {worst:.2f} times slower; the bar is {BAR}")


def _environment() -> dict[str, Any]:
    from metarec.system.doctor import environment

    return environment()


if __name__ == "__main__":
    main()
