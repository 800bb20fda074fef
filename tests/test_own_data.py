"""Data as people have it become a task without YAML: from a DataFrame, from a table file, from the command line."""

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
from test_python_api import FAST, fresh

from metarec.data.own_data import summary
from metarec.errors import ConfigError, DataError, MetarecError
from metarec.recommender import MetaRecommender


def shop(users: int = 60, items: int = 30, seed: int = 0) -> pd.DataFrame:
    """Sixty customers who like books of one kind or of the other; a review tells the rating."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        for item in generator.choice(items, 16, replace=False):
            rating = int(np.clip((4.5 if (item + user) % 2 else 2) + generator.choice([-1, 0, 1]), 1, 5))
            rows.append(
                {
                    "user": f"u{user}",
                    "item": int(item) + 100,
                    "rating": rating,
                    "title": f"Book {item}",
                    "Kind (of book)": ("crime", "poetry")[item % 2],
                    "review": f"I give it {rating}, says u{user}",
                    "timestamp": pd.Timestamp("2024-01-01") + pd.Timedelta(days=int(generator.integers(300))),
                }
            )
    return pd.DataFrame(rows)


def test_a_dataframe_is_fitted_evaluated_saved_and_loaded(tmp_path: Path) -> None:
    frame = shop()
    recommender = fresh().fit(frame)
    task = recommender.fitted.task
    assert (task.shots, task.label) == ((0, 5, 10), "rating > user mean")
    assert set(recommender.fitted.catalog.fields) == {"title", "kind_of_book"}  # a review would tell the rating
    assert "{{ kind_of_book }}" in task.prompt.text
    report = recommender.evaluate()
    recommender.save_pretrained(tmp_path / "model")
    loaded = MetaRecommender.from_pretrained(tmp_path / "model")
    assert loaded.adapt({"105": 5}).recommend(3) == recommender.adapt({"105": 5}).recommend(3)
    with pytest.raises(DataError, match=r"kept nowhere. Give it again, e.g. evaluate\(frame\)"):
        loaded.evaluate()
    pd.testing.assert_frame_equal(loaded.evaluate(frame).per_user, report.per_user)


def test_a_table_file_is_a_dataframe_is_a_yaml_file(tmp_path: Path) -> None:
    frame = shop()
    frame.to_csv(tmp_path / "shop.csv", sep=";", index=False)
    frame.to_parquet(tmp_path / "shop.parquet")
    expected = fresh().prepare(frame)
    for name in ("shop.csv", "shop.parquet"):
        read = fresh().prepare(tmp_path / name)
        assert read.adapt({"105": 5}).score(["106"]) == expected.adapt({"105": 5}).score(["106"])
    read.save_pretrained(tmp_path / "model")
    loaded = MetaRecommender.from_pretrained(tmp_path / "model")  # the task names the file
    pd.testing.assert_frame_equal(loaded.evaluate().per_user, expected.evaluate().per_user)


def test_what_people_change_is_a_keyword(tmp_path: Path) -> None:
    frame = shop().rename(columns={"title": "name", "rating": "stars"})
    data = fresh().task_data(frame, title="name", columns={"rating": "stars"}, shots=[0, 3], label="rating >= 4")
    assert data.task.shots == (0, 3)
    assert data.task.label == "rating >= 4"
    assert data.interactions.catalog.fields["title"][0].startswith("Book")
    assert (
        fresh().task_data(frame, title="name", rating="stars", prompt="{{ title }}?").task.prompt.text == "{{ title }}?"
    )
    likes = frame[frame["stars"] > 3].drop(columns="stars")
    assert fresh().task_data(likes, title="name").task.label == "implicit"
    with pytest.raises(ConfigError, match=r"'shot' is unknown. Did you mean 'shots'"):
        fresh().task_data(frame, shot=[1])
    with pytest.raises(ConfigError, match="'shots' is given for a task"):
        fresh().task_data("movielens/user-cold", shots=[1])


def test_users_with_few_ratings_get_a_task_that_fits_them() -> None:
    few = shop().groupby("user").head(8)
    assert fresh().task_data(few).task.shots == (0, 1, 2, 3)


@pytest.mark.parametrize("wrong", [7, 1.5, ["a.csv"], {"user": ["u"]}, np.zeros(3), object])
def test_fit_says_what_it_takes(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"a task is .* Give a task's name, a YAML file, a table file"):
        fresh().fit(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop(columns="title"), "the DataFrame has no column 'title'"),
        (lambda frame: frame.drop(columns="user"), "the DataFrame has no column 'user'"),
        (lambda frame: frame.iloc[:0], "no ratings|cannot be read"),
        (lambda frame: frame.assign(rating=["x"] * 900 + [3] * 60), "900 of 960 rows cannot be read"),
        (lambda frame: pd.concat([frame, frame["user"]], axis=1), "column 'user' 2 times"),
    ],
)
def test_a_frame_that_cannot_be_meant_is_refused(change: Callable[[pd.DataFrame], pd.DataFrame], message: str) -> None:
    with pytest.raises(MetarecError, match=message):
        fresh().fit(change(shop()))


def test_a_bare_csv_becomes_recommendations_in_four_commands(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    frame = shop().rename(columns={"title": "name", "user": "Kunden-Nr"})
    frame.loc[3, "rating"] = np.nan
    orders = tmp_path / "orders.csv"
    frame.to_csv(orders, sep=";", index=False)
    settings = [
        f"--set={name}={json.dumps(value)}" for name, value in FAST.items() if name in ("score", "collaborative")
    ]
    assert metarec("data", "check", orders, "--column", "title=name").status == 0
    assert "60" in metarec("data", "describe", orders, "--column", "title=name").out
    named = ("--name", "shop", "--runs", tmp_path, "--set", "train.steps=2", *settings)
    trained = metarec("train", orders, "--column", "title=name", *named)
    assert trained.status == 0, trained.err
    assert "item fields: kind_of_book" in trained.err
    ranked = metarec("recommend", tmp_path / "shop", "--rating", "Book 5=5", "-k", "3", "--explain", "--json")
    assert ranked.status == 0, ranked.err
    assert [reason["title"] for entry in json.loads(ranked.out) for reason in entry["because"]] == ["Book 5"] * 3
    assert metarec("evaluate", tmp_path / "shop", "--json").status == 0
    both = metarec("train", orders, "--task", "movielens/user-cold")
    assert both.status == 2
    assert "two tasks" in both.err
    assert metarec("train", tmp_path / "none.csv").status == 2
    assert metarec("train", "movielens/user-cold", "--column", "title=name").status == 2


def apart(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the ratings, and the items in a table of their own under another name of the ids."""
    of_items = ["item", "title", "Kind (of book)"]
    return frame.drop(columns=of_items[1:]), frame[of_items].drop_duplicates().rename(columns={"item": "ISBN"})


