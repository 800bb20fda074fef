"""The smallest task that is valid, for tests to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BASE: dict[str, Any] = {
    "name": "test/known",
    "version": 1,
    "description": "Two opposite tastes.",
    "licence": "none",
    "dataset": {"source": "embedded-movielens"},
    "split": {"fractions": [0.6, 0.2, 0.2]},
    "shots": [0, 5],
    "query": {"max": 14, "min": 2},
    "label": "rating >= 3.5",
    "prompt": {"text": "{{ title }}", "positive": " Yes", "negative": " No"},
}

TOY = """
import pandas as pd
from metarec.data.sources import Tables

def read(path, options):
    ratings = pd.DataFrame({"user": ["u", "v"], "item": ["a", "b"], "rating": [1.0, 5.0]})
    return Tables(ratings, pd.DataFrame({"item": ["a", "b"], "title": ["Alien", "Heat"]}), "the toy", None)

def wrong(path, options):
    return 7
"""


def write(root: Path, **files: str | bytes) -> Path:
    """Writes files; in their names ``__`` stands for a dot and ``ZZ`` for a dash."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        (root / name.replace("__", ".").replace("ZZ", "-")).write_bytes(data)
    return root


def ml_1m(root: Path) -> Path:
    movies = "1::Toy Story (1995)::Animation|Children's|Comedy\n2653::2001: A Space Odyssey (1968)::Drama\n"
    movies += "73::Mis\xe9rables, Les (1995)::Drama\n"
    return write(
        root, ratings__dat="1::2653::5::978300760\n01::1::4::978302109\n", movies__dat=movies.encode("latin-1")
    )
