"""``metarec tasks`` and ``metarec data`` as people call them."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Ran
from small_tasks import BASE, TOY, ml_1m


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A family of one's own with one task, one group and one broken file."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "one.yaml").write_text(yaml.safe_dump(BASE | {"name": "mine/one"}))
    (tmp_path / "mine" / "all.yaml").write_text("group: mine/all\ntasks: [mine/one, movielens/user-cold]\n")
    (tmp_path / "mine" / "some.yaml").write_text("group: mine/some\ntasks: 5\n")
    (tmp_path / "mine" / "broken.yaml").write_text(yaml.safe_dump(BASE | {"labels": "x"}))
    return tmp_path


def test_the_list_names_tasks_groups_and_whether_the_data_is_there(metarec: Callable[..., Ran], own: Path) -> None:
    listed = json.loads(metarec("tasks", "list", "--include-path", own, "--json").out)
    tasks = {entry["name"]: entry["data"] for entry in listed["tasks"]}
    assert (tasks["movielens/item-cold"], tasks["amazon/user-cold"], tasks["mine/one"]) == (
        "embedded",
        "absent",
        "embedded",
    )
    assert tasks["mine/broken"] == tasks["mine/some"] == "broken"
    assert listed["groups"]["mine/all"] == ["mine/one", "movielens/user-cold"]
    assert "cross-domain/both-ways" in metarec("tasks", "list").out


def test_show_prints_what_includes_give(metarec: Callable[..., Ran]) -> None:
    shown = yaml.safe_load(metarec("tasks", "show", "movielens/item-cold").out)
    assert (shown["label"], shown["split"]["unseen"], len(shown["digest"])) == ("rating >= 4", 0.2, 16)


def test_validate_runs_the_real_thing(metarec: Callable[..., Ran], own: Path) -> None:
    ran = metarec("tasks", "validate", "mine/one", "--include-path", own, "--json")
    assert ran.status == 0, ran.err
    (entry,) = json.loads(ran.out)["tasks"]
    assert entry["sound"] is True
    assert set(entry["hashes"]) == {"data", "split", "prompt"}
    broken = metarec("tasks", "validate", "mine/broken", "--include-path", own)
    assert broken.status == 1
    assert "Did you mean 'label'" in broken.out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": {"text": "{{ titel }}", "positive": " Yes", "negative": " No"}}, "'titel' is undefined"),
        ({"label": "rating >= 50"}, "likes and dislikes"),
        ({"shots": [2000], "query": {"max": 5, "min": 5}}, "enough ratings"),
        ({"dataset": {"source": "movielens", "path": "nowhere"}}, "does not exist"),
        ({"domain": {"field": "genre"}, "by": "domain"}, "Did you mean 'genres'"),
    ],
)
def test_validate_finds_what_only_loading_shows(
    changes: dict[str, object], said: str, metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    file = tmp_path / "task.yaml"
    file.write_text(yaml.safe_dump(BASE | changes))
    ran = metarec("tasks", "validate", file)
    assert ran.status == 1
    assert said in ran.out


def test_preview_shows_the_prompts_with_their_answers(metarec: Callable[..., Ran]) -> None:
    ran = metarec("tasks", "preview", "movielens/genre-as-domain", "--items", 2)
    assert ran.status == 0
    assert ran.out.count("does the viewer like it?") == 4
    assert "besides" not in ran.out
    assert "domain " in ran.out
    episode = json.loads(metarec("tasks", "preview", "movielens/item-cold", "--json").out)["episodes"][0]
    assert (episode["support_size"], len(episode["query"])) == (20, 3)
    assert episode["query"][0]["answer"] in (" Yes", " No")
    review, story = episode["query"][0]["recall"]
    assert review.startswith("Movie review: ")
    assert story.endswith("tells the story of")
    assert "besides: Movie review: " in metarec("tasks", "preview", "movielens/item-cold").out


def test_a_root_option_brings_own_tasks_to_every_verb(metarec: Callable[..., Ran], own: Path) -> None:
    ran = metarec("--include-path", own, "tasks", "show", "mine/one", "--json")
    assert json.loads(ran.out)["name"] == "mine/one"


def test_a_check_fixes_and_the_copy_is_read_in_place_of_the_original(
    metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    folder = ml_1m(tmp_path / "d")
    with (folder / "ratings.dat").open("a") as stream:
        stream.write("1::2653::3::978300761\n2::9999::3::978300761\n3::1::nan::978300761\nbroken\n")
    refused = metarec("data", "check", "movielens", folder, "--fix", tmp_path / "copy")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "would drop 1 of 6 ratings (17%)" in refused.err
    assert not (tmp_path / "copy").exists()
    forced = ("--fix", tmp_path / "copy", "--force")
    ran = metarec("data", "check", "movielens", folder, *forced, "--json", "--fail-on", "error")
    assert ran.status == 1
    told = json.loads(ran.out)
    codes = {finding["code"]: finding for finding in told["findings"]}
    assert codes["rating-not-a-number"]["rows"] == ["5"]
    assert codes["malformed-row"]["rows"] == ["6"]
    assert codes["item-without-row"]["rows"] == ["4"]
    assert codes["conflicting-rating"]["rows"] == ["1"]
    assert len(told["fixed"]) == 4
    assert len(told["broken_thresholds"]) == 3
    again = metarec("data", "check", "movielens", tmp_path / "copy", "--fail-on", "error", "--fail-on", "markup")
    assert again.status == 0, again.out
    described = json.loads(metarec("data", "describe", "movielens", tmp_path / "copy", "--json").out)
    assert (described["ratings"], described["dropped"]["conflicting-rating"]) == (2, 1)


def test_a_check_of_a_task_looks_at_its_split(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    ran = metarec("data", "check", "movielens/item-cold", "--fail-on", "leak", "--fail-on", "error")
    assert ran.status == 0
    assert "suspicious-user: 1 of 671 users" in ran.out
    twins = "item,title\n" + "".join(f"{number},Film {number // 2} of the {number // 2}\n" for number in range(80))
    rows = [f"u{user},{(user * 7 + step) % 80},{1 + (user + step) % 5}" for user in range(40) for step in range(30)]
    (tmp_path / "ratings.csv").write_text("user,item,rating\n" + "\n".join(rows))
    (tmp_path / "items.csv").write_text(twins)
    task = {**BASE, "dataset": {"source": "table", "path": "."}, "split": {"by": "item", "unseen": 0.3}}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    assert "near-duplicate-item" in metarec("data", "check", tmp_path / "task.yaml").out


def test_convert_reads_any_columns(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "orders.csv").write_text("who;what;stars;name\nu1;p1;3;Lamp\nu2;p2;4;Chair\n")
    named = [word for pair in ("user=who", "item=what", "rating=stars", "title=name") for word in ("--column", pair)]
    ran = metarec(
        "data", "convert", "table", tmp_path / "orders.csv", "--separator", ";", *named, "--out", tmp_path / "o"
    )
    assert ran.status == 0, ran.err
    assert "2 ratings and 2 items" in ran.out
    assert json.loads(metarec("data", "describe", "table", tmp_path / "o", "--json").out)["users"] == 2
    occupied = metarec("data", "convert", "table", tmp_path / "o", "--out", tmp_path)
    assert (occupied.status, occupied.err.count("\n")) == (2, 1)


BOOKSHOP = """Kunden-Nr;ISBN;Sterne (1-5);Kaufdatum;Buchtitel;Autor;Käufer-Gruppe
K-1;0353407260;4;2024-08-07;The Lost Garden;García;A
K-2;0353407260;;2020-10-19;The Lost Garden;;A
K-2;3829122215;2;;The Last River;Smith;B
K-3;3829122215;3;2024-06-23;;Smith;B
K-3;1446853140;5;2021-10-25;the lost garden;O'Brien;A
k-3;1446853140;5;2021-10-26;the lost garden;O'Brien;A
"""


@pytest.fixture
def bookshop(tmp_path: Path) -> Path:
    """An export as a shop makes it: headers of its own, semicolons, empty cells, customers written in two ways."""
    (tmp_path / "orders.csv").write_bytes(b"\xef\xbb\xbf" + BOOKSHOP.encode())
    return tmp_path / "orders.csv"


def test_a_bare_table_is_described_and_what_was_guessed_is_said(metarec: Callable[..., Ran], bookshop: Path) -> None:
    ran = metarec("data", "describe", bookshop)
    assert ran.status == 0, ran.err
    said = ran.out
    for column in ("'Kunden-Nr' as user", "'ISBN' as item", "'Sterne (1-5)' as rating", "'Buchtitel' as title"):
        assert column in said
    assert "first: 2020-10-19" in said
    assert "(--column OURS=THEIRS)" in said
    facts = json.loads(metarec("data", "describe", bookshop, "--column", "title=Autor", "--json").out)
    assert (facts["ratings"], facts["items"], len(facts["notes"])) == (6, 3, 3)
    assert "title" not in facts["notes"][0].split("read by their usual names")[1]
    assert facts["fields"]["title"]["distinct"] == 3


def test_a_check_of_a_bare_table_tells_all_that_is_wrong(metarec: Callable[..., Ran], bookshop: Path) -> None:
    told = json.loads(metarec("data", "check", bookshop, "--json").out)
    codes = {finding["code"]: finding for finding in told["findings"]}
    assert codes["rating-not-a-number"]["rows"] == ["3"]
    assert codes["time-not-a-number"]["rows"] == ["4"]
    assert codes["twin-id"]["rows"] == ["5", "6", "7"]
    assert codes["repeated-title"]["count"] == 2
    assert codes["unused-column"]["rows"] == ["'Autor'", "'Käufer-Gruppe'"]
    assert "empty-title" not in codes


SHOP_HEADER = ["Kunden-Nr", "ISBN", "Sterne (1-5)", "Kaufdatum", "Buchtitel", "Autor", "Warengruppe"]


def made_bookshop(path: Path, users: int = 40, books: int = 24) -> Path:
    """A made export with the faults that shops' exports have: two ratings, one date and some authors are empty."""
    generator = random.Random(0)
    titles = ["The Lost Garden", *(f"Garden of Orchard, A Tale {book}" for book in range(1, books - 1))]
    titles.append("The Lost Garden")  # by somebody else
    rows: list[list[object]] = []
    for user in range(users):
        for book in generator.sample(range(books), 14):
            stars = generator.choice((4, 5) if (user + book) % 2 else (1, 2))
            author = "" if generator.random() < 0.1 else ("Müller", "O'Brien")[book % 2]
            genre = ("Krimi", "Roman", "Kinder")[book % 3]
            day = f"20{generator.randint(20, 24)}-{generator.randint(1, 12):02}-{generator.randint(1, 28):02}"
            rows.append([f"K-{user:05}", f"03534{book:05}", stars, day, titles[book], author, genre])
    rows[3][2] = rows[17][2] = rows[29][3] = ""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([SHOP_HEADER, *rows])
    return path


