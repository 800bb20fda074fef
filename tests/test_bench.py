"""The benchmark: cells that resume, statistics over people, one page that fetches nothing."""

from __future__ import annotations

import csv
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import Ran, known_interactions
from threadpoolctl import threadpool_info

from metarec.bench import cells as bench
from metarec.bench.methods import METHODS, Method, MethodContext, MethodRow
from metarec.bench.plan import Cell, Plan, cells
from metarec.bench.report import _between
from metarec.bench.results import read_cells
from metarec.bench.summary import Summary, crossing, holm
from metarec.bench.webpage import render
from metarec.data.interactions import Ratings
from metarec.errors import ArtifactError, ConfigError, EvaluationError
from metarec.evaluation.metric_names import BEYOND
from metarec.evaluation.metrics import BASELINE
from metarec.files.artifacts import load_json
from metarec.scorers.collaborative.trivial import ItemMean


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The known world as a task of CSV files."""
    folder = tmp_path_factory.mktemp("known")
    data = known_interactions()
    rated = zip(data.user, data.item, data.rating, strict=True)
    with (folder / "ratings.csv").open("w", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(["user", "item", "rating"])
        lines.writerows([data.users[u], data.catalog.ids[i], f"{value:.1f}"] for u, i, value in rated)
    with (folder / "items.csv").open("w", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(["item", "title", "genres"])
        lines.writerows(zip(data.catalog.ids, *data.catalog.fields.values(), strict=True))
    described = {
        "name": "known/user-cold",
        "version": 1,
        "description": "Two opposite tastes.",
        "licence": "made up",
        "dataset": {"source": "table", "path": str(folder)},
        "split": {"fractions": [0.6, 0.2, 0.2]},
        "shots": [0, 5, 10],
        "query": {"max": 14, "min": 5},
        "label": "rating >= 3.5",
        "prompt": {"text": "{{ title }} answer :", "positive": " Yes", "negative": " No"},
    }
    path = folder / "known.yaml"
    path.write_text(yaml.safe_dump(described))
    return str(path)


def plan(task: str, *names: str, seeds: int = 2, **more: object) -> Plan:
    return Plan.model_validate({"name": "t", "parts": [{"tasks": [task], "methods": names, "seeds": seeds, **more}]})


@pytest.mark.parametrize(("columns", "costs"), [(80, False), (160, True)])
def test_a_report_shows_intervals_and_as_many_columns_as_the_terminal_is_wide(
    columns: int,
    costs: bool,
    task: str,
    tmp_path: Path,
    metarec: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench.run(plan(task, BASELINE, "popularity", seeds=1), tmp_path)
    (table,) = read_cells(tmp_path)
    versus = next(r for r in table.rows() if r["method"] == "popularity" and r["shots"] == 10)[f"versus {BASELINE}"]
    monkeypatch.setenv("COLUMNS", str(columns))
    done = metarec("report", str(tmp_path))
    assert f"{versus['low']:+.4f} {versus['high']:+.4f}" in done.out
    assert ("B/user" in done.out) == costs
    assert max(map(len, done.out.splitlines())) <= columns


def test_metrics_beyond_accuracy_are_pooled_over_splits_and_do_not_drown_the_table(
    task: str, tmp_path: Path, metarec: Callable[..., Ran]
) -> None:
    asked = tmp_path / "beyond.yaml"
    asked.write_text(yaml.safe_dump({**yaml.safe_load(Path(task).read_text()), "metrics": list(BEYOND)}))
    bench.run(plan(str(asked), BASELINE, "popularity"), tmp_path / "out")
    done = metarec("report", tmp_path / "out", "--results", tmp_path / "out.json", "--json")
    assert done.status == 0, done.err
    (table,) = load_json(tmp_path / "out.json")["tables"]
    row = next(row for row in table["rows"] if (row["method"], row["shots"]) == ("popularity", 5))
    splits = [
        pd.read_parquet(folder / "costs.parquet").set_index(["method", "shots"]).loc[("popularity", 5), "coverage@10"]
        for folder in (tmp_path / "out" / "cells").rglob("popularity*")
        if (folder / "costs.parquet").exists()
    ]
    assert len(splits) == 2
    assert row["coverage@10"] == pytest.approx(np.mean(splits))
    assert row["log_loss_low"] < row["log_loss"] < row["log_loss_high"]
    assert row["auc_by_activity:few"] == pytest.approx(row["auc"]), "everybody rated 24 items"
    assert row["auc_by_activity:many"] is None
    printed = metarec("report", tmp_path / "out").out
    assert max(map(len, printed.splitlines())) <= 140
    assert "in --json:" in printed
    assert _between(row, "coverage@10").startswith(f"{row['coverage@10']:.3f}"[1:] + " [")
    assert _between(row, "auc_by_activity:many") == ""
    assert _between({"x": 10.742, "x_low": 0.5, "x_high": 20.25}, "x") == "10.74 [.50 20.25]"


def test_a_report_compares_with_any_of_its_rows(task: str, tmp_path: Path, metarec: Callable[..., Ran]) -> None:
    bench.run(plan(task, BASELINE, "popularity", "random", seeds=1), tmp_path)
    result = tmp_path / "out.json"
    done = metarec("report", str(tmp_path), "--results", str(result), "--reference", "popularity")
    assert done.status == 0
    (table,) = load_json(result)["tables"]
    rows = {row["method"]: row for row in table["rows"] if row["shots"] == 5}
    gap = rows["random"]["auc"] - rows["popularity"]["auc"]
    assert rows["random"]["versus popularity"]["difference"] == pytest.approx(gap)
    assert "popularity is ahead from" in table
    crossed = metarec("report", str(tmp_path), "--results", str(result), "--reference", "popularity", "--crossed")
    assert "over people and items" in crossed.out
    wide = {row["method"]: row for row in load_json(result)["tables"][0]["rows"] if row["shots"] == 5}
    versus = wide["random"]["versus popularity"]
    assert versus["difference"] == pytest.approx(gap)
    assert (
        versus["high"] - versus["low"]
        > rows["random"]["versus popularity"]["high"] - rows["random"]["versus popularity"]["low"]
    )
    wrong = metarec("report", str(tmp_path), "--reference", "popularty")
    assert (wrong.status, "'popularity'" in wrong.err) == (2, True)


@pytest.mark.parametrize("one_item", [False, True])
def test_a_benchmark_measures_what_the_task_asks_for(
    one_item: bool, task: str, tmp_path: Path, metarec: Callable[..., Ran]
) -> None:
    """Pooled AUC and errors too, with the row that knows each user's own share of likes alone."""
    asked = yaml.safe_load(Path(task).read_text()) | {"metrics": ["pooled_auc", "uauc_weighted", "mae", "recall@5"]}
    asked |= {"query": {"max": 1, "min": 1}} if one_item else {}
    file = tmp_path / "pooled.yaml"
    file.write_text(yaml.safe_dump(asked))
    bench.run(plan(str(file), BASELINE, "popularity", seeds=1), tmp_path / "out")
    (table,) = read_cells(tmp_path / "out")
    rows = {row["method"]: row for row in table.rows() if row["shots"] == 10}
    assert set(rows) == {BASELINE, "popularity", "own like share"}
    for row in rows.values():
        assert row["pooled_auc_low"] <= row["pooled_auc"] <= row["pooled_auc_high"]
        assert row["mae"] > 0
        assert np.isnan(row["auc"]) == one_item
    assert len({row["pooled_auc"] for row in rows.values()}) == 3
    result = tmp_path / "out.json"
    done = metarec("report", str(tmp_path / "out"), "--results", str(result), "--html", str(tmp_path / "page.html"))
    assert (done.status, "pooled_auc" in done.out) == (0, True)
    assert (load_json(result)["tables"][0]["rows"][0]["auc"] is None) == one_item


