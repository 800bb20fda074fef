"""Ten million ratings from a file to `Interactions`, in MovieLens 10M's layout: seconds and peak memory.

The file is made here (69,878 users, 10,677 movies, the sizes of the real one), then each layout is read in a process
of its own, whose peak memory the kernel reports.

    python benchmarks/loading.py

writes ``benchmarks/results/loading.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from metarec.files.artifacts import write_json

ROOT = Path(__file__).parent
USERS, MOVIES = 69_878, 10_677
LIMITS = {"seconds": 60.0, "peak_gb": 4.0}


def make(folder: Path, rows: int) -> None:
    """Writes the same ratings as ``ratings.dat``, ``ratings.csv`` and JSON lines."""
    generator = np.random.default_rng(0)
    user = np.sort((USERS * generator.random(rows) ** 2).astype(np.int64))
    item = (MOVIES * generator.random(rows) ** 2).astype(np.int64)
    frame = pd.DataFrame({"user": user + 1, "item": item + 1}).drop_duplicates()
    while len(frame) < rows:
        more = pd.DataFrame(
            {"user": generator.integers(1, USERS, rows // 5), "item": generator.integers(1, MOVIES, rows // 5)}
        )
        frame = pd.concat([frame, more]).drop_duplicates()
    frame = frame.iloc[:rows].sort_values("user", kind="stable")
    frame["rating"] = generator.integers(1, 11, rows) / 2
    frame["timestamp"] = generator.integers(789_652_009, 1_231_131_736, rows)
    for name in ("dat", "csv", "jsonl"):
        (folder / name).mkdir()
    frame.rename(columns={"user": "userId", "item": "movieId"}).to_csv(folder / "csv" / "ratings.csv", index=False)
    with (folder / "csv" / "ratings.csv").open() as source, (folder / "dat" / "ratings.dat").open("w") as target:
        next(source)
        for line in source:
            target.write(line.replace(",", "::"))
    frame.to_json(folder / "jsonl" / "ratings.jsonl", orient="records", lines=True)
    titles = [f"Movie {number}, The ({1950 + number % 60})" for number in range(1, MOVIES + 1)]
    movies = pd.DataFrame({"movieId": range(1, MOVIES + 1), "title": titles, "genres": "Action|Drama"})
    movies.to_csv(folder / "csv" / "movies.csv", index=False)
    lines = [f"{number}::{title}::Action|Drama\n" for number, title in enumerate(titles, start=1)]
    (folder / "dat" / "movies.dat").write_text("".join(lines))
    movies.rename(columns={"movieId": "item"}).to_csv(folder / "jsonl" / "items.csv", index=False)


def read(layout: str, folder: Path) -> dict[str, float]:
    """Reads one layout in this process."""
    from metarec.data.sources import SourceOptions, read_source

    started = time.perf_counter()
    options = SourceOptions(columns={"timestamp": "timestamp"} if layout == "jsonl" else {})
    data = read_source("table" if layout == "jsonl" else "movielens", folder / layout, options)
    seconds = time.perf_counter() - started
    return {"rows": len(data), "users": len(data.users), "seconds": seconds, "peak_gb": peak_gb()}


def peak_gb() -> float:
    """Returns the most memory this process has held; getrusage would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--read", nargs=2, metavar=("LAYOUT", "FOLDER"), help="read one layout and print JSON")
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read(arguments.read[0], Path(arguments.read[1]))))
        return
    layouts = {}
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), arguments.rows)
        for layout in ("dat", "csv", "jsonl"):
            command = [sys.executable, __file__, "--read", layout, name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            layouts[layout] = json.loads(done.stdout)
            print(layout, layouts[layout])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    within = all(found[key] <= limit for found in layouts.values() for key, limit in LIMITS.items())
    result = {
        "command": f"python benchmarks/loading.py --rows {arguments.rows}",
        "commit": commit.stdout.strip(),
        "limits": LIMITS,
        "within_limits": within,
        "layouts": layouts,
        "hardware": {"machine": platform.machine(), "python": platform.python_version()},
    }
    write_json(ROOT / "results" / "loading.json", result)
    if not within:
        sys.exit(1)


if __name__ == "__main__":
    main()
