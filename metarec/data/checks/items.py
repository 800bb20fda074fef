"""Checks of the items: ids, titles and texts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from metarec.data.checks.findings import Check, Checked, CheckLimits, Fault
from metarec.data.templates import MAX_FIELD_CHARACTERS
from metarec.data.text import CHAT, MARKUP, MAX_TEXT, MOJIBAKE, has_hidden


def _thin_items(data: Checked, limits: CheckLimits) -> Fault:
    count = dict(zip(data.items, np.bincount(data.item, minlength=len(data.items)), strict=True))
    return Fault(np.array([count.get(item, 0) < limits.item_ratings for item in data.catalog["item"]], bool), "items")


def _in_text(data: Checked, wrong: Callable[[str], bool]) -> Fault:
    flags = np.zeros(len(data.catalog), bool)
    for name in data.catalog.columns.drop("item"):
        flags |= np.array([wrong(text) for text in data.catalog[name]], bool)
    return Fault(flags, "items")


def _titles(data: Checked) -> pd.Series:
    return data.catalog["title"].str.strip()


ITEM_CHECKS: dict[str, Check] = {
    "thin-item": Check(
        _thin_items, "note", "items with hardly any ratings", "Their means are shrunk; no need to drop them", None
    ),
    "empty-item-id": Check(
        lambda data, _: Fault((data.catalog["item"].str.strip() == "").to_numpy(bool), "items"),
        "error",
        "items without an id",
        "Drop them",
        "drop",
    ),
    "duplicate-item-id": Check(
        lambda data, _: Fault(data.catalog["item"].duplicated().to_numpy(bool), "items"),
        "error",
        "items whose id is taken",
        "Keep the first row of each",
        "drop",
    ),
    "empty-title": Check(
        lambda data, _: Fault((_titles(data) == "").to_numpy(bool), "items"),
        "warning",
        "items without a title: the language model has nothing to read",
        "Fill the title in from another source",
        None,
    ),
    "repeated-title": Check(
        lambda data, _: Fault((_same(_same_text(data)) & (_titles(data) != "")).to_numpy(bool), "items"),
        "warning",
        "items whose text is the same as another's",
        "Merge them, or add what tells them apart",
        None,
    ),
    "shared-title": Check(
        lambda data, _: Fault(
            (_same(_titles(data)) & ~_same(_same_text(data)) & (_titles(data) != "")).to_numpy(bool), "items"
        ),
        "note",
        "items that have their title in common with another, and differ in a field alone",
        "Name them by their id where a title is asked for; show the field in the prompt",
        None,
    ),
    "text-too-long": Check(
        lambda data, _: _in_text(data, lambda text: len(text) > MAX_TEXT),
        "error",
        f"items with a text of more than {MAX_TEXT:,} characters",
        "Shorten it",
        "drop",
    ),
    "cut-text": Check(
        lambda data, _: _in_text(data, lambda text: len(text) > MAX_FIELD_CHARACTERS),
        "warning",
        f"items with a text of more than {MAX_FIELD_CHARACTERS} characters: prompts show its beginning",
        "Put what matters first, or raise 'prompt.characters' in the task",
        None,
    ),
    "wrong-encoding": Check(
        lambda data, _: _in_text(data, lambda text: bool(MOJIBAKE.search(text))),
        "warning",
        "texts that were decoded with the wrong encoding",
        "Read the file as UTF-8, or let --fix decode them",
        "rewrite",
    ),
    "markup": Check(
        lambda data, _: _in_text(data, lambda text: bool(MARKUP.search(text))),
        "warning",
        "texts with HTML tags or entities",
        "Let --fix turn them into plain text",
        "rewrite",
    ),
    "control-characters": Check(
        lambda data, _: _in_text(data, has_hidden),
        "warning",
        "texts with control, bidirectional or invisible characters",
        "Prompts show spaces in their place; --fix removes them",
        "rewrite",
    ),
    "chat-tokens": Check(
        lambda data, _: _in_text(data, lambda text: bool(CHAT.search(text))),
        "warning",
        "texts with the control tokens of chat models",
        "Prompts show spaces in their place; --fix removes them",
        "rewrite",
    ),
}


def _same(texts: pd.Series) -> pd.Series:
    plain = pd.Series([" ".join(text.casefold().split()) for text in texts], dtype=object)
    return plain.duplicated(keep=False)


def _same_text(data: Checked) -> pd.Series:
    columns = [data.catalog[name] for name in data.catalog.columns.drop("item")]
    return pd.Series(["\0".join(map(str.strip, row)) for row in zip(*columns, strict=True)], dtype=object)