def add_oracle(patch: pytest.MonkeyPatch) -> None:
    """Adds a method that knows the two tastes, with a trajectory, prompts and tokens; ``broken`` fails to fit."""

    class Oracle(ItemMean):
        def score(self, requests):  # type: ignore[no-untyped-def]
            def told(support: Ratings) -> float:
                return 0.01 * float(((support.items % 4 < 2) * 2 - 1) @ (support.values - 3)) if len(support) else 0.0

            return [
                torch.from_numpy(told(asked.support) * ((asked.candidates % 4 < 2) * 2.0 - 1)) for asked in requests
            ]

    def rows(context: MethodContext) -> list[MethodRow]:
        best = Oracle(context.mean, name="metarec")
        return [
            MethodRow(
                best, 7, lambda asked: 3 * len(asked.candidates), lambda asked, code: f"item {code}</script>", True
            ),
            MethodRow(replace(best, name="metarec, no adaptation")),
            MethodRow(replace(best, name="metarec, step 1"), step=1),
        ]

    def broken(context: MethodContext) -> list[MethodRow]:
        raise FloatingPointError("nothing fits")

    patch.setitem(METHODS._builtin, "metarec", Method(rows, "meta", "knows"))
    patch.setitem(METHODS._builtin, "broken", Method(broken, "meta", "fails"))


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    add_oracle(monkeypatch)


