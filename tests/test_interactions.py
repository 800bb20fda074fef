"""What a user may say, what a source may hold, and the errors for everything else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metarec.data.interactions import Catalog, RatingScale, read_ratings
from metarec.data.sources import read_source
from metarec.data.sources.assembly import assemble
from metarec.errors import ConfigError, DataError, MetarecError, RatingError, UnknownItemError

CATALOG = Catalog(
    ids=("007", "NA", "3", "4"),
    fields={"title": ("Heat", "Amélie", "Heat", "Alien"), "year": ("1995", "2001", "1986", "1979")},
)
SCALE = RatingScale(0.5, 5.0)


@pytest.mark.parametrize(
    ("name", "code"),
    [("007", 0), ("NA", 1), ("amelie", 1), ("AMÉLIE (2001)", 1), ("Heat (1986)", 2), (" alien ", 3)],
)
def test_items_are_found_by_id_or_title(name: str, code: int) -> None:
    assert CATALOG.find(name) == code


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("The Matrix", 0),
        ("matrix, the (1999)", 0),
        ("Amelie", 1),
        ("Amelie (2001)", 1),
        ("L'Avventura", 2),
        ("Solaris", 3),
    ],
)
def test_titles_are_found_as_people_say_them(name: str, code: int) -> None:
    titles = ("Matrix, The", "Amelie (Fabuleux destin, Le)", "Avventura, L'", "Solaris", "Solaris (Solyaris)")
    catalog = Catalog(ids=tuple("abcde"), fields={"title": titles, "year": ("1999", "2001", "1960", "2002", "1972")})
    assert catalog.find(name) == code


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Heat", "2 items are titled 'Heat'"),
        ("Aliens", "Did you mean 'Alien"),
        ("7", "no item has the id or title '7'"),
        (7, "item 7 is a int"),
    ],
)
def test_unknown_items_are_named_with_a_cure(name: str, message: str) -> None:
    with pytest.raises(UnknownItemError, match=message):
        CATALOG.find(name)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("3", math.nan)], "rating nan of '3' is not finite"),
        ([("3", 6)], "rating 6 of '3' is off the scale. Rate from 0.5 to 5"),
        ([("3", "five")], "rating 'five' of '3' is not a number"),
        ([("3", None)], "rating None of '3' is not a number"),
        ([("3", 4), ("Heat (1986)", 2)], "rated twice"),
        (["3"], "rating number 1 is '3'"),
    ],
)
def test_ratings_that_cannot_be_meant_are_refused(pairs: list[tuple[str, float]], message: str) -> None:
    with pytest.raises(RatingError, match=message):
        read_ratings(pairs, CATALOG, SCALE)


def test_no_ratings_are_no_ratings() -> None:
    assert len(read_ratings([], CATALOG, SCALE)) == 0


@given(st.lists(st.tuples(st.text(max_size=12), st.one_of(st.floats(), st.text(max_size=4), st.none())), max_size=4))
def test_whatever_is_said_gets_ratings_or_a_typed_error(pairs: list[tuple[str, float]]) -> None:
    try:
        ratings = read_ratings(pairs, CATALOG, SCALE)
    except MetarecError:
        return
    assert np.isfinite(ratings.values).all()


def frame(**columns: list[object]) -> pd.DataFrame:
    return pd.DataFrame({"user": ["1", "1"], "item": ["a", "b"], "rating": [4, 5], **columns})


ITEMS = pd.DataFrame({"item": ["a", "b"], "title": ["A", "B"]})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"rating": [4, "x"]}, "row 2: rating 'x' is not a finite number"),
        ({"rating": [4, math.inf]}, "row 2: rating 'inf' is not a finite number"),
        ({"rating": [4, 9]}, "row 2: rating 9 is off the scale"),
        ({"item": ["a", "z"]}, "row 2: item 'z' has no row in the catalog"),
        ({"timestamp": [1, "later"]}, "row 2: timestamp 'later'"),
    ],
)
def test_bad_rows_are_named(columns: dict[str, list[object]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        assemble(frame(**columns), ITEMS, SCALE, "here")


def test_the_latest_of_repeated_ratings_is_kept_and_counted() -> None:
    data = assemble(frame(item=["a", "a"], timestamp=[9, 2]), ITEMS, SCALE, "here")
    assert data.rating.tolist() == [4.0]
    assert data.dropped == {"repeated rating": 1}


def test_the_embedded_movielens_is_complete() -> None:
    data = read_source("embedded-movielens")
    assert (len(data), len(data.users), len(data.catalog)) == (100_004, 671, 9_066)
    toy_story = data.catalog.find("Toy Story")
    assert data.catalog.row(toy_story) == {
        "id": "1",
        "title": "Toy Story",
        "year": "1995",
        "genres": "Adventure, Animation, Children, Comedy, Fantasy",
    }
    assert read_source("embedded-movielens").rating.sum() == data.rating.sum()


SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="MovieLens 100K is not beside the clone")
def test_movielens_100k_is_read_from_recbole_files() -> None:
    data = read_source("recbole", SHARED / "ml-100k")
    assert (len(data), len(data.users), len(data.catalog)) == (100_000, 943, 1_682)
    assert data.catalog.title(data.catalog.find("GoldenEye")) == "GoldenEye (1995)"
    assert str(data.scale) == "from 1 to 5"


def recbole_files(path: Path, inter: str, item: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "x.inter").write_text(inter, encoding="utf-8")
    (path / "x.item").write_text(item, encoding="utf-8")
    return path


HEADER = "user_id:token\titem_id:token\trating:float\n"
ITEM_FILE = 'item_id:token\tmovie_title:token_seq\n007\tBond\nNA\tAn "open quote\n'


def test_recbole_ids_stay_strings(tmp_path: Path) -> None:
    data = read_source("recbole", recbole_files(tmp_path, HEADER + "NA\t007\t3\n01\tNA\t4\n", ITEM_FILE))
    assert data.users == ("NA", "01")
    assert data.catalog.ids == ("007", "NA")
    assert data.catalog.fields["title"] == ("Bond", 'An "open quote')


@pytest.mark.parametrize(
    ("inter", "message"),
    [
        ("user_id:token\titem_id:token\nu\t007\n", "no column 'rating'"),
        (HEADER + "u\t007\n", "row 2 has 2 fields, the header 3"),
        (HEADER + "u\t007\t1e999\n", "is not a finite number"),
        (HEADER, "holds no ratings"),
        ("", "no column 'user_id'"),
    ],
)
def test_malformed_recbole_files_are_named(inter: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_source("recbole", recbole_files(tmp_path, inter, ITEM_FILE))


def test_missing_sources_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'recbole'"):
        read_source("recbol")
    with pytest.raises(DataError, match="Set 'path'"):
        read_source("recbole", tmp_path / "nothing")
    with pytest.raises(DataError, match="takes no path"):
        read_source("embedded-movielens", tmp_path)


def test_a_catalog_without_titles_or_with_repeated_ids_is_refused() -> None:
    with pytest.raises(DataError, match="no 'title' field"):
        Catalog(("a",), {})
    with pytest.raises(DataError, match="an item id twice"):
        Catalog(("a", "a"), {"title": ("x", "y")})
