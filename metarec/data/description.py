"""Describes a dataset in numbers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from metarec.data.checks.findings import Checked
from metarec.files.artifacts import SCHEMA_VERSION


def describe(data: Checked) -> dict[str, Any]:
    """Returns what a dataset is: sizes, density, spread, rating histogram, time span, and how full its fields are."""
    by_user = np.bincount(data.user, minlength=len(data.users))
    by_item = np.bincount(data.item, minlength=len(data.items))
    finite = data.rating[np.isfinite(data.rating)]
    values, counts = np.unique(finite, return_counts=True)
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "where": data.tables.where,
        "ratings": len(data.user),
        "users": int((by_user > 0).sum()),
        "items": len(data.catalog),
        "items_rated": int((by_item > 0).sum()),
        "density": float(len(data.user) / max((by_user > 0).sum() * max(len(data.catalog), 1), 1)),
        "ratings_per_user": _spread(by_user[by_user > 0]),
        "ratings_per_item": _spread(by_item[by_item > 0]),
        "mean_rating": float(finite.mean()) if len(finite) else None,
        "histogram": {f"{value:g}": int(count) for value, count in zip(values[:50], counts[:50], strict=True)},
        "fields": {
            str(name): {
                "filled": float((data.catalog[name].str.strip() != "").mean()) if len(data.catalog) else 0.0,
                "distinct": int(data.catalog[name].nunique()),
                "longest": int(data.catalog[name].str.len().max()) if len(data.catalog) else 0,
            }
            for name in data.catalog.columns
        },
        "dropped": dict(data.tables.dropped),
        "notes": [str(note) for note in data.tables.notes],
    }
    if data.time is not None and np.isfinite(data.time).any():
        ends = (float(np.nanmin(data.time)), float(np.nanmax(data.time)))
        facts["first"], facts["last"] = (_date(end) for end in ends)
    return facts


def _spread(counts: np.ndarray) -> dict[str, float]:
    if not len(counts):
        return {}
    named = zip(
        ("least", "quarter", "median", "three quarters", "most"),
        np.percentile(counts, [0, 25, 50, 75, 100]),
        strict=True,
    )
    return {name: float(value) for name, value in named}


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g} s"