def test_items_may_be_a_dataframe_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ratings, items = apart(shop())
    ratings = ratings.rename(columns={"timestamp": "tiemstamp"})
    with caplog.at_level(logging.WARNING):
        recommender = fresh().fit(ratings, items=items)
    assert "'tiemstamp' (did you mean 'timestamp'?)" in caplog.text
    assert "columns of the DataFrame that nothing reads: 'review'" in caplog.text
    assert set(recommender.fitted.catalog.fields) == {"title", "Kind (of book)"}
    assert "Kind (of book)" not in recommender.fitted.task.prompt.text  # no template can name it
    report = recommender.evaluate()
    recommender.save_pretrained(tmp_path / "model")
    loaded = MetaRecommender.from_pretrained(tmp_path / "model")
    pd.testing.assert_frame_equal(loaded.evaluate(ratings, items=items).per_user, report.per_user)
    indexed = fresh().task_data(ratings, items=items.set_index("ISBN"))
    assert indexed.interactions.catalog.digest == recommender.fitted.catalog.digest
    ratings.to_csv(tmp_path / "ratings.csv", index=False)
    items.to_csv(tmp_path / "items.csv", index=False)
    read = fresh().task_data(tmp_path / "ratings.csv", items="items.csv")
    assert read.interactions.catalog.digest == recommender.fitted.catalog.digest


def test_a_dataframe_and_a_file_do_not_mix(tmp_path: Path) -> None:
    ratings, items = apart(shop())
    with pytest.raises(ConfigError, match="the ratings are a DataFrame, the items a file"):
        fresh().task_data(ratings, items="items.csv")
    ratings.to_csv(tmp_path / "ratings.csv", index=False)
    with pytest.raises(ConfigError, match="the ratings are a file, the items a DataFrame"):
        fresh().task_data(tmp_path / "ratings.csv", items=items)
    with pytest.raises(DataError, match="the items' DataFrame has no column 'item'"):
        fresh().task_data(ratings, items=items[["title"]])
    with pytest.raises(DataError, match="cannot be read"):
        fresh().task_data(ratings, items=items.iloc[:2])


def test_a_fixed_copy_is_trained_on_as_the_table(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    frame = shop()
    frame.loc[3, "rating"] = np.nan
    frame.to_csv(tmp_path / "orders.csv", index=False)
    fixed = metarec("data", "check", tmp_path / "orders.csv", "--fix", tmp_path / "cleaned")
    assert fixed.status == 0, fixed.err
    named = ("--runs", tmp_path, "--preset", "fast", "--set", "train.steps=2")
    trained = metarec("train", tmp_path / "cleaned", "--name", "shop", *named)
    assert trained.status == 0, trained.err
    assert "item fields: kind_of_book" in trained.err
    assert metarec("evaluate", tmp_path / "shop", "--json").status == 0
    frame["rating"] = frame["rating"].mask(frame.index < 100)
    frame.to_csv(tmp_path / "orders.csv", index=False)
    # What --force dropped is not held against the copy.
    metarec("data", "check", tmp_path / "orders.csv", "--fix", tmp_path / "forced", "--force")
    assert len(fresh().task_data(tmp_path / "forced").interactions) == 860
    assert metarec("train", tmp_path / "nothing", "--name", "none", *named).status == 2
    counted = fresh().task_data(tmp_path / "cleaned", scale=(0, 10)).interactions
    assert (len(counted), str(counted.scale)) == (959, "from 0 to 10")


def test_a_folder_of_ratings_and_items_is_a_table(tmp_path: Path) -> None:
    ratings, items = apart(shop())
    ratings.to_csv(tmp_path / "ratings.csv", index=False)
    items.rename(columns={"ISBN": "item"}).to_csv(tmp_path / "items.csv", index=False)
    data = fresh().task_data(str(tmp_path))
    assert data.task.name == f"own/{tmp_path.name}"
    assert summary(data.task, data.interactions.catalog)[0] == "item fields: Kind (of book)"


def test_a_prompt_names_what_tells_items_apart_and_texts_first() -> None:
    frame = shop()
    items = frame["item"] - frame["item"].min()
    more = {f"kind{number}": [f"k{item // (1 + number) % 2}" for item in items] for number in range(7)}
    told = [f"a tale of {item} roads told in {item + 3} nights" for item in items]
    frame = frame.drop(columns="Kind (of book)").assign(**more, sku=[f"S{item:04d}" for item in items], blurb=told)
    text = fresh().task_data(frame).task.prompt.text
    assert "blurb: {{ blurb }}" in text
    assert "kind4" in text
    assert "kind6" not in text
    assert "sku" not in text
