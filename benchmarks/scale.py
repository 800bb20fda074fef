"""Large catalogs: time to the first recommendation, peak memory, and how fitting, adapting and ranking grow.

    python benchmarks/scale.py              # benchmarks/results/scale.json; about an hour of processor time
    python benchmarks/scale.py --quick      # small sizes, a minute or two; runs/scale/quick.json

Catalogs and ratings are made: titles of three words and a number, two fields, 3,000 users who rated 30 items each.
Every number is of a process of its own: ``metarec train``, ``metarec recommend`` for two ratings, and ``metarec serve``
from its start to its first ranking for a user with one rating. Processor seconds are those of all threads; peak memory
is the resident one, pages of mapped files among it. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from metarec.files.artifacts import cache_dir, load_json, write_json
from metarec.system.progress import progress

RESULT = Path(__file__).parent / "results" / "scale.json"
RATINGS_EACH = 30
METAREC = [sys.executable, "-m", "metarec.cli"]
# Whoever reads every title with a sentence encoder needs an hour for a million: fields say what is in them.
NO_MODEL = ("--preset", "fast", "--set", "collaborative.features=[fields]")
# What meta-training is worth is another benchmark's matter: a few steps make a recommender that reads prompts.
WITH_MODEL = (
    *("--preset", "quick", "--set", "collaborative.features=[fields]", "--set", "train.steps=2"),
    *("--set", "train.users=4", "--set", "train.shots=[5]", "--set", "train.max_query=6"),
    *("--set", "train.validation_users=4", "--set", "train.validate_every=2"),
)
WORDS = (
    ("Silent", "Golden", "Last", "Lost", "Red", "Northern", "Broken", "Hidden", "Second", "Little"),
    ("River", "Garden", "Winter", "City", "Letter", "Island", "Harbour", "Mirror", "Road", "Star"),
)
KINDS = ("crime", "fantasy", "history", "nature", "poetry", "romance", "science", "travel")


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        catalogs: Numbers of items of ``train``, ``recommend`` and ``serve`` without a language model.
        read: Those with one.
        users: Users of the catalogs; the growth over users goes through `growing_users`.
        growing_users: Numbers of users, on the first of `growing_items`.
        growing_items: Numbers of items, with the first of `growing_users`.
        supports: Numbers of ratings K that are adapted to.
        repeats: How often adapting and ranking are timed; the median counts.
    """

    catalogs: tuple[int, ...] = (100_000, 1_000_000)
    read: tuple[int, ...] = (100_000,)
    users: int = 3000
    growing_users: tuple[int, ...] = (500, 1000, 2000, 4000)
    growing_items: tuple[int, ...] = (10_000, 20_000, 40_000, 80_000)
    supports: tuple[int, ...] = (4, 8, 16, 32, 64)
    repeats: int = 15


FULL = Sizes()
QUICK = Sizes((2000, 4000), (), 200, (100, 200), (1000, 2000), (4, 16), 3)


@dataclass(frozen=True)
class Bench:
    """Where things are kept, and the environment of the processes that are measured."""

    folder: Path
    model_settings: tuple[str, ...] = WITH_MODEL
    environment: Mapping[str, str] = field(default_factory=dict)

    def data(self, items: int, users: int) -> Path:
        """Returns the folder of a made catalog and its ratings, made where it is missing."""
        path = self.folder / "data" / f"{items}-{users}"
        if not (path / "items.csv").exists():
            subprocess.run([sys.executable, __file__, "--make", str(items), str(users), str(path)], check=True)
        return path

    def trained(self, name: str) -> Path:
        """Returns the directory of a run."""
        return self.folder / "runs" / name


