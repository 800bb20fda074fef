"""Filters over catalog fields: what each expression is true of, and what is refused with its cure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metarec.data.filters import MAX_CHARACTERS, ItemFilter
from metarec.data.interactions import Catalog
from metarec.errors import ConfigError, MetarecError, UnknownItemError

CATALOG = Catalog(
    ("a", "b", "c", "d", "e"),
    {
        "title": ("Alien", "Amélie", "Heat", "Up", "E=mc2"),
        "year": ("1979", "2001", "1995", "2009", ""),
        "genres": ("Horror, Sci-Fi", "Comedy, Romance", "Crime", "Comedy, Animation", ""),
        "released": ("1979-05-25", "2001-04-25", "1995-12-15", "2009-05-29", ""),
        "language": ("en", "fr", "en", "en", "de"),
        "list price": ("1,200.50", "9", "10", "$11", ""),
    },
)


def kept(where: str) -> str:
    return "".join(np.array(CATALOG.ids)[ItemFilter(CATALOG).where(where)])


@pytest.mark.parametrize(
    ("where", "items"),
    [
        ("year >= 1995", "bcd"),
        ("1995 < year", "bd"),
        ("1979 <= year < 2001", "ac"),
        ("year == 1995", "c"),
        ("year != 1995", "abde"),
        ("year = '1995'", "c"),
        ('"comedy" in genres', "bd"),
        ("'Comedy' in genres and year > 2005", "d"),
        ("'Comedy' in genres or 'Crime' in genres", "bcd"),
        ("not 'Comedy' in genres", "ace"),
        ("'Comedy' not in genres", "ace"),
        ("language in ['fr', 'de']", "be"),
        ("language not in ['en']", "be"),
        ("genres in ['Crime', \"Horror\"]", "ac"),
        ("language == EN or year < 1980".replace("EN", "'EN'"), "acd"),
        ("not (year < 2000)", "bde"),
        ("year < 1990 or year > 2005 and language == 'en'", "ad"),
        ("(year < 1990 or year > 2005) and 'Comedy' in genres", "d"),
        ("released >= '1995-12'", "bcd"),
        ("`list price` > 10", "ad"),
        ("title == 'amelie'", "b"),
        ("NOT language IN ['en'] AND year > 0", "b"),
        ("year in [1995, 2001]", "bc"),
    ],
)
def test_an_expression_is_true_of(where: str, items: str) -> None:
    assert kept(where) == items


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("yaer >= 1990", r"names 'yaer', which is no field of an item. Did you mean 'year'"),
        ("publisher == 1", r"Known: [^.]*\. Texts are written in quotes: 'publisher'"),
        ("year >=", r"not understood where it ends. Write e.g."),
        ("year >= 1990 1", r"not understood at '1'"),
        ("year >> 1990", r"not understood at '> 1990'"),
        ("year", r"not understood where it ends"),
        ("", r"not understood where it ends"),
        ("(year > 1", r"not understood where it ends"),
        ("genres > 3", r"compares 'genres' by size, and no item has a number"),
        ("year > 'new'", r"compares 'year' with 'new', no number or date"),
        ("year > language", r"compares 'year' with 'language'. Compare a field with"),
        ("language == en", r"compares 'language' with 'en'. Compare a field with a number or a quoted text"),
        ("language in [en]", r"lists en without quotes. Write 'en'"),
        ("language in 'en'", r"not understood at \"'en'\""),
        ("__import__('os').system('ls')", r"not understood at"),
        ("year > 1; drop", r"not understood at '; drop'"),
        ("not " * 31 + "year > 1", r"nested more than 30 deep"),
        ("(" * 31 + "year > 1" + ")" * 31, r"nested more than 30 deep"),
        (" " * (MAX_CHARACTERS + 1), r"has 1001 characters"),
    ],
)
def test_what_is_not_understood_is_named_with_its_cure(where: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ItemFilter(CATALOG).where(where)


@given(
    st.lists(st.sampled_from([*"()[],<>='", "year", "genres", "not", "and", "or", "in", "1", "'x'", "zz", "\u0000"]))
)
def test_any_text_is_a_filter_or_refused(parts: list[str]) -> None:
    try:
        flags = ItemFilter(CATALOG).where(" ".join(parts))
    except MetarecError:
        return
    assert flags.shape == (5,)
    assert flags.dtype == bool


def test_a_blocklist_takes_items_and_categories() -> None:
    items = ItemFilter(CATALOG)
    assert items.blocked(["a", "Heat"]).tolist() == [True, False, True, False, False]
    assert items.blocked(["genres=comedy"]).tolist() == [False, True, False, True, False]
    assert items.blocked(["language=DE"]).tolist() == [False, False, False, False, True]
    assert items.blocked(["E=mc2"]).tolist() == [False, False, False, False, True]
    with pytest.raises(UnknownItemError, match="Heatt"):
        items.blocked(["Heatt"])


def test_nothing_left_to_recommend_is_said() -> None:
    items = ItemFilter(CATALOG)
    assert items.kept("year > 1990", ["b"]).tolist() == [False, False, True, True, False]
    with pytest.raises(ConfigError, match="leave no item"):
        items.kept("year > 3000", [])
    with pytest.raises(ConfigError, match="leave no item"):
        items.kept(None, list(CATALOG.ids))
