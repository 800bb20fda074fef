"""Rows of the benchmark of fine-tuning's aids: what is made for them says what it is."""

from __future__ import annotations

from metarec.bench.methods.finetuning import with_rewrites
from metarec.data.interactions import Catalog


def test_rewrites_are_titles_in_lower_case_without_subtitles_and_brackets() -> None:
    titles = (
        "Mask, The",
        "Seven Samurai (Shichinin)",
        "Gears of War 4 - Ultimate Edition",
        "Fire Emblem: Stones",
        "Up",
    )
    found = with_rewrites(Catalog(tuple("abcde"), {"title": titles})).fields
    assert found["title"] == titles
    assert found["rewritten"] == ("the mask", "seven samurai", "gears of war 4", "fire emblem", "up")
