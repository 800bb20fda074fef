"""A made shop whose orders follow from one thing that is known beside titles and ratings; everything else is noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

KINDS = 4
USERS, ITEMS, RATED = 240, 120, 30
# What a test fits in a second: no language model, no stack of several members.
PLAIN: dict[str, Any] = {
    "score": ["item mean", "collaborative"],
    "collaborative": {
        "features": ["fields"],
        "members": "gp",
        "gp": {"sweeps": 3, "factors": 4},
        "stack": {"folds": 2},
    },
    "train": {"steps": 4, "validate_every": 2, "shots": [5], "max_query": 10},
}


@dataclass(frozen=True)
class Shop:
    """Orders and items of the shop, and what lies behind them.

    Args:
        orders: Columns user, item, rating, timestamp, and moments.
        items: Columns item, title, colour.
        kind: Which of `KINDS` kinds each item is of.
        taste: How much each user likes each kind, shape (users, kinds).
        files: Options of a source that name the files beside.
    """

    orders: pd.DataFrame
    items: pd.DataFrame
    kind: np.ndarray
    taste: np.ndarray
    files: Mapping[str, Any] = field(default_factory=dict)


def shop(taste: np.ndarray, flipped: np.ndarray | None = None, seed: int = 0) -> Shop:
    """Returns a shop in which a rating is the user's taste for the item's kind, and noise.

    Args:
        taste: Shape (users, kinds).
        flipped: Which of two moments turns taste around, at random for each rating; None where moments say nothing.
        seed: Seed of the draws.
    """
    generator = np.random.default_rng(seed)
    kind = generator.integers(0, KINDS, ITEMS)
    user = np.repeat(np.arange(len(taste)), RATED)
    item = np.concatenate([generator.choice(ITEMS, RATED, replace=False) for _ in taste])
    device = generator.integers(0, 2, len(user))
    sign = 1.0 if flipped is None else np.where(device == 1, -1.0, 1.0)
    value = 3 + sign * 1.2 * taste[user, kind[item]] + generator.normal(0, 0.6, len(user))
    orders = pd.DataFrame(
        {
            "user": [f"u{code}" for code in user],
            "item": [f"i{code}" for code in item],
            "rating": np.clip(np.round(value), 1, 5),
            "timestamp": 1_600_000_000 + 3_600 * generator.integers(0, 5_000, len(user)),
            "device": np.array(["phone", "desk"])[device],
        }
    )
    colours = np.array(["red", "green", "blue"])[generator.integers(0, 3, ITEMS)]
    items = pd.DataFrame(
        {"item": [f"i{code}" for code in range(ITEMS)], "title": [f"thing {code}" for code in range(ITEMS)]}
    )
    return Shop(orders, items.assign(colour=colours), kind, taste)


def own_tastes(seed: int = 1) -> np.ndarray:
    """Returns tastes that every user has of their own, shape (users, kinds)."""
    return np.random.default_rng(seed).normal(size=(USERS, KINDS))


def write_vectors(path: Path, vectors: np.ndarray) -> str:
    """Writes vectors of all items as a .npz, and returns its name."""
    np.savez(path, ids=np.array([f"i{code}" for code in range(len(vectors))]), vectors=vectors)
    return path.name