def make(items: int, users: int, folder: Path) -> None:
    """Writes ``ratings.csv`` and ``items.csv``; who likes what depends on the items' kinds."""
    import numpy as np
    import pandas as pd

    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = generator.integers(0, len(KINDS), items)
    user = np.repeat(np.arange(users), RATINGS_EACH)
    item = (items * generator.random(len(user)) ** 3).astype(np.int64)
    taste = generator.normal(size=(users, len(KINDS)))
    liking = 3 + taste[user, kinds[item]] + generator.normal(scale=0.5, size=len(user))
    frame = pd.DataFrame({"user": user, "item": item, "rating": np.clip(np.round(liking), 1, 5).astype(int)})
    frame = frame.drop_duplicates(["user", "item"])
    frame.assign(user="u" + frame.user.astype(str), item="i" + frame.item.astype(str)).to_csv(
        folder / "ratings.csv", index=False
    )
    numbers = np.arange(items)
    titles = [f"The {WORDS[0][n % 10]} {WORDS[1][n // 10 % 10]} {n}" for n in numbers]
    columns = {"item": [f"i{n}" for n in numbers], "title": titles, "kind": np.array(KINDS)[kinds]}
    decade = generator.integers(195, 203, items) * 10
    pd.DataFrame({**columns, "decade": decade}).to_csv(folder / "items.csv", index=False)


# A process, from its start to its end.


def ended(process: subprocess.Popen[bytes], began: float) -> dict[str, float]:
    """Waits for a process; returns seconds by the clock, processor seconds and peak memory."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {"wall_seconds": round(time.perf_counter() - began, 1), **of(used)}


def of(used: resource.struct_rusage) -> dict[str, float]:
    to_mib = 2**20 if sys.platform == "darwin" else 2**10
    return {"cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "peak_mib": round(used.ru_maxrss / to_mib)}


def ran(bench: Bench, arguments: Sequence[object]) -> dict[str, float]:
    """Runs a verb of metarec.

    Raises:
        RuntimeError: It failed.
    """
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        command = [*METAREC, *map(str, arguments)]
        process = subprocess.Popen(command, env=dict(bench.environment), stdout=log, stderr=subprocess.STDOUT)
        found = ended(process, began)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"metarec {arguments[0]}: {log.read().decode()[-2000:]}")
    return found


def train(bench: Bench, items: int, users: int, name: str, options: Sequence[str]) -> dict[str, float]:
    data = bench.data(items, users)
    arguments = ["train", data, "--name", name, "--runs", bench.folder / "runs", "--fresh", *options]
    return ran(bench, arguments)


def recommend(bench: Bench, name: str) -> dict[str, float]:
    before = kept_mib(bench)
    found = ran(bench, ["recommend", bench.trained(name), "--rating", "i3=5", "--rating", "i11=1", "-k", "10"])
    return {**found, "read_mib": round(kept_mib(bench) - before, 1)}


def kept_mib(bench: Bench) -> float:
    """Returns what the cache holds of items that a language model read."""
    files = (Path(bench.environment["METAREC_CACHE"]) / "forward").rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file()) / 2**20


def serve(bench: Bench, name: str) -> dict[str, float]:
    """Starts the service, rates an item, asks for a ranking, and stops it."""
    before = kept_mib(bench)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as store, tempfile.TemporaryFile() as log:
        command = [*METAREC, "serve", "--checkpoint", str(bench.trained(name)), "--store", f"{store}/store"]
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=dict(bench.environment), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            waited(process, log, lambda: ask(port, "/readyz"))
            ready = time.perf_counter() - began
            ask(port, "/v1/users/ann/feedback", {"item": "i3", "rating": 5})
            ask(port, "/v1/users/ann/recommendations?k=10")
            first = time.perf_counter() - began
            again = time.perf_counter()
            ask(port, "/v1/users/ann/recommendations?k=10")
            again = time.perf_counter() - again
        finally:
            process.terminate()
            found = ended(process, began)
    found |= {"ready_seconds": round(ready, 1), "wall_seconds": round(first, 1), "second_ranking": round(again, 3)}
    return {**found, "read_mib": round(kept_mib(bench) - before, 1)}


def ask(port: int, path: str, body: object = None) -> Any:
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.loads(answer.read())


def waited(process: subprocess.Popen[bytes], log: Any, ready: Callable[[], object]) -> None:
    while True:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            log.seek(0)
            raise RuntimeError(f"metarec serve: {log.read().decode()[-2000:]}")
        try:
            ready()
            return
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.2)


# Growth: processor seconds of calls, in a process that fitted the recommender.


def grow(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Fits in this process, then adapts to more and more ratings, of more and more users, and ranks for one of them."""
    import numpy as np

    from metarec.config import override
    from metarec.data.interactions import Ratings
    from metarec.presets import preset
    from metarec.recommender import MetaRecommender

    settings = override({}, ["collaborative.features=[fields]", "collaborative.kernel.steps=40", "train.steps=10"])
    recommender = MetaRecommender.from_pretrained("smollm2-135m-instruct", preset("fast", settings))
    data = recommender.task_data(folder)
    found: dict[str, Any] = {"fit": seconds(lambda: recommender.fit(data), 1)}
    catalog = recommender.fitted.catalog
    generator = np.random.default_rng(0)
    supports = {
        count: Ratings(generator.choice(len(catalog), count, replace=False), np.resize(np.float32([1, 5]), count))
        for count in sizes.supports
    }
    scorer = recommender.scorer()
    found["adapt"] = {count: seconds(partial(scorer.adapt, [some]), sizes.repeats) for count, some in supports.items()}
    few = supports[sizes.supports[0]]
    crowds = (1, 4, 16, 64)
    found["adapt users"] = {size: seconds(partial(scorer.adapt, [few] * size), sizes.repeats) for size in crowds}
    found["rank"] = {}
    for count, support in supports.items():
        pairs = [(catalog.ids[code], float(value)) for code, value in zip(support.items, support.values, strict=True)]
        person = recommender.adapt(pairs)
        found["rank"][count] = seconds(partial(person.recommend, 10), sizes.repeats)
    return found


