"""Splits that are given as files: each row stays in the part that its file says, and nothing stands in two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import Ran
from small_tasks import BASE
from yaml import safe_dump

from metarec import MetaRecommender
from metarec.config import RunConfig
from metarec.data.task import Task
from metarec.data.task_data import TaskData, load_task_data
from metarec.errors import DataError

Frames = Mapping[str, pd.DataFrame]
ITEMS = [f"i{number}" for number in range(90)]


def ratings(users: range, items: slice, start: int = 0) -> pd.DataFrame:
    """Ratings of users, even ones of even items high, odd ones of odd items."""
    rows = [
        {"user": f"u{user}", "item": item, "title": f"Title {item}", "rating": 5 if (user + int(item[1:])) % 2 else 1}
        for user in users
        for item in ITEMS[items]
    ]
    return pd.DataFrame(rows).assign(timestamp=range(start, start + len(rows)))


NEW: Frames = {
    "train": ratings(range(20), slice(0, 25)),
    "validation": ratings(range(20, 26), slice(0, 25)),
    "test": ratings(range(26, 34), slice(5, 30)),
}
KNOWN: Frames = {
    "train": ratings(range(20), slice(0, 15)),
    "validation": ratings(range(5), slice(15, 21)),
    "test": ratings(range(3, 12), slice(21, 30)),
}


def task(root: Path, frames: Frames, users: str = "new", **more: Any) -> Task:
    root.mkdir(exist_ok=True)
    for part, frame in frames.items():
        frame.to_csv(root / f"{part}.csv", index=False)
    split = {part: f"{part}.csv" for part in frames} | {"users": users}
    dataset = {"source": "table", "path": root}
    return Task.model_validate({**BASE, "dataset": dataset, "split": split, "shots": [0, 5], **more})


def pairs(data: TaskData, part: str) -> set[tuple[str, str]]:
    whole = data.held_out or data.interactions
    return {
        (episode.user, whole.catalog.ids[item])
        for episode in data.episodes(part)[0]  # type: ignore[arg-type]
        for item in episode.query.items
    }


def in_file(frames: Frames, part: str) -> set[tuple[str, str]]:
    return set(zip(frames[part]["user"], frames[part]["item"], strict=True))


def test_with_new_users_each_part_holds_the_users_of_its_file(tmp_path: Path) -> None:
    data = load_task_data(task(tmp_path, NEW), 0)
    for part, users in data.parts.items():
        assert {data.interactions.users[user] for user in users} == set(NEW[part]["user"])
    assert pairs(data, "test") <= in_file(NEW, "test")
    assert data.leaks() == []


def test_without_a_validation_file_a_share_of_the_training_users_validates(tmp_path: Path) -> None:
    data = load_task_data(task(tmp_path, {part: NEW[part] for part in ("train", "test")}), 0)
    assert {part: len(users) for part, users in data.parts.items()} == {"train": 18, "validation": 2, "test": 8}
    assert {data.interactions.users[user] for user in data.parts["test"]} == set(NEW["test"]["user"])


def test_with_known_users_supports_come_from_the_training_file_and_queries_from_the_part_s_own(tmp_path: Path) -> None:
    data = load_task_data(task(tmp_path, KNOWN, "known"), 0)
    trained = data.interactions
    rows = {
        (trained.users[user], trained.catalog.ids[item]) for user, item in zip(trained.user, trained.item, strict=True)
    }
    assert rows == in_file(KNOWN, "train")
    for part in ("validation", "test"):
        assert pairs(data, part) == in_file(KNOWN, part)
        for episode in data.episodes(part)[0]:  # type: ignore[arg-type]
            shown = {(episode.user, trained.catalog.ids[item]) for item in episode.support.items}
            assert len(shown) == 5
            assert shown <= in_file(KNOWN, "train")
    assert data.leaks() == []


def test_implicit_negatives_stand_in_the_part_of_the_rows_they_stand_beside(tmp_path: Path) -> None:
    more = pd.concat([KNOWN["train"], ratings(range(50, 53), slice(30, 90))])
    frames = {**KNOWN, "train": more}
    given = task(tmp_path, frames, "known", label="implicit", negatives={"per_positive": 1})
    data = load_task_data(given, 0)
    assert data.held_out is not None
    assert data.held_out.part is not None
    likes = data.held_out.likes(0.5)
    for place, part in enumerate(("train", "validation", "test")):
        rows = data.held_out.part == place
        assert likes[rows].sum() == len(frames[part])
        if part != "train":
            assert (~likes[rows]).sum() == len(frames[part])
    assert data.leaks() == []


def test_the_split_is_named_by_its_files_content(tmp_path: Path) -> None:
    moved = dict(NEW)
    moved["train"], moved["validation"] = NEW["train"][25:], pd.concat([NEW["validation"], NEW["train"][:25]])
    first = load_task_data(task(tmp_path / "a", NEW), 0).hashes
    other = load_task_data(task(tmp_path / "b", moved), 0).hashes
    assert first["split"] != other["split"]


def test_a_rating_in_two_files_is_refused_with_both_rows(tmp_path: Path) -> None:
    test = pd.concat([KNOWN["test"], KNOWN["train"][16:17]])
    with pytest.raises(
        DataError, match=r"1 ratings stand .*u1.*i1.*train\.csv.* row 18 \(train\).*test\.csv.* row 83 \(test\)"
    ):
        load_task_data(task(tmp_path, {**KNOWN, "test": test}, "known"), 0)


def test_a_new_user_in_two_files_is_refused(tmp_path: Path) -> None:
    test = pd.concat([NEW["test"], ratings(range(3, 4), slice(25, 30))])
    with pytest.raises(DataError, match=r"1 users are in 'train\.csv' and in 'test\.csv', e\.g\. 'u3'.*split\.users"):
        load_task_data(task(tmp_path, {**NEW, "test": test}), 0)


def test_a_known_user_without_training_ratings_is_refused(tmp_path: Path) -> None:
    test = pd.concat([KNOWN["test"], ratings(range(40, 41), slice(25, 30))])
    with pytest.raises(DataError, match=r"1 validation or test users have no ratings in 'train\.csv'"):
        load_task_data(task(tmp_path, {**KNOWN, "test": test}, "known"), 0)


def test_a_bad_value_is_named_by_its_own_file_and_row(tmp_path: Path) -> None:
    test = NEW["test"].astype({"rating": object})
    test.loc[7, "rating"] = "five"
    with pytest.raises(DataError, match=r"test\.csv.* row 9: rating 'five'"):
        load_task_data(task(tmp_path, {**NEW, "test": test}), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": {"train": "a.csv"}}, "'train' and 'test'"),
        ({"split": {"train": "a.csv", "test": "b.csv", "by": "item", "unseen": 0.2}}, "leave out 'by'"),
        ({"split": {"train": "a.csv", "test": "b.csv", "users": "known"}}, "'validation' ratings"),
        ({"dataset": {"source": "movielens"}}, "source 'table'"),
        ({"dataset": {"source": "table", "options": {"ratings": "a.csv"}}}, "leave out 'ratings'"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict[str, Any], message: str) -> None:
    split = {"train": "a.csv", "test": "b.csv"}
    with pytest.raises(ValueError, match=message):
        Task.model_validate({**BASE, "dataset": {"source": "table"}, "split": split, **change})


def test_a_recommender_is_fitted_and_tested_on_a_given_split(tmp_path: Path) -> None:
    settings = {"score": ["item mean", "collaborative"], "collaborative": {"features": [], "kernel": {"steps": 0}}}
    recommender = MetaRecommender(None, RunConfig.model_validate(settings)).fit(task(tmp_path, NEW))
    assert set(recommender.evaluate().per_user["user"]) == set(NEW["test"]["user"])


def test_the_command_line_checks_a_given_split_whole(tmp_path: Path, metarec: Callable[..., Ran]) -> None:
    test = NEW["test"].astype({"rating": object})
    test.loc[7, "rating"] = "five"
    given = task(tmp_path / "data", {**NEW, "test": test})
    file = tmp_path / "given.yaml"
    file.write_text(safe_dump(given.model_dump(mode="json", exclude_unset=True)))
    done = metarec("data", "check", str(file))
    assert "1 of 850 ratings" in done.out
    assert "test.csv' 9" in done.out


def test_a_split_by_files_needs_its_files_not_a_frame(tmp_path: Path) -> None:
    given = task(tmp_path, NEW)
    read_before = replace(load_task_data(given, 0).interactions, part=None)
    with pytest.raises(DataError, match="by files"):
        load_task_data(given, 0, read_before)
