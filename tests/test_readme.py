"""The README tells the truth: its Python runs as it stands, its links exist; its table is `test_tables`' matter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from metarec.data.sources import read_source
from metarec.files.artifacts import replace_dir

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOVIES, USERS = 40, 40


def only_the_popular(cache: Path, named: list[str]) -> None:
    """Cuts the embedded MovieLens, as a cache keeps it once it was read, down to its most rated movies and some named.

    Reading thousands of titles with the language model takes a quarter of an hour and makes the README no truer.
    """
    (kept,) = (cache / "data").glob("movielens-*/table.parquet")
    ratings = pd.read_parquet(kept)
    popular = ratings["movieId"].value_counts().index
    mentioned = ratings["title"].fillna("").str.startswith(tuple(named)) & ratings["movieId"].isin(popular[:300])
    ratings = ratings[ratings["movieId"].isin(popular[:MOVIES]) | mentioned]
    ratings = ratings[ratings["userId"].isin(ratings["userId"].value_counts().index[:USERS])]
    with replace_dir(kept.parent, "table") as directory:
        ratings.to_parquet(directory / kept.name, index=False)


@pytest.mark.slow
def test_the_readmes_python_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    assert len(code.splitlines()) <= 20
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "models").symlink_to(Path(os.environ["METAREC_CACHE"]) / "models")
    monkeypatch.setenv("METAREC_CACHE", str(cache))
    read_source("embedded-movielens")
    only_the_popular(cache, re.findall(r'"([A-Z][^"]+)"', code))
    left = read_source("embedded-movielens")
    assert MOVIES <= len(left.catalog) < 2 * MOVIES
    assert len(left.users) == USERS
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert re.fullmatch(r"\[.*\] adapted in \d+\.\d\d s", lines[5])
    assert re.search(r"AUC over the item mean, 95% interval", lines[6])
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


def test_the_quickstarts_minutes_are_those_that_were_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text(encoding="utf-8"))["after"]
    said = re.search(r"The quickstart takes (\d+) minutes after the install, on (\w+) cores", README)
    assert said is not None
    assert said.groups() == (str(round(measured["wall_seconds"] / 60)), "two")
    assert measured["hardware"]["cores"] == 2


def test_the_readmes_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
