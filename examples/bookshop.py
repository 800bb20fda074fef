"""Writes the orders of a small made bookshop: python examples/bookshop.py orders.csv.

Every customer likes two genres and dislikes two, and stars follow from that, and noise. So a few ratings of a new
customer say which books to show, and whoever tries metarec can see whether it is right. As in real tables, some rows
have faults.
"""

from __future__ import annotations

import argparse
import csv
import random
from datetime import date, timedelta
from pathlib import Path

WORDS = {
    "Crime": ("Murder", "Inspector", "Alibi", "Witness", "Poison", "Verdict"),
    "Fantasy": ("Dragon", "Wizard", "Crown", "Prophecy", "Sword", "Tower"),
    "Cooking": ("Kitchen", "Bread", "Spice", "Supper", "Harvest", "Oven"),
    "Travel": ("Island", "Railway", "Desert", "Harbour", "Mountain", "Border"),
}
ADJECTIVES = ("Last", "Quiet", "Broken", "Golden", "Northern", "Forgotten")
COLUMNS = ("customer", "isbn", "title", "genre", "stars", "bought")


def books(count: int, chance: random.Random) -> list[tuple[str, str, str]]:
    """Returns ISBN, title and genre of `count` books, no two with one title.

    Raises:
        ValueError: There are not so many titles.
    """
    titles = [
        (f"The {adjective} {word}", genre)
        for genre, words in WORDS.items()
        for word in words
        for adjective in ADJECTIVES
    ]
    chosen = chance.sample(titles, count)
    return [(f"978{code:07d}", title, genre) for code, (title, genre) in enumerate(chosen)]


def orders(customers: int = 120, catalog: int = 90, each: int = 24, seed: int = 0) -> list[tuple[str, ...]]:
    """Returns rows of `COLUMNS`, in the order of their dates; two rows have no stars, and one order comes twice.

    Args:
        customers: How many customers there are.
        catalog: How many books; 144 at most.
        each: How many books each customer rates.
        seed: Seed of the draws.
    """
    chance = random.Random(seed)  # noqa: S311 - made data, not a secret
    shelf = books(catalog, chance)
    rows = []
    for customer in range(customers):
        liked = set(chance.sample(sorted(WORDS), 2))
        for isbn, title, genre in chance.sample(shelf, each):
            stars = min(5, max(1, round((4.3 if genre in liked else 2.2) + chance.gauss(0, 0.7))))
            bought = date(2024, 1, 1) + timedelta(days=chance.randrange(700))
            rows.append((f"C{customer:04d}", isbn, title, genre, str(stars), bought.isoformat()))
    rows.sort(key=lambda row: row[-1])
    for place in (17, 171):
        rows[place] = (*rows[place][:4], "", rows[place][5])
    return [*rows, rows[0]]


def main() -> None:
    """Writes the table that the command line names."""
    parser = argparse.ArgumentParser(description="Write the orders of a made bookshop.")
    parser.add_argument("file", type=Path, help="the CSV file to write")
    parser.add_argument("--customers", type=int, default=120)
    chosen = parser.parse_args()
    with chosen.file.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(orders(chosen.customers))


if __name__ == "__main__":
    main()
