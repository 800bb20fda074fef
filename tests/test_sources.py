"""Published layouts, byte for byte as they are shipped, on a few rows; and everything that can be wrong with a file."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_tasks import BASE, TOY, ml_1m, write

from metarec.data.interactions import Interactions
from metarec.data.source_options import SourceOptions
from metarec.data.sources import SOURCES, read_source, read_tables, write_tables
from metarec.data.sources.columns import times
from metarec.data.task_data import load_dataset, load_task_data
from metarec.data.task_files import load_task
from metarec.data.titles import read_title
from metarec.errors import ArtifactError, ConfigError, DataError, MetarecError

OWN = {name for name in SOURCES.names() if ":" not in name}
QUARANTINE = SourceOptions(bad_rows="quarantine")


def rows(data: Interactions) -> list[tuple[str, str, float]]:
    return [
        (data.users[user], data.catalog.ids[item], float(rating))
        for user, item, rating in zip(data.user, data.item, data.rating, strict=True)
    ]


def ml_100k(root: Path) -> Path:
    genres = "unknown|0\nAction|1\nAdventure|2\nDrama|3\n\n"
    items = (
        "1|Toy Story (1995)|01-Jan-1995||http://us.imdb.com/M/title-exact?Toy%20Story%20(1995)|0|0|1|0\n"
        "2|Cit\xe9 des enfants perdus, La (1995)|01-Jan-1995||http://us.imdb.com/M|0|1|0|1\n"
    ).encode("latin-1")
    return write(root, u__data="196\t1\t3\t881250949\n186\t2\t5\t891717742\n", u__item=items, u__genre=genres)


def ml_10m(root: Path) -> Path:
    movies = "1::Toy Story (1995)::Animation|Comedy\n2::Amélie (2001)::Comedy\n"
    return write(root, ratings__dat="1::1::3.5::838985046\n1::2::5::838983525\n", movies__dat=movies)


def ml_latest(root: Path) -> Path:
    movies = 'movieId,title,genres\n1,Toy Story (1995),Animation|Comedy\n11,"American President, The (1995)",Comedy\n'
    movies += "99,Untitled,(no genres listed)\n"
    return write(
        root,
        ratings__csv="userId,movieId,rating,timestamp\n1,1,4.0,964982703\n1,11,0.5,964981247\n",
        movies__csv=movies,
    )


def test_movielens_100k(tmp_path: Path) -> None:
    data = read_source("movielens", ml_100k(tmp_path / "d"))
    assert rows(data) == [("196", "1", 3.0), ("186", "2", 5.0)]
    assert data.catalog.row(1) == {
        "id": "2",
        "title": "La Cité des enfants perdus",
        "year": "1995",
        "genres": "Action, Drama",
    }
    assert data.timestamp is not None
    assert data.timestamp.tolist() == [881250949, 891717742]


def test_movielens_1m_has_latin_1_titles_and_colons_in_them(tmp_path: Path) -> None:
    data = read_source("movielens", ml_1m(tmp_path / "d"))
    assert rows(data) == [("1", "2653", 5.0), ("01", "1", 4.0)]
    assert data.catalog.title(1) == "2001: A Space Odyssey (1968)"
    assert data.catalog.title(2) == "Les Misérables (1995)"
    assert data.catalog.row(0)["genres"] == "Animation, Children's, Comedy"
    assert str(data.scale) == "from 1 to 5"


def test_movielens_10m_has_halves_and_utf_8(tmp_path: Path) -> None:
    data = read_source("movielens", ml_10m(tmp_path / "d"))
    assert (str(data.scale), data.catalog.title(1)) == ("from 0.5 to 5", "Amélie (2001)")


def test_movielens_latest(tmp_path: Path) -> None:
    data = read_source("movielens", ml_latest(tmp_path / "d"))
    assert rows(data) == [("1", "1", 4.0), ("1", "11", 0.5)]
    assert data.catalog.title(1) == "The American President (1995)"
    assert data.catalog.row(2) == {"id": "99", "title": "Untitled", "year": "", "genres": ""}


@pytest.mark.parametrize("make", [ml_100k, ml_1m, ml_10m, ml_latest])
def test_a_zip_is_read_like_its_folder(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "d")
    with zipfile.ZipFile(tmp_path / "ml.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, f"ml-x/{file.name}")
    assert read_source("movielens", tmp_path / "ml.zip").digest == read_source("movielens", folder).digest


def test_amazon_2018(tmp_path: Path) -> None:
    reviews = (
        '{"overall": 5.0, "verified": true, "reviewTime": "09 13, 2009", "reviewerID": "A1", "asin": "0000031852", '
        '"style": {"Size:": " L"}, "reviewText": "x", "unixReviewTime": 1252800000}\n'
        '{"overall": 2.0, "vote": "3", "reviewerID": "A2", "asin": "0000031852", "unixReviewTime": 1252800001}\n'
    )
    meta = (
        '{"category": ["Toys", "Dolls"], "title": "Tutu", "brand": "Coxlures", "asin": "0000031852", "price": "$3"}\n'
    )
    folder = write(
        tmp_path, Toys__json__gz=gzip.compress(reviews.encode()), meta_Toys__json__gz=gzip.compress(meta.encode())
    )
    data = read_source("amazon", folder)
    assert rows(data) == [("A1", "0000031852", 5.0), ("A2", "0000031852", 2.0)]
    assert data.catalog.row(0) == {"id": "0000031852", "title": "Tutu", "brand": "Coxlures", "genres": "Toys, Dolls"}


def test_amazon_2023_counts_milliseconds(tmp_path: Path) -> None:
    reviews = (
        '{"rating": 4.0, "title": "Nice", "text": "x", "images": [], "asin": "B0", "parent_asin": "B1", '
        '"user_id": "AE", "timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": true}\n'
    )
    meta = '{"main_category": "Toys", "title": "Robot", "store": null, "categories": [], "parent_asin": "B1"}\n'
    data = read_source("amazon", write(tmp_path, Toys__jsonl=reviews, meta_Toys__jsonl=meta))
    assert rows(data) == [("AE", "B1", 4.0)]
    assert data.timestamp is not None
    assert data.timestamp.tolist() == pytest.approx([1588687728.923], abs=1e-6)
    assert data.catalog.row(0) == {"id": "B1", "title": "Robot", "brand": "", "genres": ""}


def book_crossing(root: Path) -> Path:
    ratings = '"User-ID";"ISBN";"Book-Rating"\r\n"276725";"034545104X";"0"\r\n"276726";"0155061224";"5"\r\n'
    ratings += '"276726";"nowhere";"7"\r\n'
    books = (
        '"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher";"Image-URL-S";"Image-URL-M";"Image-URL-L"\r\n'
        '"034545104X";"Flesh Tones";"M. J. Rose";"2002";"Ballantine";"http://s";"http://m";"http://l"\r\n'
        '"0155061224";"Rites \\"of\\" Passage; Fran\xe7ois";"Judith Rae";"2001";"Heinle";"http://s";"http://m";"http://l"\r\n'
    )
    return write(root, BXZZBookZZRatings__csv=ratings, BXZZBooks__csv=books.encode("latin-1"))


def test_book_crossing_leaves_zeros_and_unknown_books_out_and_counts_them(tmp_path: Path) -> None:
    data = read_source("book-crossing", book_crossing(tmp_path), QUARANTINE)
    assert rows(data) == [("276726", "0155061224", 5.0)]
    assert data.catalog.row(1)["title"] == 'Rites "of" Passage; François'
    assert data.dropped == {"implicit rating (0)": 1, "item without a catalog row": 1}
    with pytest.raises(DataError, match="item 'nowhere' has no row in the catalog"):
        read_source("book-crossing", tmp_path)


def test_goodbooks(tmp_path: Path) -> None:
    books = (
        "book_id,goodreads_book_id,authors,original_publication_year,original_title,title\n"
        '1,2767052,Suzanne Collins,2008.0,The Hunger Games,"The Hunger Games (The Hunger Games, #1)"\n2,3,X,,Y,Z\n'
    )
    data = read_source(
        "goodbooks", write(tmp_path, ratings__csv="user_id,book_id,rating\n1,1,5\n2,2,4\n", books__csv=books)
    )
    assert rows(data) == [("1", "1", 5.0), ("2", "2", 4.0)]
    assert data.catalog.row(0) == {
        "id": "1",
        "title": "The Hunger Games (The Hunger Games, #1)",
        "authors": "Suzanne Collins",
        "year": "2008",
    }
    assert data.catalog.row(1)["year"] == ""


def test_mind_rates_what_was_shown(tmp_path: Path) -> None:
    behaviors = "1\tU87243\t11/10/2019 11:30:54 AM\tN8668 N39081\tN78206-0 N26368-1\n"
    behaviors += "2\tU598\t11/12/2019 1:45:29 PM\t\tN26368-0\n"
    news = 'N78206\tsports\tgolf\tThe "open\tAn abstract\thttps://x\t[]\t[]\nN26368\tnews\tworld\tPeace\t\thttps://y\t[]\t[]\n'
    data = read_source("mind", write(tmp_path, behaviors__tsv=behaviors, news__tsv=news))
    assert rows(data) == [("U87243", "N78206", 0.0), ("U87243", "N26368", 1.0), ("U598", "N26368", 0.0)]
    assert data.timestamp is not None
    assert data.timestamp[2] - data.timestamp[0] == 2 * 86400 + 2 * 3600 + 14 * 60 + 35
    assert data.catalog.row(0)["title"] == 'The "open'


def test_steam_reads_python_literals(tmp_path: Path) -> None:
    reviews = (
        "{'user_id': 'doctr', 'user_url': 'http://x', 'reviews': [{'funny': '', 'posted': 'Posted July 8.', 'item_id': "
        "'250320', 'helpful': '2 of 2', 'recommend': True, 'review': u'It\\'s fun'}, "
        "{'item_id': '10', 'recommend': False}]}\n"
    )
    games = (
        "{u'publisher': u'TT', u'genres': [u'Action', u'Indie'], u'app_name': u'Wolf', u'title': u'Wolf', "
        "u'release_date': u'2013-10-11', u'id': u'250320', u'early_access': False}\n"
        "{u'app_name': u'Counter', u'id': u'10', u'release_date': u'2000-11-01'}\n"
    )
    data = read_source("steam", write(tmp_path, australian_user_reviews__json=reviews, steam_games__json=games))
    assert rows(data) == [("doctr", "250320", 1.0), ("doctr", "10", 0.0)]
    assert data.catalog.row(0) == {"id": "250320", "title": "Wolf", "genres": "Action, Indie", "year": "2013"}


def test_yelp(tmp_path: Path) -> None:
    review = (
        '{"review_id":"KU","user_id":"mh","business_id":"XQ","stars":3.0,"useful":0,"funny":0,"cool":0,'
        '"text":"If you decide","date":"2018-07-07 22:09:11"}\n'
    )
    business = (
        '{"business_id":"XQ","name":"Turning Point","address":"1","city":"Philadelphia","state":"PA","stars":3.0,'
        '"attributes":null,"categories":"Restaurants, Breakfast & Brunch","hours":{"Monday":"7:30-15:0"}}\n'
    )
    folder = write(tmp_path, yelp_academic_dataset_review__json=review, yelp_academic_dataset_business__json=business)
    data = read_source("yelp", folder)
    assert rows(data) == [("mh", "XQ", 3.0)]
    assert data.timestamp is not None
    assert data.timestamp.tolist() == [1531001351]
    assert data.catalog.row(0)["city"] == "Philadelphia"


def test_lastfm_plays_are_ones(tmp_path: Path) -> None:
    artists = "id\tname\turl\tpictureURL\n1\tMALICE MIZER\thttp://a\thttp://b\n2\tMötley Crüe\thttp://a\t\n"
    plays = "userID\tartistID\tweight\n2\t1\t13883\n2\t2\t11690\n"
    data = read_source("lastfm", write(tmp_path, user_artists__dat=plays, artists__dat=artists))
    assert rows(data) == [("2", "1", 1.0), ("2", "2", 1.0)]
    assert data.catalog.title(1) == "Mötley Crüe"


TABLE = {"user": ["007", "NA"], "item": ["a", "b"], "rating": [4.0, 2.5], "timestamp": [1, 2]}
THINGS = {"item": ["a", "b"], "title": ["Alien", "Heat"], "mood": ["dark", ""]}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "csv.gz"])
def test_any_table_with_named_columns(kind: str, tmp_path: Path) -> None:
    for name, columns in (("ratings", TABLE), ("items", THINGS)):
        frame, file = pd.DataFrame(columns), tmp_path / f"{name}.{kind}"
        if kind == "jsonl":
            frame.to_json(file, orient="records", lines=True)
        elif kind == "parquet":
            frame.to_parquet(file)
        else:
            frame.to_csv(file, index=False, sep="\t" if kind == "tsv" else ",")
    data = read_source("table", tmp_path, SourceOptions(columns={"timestamp": "timestamp"}))
    assert rows(data) == [("007", "a", 4.0), ("NA", "b", 2.5)]
    assert data.timestamp is not None
    assert data.catalog.row(0) == {"id": "a", "title": "Alien", "mood": "dark"}


def test_one_table_may_hold_ratings_and_items_under_other_names(tmp_path: Path) -> None:
    text = "who;what;stars;name\nu1;p1;3;Lamp\nu2;p1;4;Lamp\n"
    options = SourceOptions(
        ratings="orders.csv", separator=";", columns={"user": "who", "item": "what", "rating": "stars", "title": "name"}
    )
    data = read_source("table", write(tmp_path, orders__csv=text), options)
    assert rows(data) == [("u1", "p1", 3.0), ("u2", "p1", 4.0)]
    assert data.catalog.fields["title"] == ("Lamp",)


def test_a_table_without_ratings_is_implicit(tmp_path: Path) -> None:
    folder = write(tmp_path, ratings__csv="user,item\nu,a\n", items__csv="item,title\na,A\nb,B\n")
    assert rows(read_source("table", folder)) == [("u", "a", 1.0)]


@pytest.mark.parametrize("splits", [False, True])
def test_a_saved_hugging_face_dataset(splits: bool, tmp_path: Path) -> None:
    folder = tmp_path / "train" if splits else tmp_path
    folder.mkdir(exist_ok=True)
    columns = pa.table({"user": ["u", "v"], "item": [1, 2], "rating": [5, 1], "title": ["A", "B"]})
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, columns.schema) as out,
    ):
        out.write_table(columns)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    data = read_source("hf-datasets", tmp_path)
    assert rows(data) == [("u", "1", 5.0), ("v", "2", 1.0)]
    assert data.catalog.fields["title"] == ("A", "B")
    (folder / "data-00000-of-00001.arrow").write_bytes(b"nothing")
    with pytest.raises(DataError, match="is not a saved dataset"):
        read_source("hf-datasets", tmp_path)


FLIPPED = """
import json, sys
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from metarec.data.sources import read_tables
from metarec.errors import MetarecError

