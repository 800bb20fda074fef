"""Exports as people have them: each is read right, or refused with what to type."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Ran

from metarec.data.interactions import Catalog, Interactions, RatingScale
from metarec.data.own_data import own_task
from metarec.data.sources.columns import scale_without_zero, times
from metarec.data.sources.rated import own_ratings
from metarec.errors import DataError


def read(path: Path, **choices: Any) -> Interactions:
    return own_task(path, choices)[1]


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def test_amazon_reviews_as_json_lines(tmp_path: Path) -> None:
    reviews = [
        {
            "overall": 4.0 + row % 2,
            "verified": True,
            "reviewTime": "09 13, 2009",
            "reviewerID": f"A{row % 3}",
            "asin": f"000{row:07}",
            "reviewText": "good",
            "unixReviewTime": 1252800000 + row,
        }
        for row in range(6)
    ]
    lines(tmp_path / "reviews.json", reviews)
    lines(tmp_path / "meta.json", [{"asin": f"000{row:07}", "title": f"Book {row}", "brand": "B"} for row in range(6)])
    found = read(tmp_path / "reviews.json", items="meta.json")
    assert found.catalog.ids[1] == "0000000001"
    assert found.catalog.fields["title"][1] == "Book 1"
    assert found.timestamp is not None
    assert found.timestamp[1] == 1252800001
    assert found.rating.tolist() == [4, 5, 4, 5, 4, 5]


def test_amazon_ratings_without_a_header_are_refused_until_their_columns_are_named(
    metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    ratings = tmp_path / "ratings_Books.csv"
    ratings.write_text("AH2L9G3DQHHAJ,0000000116,4.0,1019865600\nA2IIIDRK3PRRZY,0000000116,1.0,1395619200\n")
    lines(tmp_path / "meta.json", [{"asin": "0000000116", "title": "Interpreting"}])
    refused = metarec("data", "check", ratings, "--items-file", "meta.json")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "its first row is data, 'AH2L9G3DQHHAJ', '0000000116', '4.0', '1019865600'" in refused.err
    assert "--header user,item,rating,timestamp" in refused.err
    named = ("--items-file", "meta.json", "--header", "user,item,rating,timestamp")
    facts = json.loads(metarec("data", "describe", ratings, *named, "--json").out)
    assert (facts["ratings"], facts["users"], facts["items"]) == (2, 2, 1)
    assert (facts["first"], facts["last"]) == ("2002-04-27", "2014-03-24")
    wrong = metarec("data", "describe", ratings, "--items-file", "meta.json", "--header", "user,item,rating")
    assert wrong.status == 0  # rows of another number of fields are set aside and counted
    assert "malformed" in wrong.out or "wrong number of fields" in wrong.out


@pytest.mark.parametrize("liked", ["True", "TRUE", "true", "1"])
def test_steam_recommends_or_not_beside_hours(liked: str, tmp_path: Path) -> None:
    disliked = {"True": "False", "TRUE": "FALSE", "true": "false", "1": "0"}[liked]
    head = "app_id,title,date,is_recommended,hours,user_id,review_id\n"
    rows = (
        f"975370,Dwarf Fortress,2022-12-12,{liked},36.3,51580,0\n304390,FOR HONOR,2017-02-17,{disliked},11.5,2586,1\n"
    )
    (tmp_path / "recommendations.csv").write_text(head + rows)
    task, found = own_task(tmp_path / "recommendations.csv", {})
    assert found.rating.tolist() == [1, 0]
    assert found.users == ("51580", "2586")
    assert found.catalog.ids == ("975370", "304390")
    assert task.label == "rating >= 1"


def test_hours_played_by_title_alone(tmp_path: Path) -> None:
    rows = (
        "151603712,The Elder Scrolls V Skyrim,play,273.0,0",
        "151603712,Fallout 4,play,87.5,0",
        "5,Fallout 4,play,2,0",
    )
    (tmp_path / "steam-200k.csv").write_text("\n".join(rows) + "\n")
    found = read(tmp_path / "steam-200k.csv", header=["user", "title", "behaviour", "rating", "nothing"])
    assert found.catalog.ids == ("The Elder Scrolls V Skyrim", "Fallout 4")
    assert found.rating.tolist() == [273, 87.5, 2]


UCSD = [
    ("u1", "10", 5, "Fri Nov 10 09:53:41 -0800 2017", ""),
    ("u1", "11", 0, "Wed Oct 04 08:00:00 -0700 2006", ""),
    ("u2", "10", 3, "Mon Jan 01 00:00:00 +0000 2018", "Tue Jan 02 00:00:00 +0000 2018"),
    ("u2", "12", 1, "Mon Jan 01 00:00:01 +0000 2018", ""),
]


def goodreads_of_ucsd(path: Path) -> Path:
    rows = [
        {
            "user_id": user,
            "book_id": book,
            "title": f"Book {book}",
            "rating": rating,
            "date_added": added,
            "read_at": read_,
        }
        for user, book, rating, added, read_ in UCSD
    ]
    return lines(path, rows)


def test_goodreads_json_lines_are_asked_what_zero_means(tmp_path: Path) -> None:
    file = goodreads_of_ucsd(tmp_path / "interactions.json")
    with pytest.raises(DataError, match=r"1 of 4 ratings are 0 beside 1 to 5.*scale=\(1, 5\).*--scale 0,5"):
        read(file)
    found = read(file, scale=(1, 5))
    assert found.rating.tolist() == [5, 3, 1]
    assert found.dropped == {"not rated (0)": 1}
    assert found.timestamp is not None
    assert found.timestamp.tolist() == [1510336421, 1514764800, 1514764801]
    assert read(file, scale=(0, 5)).rating.tolist() == [5, 0, 3, 1]


def test_data_check_asks_what_zero_means(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    file = goodreads_of_ucsd(tmp_path / "interactions.json")
    assert "zero-rating: 1 of 4 ratings" in metarec("data", "check", file).out
    assert "zero-rating" not in metarec("data", "check", file, "--scale", "0,5").out


@pytest.mark.parametrize(
    ("ratings", "scale"),
    [
        ([0, 1, 2, 3, 4, 5], (1, 5)),
        ([0, 0.5, 3, 4.5, 5], (0.5, 5)),
        ([0, 7, 8, 10], (1, 10)),
        ([0, 1], None),
        ([1, 2, 3], None),
        ([0, 1.7, 3.2, 4], None),
        ([0, 20, 60, 100], None),
        ([-10, 0, 3, 5], None),
        ([], None),
    ],
)
def test_zeros_are_odd_beside_stars_alone(ratings: list[float], scale: tuple[float, float] | None) -> None:
    assert scale_without_zero(np.array(ratings, float)) == scale


LIBRARY = """Book Id,Title,Author,My Rating,Average Rating,Date Read,Date Added,Exclusive Shelf,My Review
1,"The Lost Garden (Tales, #1)",X,5,3.9,2017/11/10,2017/11/01,read,"two
lines"
2,The Last River,Y,0,3.9,,2017/11/02,to-read,
77,Nobody Knows This,Z,3,3.9,2017/12/10,2017/11/02,read,
4,The Silent Clock,Z,2,3.9,2017/12/10,2017/11/02,read,
"""
BOOKS = Catalog(
    ("b1", "b2", "b3"), {"title": ("The Lost Garden", "The Last River", "The Silent Clock"), "year": ("", "", "")}
)


def test_ones_own_goodreads_library_is_adapted_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "goodreads_library_export.csv").write_text(LIBRARY)
    with caplog.at_level(logging.WARNING):
        found = own_ratings(tmp_path / "goodreads_library_export.csv", BOOKS, RatingScale(1, 5))
    assert found == [("b1", 5.0), ("b3", 2.0)]
    assert "1 rows without a rating are left out" in caplog.text
    assert "1 rated titles are left out: the catalog has none, or several, of 'Nobody Knows This'" in caplog.text


def test_a_library_is_no_table_of_users_and_says_where_it_goes(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "library.csv").write_text(LIBRARY)
    for verb in (("data", "check"), ("train",)):
        assert "--line-breaks" in metarec(*verb, tmp_path / "library.csv").err
        refused = metarec(*verb, tmp_path / "library.csv", "--line-breaks")
        assert (refused.status, refused.err.count("\n")) == (2, 1)
        assert "metarec recommend RUN --ratings FILE" in refused.err


def test_libraries_of_several_people_are_a_table(tmp_path: Path) -> None:
    head, *rows = LIBRARY.replace("two\nlines", "two lines").splitlines()
    people = [f"{name},{row}" for name in ("ann", "bob") for row in rows]
    (tmp_path / "libraries.csv").write_text("\n".join([f"user,{head}", *people]) + "\n")
    found = read(tmp_path / "libraries.csv", scale=(1, 5))
    assert found.dropped == {"not rated (0)": 2}
    assert found.rating.tolist() == [5, 3, 2] * 2
    assert found.timestamp is not None
    assert found.timestamp[0] == 1509494400  # 2017/11/01


LETTERBOXD = """Date,Name,Year,Letterboxd URI,Rating
2023-01-05,Solaris,1972,https://boxd.it/a,4.5
2023-01-06,Solaris,2002,https://boxd.it/b,2
2023-01-07,Stalker,1979,https://boxd.it/c,5
"""


def test_letterboxd_tells_remakes_apart_by_year(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text(LETTERBOXD)
    films = Catalog(("f1", "f2", "f3"), {"title": ("Solaris", "Solaris", "Stalker"), "year": ("2002", "1972", "1979")})
    assert own_ratings(tmp_path / "ratings.csv", films, RatingScale(0.5, 5)) == [("f2", 4.5), ("f1", 2.0), ("f3", 5.0)]
    strangers = Catalog(("x",), {"title": ("Alien",)})
    with pytest.raises(DataError, match="none of 3 rated titles"):
        own_ratings(tmp_path / "ratings.csv", strangers, RatingScale(0.5, 5))


def test_films_of_several_people_without_ids_are_told_apart_by_title_and_year(tmp_path: Path) -> None:
    head, *rows = LETTERBOXD.splitlines()
    people = [f"{user},{row}" for user in ("ann", "bob", "cy", "di") for row in rows]
    (tmp_path / "films.csv").write_text("\n".join([f"user,{head}", *people]) + "\n")
    found = read(tmp_path / "films.csv", columns={"year": "Year"})
    assert found.catalog.ids == ("Solaris (1972)", "Solaris (2002)", "Stalker (1979)")
    assert found.catalog.fields["year"] == ("1972", "2002", "1979")
    assert any("their titles stand for them" in note for note in found.notes)


def test_audiobooks_with_decimal_commas_are_read_as_a_spreadsheet_of_europe_writes_them(tmp_path: Path) -> None:
    (tmp_path / "hoerbuecher.csv").write_text(
        "Kundennummer;ASIN;Titel;Bewertung;Datum\n007;B01;Der Zauberberg;4,5;10.11.2017\n8;B02;Momo;3,0;01.02.2018\n",
        encoding="cp1252",
    )
    found = read(tmp_path / "hoerbuecher.csv")
    assert found.rating.tolist() == [4.5, 3]
    assert found.users == ("007", "8")
    assert found.timestamp is not None
    assert found.timestamp.tolist() == [1510272000, 1517443200]


@pytest.mark.parametrize(
    "written",
    [
        "2017/11/10",
        "2017-11-10",
        "10.11.2017",
        "Nov 10, 2017",
        "November 10, 2017",
        "10 Nov 2017",
        "10 November 2017",
        "Fri Nov 10 00:00:00 +0000 2017",
        "Thu Nov 09 16:00:00 -0800 2017",
        "Fri, 10 Nov 2017 01:00:00 +0100",
        "1510272000",
        "1510272000000",
    ],
)
def test_dates_of_every_export_are_one_day(written: str) -> None:
    assert times(pd.Series([written])).tolist() == [1510272000]


@pytest.mark.parametrize("written", ["10-11-17", "10/11/2017", "Fri Nob 10 2017", "Posted November 5", "November"])
def test_a_date_that_can_be_meant_in_two_ways_or_in_none_is_no_date(written: str) -> None:
    assert np.isnan(times(pd.Series([written]))).all()