def test_every_method_is_measured_on_the_same_users_and_the_baseline_joins_by_itself(task: str, tmp_path: Path) -> None:
    bench.run(plan(task, "random", "popularity"), tmp_path)
    (pooled,) = read_cells(tmp_path, BASELINE)
    assert list(pooled.methods) == [BASELINE, "random", "popularity"]
    users = {name: sorted(pooled.report.values(name, 5).index) for name in pooled.methods}
    assert users[BASELINE] == users["random"] == users["popularity"]
    assert {user.split("/")[0] for user in users[BASELINE]} == {"0", "1"}


def test_a_cell_that_is_done_is_not_measured_again(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = plan(task, "random", seeds=1)
    bench.run(wanted, tmp_path)
    fits = []
    original = METHODS.get("random")
    counted = Method(lambda context: fits.append(1) or original.rows(context), "trivial", "counts")
    monkeypatch.setitem(METHODS._builtin, "random", counted)
    bench.run(wanted, tmp_path)
    assert not fits
    bench.run(wanted, tmp_path, fresh=True)
    assert len(fits) == 1


@pytest.mark.parametrize("harm", ["options", "damage"])
def test_a_cell_with_other_options_or_a_changed_byte_is_measured_again(
    harm: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan(task, "random", seeds=1)
    bench.run(wanted, tmp_path)
    cell = next(cell for cell in cells(wanted) if cell.method == "random")
    if harm == "damage":
        file = tmp_path / "cells" / cell.folder / "per_user.parquet"
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    else:
        changed = Method(lambda context, **_: METHODS.get("constant").rows(context), "trivial", "", {"strength": 2})
        monkeypatch.setitem(METHODS._builtin, "random", changed)
    assert bench.missing(cells(wanted), tmp_path) == [cell]
    bench.run(wanted, tmp_path)
    assert bench.missing(cells(wanted), tmp_path) == []


def test_cells_that_were_measured_on_other_data_are_measured_again(
    task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(Path(task).parent, folder)
    described = yaml.safe_load(Path(task).read_text()) | {"dataset": {"source": "table", "path": str(folder)}}
    task = str(folder / "known.yaml")
    Path(task).write_text(yaml.safe_dump(described))
    wanted = cells(plan(task, BASELINE))
    bench.run(plan(task, BASELINE), tmp_path / "out")
    assert bench.missing(wanted, tmp_path / "out") == []
    ratings = Path(task).parent / "ratings.csv"
    before = ratings.read_text()
    head, first, *rest = before.splitlines()
    user, item, rating, *more = first.split(",")
    flipped = ",".join([user, item, "1" if float(rating) > 3 else "5", *more])
    ratings.write_text("\n".join([head, flipped, *rest]) + "\n")
    assert bench.missing(wanted, tmp_path / "out") == wanted
    assert "2 cells were measured on other data" in caplog.text
    bench.run(plan(task, BASELINE), tmp_path / "out")
    assert bench.missing(wanted, tmp_path / "out") == []
    ratings.rename(ratings.with_name("elsewhere.csv"))
    assert bench.missing(wanted, tmp_path / "out") == []  # nothing to compare with, which is said
    assert "cannot be compared with what was measured" in caplog.text


def test_embedded_data_are_not_read_to_see_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = cells(plan("movielens/user-cold", BASELINE, seeds=1))
    monkeypatch.setattr(bench, "_is_done", lambda cell, out: True)
    monkeypatch.setattr(bench, "load_dataset", pytest.fail)
    assert bench.missing(wanted, tmp_path) == []


def test_a_report_puts_back_the_cell_that_a_killed_process_had_put_aside(
    task: str, tmp_path: Path, metarec: Callable[..., Ran]
) -> None:
    bench.run(plan(task, BASELINE, "popularity", seeds=1), tmp_path)
    before = metarec("report", tmp_path).out
    for cell in cells(plan(task, BASELINE, "popularity", seeds=1)):
        folder = tmp_path / "cells" / cell.folder
        folder.rename(folder.with_name(f".{folder.name}.{'0' * 16}.old"))
    again = metarec("report", tmp_path)
    assert again.status == 0, again.err
    assert again.out == before
    assert all((tmp_path / "cells" / cell.folder).is_dir() for cell in cells(plan(task, BASELINE, seeds=1)))


@pytest.mark.usefixtures("oracle")
def test_a_method_that_fails_stops_no_other_and_is_named_at_the_end(task: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"1 of 3 cells failed, the first 'broken' .* nothing fits"):
        bench.run(plan(task, "broken", "random", seeds=1), tmp_path)
    (pooled,) = read_cells(tmp_path, BASELINE)
    assert set(pooled.methods) == {BASELINE, "random"}
    assert "FloatingPointError" in next(iter(load_json(tmp_path / "failed.json").values()))


def test_a_process_that_works_beside_others_takes_no_more_threads_than_its_share() -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, bench._start_worker, (1,)) as pool:
        pools = pool.submit(threadpool_info).result()
        assert {found["num_threads"] for found in pools} == {1}
        assert {found["user_api"] for found in pools} == {"blas", "openmp"}


def test_processes_end_with_the_one_that_started_them() -> None:
    script = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from metarec.bench.cells import _start_worker
pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start_worker, (1,))
print(pool.submit(abs, -1).result(), flush=True)
pool.submit(time.sleep, 600)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "1\n"
    parent.kill()
    # The pipe ends once nobody holds it any more, and a process of the pool would for ten minutes.
    assert parent.communicate(timeout=60) == ("", None)


def test_results_say_from_when_to_when_and_for_how_long_they_were_measured(task: str, tmp_path: Path) -> None:
    before = time.time()
    bench.run(plan(task, "random", "popularity", seeds=2), tmp_path)
    (pooled,) = read_cells(tmp_path, BASELINE)
    measured = pooled.made["measured"]
    began, ended = (datetime.fromisoformat(measured[at]).timestamp() for at in ("began", "ended"))
    assert before - 1 <= began <= ended <= time.time() + 1
    assert 0 < measured["process_seconds"] <= time.time() - before
    assert measured["seconds"] == pytest.approx(ended - began, abs=2)


def test_no_two_methods_share_a_cell() -> None:
    folders = {Cell("t", method, 0).folder for method in METHODS.names()}
    assert len(folders) == len(METHODS.names())


def test_limited_users_and_limited_training_are_cells_of_their_own(task: str, tmp_path: Path) -> None:
    bench.run(plan(task, "popularity", seeds=1, train_users=[5, None], users=4), tmp_path)
    small, whole = sorted(read_cells(tmp_path, BASELINE), key=lambda group: group.train_users or 99)
    assert (small.train_users, whole.train_users) == (5, None)
    assert len(small.report.values("popularity", 0)) == len(whole.report.values("popularity", 0)) == 4
    assert small.report.values("popularity", 0).tolist() != whole.report.values("popularity", 0).tolist()


def test_progress_names_the_cell_that_is_measured_now(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[float, str]] = []
    monkeypatch.setattr(bench, "progress", lambda *_: nullcontext(lambda done, note: said.append((done, note))))
    bench.run(plan(task, "popularity", seeds=2), tmp_path)
    names = [f"{method} on {task}, seed {seed}" for seed in (0, 1) for method in (BASELINE, "popularity")]
    assert said == list(enumerate([*names, ""]))


@pytest.fixture(scope="module")
def known(task: str, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    out = tmp_path_factory.mktemp("known-cells")
    with pytest.MonkeyPatch.context() as patch:
        add_oracle(patch)
        bench.run(plan(task, "metarec", "random", seeds=3), out)
        return read_cells(out, BASELINE)[0]


def test_a_row_says_what_is_known_by_hand(known: Summary) -> None:
    rows = {(row["method"], row["shots"]): row for row in known.rows("metarec")}
    assert {name for name, _ in rows} == {BASELINE, "metarec", "metarec, no adaptation", "random"}, (
        "points of a trajectory are no rows"
    )
    best = rows["metarec", 10]
    assert best["auc"] == 1.0
    assert best["seeds"] == 3
    assert best["people"] <= best["episodes"]
    assert best["parameters"] == 7
    assert best["tokens"] == 3 * 14
    assert best["hurt"] == 0.0
    assert best["ece"] < 0.02 < best["ece_uncalibrated"]
    assert rows["metarec", 0]["auc"] == 0.5
    gain = best[f"versus {BASELINE}"]
    assert gain["low"] <= gain["difference"] <= gain["high"]
    assert gain["difference"] == pytest.approx(1 - rows[BASELINE, 10]["auc"])
    assert gain["p"] <= gain["p_holm"] < 0.01
    lost = rows["random", 10]["versus metarec"]
    assert lost["high"] < 0
    assert f"versus {BASELINE}" not in rows[BASELINE, 10]


def test_a_person_in_two_seeds_is_one_person(known: Summary) -> None:
    """Intervals resample people: doubling every episode under the same person changes none of them."""
    report = known.report
    copies = report.per_user.assign(user="copy/" + report.per_user["user"])
    people = report.people | {f"copy/{user}": person for user, person in report.people.items()}
    doubled = replace(report, per_user=pd.concat([report.per_user, copies]), people=people)
    once, twice = (side.difference("random", 5, BASELINE, 5) for side in (report, doubled))
    assert twice[0] == pytest.approx(once[0])
    np.testing.assert_allclose(once[1], twice[1], atol=1e-9)
    naive = replace(doubled, people={}).difference("random", 5, BASELINE, 5)[1]
    assert naive[1] - naive[0] < 0.85 * (twice[1][1] - twice[1][0])


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({0: 0.5, 10: 0.7}, {0: 0.6, 10: 0.6}, 5.0),
        ({0: 0.6, 10: 0.7}, {0: 0.6, 10: 0.6}, 0.0),
        ({0: 0.7, 10: 0.5}, {0: 0.6, 10: 0.6}, None),
        ({0: 0.7, 5: 0.5, 10: 0.8}, {0: 0.6, 5: 0.6, 10: 0.7}, 7.5),
    ],
)
def test_the_crossing_is_where_one_method_overtakes_the_other_for_good(
    ours: dict[int, float], theirs: dict[int, float], expected: float | None
) -> None:
    assert crossing(ours, theirs) == pytest.approx(expected)


