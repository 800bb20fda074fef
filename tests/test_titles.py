"""How people write titles, and which items they mean."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from metarec.data.interactions import Catalog
from metarec.data.titles import TitleIndex
from metarec.errors import UnknownItemError

FILMS = (
    ("Star Wars: Episode IV - A New Hope", "1977"),
    ("Star Wars: Episode V - The Empire Strikes Back", "1980"),
    ("Star Trek: The Motion Picture", "1979"),
    ("Godfather, The", "1972"),
    ("Godfather: Part II, The", "1974"),
    ("Spider-Man", "2002"),
    ("WALL\u00b7E", "2008"),
    ("Solaris", "2002"),
    ("Solaris (Solyaris)", "1972"),
    ("Thelma & Louise", "1991"),
    ("Terminator 2: Judgment Day", "1991"),
    ("Nosferatu (1922)", ""),
    ("Stalker", ""),
    ("***", "1999"),
)


def catalog(year: str = "year") -> Catalog:
    titles, years = zip(*FILMS, strict=True)
    return Catalog(tuple(f"id{code}" for code in range(len(FILMS))), {"title": titles, year: years})


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Star Wars (1977)", 0),
        ("star wars  (1980)", 1),
        ("The Godfather", 3),
        ("the godfather (1972)", 3),
        ("Godfather (1972)", 3),
        ("GODFATHER, THE", 3),
        ("The Godfather: Part II", 4),
        ("spider man", 5),
        ("Wall-E", 6),
        ("Solaris", 7),
        ("Solaris (1972)", 8),
        ("Thelma and Louise", 9),
        ("Terminator 2 (1991)", 10),
        ("Nosferatu", 11),
        ("Nosferatu (1922)", 11),
        ("Stalker (1979)", 12),
        ("***", 13),
    ],
)
@pytest.mark.parametrize("year", ["year", "Release_Year"])
def test_a_title_is_found_however_people_write_it(text: str, code: int, year: str) -> None:
    assert catalog(year).find(text) == code


def test_a_date_says_the_year() -> None:
    assert TitleIndex(["Heat: A Crime Saga", "Heat: Again"], ["1995-12-15", "2020.0"]).find("Heat (1995)") == [0]


@pytest.mark.parametrize("text", ["Star Wars", "Godfather", "Spider-Man (1967)", "Solaris (1999)", "", "()"])
def test_what_may_mean_another_title_is_not_taken_for_one(text: str) -> None:
    with pytest.raises(UnknownItemError):
        catalog().find(text)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("Star Wars", ["Star Wars: Episode IV - A New Hope", "Star Wars: Episode V - The Empire Strikes Back"]),
        ("Termnator", ["Terminator 2: Judgment Day"]),
        ("Spidermann", ["Spider-Man"]),
        ("Spider-Man (1967)", ["Spider-Man"]),
        ("Teh Godfather", ["Godfather, The"]),
        ("Empire Strikes Back", ["Star Wars: Episode V - The Empire Strikes Back"]),
    ],
)
def test_the_nearest_titles_are_near(text: str, near: list[str]) -> None:
    found = catalog()
    nearest = [found.fields["title"][code] for code in found.titles.nearest(text)]
    assert set(near) <= set(nearest), nearest
    assert len(nearest) <= 3
    with pytest.raises(UnknownItemError, match="Did you mean"):
        found.find(text)


def test_unrelated_titles_are_not_named_as_near() -> None:
    with pytest.raises(UnknownItemError, match=r"no item has the id or title 'Quux zyzzyva'\. No title is like it"):
        catalog().find("Quux zyzzyva")


ODD = [
    "Don't Look Now (1973)",
    "Am\u00e9lie",
    "AMELIE",
    "Rosencrantz & Guildenstern",
    "1917",
    "(2019)",
    "$9.99",
    "a\nb c",
    "...",
]
ODD += [
    "Stra\u00dfe",
    "L'Avventura",
    "Avventura, L' (1960)",
    "City of Lost Children, The (Cit\u00e9 des enfants, La) (1995)",
]
ASKED = [
    *ODD,
    "dont look now",
    "Don\u2019t Look Now",
    "amelie",
    "rosencrantz and guildenstern",
    "1917 (2019)",
    "9 99",
    "A B C",
]
ASKED += [
    "strasse",
    "l avventura (1960)",
    "The City of Lost Children: A Film (1995)",
    "and",
    "The",
    "",
    "city children",
    "look",
]


@pytest.mark.parametrize("text", ASKED)
def test_the_first_texts_find_what_all_titles_normalised_find(text: str) -> None:
    often = TitleIndex(ODD)
    for _ in range(20):
        often.find("nothing")
    first = TitleIndex(ODD)
    assert first.find(text) == often.find(text)
    assert "_forms" in vars(often)
    assert text in ("...", "$9.99", "(2019)", "and", "The", "") or "_forms" not in vars(first), "no look at every title"


def test_titles_that_are_no_latin_letters_keep_their_vowels_apart() -> None:
    index = TitleIndex(["\u0915\u093e\u0932", "\u0915\u0940\u0932", "\u300a\u6d3b\u7740\u300b"])
    assert index.find("\u0915\u0940\u0932") == [1]
    assert index.find("\u6d3b\u7740") == [2]


def made(items: int) -> TitleIndex:
    generator = np.random.default_rng(0)
    syllables = ["ka", "lo", "mi", "ter", "san", "vu", "dor", "el", "pra", "qui"]
    names = ["".join(generator.choice(syllables, 3)) for _ in range(items)]
    return TitleIndex([f"The {names[code]} of {names[-code]} {code}" for code in range(items)])


def fastest(call: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def test_an_unknown_title_costs_no_look_at_every_title() -> None:
    """Thirty times the titles cost far less than thirty times the time."""
    few, many = made(1_000), made(30_000)
    for index in (few, many):
        index.nearest("the terkalo of prasan")
    ratio = fastest(lambda: many.nearest("the terkala of prasin")) / fastest(
        lambda: few.nearest("the terkala of prasin")
    )
    assert ratio < 15, ratio


def test_a_word_that_no_title_has_is_shared_with_none() -> None:
    titles = TitleIndex(["Alien", "The Thing", "Thing"])
    assert titles.shared("sisters").tolist() == [0, 0, 0]
    assert titles.shared("thing sisters").tolist() == pytest.approx([0, 1 / 3, 1 / 2])
