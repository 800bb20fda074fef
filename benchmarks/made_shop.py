"""A made shop whose orders follow from one thing that is known beside titles and ratings; everything else is noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

KINDS = 4
# More than features of items that the regression on a text reads: what somebody of somewhere does.
MANY_SUBJECTS = tuple(
    f"{people} {what}"
    for people in (
        *("Norwegian", "Chinese", "Egyptian", "Mexican", "Greek", "Indian"),
        *("Irish", "Japanese", "Kenyan", "Polish", "Turkish", "Peruvian"),
    )
    for what in (
        *("cooking", "history", "music", "architecture", "poetry", "gardens"),
        *("cinema", "football", "festivals", "castles", "railways", "painting"),
    )
)
# What people say of a rating.
SAID = {1: "I hated it", 2: "not good at all", 3: "it was fine", 4: "quite good", 5: "I loved it"}
# What items of a bookshop are about, and what its people write that they like.
SUBJECTS = (
    *("astronomy", "baking", "chess", "dogs", "football", "gardening"),
    *("jazz", "knitting", "motorbikes", "painting", "sailing", "volcanoes"),
)
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
    """

    orders: pd.DataFrame
    items: pd.DataFrame
    kind: np.ndarray
    taste: np.ndarray


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


def by_group(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the group of each user, of three, and tastes that groups share, shape (users, kinds)."""
    generator = np.random.default_rng([seed, 5])
    group = generator.integers(0, 3, USERS)
    return group, generator.normal(size=(3, KINDS))[group] + 0.3 * generator.normal(size=(USERS, KINDS))


def write_users(path: Path, group: np.ndarray, seed: int = 0) -> str:
    """Writes the group of each user, a shoe size that says nothing, and a sentence that names the group."""
    generator = np.random.default_rng([seed, 6])
    rows = [
        f"u{user},{'abc'[code]},{generator.integers(36, 46)},I keep {('cats', 'dogs', 'birds')[code]}"
        for user, code in enumerate(group)
    ]
    path.write_text("\n".join(["user,group,shoe,about", *rows]) + "\n")
    return path.name


def write_friends(path: Path, group: np.ndarray, seed: int = 0) -> str:
    """Writes four friends of each user's own group."""
    generator = np.random.default_rng([seed, 7])
    alike = [np.flatnonzero(group == code) for code in range(3)]
    rows = [f"u{one},u{other}" for one in range(len(group)) for other in generator.choice(alike[group[one]], 4)]
    path.write_text("\n".join(["user,friend", *rows]) + "\n")
    return path.name


def write_graph(path: Path, kind: np.ndarray) -> str:
    """Writes a graph in which items of one kind have one maker."""
    rows = [f"i{code},maker,m{one}" for code, one in enumerate(kind)]
    path.write_text("\n".join(["item,relation,other", *rows]) + "\n")
    return path.name


def pictures(kind: np.ndarray, seed: int) -> np.ndarray:
    """Returns noisy vectors of items that tell the kind, shape (items, 16)."""
    generator = np.random.default_rng([seed, 8])
    return np.eye(KINDS)[kind] @ generator.normal(size=(KINDS, 16)) + 0.3 * generator.normal(size=(len(kind), 16))


def bookshop(
    seed: int = 0, subjects: tuple[str, ...] = SUBJECTS, *, items: int = ITEMS, users: int = USERS
) -> tuple[Shop, np.ndarray]:
    """Returns a shop of books about subjects, named by their titles, and the one subject that each user likes.

    Args:
        seed: Seed of the draws.
        subjects: The subjects.
        items: How many books.
        users: How many users.
    """
    generator = np.random.default_rng([seed, 12])
    subject, liked = generator.integers(0, len(subjects), items), generator.integers(0, len(subjects), users)
    rows = []
    for user, mine in enumerate(liked):
        near, far = np.flatnonzero(subject == mine), np.flatnonzero(subject != mine)
        for item in [*near, *generator.choice(far, 24 - len(near), replace=False)]:
            value = 3 + (1.2 if subject[item] == mine else -1.2) + generator.normal(0, 0.6)
            rows.append((f"u{user}", f"i{item}", float(np.clip(np.round(value), 1, 5))))
    orders = pd.DataFrame(rows, columns=["user", "item", "rating"])
    titles = [f"All about {subjects[one]}, volume {code}" for code, one in enumerate(subject)]
    table = pd.DataFrame({"item": [f"i{code}" for code in range(items)], "title": titles})
    return Shop(orders, table, subject, np.eye(len(subjects))[liked]), liked


def write_sentences(path: Path, liked: np.ndarray, subjects: tuple[str, ...] = SUBJECTS) -> str:
    """Writes a sentence of each user that names a subject, and returns the file's name."""
    rows = [f"u{user},I like {subjects[code]} since {1990 + user % 9}" for user, code in enumerate(liked)]
    path.write_text("\n".join(["user,about", *rows]) + "\n")
    return path.name


def reviewed(world: Shop, seed: int) -> Shop:
    """Returns the shop with ratings that are half noise, and reviews that say what people thought."""
    generator = np.random.default_rng([seed, 9])
    thought = world.orders["rating"].astype(int)
    noisy = np.clip(np.round(thought + generator.normal(0, 1.8, len(thought))), 1, 5)
    wrote = np.where(generator.random(len(thought)) < 0.8, thought.map(SAID), "")
    return replace(world, orders=world.orders.assign(rating=noisy, text=wrote))


def write_two_shops(folder: Path, seed: int = 0, *, shared: bool = True) -> dict[str, Any]:
    """Writes two shops with the same people and kinds; returns a mix of them as a task's `dataset` names it.

    Args:
        folder: Where they are written.
        seed: Seed of tastes and draws.
        shared: False gives the people of the second shop ids of their own.
    """
    tastes = own_tastes(seed + 1)
    for at, name in enumerate(("movies", "books")):
        world = shop(tastes, seed=2 * seed + at)
        (folder / name).mkdir(parents=True)
        rows = world.orders if shared or name == "movies" else world.orders.assign(user="v" + world.orders["user"])
        rows.drop(columns="device").to_csv(folder / name / "ratings.csv", index=False)
        items = world.items.assign(colour=[f"kind {kind}" for kind in world.kind])
        items.to_csv(folder / name / "items.csv", index=False)
    parts = {name: {"source": "table", "path": str(folder / name)} for name in ("movies", "books")}
    return {"source": "mix", "parts": parts, "shared_users": True}