def test_methods_that_share_no_users_have_no_crossing(task: str, tmp_path: Path) -> None:
    bench.run(plan(task, "random", seeds=1), tmp_path)
    (group,) = read_cells(tmp_path, BASELINE)
    table = group.report.per_user
    apart = table.assign(user=table["user"].where(table["method"] == BASELINE, table["user"] + "'"))
    assert set(group.crossings("random")) == {BASELINE}
    assert replace(group, report=replace(group.report, per_user=apart)).crossings("random") == {}


def test_the_page_compares_sizes_of_meta_training(oracle: None, task: str, tmp_path: Path) -> None:
    bench.run(plan(task, "metarec", seeds=1, train_users=[20, None, 5]), tmp_path)
    groups = read_cells(tmp_path, BASELINE)
    for group in groups:
        expected = crossing(group.curve("metarec"), group.curve(BASELINE))
        assert group.crossings("metarec")[BASELINE] == pytest.approx(expected)
        assert group.crossings("nobody") == {}
    page = render(groups, "metarec")
    assert "Few-shot against fine-tuning" in page
    assert page.count('"type": "category"') == 1, "sizes"
    assert page.count('"type": "log"') == 1, "cost against quality, of the whole meta-training"
    assert re.findall(r"<td>item mean</td><td>(\w+)</td>", page) == ["5", "20", "all"]
    assert re.search(r"<td>item mean</td><td>5</td>(<td>[^<]*</td>)+<td>K = \d", page)


