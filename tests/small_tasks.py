"""The smallest task that is valid, for tests to change."""

from __future__ import annotations

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
