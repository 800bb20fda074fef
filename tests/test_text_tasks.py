"""Tasks whose texts carry taste, on small made files, and on the real ones where they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_tasks import write

from metarec.data.source_options import SourceOptions
from metarec.data.sources import read_source
from metarec.data.task_data import TaskData, load_task_data
from metarec.data.task_files import load_task, task_names
from metarec.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
FAMILIES = ("games", "news", "questionnaire", "jokes")
TASKS = [name for name in task_names() if name.split("/")[0] in FAMILIES]


def games(root: Path) -> None:
    """Eighty gamers who buy thirty of 200 games one after the other."""
    generator = np.random.default_rng(0)
    bought = [generator.choice(200, 30, replace=False) for _ in range(80)]
    rows = [f"{user},g{item},{at}" for user, items in enumerate(bought) for at, item in enumerate(items)]
    items = [f'g{item},"Saga {item % 9}, part {item}"' for item in range(200)]
    write(root / "games", interactions__csv="\n".join(["user,item,position", *rows]) + "\n")
    write(root / "games", items__csv="\n".join(["item,title", *items]) + "\n")


def news(root: Path) -> None:
    """Sixty readers who were shown sixty of 300 headlines, in the layout of the repository DKN."""
    generator = np.random.default_rng(0)
    rows = [
        f"{user}\tstory {item} of town {item % 7}\t{(user + item) % 2}\t{item % 7}:Town {item % 7};9:Story"
        for user in range(60)
        for item in generator.choice(300, 60, replace=False)
    ]
    write(root / "news", raw_train__txt="\n".join(rows[:-100]) + "\n", raw_test__txt="\n".join(rows[-100:]) + "\n")


def questionnaire(root: Path) -> None:
    """Sixty people who say of 120 sentences how true they are."""
    rows = [f"{user},q{item},{1 + (user * item) % 6}" for item in range(120) for user in range(60)]
    items = [f"q{item},Like number {item}." for item in range(120)]
    write(root / "questionnaire", answers__csv="\n".join(["user,item,rating", *rows]) + "\n")
    write(root / "questionnaire", items__csv="\n".join(["item,text", *items]) + "\n")


def jokes(root: Path) -> None:
    """Sixty people who find each of 120 jokes funny or not."""
    rows = [f"{user},j{item},{(user * item) % 21 - 10}" for item in range(120) for user in range(60)]
    items = [f'j{item},"Knock, knock. Who is there? Number {item}."' for item in range(120)]
    write(root / "jokes", ratings__csv="\n".join(["user,item,rating", *rows]) + "\n")
    write(root / "jokes", items__csv="\n".join(["item,title", *items]) + "\n")


MADE: dict[str, Callable[[Path], None]] = {
    "games": games,
    "news": news,
    "questionnaire": questionnaire,
    "jokes": jokes,
}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], TaskData]:
    """Returns what a task's made files load to; any warning of a reader is an error."""

    def loaded(name: str) -> TaskData:
        MADE[name.split("/")[0]](tmp_path)
        monkeypatch.setenv("METAREC_DATA", str(tmp_path))
        return load_task_data(load_task(name), 0)

    return loaded


def test_each_family_is_cold_in_users_items_and_both() -> None:
    assert {name.split("/")[1] for name in TASKS if name.startswith("games/")} == {
        *("user-cold", "item-cold", "both-cold", "time", "brief", "short")
    }
    for family in ("news", "questionnaire", "jokes"):
        assert {f"{family}/{kind}" for kind in ("user-cold", "item-cold", "both-cold")} <= set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_text_tasks_load_from_made_files_and_leak_nothing(
    name: str, load: Callable[[str], TaskData], caplog: pytest.LogCaptureFixture
) -> None:
    data = load(name)
    assert data.leaks() == []
    assert not caplog.records
    for part in ("validation", "test"):
        episodes, _ = data.episodes(part)  # type: ignore[arg-type]
        assert len(episodes) >= 3
        assert any(0 < episode.query.likes(data.task.like_threshold).mean() < 1 for episode in episodes)
    sentence = data.task.hidden_states[0] if data.task.split.asks_unrated else "{{ title }}"
    assert "{{ title }}" in sentence