def test_holm_is_the_step_down_correction() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_a_folder_without_cells_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no measured cells"):
        read_cells(tmp_path, BASELINE)


def test_an_unknown_method_is_named_with_the_nearest_one(task: str) -> None:
    with pytest.raises(ConfigError, match=r"'populrity'.*'popularity'"):
        cells(plan(task, "populrity"))


def test_parts_without_methods_measure_the_plans(task: str) -> None:
    parts = [{"tasks": [task], "seeds": 2}, {"tasks": [task], "methods": ["popularity"], "first_seed": 5, "seeds": 1}]
    given = Plan.model_validate({"name": "t", "methods": ["random"], "parts": parts})
    found = {(cell.method, cell.seed) for cell in cells(given) if cell.method != BASELINE}
    assert found == {("random", 0), ("random", 1), ("popularity", 5)}
    bare = Plan.model_validate({"name": "t", "parts": parts})
    with pytest.raises(ConfigError, match=r"plan 't' names no methods for .* Name them in the part or the plan"):
        cells(bare)


def test_a_group_stands_for_its_methods(task: str) -> None:
    names = {cell.method for cell in cells(plan(task, "trivial"))}
    assert names == {name for name in METHODS.names() if METHODS.get(name).group == "trivial"}


def test_every_method_says_what_it_is_in_one_line() -> None:
    for name in METHODS.names():
        method = METHODS.get(name)
        assert method.about, name
        assert len(method.about) < 90, name
        assert "\n" not in method.about, name


