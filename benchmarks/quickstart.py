"""The quickstart from empty caches: wall clock, CPU seconds, peak memory and items read, written as JSON.

    python benchmarks/quickstart.py                                        # benchmarks/results/quickstart.json
    python benchmarks/quickstart.py --label "before"                       # beside the other labels of the file
    python benchmarks/quickstart.py --preset standard --out standard.json

Models and data are unpacked anew, as after an installation. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from metarec.files.artifacts import load_json, write_json
from metarec.system.doctor import environment

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quick", help="settings of the run (default: quick)")
    parser.add_argument("--label", default="now", help="what the measurement is called in the file (default: now)")
    parser.add_argument("--out", type=Path, default=RESULTS / "quickstart.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(given.preset, Path(folder))
    others = load_json(given.out) if given.out.exists() else {}
    write_json(given.out, {**others, given.label: {"preset": given.preset, **measured, **environment()}})
    for name, value in measured.items():
        print(f"{name.replace('_', ' ')}: {value}")


def measure(preset: str, folder: Path) -> dict[str, Any]:
    """Runs the quickstart once; returns seconds, in all and by part, peak memory and the size of the cache."""
    command = [sys.executable, "-m", "metarec.cli", "quickstart", "--preset", preset, "--runs", str(folder / "runs")]
    command.append("--json")
    cached = {**os.environ, "METAREC_CACHE": str(folder / "cache")}
    began = time.perf_counter()
    done = subprocess.run(command, env=cached, check=True, stdout=subprocess.PIPE, text=True)
    wall = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_memory_mb": round(used.ru_maxrss / 1024),
        "seconds_by_part": json.loads(done.stdout)["seconds"],
        "cache_mb": round(sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file()) / 1e6),
    }


if __name__ == "__main__":
    main()