def test_games_by_time_ask_about_later_purchases_than_they_show(load: Callable[[str], TaskData]) -> None:
    data = load("games/time")
    whole = data.interactions
    assert whole.timestamp is not None
    at = {(whole.users[u], int(i)): int(t) for u, i, t in zip(whole.user, whole.item, whole.timestamp, strict=True)}
    for episode in data.episodes("test")[0]:
        times = [[at[episode.user, int(item)] for item in part.items] for part in (episode.support, episode.query)]
        assert max(times[0]) <= min(times[1])
        assert abs(episode.support.likes(0.5).mean() - 0.5) < 0.01


def test_a_game_that_was_not_bought_is_drawn_as_often_as_it_sells(load: Callable[[str], TaskData]) -> None:
    data = load("games/user-cold").interactions
    assert (data.rating == 1).sum() == (data.rating == 0).sum() == 80 * 30


def test_dkn_files_are_read_with_entities_and_a_click_outlasts_a_refusal(tmp_path: Path) -> None:
    kite = '7\tkite "over" sea\t{}\t3:Sea: the film;5:Kite\n'
    train = f"{kite.format(1)}{kite.format(0)}8\tplain news\t0\t\n"
    folder = write(tmp_path, raw_train__txt=train, raw_test__txt="8\tplain news\t1\t2:News\n")
    data = read_source("dkn", folder)
    assert data.users == ("7", "8")
    assert data.rating.tolist() == [1.0, 1.0]
    assert data.dropped == {"repeated rating": 2}
    assert data.catalog.fields["title"] == ('kite "over" sea', "plain news")
    assert data.catalog.fields["entities"] == ("Sea: the film, Kite", "News")


def test_dkn_may_be_one_table(tmp_path: Path) -> None:
    text = "user,title,clicked,entities,part\n1,snow melts,0,4:Snow,train\n1,rain falls,1,,test\n"
    data = read_source("dkn", write(tmp_path, clicks__csv=text))
    assert data.rating.tolist() == [0.0, 1.0]
    assert data.catalog.fields == {"title": ("snow melts", "rain falls"), "entities": ("Snow", "")}


@pytest.mark.parametrize(("line", "message"), [("1\ta b\tyes\t", "row 2: rating 'yes'"), ("1\ta b", "row 2 has 2")])
def test_a_bad_row_of_dkn_is_named_or_set_aside(line: str, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, raw_train__txt=f"1\tgood news\t1\t\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_source("dkn", folder)
    data = read_source("dkn", folder, SourceOptions(bad_rows="quarantine"))
    assert (len(data), sum(data.dropped.values())) == (1, 1)


def test_a_table_that_says_it_has_no_ratings_is_not_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path, ratings__csv="user,item\nu,a\n", items__csv="item,title\na,A\nb,B\n")
    read_source("table", folder, SourceOptions(columns={"rating": ""}))
    assert not caplog.records
    read_source("table", folder)
    assert "every row counts as 1. Map one" in caplog.text


SIZES = {
    "games": (267_696, 5_876, 16_859),
    "news": (9_838, 331, 9_075),
    "questionnaire": (540_000, 4_000, 135),
    "jokes": (363_209, 5_000, 100),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_real_files_are_read_as_they_are(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (SHARED / family).exists():
        pytest.skip(f"the {family} data are not beside the clone")
    monkeypatch.setenv("METAREC_DATA", str(SHARED))
    whole = load_task_data(load_task(f"{family}/user-cold"), 0).interactions
    assert (len(whole), len(whole.users), len(whole.catalog)) == SIZES[family]
    cold = load_task_data(load_task(f"{family}/item-cold"), 0)
    assert cold.leaks() == []
    assert len(cold.episodes("test")[0]) >= 60