def test_limited_training_sees_only_those_users(task: str, tmp_path: Path) -> None:
    from metarec.data.task_data import load_task_data
    from metarec.data.task_files import load_task

    data = load_task_data(load_task(task), 0)
    context = MethodContext(data, tmp_path, 5)
    assert len(context.users) == 5
    assert set(context.users) <= set(data.parts["train"])
    assert set(context.task_data.parts["test"]) == set(data.parts["test"])
    assert context.mean.count.sum() == np.isin(data.interactions.user, context.users).sum()


def test_the_page_holds_everything_and_fetches_nothing(known: Summary) -> None:
    page = render([known], "metarec")
    outside = page.replace(re.search(r"<script>(.*?)</script>", page, re.S).group(1), "")  # type: ignore[union-attr]
    assert not re.search(r"(src|href)=|https?://|@import", outside)
    assert page.count("Plotly.newPlot(") >= 4
    for text in ("metarec", "random", "trajectory", "known/user-cold"):
        assert text in outside
    # A prompt with a closing tag must not end the script that carries it.
    assert '</script>"' not in page
    assert "\\u003c/script>" in outside


def test_bench_report_and_compare_from_the_command_line(task: str, tmp_path: Path, metarec: Callable[..., Ran]) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({"name": "t", "parts": [{"tasks": [task], "methods": ["random"], "seeds": 1}]}))
    dry = metarec("bench", file, "--out", tmp_path / "a", "--dry-run")
    assert dry.out.count("missing") == 2
    done = metarec("bench", file, "--out", tmp_path / "a", "--json")
    assert done.status == 0, done.err
    assert {row["method"] for row in json.loads(done.out)["tables"][0]["rows"]} == {BASELINE, "random"}
    again = metarec("bench", "--task", task, "--method", "random", "--seeds", 1, "--out", tmp_path / "b")
    assert again.status == 0, again.err
    assert "random" in again.out
    page, results = tmp_path / "r.html", tmp_path / "r.json"
    told = metarec("report", tmp_path / "a", "--html", page, "--results", results)
    assert told.status == 0, told.err
    assert page.stat().st_size > 1e6
    assert load_json(results)["baseline"] == BASELINE
    same = json.loads(metarec("compare", tmp_path / "a", tmp_path / "b", "--json").out)
    assert {row["difference"] for row in same} == {0.0}
    assert {row["p_holm"] for row in same} == {1.0}
    assert metarec("bench", file, "--method", "random").status == 2
    assert metarec("report", tmp_path / "nothing").status == 2


def test_two_evaluated_runs_are_compared_user_by_user(tmp_path: Path, metarec: Callable[..., Ran]) -> None:
    for name, shift in (("a", 0.0), ("b", 0.1)):
        (tmp_path / name).mkdir()
        table = pd.DataFrame(
            {
                "method": "m",
                "shots": 5,
                "user": [f"u{code}" for code in range(8)],
                "auc": np.linspace(0.5, 0.6, 8) + shift + 0.01 * np.arange(8) * shift,
            }
        )
        table.to_parquet(tmp_path / name / "per_user.parquet")
        (tmp_path / name / "table.json").write_text(json.dumps({"task": {"name": "t/x"}}))
    (row,) = json.loads(metarec("compare", tmp_path / "a", tmp_path / "b", "--json").out)
    assert row["task"] == "t/x"
    assert row["episodes"] == 8
    assert row["difference"] == pytest.approx(0.1035)
    assert row["low"] > 0.1
    assert row["p"] == pytest.approx(2 / 2**8)
    other = metarec("compare", tmp_path / "a", tmp_path / "c")
    assert other.status == 2