kind, root = sys.argv[1], Path(sys.argv[2])
rows = range(40)
columns = {"user": [f"u{i % 7}" for i in rows], "item": list(rows), "rating": [float(i % 5 + 1) for i in rows]}
columns |= {"title": [f"film {i}" if i % 3 else None for i in rows], "genres": [["a", "b"][: i % 3] for i in rows]}
columns["format"] = pa.array(["film", "series"] * 20).dictionary_encode()
table = pa.table(columns)
if kind == "hf-datasets":
    file = root / "data.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": file.name}]}))
else:
    file = root / "ratings.parquet"
    pq.write_table(table, file)
whole, random, refused = file.read_bytes(), np.random.default_rng(0), 0
for _ in range(125):
    place = int(random.integers(len(whole) * 8))
    print("bit", place, file=sys.stderr, flush=True)
    content = bytearray(whole)
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)
    try:
        read_tables(kind, root)
    except MetarecError:
        refused += 1
print(refused)
"""


@pytest.mark.parametrize("kind", ["hf-datasets", "table"])
def test_a_damaged_arrow_or_parquet_file_is_refused_or_read_and_kills_no_process(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FLIPPED, kind, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) > 25


def test_a_flipped_byte_of_the_cached_movielens_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {"movieId": [1, 2, 3], "title": ["A", "B", None], "year": [1999.0, 2000.0, None]}
    columns |= {"genres": ["Drama|War", "Action", "(no genres listed)"], "userId": [1, 1, 2]}
    shipped = pd.DataFrame(columns | {"rating": [5.0, 0.5, 3.0], "timestamp": [7, 8, 9]})
    monkeypatch.setattr("metarec.data.sources.movielens._shipped_frame", lambda: shipped)
    monkeypatch.setattr("metarec.files.artifacts._fsync", lambda _: None)
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path))
    digest = read_source("embedded-movielens").digest
    (cached,) = (tmp_path / "data").iterdir()
    for number, place in enumerate(np.random.default_rng(0).integers(0, 1 << 40, 100).tolist()):
        file = cached / ("manifest.json" if number % 5 == 0 else "table.parquet")
        flip(file, place)
        caplog.clear()
        assert read_source("embedded-movielens").digest == digest
        assert len(caplog.messages) <= 1
        assert number % 5 == 0 or "is missing, truncated or altered; it is made again" in caplog.text


def flip(file: Path, place: int) -> None:
    """Flips one bit of a file."""
    content = bytearray(file.read_bytes())
    content[place // 8 % len(content)] ^= 1 << place % 8
    file.write_bytes(content)


def test_every_source_has_a_task_and_every_task_a_source() -> None:
    from metarec.data.task_files import task_names

    used = {load_task(name).dataset.source for name in task_names()}
    # What a service has collected is at a path of its own.
    assert used - {"mix"} | {"store"} == OWN


def test_a_task_of_each_family_loads_on_a_folder_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    pairs = [(user, item) for user in range(40) for item in generator.choice(60, 30, replace=False)]
    plays = "userID\tartistID\tweight\n" + "".join(f"{user}\t{item}\t9\n" for user, item in pairs)
    artists = "id\tname\turl\tpictureURL\n" + "".join(f"{item}\tBand {item}\tx\ty\n" for item in range(60))
    write(tmp_path / "lastfm", user_artists__dat=plays, artists__dat=artists)
    monkeypatch.setenv("METAREC_DATA", str(tmp_path))
    data = load_task_data(load_task("lastfm/user-cold"), 0)
    assert data.leaks() == []
    assert {0.0, 1.0} == set(data.interactions.rating.tolist())


# A source from outside.


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    write(tmp_path / "lib", toy_source__py=TOY)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    return "toy_source"


def test_a_source_from_outside_is_named_by_its_module(toy: str) -> None:
    data = read_source(f"{toy}:read")
    assert (rows(data), data.catalog.title(1)) == ([("u", "a", 1.0), ("v", "b", 5.0)], "Heat")
    with pytest.raises(DataError, match=r"'toy_source:wrong' returned a int.*Return metarec.data.sources.Tables"):
        read_source(f"{toy}:wrong")
    for missing in (f"{toy}:reed", "no_such_module:read"):
        with pytest.raises(ConfigError, match="cannot be imported"):
            read_source(missing)
    with pytest.raises(ConfigError, match="Did you mean 'movielens'"):
        read_source("movilens")


def test_a_source_from_an_installed_package_has_a_name(toy: str, tmp_path: Path) -> None:
    metadata = write(tmp_path / "lib" / "toy-1.dist-info", METADATA="Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[metarec.sources]\ntoy-set = {toy}:read\n")
    assert "toy-set" in SOURCES.names()
    assert len(read_source("toy-set")) == 2


def test_a_task_may_name_a_source_from_outside(toy: str, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(json.dumps({**BASE, "dataset": {"source": f"{toy}:read"}}))
    assert len(load_dataset(load_task(str(tmp_path / "task.yaml")).dataset)) == 2


# Times, numbers and ids as people write them.

STAMPS = [
    (["2024-08-07", "2024-08-08"], [1722988800, 1723075200]),
    (["2024-08-07T10:00:00+02:00", "2024-08-07 10:00:00.25"], [1723017600, 1723024800.25]),
    (["2024-08-07T10:00:00,5Z", "2024-08-07 10:00 UTC"], [1723024800.5, 1723024800]),
    (["07.08.2024", "7.8.2024 10:00"], [1722988800, 1723024800]),
    (["08/07/2024", "08/13/2024"], [1722988800, 1723507200]),
    (["20240807", "20240808"], [1722988800, 1723075200]),
    (["1700000000.5", "1700000001"], [1700000000.5, 1700000001]),
    (["1700000000123", "1700000000500"], [1700000000.123, 1700000000.5]),
    (["1700000000123456", "1700000000500000"], [1700000000.123456, 1700000000.5]),
    (["1700000000500000000", "1700000001000000000"], [1700000000.5, 1700000001]),
]


@pytest.mark.parametrize(("written", "seconds"), STAMPS, ids=lambda value: str(value[0]))
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_times_are_read_as_they_are_written(
    written: list[str], seconds: list[float], kind: str, tmp_path: Path
) -> None:
    frame = pd.DataFrame({"user": ["u", "v"], "item": "a", "rating": 4, "timestamp": written, "title": "A"})
    if kind == "csv":
        frame.to_csv(tmp_path / "ratings.csv", index=False)
    elif kind == "jsonl":
        frame.to_json(tmp_path / "ratings.jsonl", orient="records", lines=True)
    else:
        frame.to_parquet(tmp_path / "ratings.parquet")
    data = read_source("table", tmp_path)
    assert data.timestamp is not None
    np.testing.assert_allclose(data.timestamp, seconds, rtol=0, atol=1e-6)


@pytest.mark.parametrize("written", ["08/07/2024", "later", "Aug 7", ""])
def test_a_time_that_can_be_meant_in_two_ways_is_an_error_with_its_cure(written: str, tmp_path: Path) -> None:
    folder = write(tmp_path, ratings__csv=f"user,item,rating,timestamp,title\nu,a,4,{written},A\n")
    with pytest.raises(DataError, match=r"row 2: timestamp .* is neither a number nor a date.*2024-08-07"):
        read_source("table", folder)
    assert read_source("table", folder, SourceOptions(columns={"timestamp": ""})).timestamp is None


def test_times_too_large_to_be_averaged_are_no_overflow() -> None:
    assert np.isfinite(times(pd.Series([1.7e308, 1.7e308]))).all()


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_datetimes_of_parquet_keep_their_fractions(unit: str, tmp_path: Path) -> None:
    when = pd.to_datetime(["2024-08-07 10:00:00.250", "2024-08-07 10:00:00"], format="ISO8601").astype(
        f"datetime64[{unit}]"
    )
    frame = pd.DataFrame({"user": ["u", "u"], "item": "a", "rating": [5, 1], "time": when, "title": "A"})
    frame.to_parquet(tmp_path / "ratings.parquet")
    data = read_source("table", tmp_path)
    assert data.rating.tolist() == [1.0 if unit == "s" else 5.0]


@pytest.mark.parametrize(
    "column", ["timestamp", "Time", "date", "datetime", "unixReviewTime", "Kaufdatum", "created_at"]
)
def test_the_later_of_two_ratings_wins_by_fractions_and_by_any_usual_name(column: str, tmp_path: Path) -> None:
    text = f"user,item,rating,title,{column}\nu,a,5,A,1700000000.7\nu,a,1,A,1700000000.2\n"
    data = read_source("table", write(tmp_path, ratings__csv=text))
    assert rows(data) == [("u", "a", 5.0)]


def test_order_by_fractions_of_a_second_is_kept_in_splits(tmp_path: Path) -> None:
    from metarec.data.episodes import split_by_time

    lines = [
        f"u{user},i{item},3,T,{1700000000 + (9 - user) / 10 + item / 100}" for user in range(9) for item in range(3)
    ]
    text = "user,item,rating,title,timestamp\n" + "\n".join(lines)
    data = read_source("table", write(tmp_path, ratings__csv=text))
    parts, usable = split_by_time(data, (0.34, 0.33, 0.33))
    assert {data.users[code] for code in parts["train"]} == {"u6", "u7", "u8"}
    assert usable.all()


def test_numbers_may_have_a_decimal_comma_or_be_true_and_false(tmp_path: Path) -> None:
    text = "user;item;rating;title\nu;a;4,5;A\nv;a;3;A\n"
    options = SourceOptions(separator=";")
    assert read_source("table", write(tmp_path / "c", ratings__csv=text), options).rating.tolist() == [4.5, 3.0]
    text = "user,item,liked,title\nu,a,True,A\nv,a,FALSE,A\n"
    data = read_source("table", write(tmp_path / "b", ratings__csv=text))
    assert (data.rating.tolist(), str(data.scale)) == ([1.0, 0.0], "from 0 to 1")
    text = "user;item;rating;title\nu;a;1,234;A\n"
    with pytest.raises(DataError, match=r"rating '1,234' is not a finite number"):
        read_source("table", write(tmp_path / "t", ratings__csv=text), options)


def test_an_id_is_the_same_in_every_unicode_form(tmp_path: Path) -> None:
    ratings = "user,item,rating\nJos\u00e9,caf\u00e9,5\nJose\u0301,x,1\nz,cafe\u0301,3\n"
    data = read_source("table", write(tmp_path, ratings__csv=ratings, items__csv="item,title\ncafe\u0301,A\nx,B\n"))
    assert data.users == ("Jos\u00e9", "z")
    assert data.catalog.find("cafe\u0301") == data.catalog.find("caf\u00e9") == 0
    write(tmp_path, items__csv="item,title\ncafe\u0301,A\ncaf\u00e9,A\nx,B\n")
    with pytest.raises(DataError, match="item id twice"):
        read_source("table", tmp_path)


# Tables of one's own.


def test_the_first_blank_of_an_items_rows_does_not_win(tmp_path: Path) -> None:
    text = "user,item,rating,title,maker\nu,a,5,,\nv,a,3,Real title, \nw,a,3,Other,Philips\n"
    data = read_source("table", write(tmp_path, ratings__csv=text), SourceOptions(columns={"maker": "maker"}))
    assert data.catalog.row(0) == {"id": "a", "title": "Real title", "maker": "Philips"}
    assert any("several titles: a" in note for note in data.notes)


def test_columns_that_nothing_reads_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "user,item,raiting,title,colour\nu,a,5,A,red\n"
    data = read_source("table", write(tmp_path, ratings__csv=text))
    said = " | ".join(data.notes)
    assert "'raiting' (did you mean 'rating'?)" in said
    assert "nothing reads: 'colour'" in said
    assert "every row counts as 1" in said
    assert caplog.text.count("WARNING") == 3


@pytest.mark.parametrize(
    ("ratings", "items", "options"),
    [
        ("user_id,ISBN,Sterne (1-5)\nu,a,4\n", "sku,name\na,A\n", {}),
        ("User-ID,Anime_ID,My Score\nu,a,4\n", "anime_id,Name\na,A\n", {"columns": {"rating": "My Score"}}),
        ("user,item,rating\nu,a,4\n", "code,title\na,A\n", {"items": {"id": "code"}}),
        ("user,item,rating\nu,a,4\n", "code,title\na,A\n", {"items": {"file": "items.csv", "id": "code"}}),
        ("Käufer,Artikelnr.,Bewertung\nu,a,4\n", "Artikelnr.,Bezeichnung\na,A\n", {}),
    ],
)
def test_two_tables_may_name_their_ids_differently(ratings: str, items: str, options: object, tmp_path: Path) -> None:
    folder = write(tmp_path, ratings__csv=ratings, items__csv=items)
    data = read_source("table", folder, SourceOptions.model_validate(options))
    assert (rows(data), data.catalog.row(0)) == ([("u", "a", 4.0)], {"id": "a", "title": "A"})


def test_lists_in_cells_become_text(tmp_path: Path) -> None:
    cells = '\'["Action", "Drama"]\''.replace("'", "")
    frame = pd.DataFrame({"item": ["a", "b", "c", "d"], "title": ["[REC]", "B", "C", "D"]})
    frame["genres"] = [cells, "['Drama']", '[{"id": 1, "name": "Crime"}]', "[broken"]
    frame.to_csv(tmp_path / "items.csv", index=False)
    data = read_source("table", write(tmp_path, ratings__csv="user,item,rating\nu,a,4\n"))
    assert data.catalog.fields["genres"] == ("Action, Drama", "Drama", "Crime", "[broken")
    assert data.catalog.fields["title"][0] == "[REC]"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_what_excel_saves_is_read(encoding: str, kind: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    text = "user,item,rating,title\nMüller,a,4,Ä\n"
    if kind == "jsonl":
        text = '{"user": "Müller", "item": "a", "rating": 4, "title": "Ä"}\n'
    (tmp_path / f"ratings.{kind}").write_bytes((mark + text).encode(encoding))
    data = read_source("table", tmp_path)
    assert (rows(data), data.catalog.title(0)) == ([("Müller", "a", 4.0)], "Ä")


@pytest.mark.parametrize(
    ("ratings", "options", "message"),
    [
        ("", {}, "is empty"),
        ("\n", {}, "is empty"),
        ("user,item,rating,rating,title\nu,a,4,5,A\n", {}, "has the column 'rating' 2 times"),
        ("user,item,rating,title\n", {}, "holds no ratings"),
        ("user,item,rating\nu,a,4\n", {}, "no column 'title'.*--column title=THEIRS.*--items-file FILE"),
        ("user,item,rating,title\nu,a,4,A\n", {"columns": {"title": "item"}}, "is named for title and item"),
        ("user,item,rating,title\nu,a,4,A\n", {"columns": {"title": "titel"}}, "no column 'titel'.*'title'"),
        ("user,item,rating\nu,a,4\n", {"items": {"id": "x"}}, "no file 'items"),
    ],
)
def test_a_table_that_cannot_be_meant_is_an_error_with_its_cure(
    ratings: str, options: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_source("table", write(tmp_path, ratings__csv=ratings), SourceOptions.model_validate(options))
    assert caught.value.cure


def test_a_json_array_says_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is one JSON array.*one object a line"):
        read_source("table", write(tmp_path, ratings__json='[{"user": "u", "item": "a", "rating": 5}]'))


def test_a_misspelt_time_of_recbole_is_said(tmp_path: Path) -> None:
    inter = "user_id:token\titem_id:token\trating:float\ttimestmap:float\nu\ta\t5\t1\n"
    (tmp_path / "x.inter").write_text(inter)
    (tmp_path / "x.item").write_text("item_id:token\ttitle:token\na\tA\n")
    (note,) = read_source("recbole", tmp_path).notes
    assert "'timestmap' (did you mean 'timestamp'?)" in note


# What a converted copy keeps.


def test_a_converted_copy_stands_in_for_the_original(tmp_path: Path) -> None:
    original = ml_1m(tmp_path / "original")
    write_tables(read_tables("movielens", original), tmp_path / "copy")
    one, two = read_source("movielens", original), read_source("goodbooks", tmp_path / "copy")
    assert rows(one) == rows(two)
    assert (one.catalog, str(one.scale)) == (two.catalog, str(two.scale))
    damaged = tmp_path / "copy" / "ratings.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="truncated or altered"):
        read_source("movielens", tmp_path / "copy")


# Bad input.

GOOD_ITEMS = "item,title\na,A\nb,B\n"
GOOD = "user,item,rating\nu,a,4\nv,b,2\n"


@pytest.mark.parametrize(
    ("ratings", "items", "message"),
    [
        ("user;item;rating\nu;a;4\n", GOOD_ITEMS, "no column 'user'. Its columns look separated by ';'"),
        ("user\titem\trating\nu\ta\t4\n", GOOD_ITEMS, "look separated by a tab"),
        ("user,itm,rating\nu,a,4\n", GOOD_ITEMS, "no column 'item'. Did you mean 'itm'"),
        (GOOD, "item,label\na,A\n", "no title"),
        ("user,item,rating\nu,a,4\nv,b\n", GOOD_ITEMS, "row 3 has 2 fields, the header 3"),
        ("user,item,rating\nu,a,4\nv,b,2,9\n", GOOD_ITEMS, "row 3 has 4 fields, the header 3"),
        (
            'user,item,rating\n"u,a,4\nv,b,2\nw,b",a,2\n',
            GOOD_ITEMS,
            "row 2: a quoted field goes on over the line's end",
        ),
        ('user,item,rating\nu,a,4\n"v,b,2\n', GOOD_ITEMS, "row 3 is not valid delimited text"),
        ("user,item,rating\nu,a,NaN\n", GOOD_ITEMS, "row 2: rating 'NaN' is not a finite number"),
        ("user,item,rating\nu,a,4\nv,b,1e999\n", GOOD_ITEMS, "row 3: rating '1e999' is not a finite number"),
        ("user,item,rating\nu,a,4\nv,b,1e300\n", GOOD_ITEMS, "row 3: rating '1e\\+300' is not a finite number"),
        ("user,item,rating\nu,a,\n", GOOD_ITEMS, "rating '' is not a finite number"),
        ("user,item,rating\nu,a,٤\n", GOOD_ITEMS, "is not a finite number"),
        ("user,item,rating\nu,a,1_0\n", GOOD_ITEMS, "is not a finite number"),
        ("user,item,rating\n,a,4\n", GOOD_ITEMS, "row 2: the user id is empty"),
        ("user,item,rating\nu,z,4\n", GOOD_ITEMS, "item 'z' has no row in the catalog"),
        ("user,item,rating\n", GOOD_ITEMS, "holds no ratings"),
        ("", GOOD_ITEMS, "is empty"),
        (b"user,item,rating\nu,a\xff,4\n", GOOD_ITEMS, "is not UTF-8.*Set 'encoding'"),
        (GOOD.encode("utf-16")[:-1], GOOD_ITEMS, "is not UTF-16"),
        (GOOD.encode("utf-16-le"), GOOD_ITEMS, "Set 'encoding' to 'utf-16-le'"),
        (GOOD, "item,title\na,A\na,B\n", "item id twice"),
        (GOOD, "item,title\na,A\nb," + "x" * 1_000_000 + "\n", "item text too long.*65,536"),
        (GOOD, 'item,title\na,"A\nb,B\n', "quoted field|not valid delimited"),
        (GOOD, "item,title\na,\x00\nb,B\n\x00", "fields|not"),
    ],
    ids=lambda value: str(value)[:24] if not isinstance(value, str) or len(value) < 60 else value[:24],
)
def test_a_bad_file_is_named_with_row_and_cure(ratings: str | bytes, items: str, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, ratings__csv=ratings, items__csv=items)
    with pytest.raises(DataError, match=message) as caught:
        read_source("table", folder)
    assert caught.value.cure
    assert str(tmp_path) in str(caught.value)


def test_quarantine_sets_bad_rows_aside_and_counts_each_kind(tmp_path: Path) -> None:
    ratings = "user,item,rating\nu,a,4\nv,b\nw,b,NaN\nx,z,3\n,a,3\ny,c,3\nv,b,2\nv,b,3\n"
    items = "item,title\na,A\nb,B\nb,Again\n,nobody\nc," + "x" * 100_000 + "\n"
    data = read_source("table", write(tmp_path, ratings__csv=ratings, items__csv=items), QUARANTINE)
    assert rows(data) == [("u", "a", 4.0), ("v", "b", 3.0)]
    assert data.users == ("u", "v")
    assert data.dropped == {
        "malformed row": 1,
        "item id empty": 1,
        "item id twice": 1,
        "item text too long": 1,
        "user id empty": 1,
        "rating not a number": 1,
        "item without a catalog row": 2,
        "repeated rating": 1,
    }
    broken = write(tmp_path / "all", ratings__csv="user,item,rating\nu,z,4\n", items__csv=items)
    with pytest.raises(DataError, match="none of 1 ratings can be read"):
        read_source("table", broken, QUARANTINE)


@pytest.mark.parametrize(
    "line", ["not json", '{"user": NaN}', '{"user": "u", "user": "v"}', "[1]", "{" * 20_000, '{"user":']
)
def test_a_bad_json_line_is_named_or_set_aside(line: str, tmp_path: Path) -> None:
    good = '{"user": "u", "item": "a", "rating": 4}\n'
    folder = write(tmp_path, ratings__jsonl=good + line + "\n", items__csv=GOOD_ITEMS)
    with pytest.raises(DataError, match="row 2 is not an object"):
        read_source("table", folder)
    data = read_source("table", folder, QUARANTINE)
    assert (rows(data), data.dropped) == ([("u", "a", 4.0)], {"malformed row": 1})


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("ratings.csv", "w") as stream:
            stream.write(b"userId,movieId,rating,timestamp\n")
            for _ in range(80):
                stream.write(b"1,1,4.0,964982703\n" * 60_000)
        archive.writestr("movies.csv", "movieId,title,genres\n1,A (2000),Drama\n")
    with pytest.raises(DataError, match="expands to more than 100 times its size"):
        read_source("movielens", tmp_path / "bomb.zip")


def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb") as stream:
        stream.write(b"user,item,rating\n")
        for _ in range(70):
            stream.write(b"u,a,4\n" * 170_000)
    folder = write(tmp_path, ratings__csv__gz=packed.getvalue(), items__csv=GOOD_ITEMS)
    with pytest.raises(DataError, match="expands to more than 100 times its size"):
        read_source("table", folder)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "not a zip"])
def test_a_damaged_archive_is_named(damage: str, tmp_path: Path) -> None:
    folder = ml_latest(tmp_path / "d")
    file = tmp_path / "ml.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in folder.iterdir():
            archive.write(part, f"ml/{part.name}")
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[60] ^= 0xFF
    file.write_bytes(
        {"truncated": bytes(content[:50]), "empty": b"", "not a zip": b"hello"}.get(damage, bytes(content))
    )
    with pytest.raises(DataError):
        read_source("movielens", file)


def test_a_truncated_gzip_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(GOOD.encode() * 1000)
    folder = write(tmp_path, ratings__csv__gz=packed[:-20], items__csv=GOOD_ITEMS)
    with pytest.raises(DataError, match="cannot be read"):
        read_source("table", folder)


def test_missing_data_says_where_to_put_it(tmp_path: Path) -> None:
    for name in OWN - {"embedded-movielens"}:
        for path in (None, tmp_path / "nothing", write(tmp_path / "empty")):
            with pytest.raises(DataError) as caught:
                read_source(name, path)
            assert caught.value.cure, name


TITLES = [
    ("Matrix, The (1999)", "The Matrix", "1999"),
    (
        "City of Lost Children, The (Cité des enfants perdus, La) (1995)",
        "The City of Lost Children (La Cité des enfants perdus)",
        "1995",
    ),
    ("Avventura, L' (1960)", "L'Avventura", "1960"),
    ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey", "1968"),
    ("1984", "1984", ""),
    ("Seven (a.k.a. Se7en) (1995)", "Seven (a.k.a. Se7en)", "1995"),
    ("Dekalog (Decalogue, The) (1989-1990)", "Dekalog (The Decalogue)", "1989"),
    ("Walking, Talking", "Walking, Talking", ""),
    ("", "", ""),
]


@pytest.mark.parametrize(("written", "title", "year"), TITLES)
def test_titles_are_read_as_people_say_them(written: str, title: str, year: str) -> None:
    assert read_title(written) == (title, year)
    assert read_title(title) == (title, "")


@given(st.text(max_size=80))
def test_any_title_can_be_read(text: str) -> None:
    title, year = read_title(text)
    assert "\n" not in title
    assert year == "" or year.isdigit()


FIELD = st.one_of(
    st.sampled_from(
        ["u", "a", "b", "4", "2.5", "NA", "007", "nan", "1e999", '"', "'", "", "\x00", "‮", "<|im_end|>", "-1"]
    ),
    st.text(max_size=6),
)
LINES = st.lists(st.lists(FIELD, max_size=4).map(",".join), max_size=6).map("\n".join)


@given(LINES, LINES, st.sampled_from(["error", "quarantine"]), st.sampled_from(["csv", "tsv", "jsonl"]), st.booleans())
@example("u,0,4", "u,u,u\n0,u", "quarantine", "csv", True)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_table_is_read_or_refused_and_no_row_is_lost_silently(
    tmp_path_factory: pytest.TempPathFactory, ratings: str, items: str, bad_rows: str, kind: str, header: bool
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    start = "user,item,rating\n" if header else ""
    text = start.replace(",", "\t") + ratings if kind == "tsv" else start + ratings
    (folder / f"ratings.{kind}").write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    (folder / "items.csv").write_text("item,title\n" + items, encoding="utf-8", errors="surrogatepass", newline="")
    try:
        data = read_source("table", folder, SourceOptions(bad_rows=bad_rows))  # type: ignore[arg-type]
    except MetarecError:
        return
    assert np.isfinite(data.rating).all()
    assert "" not in data.users
    lines = [line for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line][1:]
    counted = sum(
        number
        for reason, number in data.dropped.items()
        if reason != "malformed item row" and (not reason.startswith("item ") or "row" in reason)
    )
    assert len(data) + counted == len(lines)


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_data_or_a_typed_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("u.data", "ratings.csv.gz", "x.inter", "ml.zip", "behaviors.tsv", "ratings.parquet"):
        (folder / name).write_bytes(content)
    for source in ("movielens", "recbole", "mind", "table", "goodbooks"):
        with pytest.raises(MetarecError):
            read_source(source, folder)
    with pytest.raises(MetarecError):
        read_source("movielens", folder / "ml.zip")