def test_a_bookshops_export_is_checked_described_trained_and_recommended_from_without_yaml(
    metarec: Callable[..., Ran], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    orders = made_bookshop(tmp_path / "orders.csv")
    told = metarec("data", "check", orders)
    assert told.status == 0, told.err
    for said in (
        "'Sterne (1-5)' as rating",
        "'Autor' as autor, 'Warengruppe' as warengruppe",
        "empty-cell: 3 of 3 columns",
        "'Sterne (1-5)' in 2 of 560 rows",
        "'Kaufdatum' in 1 of 560 rows",
        "rating-not-a-number: 2 of 560 ratings",
        "rows: 5, 19",
        "time-not-a-number: 1 of 560 ratings",
        "shared-title: 2 of 24 items",
    ):
        assert said in told.out
    assert "unused-column" not in told.out
    described = metarec("data", "describe", orders, "--column", "rating=Sterne (1-5)")
    assert "ratings: 560\nusers: 40\nitems: 24" in described.out
    assert "warengruppe: filled 1, distinct 3" in described.out
    assert "autor" not in metarec("data", "describe", orders, "--column", "autor=").out.split("fields:")[1]
    named = ("--column", "rating=Sterne (1-5)", "--preset", "fast", "--name", "shop", "--runs", tmp_path)
    trained = metarec("train", orders, *named, "--set", "train.steps=2")
    assert trained.status == 0, trained.err
    assert "item fields: autor, warengruppe" in trained.err
    assert "rating not a number: 2, timestamp not a number: 1" in caplog.text
    ranked = metarec("recommend", tmp_path / "shop", "--rating", "Garden of Orchard, A Tale 3=5", "-k", "3", "--json")
    assert ranked.status == 0, ranked.err
    assert len(json.loads(ranked.out)) == 3
    twice = metarec("recommend", tmp_path / "shop", "--rating", "The Lost Garden=5")
    assert twice.status == 2  # two books have this title
    assert "0353400000" in twice.err
    assert "0353400023" in twice.err


SHARED_SHOP = Path(__file__).parents[2] / "shared" / "faults" / "bookshop" / "orders.csv"


@pytest.mark.skipif(not SHARED_SHOP.exists(), reason="the bookshop's export is not beside the clone")
def test_the_shared_bookshop_is_told_as_it_is(metarec: Callable[..., Ran]) -> None:
    found = json.loads(metarec("data", "check", SHARED_SHOP, "--json").out)["findings"]
    counts = {finding["code"]: finding["count"] for finding in found}
    assert counts == {
        "guessed-column": 5,
        "item-field": 2,
        "empty-cell": 3,
        "rating-not-a-number": 25,
        "time-not-a-number": 10,
        "shared-title": 6,
    }


def test_tables_in_a_folder_need_no_name_either(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("user,item,raiting\nu,a,4\n")
    (tmp_path / "items.csv").write_text("code,title\na,A\n")
    said = metarec("data", "check", tmp_path, "--items-id", "code").out
    assert "misspelt-column: 1 of 1 columns" in said
    assert "columns: 'raiting' (did you mean 'rating'?)" in said
    refused = metarec("data", "check", tmp_path)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "Name it: items: {id: COLUMN} (--items-id COLUMN)" in refused.err


def test_hours_are_said_to_be_skewed(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    lines = [f"u{row % 7},g{row // 7},{500 if row % 9 == 0 else 1 + row % 4}" for row in range(63)]
    (tmp_path / "play.csv").write_text("user,game,rating\n" + "\n".join(lines) + "\n")
    said = metarec("data", "check", tmp_path / "play.csv", "--column", "title=game", "--column", "item=game").err
    assert "is named for" in said
    rest = [f"{line},T{line.split(',')[1]}" for line in lines]
    (tmp_path / "play.csv").write_text("user,game,rating,title\n" + "\n".join(rest) + "\n")
    assert "skewed-rating: 7 of 63 ratings" in metarec("data", "check", tmp_path / "play.csv").out


OWN_TABLE = {"dataset": {"source": "table", "path": "."}, "shots": [0, 5, 25], "query": {"max": 5, "min": 5}}


def own_table(folder: Path, story: str = "") -> Path:
    rows = [f"u{user},{(user * 7 + step) % 80},{1 + (user + step) % 5}" for user in range(40) for step in range(20)]
    (folder / "ratings.csv").write_text("user,item,rating\n" + "\n".join(rows))
    (folder / "items.csv").write_text("item,title,story\n" + "".join(f"{n},Film {n},{story}\n" for n in range(80)))
    prompt = {"text": "{{ title }} {{ story }}", "positive": " Yes", "negative": " No"}
    (folder / "task.yaml").write_text(yaml.safe_dump({**BASE, **OWN_TABLE, "prompt": prompt}))
    return folder / "task.yaml"


def test_validate_says_for_whom_there_are_enough_ratings(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    ran = metarec("tasks", "validate", own_table(tmp_path))
    assert ran.status == 1
    assert (
        "5 shots, enough ratings: train 24 (left out: 0), validation 8 (left out: 0), test 8 (left out: 0)" in ran.out
    )
    assert "25 shots, enough ratings: train 0 (left out: 24)" in ran.out
    assert "with 25 shots no meta-training user has the 25 ratings and 5 to ask about: fit needs train.shots" in ran.out
    assert "(--set 'train.shots=[5]')" in ran.out
    assert "no validation episode has enough ratings" in ran.out


def test_what_a_prompt_cuts_is_counted_wherever_it_is_shown(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    task = own_table(tmp_path, "word " * 100)
    task.write_text(task.read_text().replace("- 25\n", ""))
    said = "'story' of 80 items has more than 300 characters"
    assert said in metarec("tasks", "validate", task).out
    assert said in metarec("tasks", "preview", task).out
    assert "cut-text: 80 of 80 items" in metarec("data", "check", task).out
    task.write_text(task.read_text().replace("{{ story }}", ""))
    assert said not in metarec("tasks", "validate", task).out


SMALL = {
    "one row": ["u,a,5,A"],
    "one item": [f"u{row},a,{1 + row % 5},A" for row in range(50)],
    "one user": [f"u,a{row},{1 + row % 5},A{row}" for row in range(50)],
    "one rating": [f"u{row % 30},a{row // 30},4,A{row // 30}" for row in range(600)],
    "no user": [",a,5,A"],
}


@pytest.mark.parametrize("name", SMALL)
def test_the_smallest_tasks_end_in_a_line(name: str, metarec: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("user,item,rating,title\n" + "\n".join(SMALL[name]) + "\n")
    dataset = {"source": "table", "path": str(tmp_path)}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({**BASE, "dataset": dataset, "label": "rating > user mean"}))
    ran = metarec("tasks", "validate", tmp_path / "task.yaml")
    assert ran.status == 1
    assert ran.out.startswith("BROKEN")
    assert metarec("tasks", "preview", tmp_path / "task.yaml").status in (0, 2)
    assert metarec("data", "check", tmp_path / "task.yaml").status == 0


def test_an_implicit_task_without_negatives_is_one_short_line(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({**BASE, "label": "implicit"}))
    ran = metarec("tasks", "show", tmp_path / "task.yaml")
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert "label 'implicit' needs 'negatives' beside it" in ran.err
    assert "Two opposite tastes" not in ran.err


@pytest.mark.parametrize(
    ("ratings", "said"),
    [
        ("", "is empty"),
        ("user,item,rating,title\n", "ratings: 0"),
        ("user,item,rating,title\nu,a,4,A\n", "ratings: 1"),
        ("user,item,rating,rating,title\nu,a,4,4,A\n", "has the column 'rating' 2 times"),
        ("nothing here\nat all\n", "no column 'user'"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "describe"])
def test_the_smallest_tables_end_in_a_line(
    verb: str, ratings: str, said: str, metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text(ratings)
    ran = metarec("data", verb, tmp_path / "t.csv")
    if said.startswith("ratings:"):
        assert ran.status == 0, ran.err
        assert verb == "check" or said in ran.out
    else:
        assert (ran.status, ran.err.count("\n")) == (2, 1)
        assert said in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data", "check", "no-such.csv"), "the table 'no-such.csv' does not exist"),
        (("data", "check", "movilens"), "no task is called 'movilens'"),
        (("data", "check", "movielens"), "Set 'path'"),
        (("data", "check", "movielens/user-cold", "x"), "Leave the path out"),
        (("data", "check", "cross-domain/movies-to-books"), "Check each: movies, books"),
        (("data", "check", "movielens/user-cold", "--fail-on", "markupp"), "Did you mean 'markup'"),
        (("data", "describe", "table", "x.csv", "--column", "user"), "has no '='"),
        (("data", "describe", "table", "x.csv", "--scale", "a,b"), "scale"),
        (("data", "describe", "amazon/user-cold"), "does not exist"),
        (("tasks", "show", "movielens/item-colt"), "Did you mean 'movielens/item-cold'"),
        (("tasks", "show", "movielens/cold-start"), "is a group of tasks"),
        (("tasks", "list", "--include-path", "nowhere"), "does not exist"),
        (("tasks", "preview", "../secret"), "no task is called"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: tuple[str, ...], message: str, metarec: Callable[..., Ran]
) -> None:
    ran = metarec(*arguments)
    assert ran.status == 2, ran.out + ran.err
    assert message in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    "verb",
    ["tasks list", "tasks show", "tasks validate", "tasks preview", "data check", "data describe", "data convert"],
)
def test_help_shows_an_example(verb: str, metarec: Callable[..., Ran]) -> None:
    ran = metarec(*verb.split(), "--help")
    assert ran.status == 0
    assert f"Example: metarec {verb}" in " ".join(ran.out.split())


def test_help_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'pandas', 'pyarrow', 'pydantic'}"
    code = f"import sys; from metarec.cli import app; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "check", "movielens/user-cold"),
        ("tasks", "list"),
        ("tasks", "validate", "movielens/user-cold"),
    ],
)
def test_no_verb_of_data_or_tasks_loads_torch(arguments: tuple[str, ...]) -> None:
    code = f"import sys; from metarec.cli import app; app({list(arguments)!r}, standalone_mode=False)"
    code += "; print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_source_from_outside_is_checked_by_its_name(
    metarec: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_of_cli.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    assert metarec("data", "check", "toy_of_cli:read").status == 0
    assert "ratings: 2" in metarec("data", "describe", "toy_of_cli:read").out
    refused = metarec("data", "check", "toy_of_cli:nothing")
    assert (refused.status, refused.err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--separator", "ab", "'separator' is 'ab'. One sign separates fields"),
        ("--separator", "", "'separator' is ''. One sign"),
        ("--separator", "a", "'separator' is 'a'. One sign"),
        ("--scale", "5,1", "The lowest rating comes first"),
        ("--scale", "1,inf", "Input should be a finite number"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(
    metarec: Callable[..., Ran], tmp_path: Path, option: str, value: str, said: str
) -> None:
    (tmp_path / "shop.csv").write_text("user,item,rating,title\nu,i,5,Heat\n")
    ran = metarec("data", "describe", tmp_path / "shop.csv", option, value)
    assert ran.status == 2
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_validate_says_what_is_read_of_an_item(metarec: Callable[..., Ran], own: Path) -> None:
    (found,) = json.loads(metarec("tasks", "validate", own / "mine" / "one.yaml", "--json").out)["tasks"]
    assert found["features"] == {
        "text": "{{ title }}",
        "fields": {"genres": "category", "year": "number"},
        "unread": {},
    }
    shown = metarec("tasks", "validate", own / "mine" / "one.yaml").out
    assert "features: text '{{ title }}', fields genres (category), year (number)" in shown
