"""Runs the cells of a benchmark: one method on one split each; what is done is not measured again."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from metarec.bench.methods import METHODS, MethodContext, MethodRow
from metarec.bench.plan import Cell, Plan, cells, check_names
from metarec.bench.results import CELL_FACTS, CELL_TABLES
from metarec.data.episodes import Episode
from metarec.data.task_data import TaskData, load_dataset, load_task_data
from metarec.data.task_files import load_task
from metarec.errors import ArtifactError, ConfigError, EvaluationError, MetarecError
from metarec.evaluation.evaluate import beside_pooled, evaluate_on
from metarec.evaluation.metrics import BASELINE
from metarec.files.artifacts import (
    SCHEMA_VERSION,
    content_hash,
    dump_json,
    load_json,
    parse_json,
    replace_dir,
    verify_dir,
)
from metarec.scorer import Request, request
from metarec.system.devices import check_device
from metarec.system.doctor import environment
from metarec.system.progress import QUIET, progress

_LOG = logging.getLogger(__name__)
_SHOWN_USERS, _SHOWN_PROMPTS = 3, 2


def run(plan: Plan, out: Path, *, jobs: int = 1, fresh: bool = False) -> None:
    """Measures the cells of a plan that are not there yet.

    Args:
        plan: What to measure.
        out: Folder of the cells and of what trainings keep.
        jobs: Number of processes; each takes its share of the cores.
        fresh: Measures all of them again.

    Raises:
        ConfigError: A task, a method or a setting is not known.
        EvaluationError: A cell failed; all others were measured first.
        KeyboardInterrupt: Everything that is done is kept, trainings in their checkpoints.
    """
    _data.cache_clear()  # files may have changed since
    wanted = cells(plan)
    check_names(wanted)  # so that a task that cannot be read ends it here, and not every cell
    missing_cells = wanted if fresh else missing(wanted, out)
    for device in {cell.changed["device"] for cell in missing_cells if "device" in cell.changed}:
        check_device(device)
    failed: dict[Cell, str] = {}
    waiting = dict.fromkeys(missing_cells, True)
    with progress("cells", len(missing_cells)) as advance:
        advance(0, _in_work(waiting))
        for done, (cell, problem) in enumerate(_measured(missing_cells, out, jobs, fresh), start=1):
            if problem:
                failed[cell] = problem
            del waiting[cell]
            advance(done, _in_work(waiting))
    if failed:
        cell, problem = next(iter(failed.items()))
        raise EvaluationError(
            f"{len(failed)} of {len(missing_cells)} cells failed, the first '{cell.method}' on '{cell.task}', seed "
            f"{cell.seed}: {problem.strip().splitlines()[-1]}",
            f"The others are kept; the whole errors are in {out / 'failed.json'}",
        )


def _in_work(waiting: Iterable[Cell]) -> str:
    """Returns the name of the cell that is measured now, the first of those that are not done; "" if all are."""
    return next((f"{cell.method} on {cell.task}, seed {cell.seed}" for cell in waiting), "")


def missing(wanted: Sequence[Cell], out: Path) -> list[Cell]:
    """Returns the cells that were not measured yet, or not as they would be now, on the data that are there now."""
    done = [cell for cell in wanted if _is_done(cell, out)]
    stale = _on_other_data(done, out)
    if stale:
        _LOG.warning("%d cells were measured on other data than there are now, and count as missing", len(stale))
    fresh = set(done) - stale
    return [cell for cell in wanted if cell not in fresh]


def _on_other_data(done: Sequence[Cell], out: Path) -> set[Cell]:
    """Returns measured cells whose data changed since; a task's files are read once for all seeds.

    What metarec embeds does not change. Data that cannot be read cannot be compared, which is said.
    """
    stale: set[Cell] = set()
    for name in dict.fromkeys(cell.task for cell in done):
        task = load_task(name)
        sets = [*task.dataset.parts.values()] or [task.dataset]
        if all(part.path is None and ":" not in part.source for part in sets):
            continue
        cells_of_task = [cell for cell in done if cell.task == name]
        try:
            # Without what `load_task_data` does after reading.
            source = task.dataset.model_copy(update={"fields": {}, "ratings_per_user": (1, None)})
            read = load_dataset(source, files=task.split.files)
            hashes = {seed: load_task_data(task, seed, read).hashes for seed in {cell.seed for cell in cells_of_task}}
        except MetarecError as error:
            _LOG.warning("the data of '%s' cannot be compared with what was measured: %s", name, error)
            continue
        stale |= {
            cell
            for cell in cells_of_task
            if load_json(out / "cells" / cell.folder / CELL_FACTS)["hashes"] != hashes[cell.seed]
        }
    return stale


def _measured(wanted: Sequence[Cell], out: Path, jobs: int, fresh: bool) -> Iterator[tuple[Cell, str]]:
    failures = out / "failed.json"
    failures.unlink(missing_ok=True)
    problems: dict[str, str] = {}

    def noted(cell: Cell, problem: str) -> tuple[Cell, str]:
        if problem:
            problems[str(cell.folder)] = problem
            out.mkdir(parents=True, exist_ok=True)
            failures.write_text(dump_json(problems), encoding="utf-8")
        return cell, problem

    if jobs == 1:
        for cell in wanted:
            yield noted(cell, _try(cell, out, fresh))
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker, (threads,))
    try:
        futures = {pool.submit(_try, cell, out, fresh): cell for cell in wanted}
        for future in as_completed(futures):
            yield noted(futures[future], future.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(threads: int) -> None:
    # Limits hold for libraries that are loaded: scikit-learn brings a pool of threads too.
    import sklearn.utils  # noqa: F401

    from metarec.system.threads import use_threads

    os.environ[QUIET] = "1"
    use_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent is gone: a killed parent cannot end it, and it would go on with its cells."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _try(cell: Cell, out: Path, fresh: bool) -> str:
    """Measures a cell; returns the error that kept it from being measured, or nothing."""
    try:
        _measure(cell, out, fresh)
    except Exception:
        # Of a hundred cells one may fail for a reason of its own; `run` says so at the end, with status 2.
        return traceback.format_exc()
    return ""


@lru_cache(maxsize=1)
def _data(task: str, seed: int) -> TaskData:
    return load_task_data(load_task(task), seed)


def _identity(cell: Cell) -> dict[str, Any]:
    """Returns all that a cell's figures are a function of but metarec's own code; as JSON values.

    Raises:
        ConfigError: An option of the method is no JSON value.
    """
    task, code = load_task(cell.task), METHODS.code(cell.method)
    options = dict(METHODS.get(cell.method).options)
    outside = {} if code is None else {"code": code}
    identity = {**cell.identity, "task": task.name, "task_digest": task.digest, "options": options, **outside}
    try:
        return dict(parse_json(dump_json(identity)))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the options of the method '{cell.method}' are not plain JSON values: {error}", "Name things by texts"
        ) from None


def _is_done(cell: Cell, out: Path) -> bool:
    """Says whether a cell was measured as it would be now; a damaged one was not."""
    folder = out / "cells" / cell.folder
    try:
        verify_dir(folder, "cell")
    except ArtifactError:
        return False
    return bool(load_json(folder / CELL_FACTS)["identity"] == _identity(cell))


def _measure(cell: Cell, out: Path, fresh: bool) -> None:
    began, began_at = datetime.now(timezone.utc), time.perf_counter()
    data = _data(cell.task, cell.seed)
    # What a training leaves behind belongs to the method's options and to the data as well as to the cell.
    identity = _identity(cell)
    folder = out / "work" / cell.folder.parent / f"{cell.folder.name}-{content_hash([identity, data.hashes])[:8]}"
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    context, method = MethodContext(data, folder, cell.train_users, cell.changed), METHODS.get(cell.method)
    episodes, short = data.evaluated("test")
    labels = [episode.query.likes(data.task.like_threshold) for episode in episodes]
    both = [episode for episode, liked in zip(episodes, labels, strict=True) if 0 < liked.sum() < len(liked)]
    chosen = episodes if cell.users is None else both[: cell.users]
    started = time.perf_counter()
    rows = list(method.rows(context))
    if cell.method == BASELINE:
        rows += map(MethodRow, beside_pooled(data.task, data.interactions.catalog))
    fit_seconds = time.perf_counter() - started
    report = evaluate_on(
        data,
        [row.scorer for row in rows],
        chosen,
        seed=cell.seed,
        baseline=rows[0].scorer.name,
        left_out={"too few ratings": short} if short else {},
    )
    facts = {
        "schema_version": SCHEMA_VERSION,
        "identity": identity,
        "group": method.group,
        "fit_seconds": fit_seconds,
        "began": began.isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - began_at,
        "left_out": dict(report.left_out),
        "metrics": report.metrics,
        "hashes": data.hashes,
        **environment(),
        "rows": [_row_facts(row, chosen, data) for row in rows],
    }
    with replace_dir(out / "cells" / cell.folder, "cell") as directory:
        (directory / CELL_FACTS).write_text(dump_json(facts), encoding="utf-8")
        for name in CELL_TABLES:
            getattr(report, name).to_parquet(directory / f"{name}.parquet", index=False)


def _row_facts(row: MethodRow, chosen: Sequence[Episode], data: TaskData) -> dict[str, Any]:
    """Returns what a cell keeps of a row beside its scores, as JSON values."""
    return {
        "method": row.scorer.name,
        "parameters": int(row.parameters),
        "log_odds": row.log_odds,
        "step": row.step,
        "tokens": {
            str(shots): float(np.mean([row.tokens(request(episode, shots)) for episode in chosen]))
            for shots in data.task.shots
        },
        "prompts": _prompts(row, [request(episode, max(data.task.shots)) for episode in chosen], data),
    }


def _prompts(row: MethodRow, requests: Sequence[Request], data: TaskData) -> dict[str, dict[str, str]]:
    """Returns what a language model reads of a few users' first candidates, by user and item."""
    if row.prompt is None:
        return {}
    ids = data.interactions.catalog.ids
    return {
        asked.user: {ids[code]: row.prompt(asked, int(code)) for code in asked.candidates[:_SHOWN_PROMPTS]}
        for asked in requests[:_SHOWN_USERS]
    }