def seconds(run: Callable[[], object], times: int) -> float:
    """Returns the median processor time of a call."""
    found = []
    for _ in range(times):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return sorted(found)[len(found) // 2]


def grown(bench: Bench, sizes: Sizes, items: int, users: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--grow", str(bench.data(items, users)), json.dumps(vars(sizes))]
    done = subprocess.run(command, env=dict(bench.environment), stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def slope(by_size: Mapping[Any, float]) -> dict[str, Any]:
    """Returns the least-squares slope of log seconds over log size, and that of the last two sizes alone."""
    import numpy as np

    # JSON's keys are texts, in the order of texts.
    ordered = sorted((int(size), value) for size, value in by_size.items())
    sizes, values = np.log(np.array(ordered, np.float64)).T
    last = (values[-1] - values[-2]) / (sizes[-1] - sizes[-2])
    return {
        "sizes": [size for size, _ in ordered],
        "cpu_seconds": [round(value, 4) for _, value in ordered],
        "slope": round(float(np.polyfit(sizes, values, 1)[0]), 2),
        "slope_of_the_last_two": round(float(last), 2),
    }


def growth(cells: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Returns how every part grows, from the cells."""
    first_items, first_users = sizes.growing_items[0], sizes.growing_users[0]
    over_users = {users: cells[f"growth {first_items} items {users} users"] for users in sizes.growing_users}
    over_items = {items: cells[f"growth {items} items {first_users} users"] for items in sizes.growing_items}
    fewest = str(sizes.supports[0])
    return {
        "fit over users": slope({size: cell["fit"] for size, cell in over_users.items()}),
        "fit over items": slope({size: cell["fit"] for size, cell in over_items.items()}),
        "adapt over users": slope(over_items[first_items]["adapt users"]),
        "adapt over items": slope({size: cell["adapt"][fewest] for size, cell in over_items.items()}),
        "adapt over K": slope(over_items[first_items]["adapt"]),
        "rank over users of the fit": slope({size: cell["rank"][fewest] for size, cell in over_users.items()}),
        "rank over items": slope({size: cell["rank"][fewest] for size, cell in over_items.items()}),
        "rank over K": slope(over_items[first_items]["rank"]),
    }


# All of it.


def cells(bench: Bench, sizes: Sizes) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns what is to be measured, by name, in an order in which every run is trained before it is used."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for items in sizes.growing_items:
        name = f"growth {items} items {sizes.growing_users[0]} users"
        found[name] = partial(grown, bench, sizes, items, sizes.growing_users[0])
    for users in sizes.growing_users:
        name = f"growth {sizes.growing_items[0]} items {users} users"
        found[name] = partial(grown, bench, sizes, sizes.growing_items[0], users)
    kinds = (("without", sizes.catalogs, NO_MODEL), ("with", sizes.read, bench.model_settings))
    for kind, catalogs, options in kinds:
        for items in catalogs:
            run, what = f"{items}-{kind}", f"{items} items {kind} a language model"
            found[f"train {what}"] = partial(train, bench, items, sizes.users, run, options)
            found[f"recommend {what}"] = partial(recommend, bench, run)
            found[f"serve {what}"] = partial(serve, bench, run)
    return found


def measure(bench: Bench, sizes: Sizes, out: Path, command: str, only: str = "") -> dict[str, Any]:
    """Measures what a file of results lacks; each cell is written when it ends.

    Args:
        bench: Where things are kept.
        sizes: What is measured.
        out: The file.
        command: What a person calls to measure it again.
        only: How the names begin of the cells that are measured now.
    """
    kept = load_json(out) if out.exists() else {}
    done: dict[str, Any] = kept.get("cells", {})
    every = cells(bench, sizes)
    wanted = {name: run for name, run in every.items() if name.startswith(only)}
    with progress("cells", len(wanted)) as advance:
        for place, (name, run) in enumerate(wanted.items(), start=1):
            if name not in done:
                done[name] = {**run(), "commit": commit(), "load_before": round(os.getloadavg()[0], 1)}
                write_json(out, {**kept, "cells": done})
            advance(place, name)
    result = {
        "command": command,
        "main_figure": "cpu_seconds: other processes were running, see load_before; the clock's seconds include them",
        "sizes": json.loads(json.dumps(vars(sizes))),
        "growth": growth(done, sizes) if set(every) <= set(done) else {},
        "cells": {name: done[name] for name in every if name in done},
        **environment(),
    }
    write_json(out, result)
    return result


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULT.parent)
    return found.stdout.strip()


def environment() -> dict[str, Any]:
    from metarec.system.doctor import environment as of_machine

    return of_machine()


def show(result: Mapping[str, Any]) -> None:
    for name, cell in result["cells"].items():
        if "peak_mib" in cell:
            print(f"{name}: {cell['cpu_seconds']} CPU s, {cell['wall_seconds']} s, {cell['peak_mib']:,} MiB")
    for name, found in result["growth"].items():
        print(f"{name}: slope {found['slope']}, at the end {found['slope_of_the_last_two']}")


def opened(folder: Path, options: Sequence[str] = ()) -> Bench:
    """Returns where things are kept; its cache has the models of the user's, and nothing that was computed.

    Args:
        folder: Where.
        options: More options of `metarec train` with a language model.
    """
    folder = folder.absolute()
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    models, link = cache_dir() / "models", folder / "cache" / "models"
    if models.is_dir() and not link.exists():
        link.symlink_to(models.absolute())
    return Bench(folder, (*WITH_MODEL, *options), {**os.environ, "METAREC_CACHE": str(folder / "cache")})


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--folder", type=Path, default=Path("runs/scale"), help="of catalogs, runs and their cache")
    parser.add_argument("--backbone", help="the language model (default: that of the settings)")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="a setting of its recommender")
    parser.add_argument(
        "--out", type=Path, help=f"results; what is there is not measured again (default: {RESULT.name})"
    )
    parser.add_argument("--only", default="", help="measure the cells whose names begin so, e.g. train")
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--grow", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.make:
        make(int(arguments.make[0]), int(arguments.make[1]), Path(arguments.make[2]))
        return
    if arguments.grow:
        print(json.dumps(grow(Path(arguments.grow[0]), Sizes(**json.loads(arguments.grow[1])))))
        return
    out = arguments.out or (arguments.folder / "quick.json" if arguments.quick else RESULT)
    command = "python benchmarks/scale.py" + (" --quick" if arguments.quick else "")
    options = ["--backbone", arguments.backbone] if arguments.backbone else []
    options += [part for assignment in arguments.sets for part in ("--set", assignment)]
    bench, sizes = opened(arguments.folder, options), QUICK if arguments.quick else FULL
    show(measure(bench, sizes, out, command, arguments.only))


if __name__ == "__main__":
    main()