TOY = '''
"""Toy methods, as another package would bring them."""
from functools import partial

from metarec.bench.methods import Method, MethodRow
from metarec.scorers.collaborative.trivial import ItemMean

LEVEL = 1


def plain(context):
    """Item means under another name."""
    return [MethodRow(ItemMean(context.mean, name="toy"))]


def sized(context, *, size):
    return [MethodRow(ItemMean(context.mean, name="toy, sized"), size)]


def own(context):
    return [MethodRow(ItemMean(context.mean, name="popularity"))]


def backbone(context):
    return [MethodRow(ItemMean(context.mean, name=f"toy of {context.config.backbone}"), context.config.train.steps)]


small = partial(sized, size=3)
METHOD = Method(sized, "toys", "item means of some size", {"size": 5})
NOTHING = 3
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a module of toy methods, ``toy_methods``, on the path."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "toy_methods.py").write_text(TOY)
    monkeypatch.syspath_prepend(folder)
    registered = dict(METHODS._registered)
    yield folder / "toy_methods.py"
    METHODS._registered.clear()
    METHODS._registered.update(registered)
    sys.modules.pop("toy_methods", None)


def test_several_processes_measure_what_one_does_methods_outside_metarec_too(
    toy: Path, task: str, tmp_path: Path
) -> None:
    """Methods outside metarec are named by module and attribute."""
    wanted = plan(task, "toy_methods:plain", "toy_methods:METHOD", "toy_methods:small", "popularity", "random")
    for jobs in (1, 2):
        bench.run(wanted, tmp_path / str(jobs), jobs=jobs)
    alone, table = (read_cells(tmp_path / str(jobs))[0] for jobs in (1, 2))
    keys = ["method", "shots", "user"]
    one, two = (found.report.per_user.sort_values(keys, ignore_index=True) for found in (alone, table))
    pd.testing.assert_frame_equal(one, two, check_like=True)
    names = {"toy", "toy, sized", "toy, sized (toy_methods:small)", "popularity", "random"}
    assert set(table.methods) == {BASELINE, *names}
    assert table.methods["toy, sized"].parameters == 5
    assert table.methods["toy, sized (toy_methods:small)"].parameters == 3
    assert (table.methods["toy"].group, table.methods["toy, sized"].group) == ("other", "toys")
    assert table.curve("toy") == table.curve(BASELINE)


@pytest.mark.parametrize("change", ["options", "code"])
def test_a_cell_of_an_outside_method_is_measured_again_when_it_changed(
    change: str, toy: Path, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan(task, "toy_methods:small", seeds=1)
    bench.run(wanted, tmp_path)
    assert bench.missing(cells(wanted), tmp_path) == []
    if change == "code":
        toy.write_text(TOY.replace("LEVEL = 1", "LEVEL = 2"))
    else:
        import toy_methods  # type: ignore[import-not-found]

        monkeypatch.setitem(METHODS._registered, "toy_methods:small", partial(toy_methods.sized, size=4))
    assert [cell.method for cell in bench.missing(cells(wanted), tmp_path)] == ["toy_methods:small"]


def test_an_installed_package_adds_methods_and_groups_by_entry_point(
    toy: Path, task: str, tmp_path: Path, metarec: Callable[..., Ran]
) -> None:
    info = toy.parent / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[metarec.methods]\ntoy-means = toy_methods:METHOD\n")
    assert {cell.method for cell in cells(plan(task, "toys"))} == {BASELINE, "toy-means"}
    assert METHODS.code("toy-means")
    assert METHODS.code(BASELINE) is None
    listed = json.loads(metarec("bench", "--methods", "--json").out)
    assert listed["groups"]["toys"] == 1
    assert listed["methods"]["toy-means"] == {"group": "toys", "about": "item means of some size"}
    (info / "entry_points.txt").write_text("[metarec.methods]\ntoy-means = toy_methods:gone\n")
    with pytest.raises(ConfigError, match="'toy-means' of an installed package cannot be imported"):
        cells(plan(task, "toy-means"))


def test_the_command_line_takes_a_method_by_module_and_attribute(
    toy: Path, task: str, tmp_path: Path, metarec: Callable[..., Ran]
) -> None:
    options = ["--task", task, "--seeds", 1, "--out", tmp_path / "out"]
    done = metarec("bench", "--method", "toy_methods:plain", *options, "--json")
    assert done.status == 0, done.err
    assert {row["method"] for row in json.loads(done.out)["tables"][0]["rows"]} == {BASELINE, "toy"}
    for wrong, said in [
        ("toy_methods:gone", "cannot be imported"),
        ("toy_methods:NOTHING", "Name a Method, or a func"),
    ]:
        refused = metarec("bench", "--method", wrong, *options)
        assert refused.status == 2
        assert said in refused.err


def test_methods_are_listed_with_groups_apart(metarec: Callable[..., Ran]) -> None:
    listed = metarec("bench", "--methods").out
    groups, methods = listed.split("Methods:")
    assert re.search(r"trivial +5 methods", groups)
    assert "popularity" not in groups
    assert re.search(r"popularity +trivial +how often", methods)
    for group, members in METHODS.groups().items():
        for name in members:
            assert re.search(rf"^  {re.escape(name)}  +{group}  +\S", methods, re.M), name


def test_settings_reach_a_method_and_make_rows_and_cells_of_their_own(
    toy: Path, task: str, tmp_path: Path, metarec: Callable[..., Ran]
) -> None:
    file = tmp_path / "plan.yaml"
    part = {"tasks": [task], "methods": ["toy_methods:backbone"], "seeds": 1}
    written = {"name": "t", "settings": {"train.steps": 7}, "parts": [part, {**part, "settings": {"backbone": "tiny"}}]}
    file.write_text(json.dumps(written))
    out = tmp_path / "out"
    done = metarec("bench", file, "--out", out, "--json")
    assert done.status == 0, done.err
    rows = {row["method"]: row for row in json.loads(done.out)["tables"][0]["rows"]}
    default, tiny = "toy of smollm2-135m-instruct [train.steps=7]", "toy of tiny [backbone=tiny, train.steps=7]"
    assert set(rows) == {BASELINE, default, tiny}
    assert rows[tiny]["parameters"] == 7
    assert rows[tiny]["settings"] == {"backbone": "tiny", "train.steps": 7}
    assert "settings" not in rows[BASELINE]
    dry = metarec("bench", file, "--out", out, "--dry-run", "--set", "train.steps=8", "--backbone", "tiny").out
    assert [line.split()[0] for line in dry.splitlines()] == ["done", "missing"], "the baseline reads no setting"
    assert metarec("bench", file, "--out", out, "--dry-run", "--set", "train.steps=7").out.count("missing") == 0


def test_settings_that_are_the_defaults_are_the_same_cell_however_they_are_written(task: str) -> None:
    def wanted(**settings: object) -> list[Cell]:
        return cells(plan(task, "metarec", "GP", seeds=1, settings=settings))

    plainly = wanted()
    assert wanted(backbone="smollm2-135m-instruct", **{"train.steps": 100}) == plainly
    assert wanted(**{"meta": {"inner_lr": 1}}) == wanted(**{"meta.inner_lr": 1.0}) != plainly
    changed = {cell.method: cell for cell in wanted(**{"meta.inner_lr": 1.0})}
    assert changed["GP"].settings == ()
    assert changed["metarec"].folder.name.startswith("metarec-meta.inner-lr-1.0-")
    both = [cell.folder for cell in (*plainly, *wanted(**{"train.steps": 1}), *wanted(**{"train.steps": 2}))]
    assert len(set(both)) == 5, "item mean, GP, and metarec three times"


def test_a_methods_own_options_come_before_settings(task: str) -> None:
    settings = {"adapter.rank": 4, "meta.inner_steps": 5}
    wanted = cells(plan(task, "metarec", "metarec, no stack, rank 8", seeds=1, settings=settings))
    (cell,) = (cell for cell in wanted if "rank 8" in cell.method)
    assert cell.changed == {"meta.inner_steps": 5}
    method = METHODS.get(cell.method)
    context = MethodContext(SimpleNamespace(seed=3), Path(), None, cell.changed)  # type: ignore[arg-type]
    config = context.configured({key: value for key, value in method.options.items() if key != "name"})
    assert (config.adapter.rank, config.meta.inner_steps, config.seed) == (8, 5, 3)


def test_a_context_opens_the_models_that_the_settings_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("metarec.training.fitting.open_backbone", asked.append)
    monkeypatch.setattr(
        "metarec.scorers.language.item_vectors.text_vectors", lambda _, text, encoder: asked.append(encoder)
    )
    data = SimpleNamespace(seed=2, interactions=SimpleNamespace(catalog=None), task=SimpleNamespace(item_text=None))
    settings = {"backbone": "x", "device": "cuda", "dtype": "bfloat16"}
    encoder = {"collaborative.encoder": "y"}
    context = MethodContext(data, Path(), None, settings | encoder)  # type: ignore[arg-type]
    assert (context.backbone, context.vectors) == (None, None)
    assert asked == [context.config, "y"]
    assert context.config.model_dump(include={*settings, "seed"}) == {**settings, "seed": 2}


@pytest.mark.parametrize(
    ("assigned", "said"),
    [
        ("train.stepz=3", "Did you mean 'steps'"),
        ("meta.inner_steps=many", "meta.inner_steps"),
        ("seed=3", "'seed' is no setting of a benchmark"),
        ("backbone.x=3", "backbone"),
        ("meta.inner_steps=5", "changes none of the plan's methods"),
    ],
)
def test_settings_that_are_wrong_end_it_before_anything_runs(
    assigned: str, said: str, task: str, tmp_path: Path, metarec: Callable[..., Ran]
) -> None:
    refused = metarec("bench", "--task", task, "--method", "GP", "--set", assigned, "--out", tmp_path / "out")
    assert refused.status == 2
    assert said in refused.err
    assert not (tmp_path / "out").exists()


def test_the_two_baselines_are_one() -> None:
    from metarec import recommender

    assert recommender.BASELINE == BASELINE
