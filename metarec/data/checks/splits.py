"""Checks of a split: leaks, and items that nearly repeat one on the other side."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from metarec.data.checks.findings import SHOWN, DataFinding
from metarec.data.interactions import Catalog, Flags


def near_duplicates(catalog: Catalog, seen: Flags) -> DataFinding | None:
    """Finds unseen items whose text nearly is that of a seen one, across an item-cold split.

    Similarity is the cosine of character 3- to 5-gram counts of the titles, weighted by rarity; at .9 two titles are
    the same to a reader. Where both have a year, the years are the same too: a remake is another item.

    Args:
        catalog: The items.
        seen: Items that meta-training may see, shape (items,).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    titles = [" ".join(re.sub(r"[^\w\s]", " ", title.casefold()).split()) for title in catalog.fields["title"]]
    cold, warm = np.flatnonzero(~seen), np.flatnonzero(seen)
    texts = [title or f"\0{code}" for code, title in enumerate(titles)]
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), token_pattern=None).fit_transform(texts)
    years = catalog.fields.get("year", ("",) * len(catalog))
    pairs = []
    for block in np.array_split(cold, max(1, len(cold) // 500)):
        likeness = (vectors[block] @ vectors[warm].T).tocoo()
        close = likeness.data >= 0.9
        for row, column in zip(likeness.row[close], likeness.col[close], strict=True):
            one, two = int(block[row]), int(warm[column])
            if not years[one] or not years[two] or years[one] == years[two]:
                pairs.append((one, two))
    if not pairs:
        return None
    shown = tuple(
        f"{catalog.ids[one]} '{catalog.title(one)[:60]}' ~ {catalog.ids[two]} '{catalog.title(two)[:60]}'"
        for one, two in pairs[:SHOWN]
    )
    return DataFinding(
        "near-duplicate-item", "warning", len({one for one, _ in pairs}), "items", len(cold),
        "unseen items that nearly repeat a seen one, across the item-cold split",
        "Merge them, or read item-cold results as an upper bound", shown, False,
    )  # fmt: skip


def leakage(leaks: Sequence[str]) -> DataFinding | None:
    """Puts what `TaskData.leaks` says into a finding."""
    if not leaks:
        return None
    return DataFinding(
        "leak",
        "error",
        len(leaks),
        "ways",
        len(leaks),
        "training can see what is tested",
        "Report this as a bug: a split must not leak",
        tuple(leaks),
        False,
    )
