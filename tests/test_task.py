"""Tasks as data: what a split keeps apart, what a label rule calls a like, and what a task's file may say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import known_interactions
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import BASE

from metarec.config import validated
from metarec.data import task_data, task_files
from metarec.data.episodes import seeded, training_batch
from metarec.data.interactions import Interactions, RatingScale
from metarec.data.labels import read_rule
from metarec.data.task import Task
from metarec.data.task_data import TaskData, load_task_data
from metarec.data.task_files import group_names, load_group, load_task, task_names
from metarec.data.transforms import as_domains, keep_users, merge, with_negatives
from metarec.errors import ConfigError, DataError, MetarecError
from metarec.scorer import request
from metarec.scorers.collaborative.item_mean import fit_item_mean

DATA = known_interactions()


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns what a task over the known ratings loads to."""

    def loaded(seed: int = 0, data: Interactions = DATA, **changes: Any) -> TaskData:
        monkeypatch.setattr(task_data, "read_source", lambda *_: data)
        return load_task_data(validated(Task, BASE | changes, "test"), seed)

    return loaded


def split(**changes: Any) -> dict[str, Any]:
    return {"split": {"fractions": [0.6, 0.2, 0.2], **changes}}


SPLITS = [
    {},
    split(by="item", unseen=0.3),
    split(by="both", unseen=0.5),
    split(by="time", order="time"),
    split(users="known"),
    split(by="item", unseen=0.3, users="known"),
    split(by="both", unseen=0.5, users="known"),
]


@pytest.mark.parametrize("changes", SPLITS, ids=lambda changes: str(changes.get("split")))
@pytest.mark.parametrize("seed", [0, 1])
def test_no_split_leaks(changes: dict[str, Any], seed: int, load: Any) -> None:
    data = load(seed, **changes)
    assert data.leaks() == []
    for part in ("validation", "test"):
        assert data.episodes(part)[0]


def test_a_leak_is_found(load: Any) -> None:
    data = load(**split(by="item", unseen=0.3))
    everything = replace(data, interactions=DATA, parts={**data.parts, "train": np.arange(60)})
    assert len(everything.leaks()) == 4


def test_item_cold_asks_about_unseen_items_after_a_support_of_seen_ones(load: Any) -> None:
    data = load(**split(by="item", unseen=0.3))
    assert (~data.seen).sum() == 12
    trained = data.interactions.item[np.isin(data.interactions.user, data.parts["train"])]
    assert data.seen[trained].all()
    for episode in data.episodes("test")[0]:
        assert data.seen[episode.support.items].all()
        assert not data.seen[episode.query.items].any()


def test_both_cold_has_seen_neither_support_nor_query(load: Any) -> None:
    data = load(**split(by="both", unseen=0.5))
    for episode in data.episodes("test")[0]:
        assert not data.seen[episode.support.items].any()
        assert not data.seen[episode.query.items].any()


def test_the_prior_knows_nothing_of_a_cold_item(load: Any) -> None:
    data = load(**split(by="item", unseen=0.3))
    turned = replace(DATA, rating=np.where(data.seen[DATA.item], DATA.rating, 5.5 - DATA.rating).astype(np.float32))
    other = load(data=turned, **split(by="item", unseen=0.3))
    one, two = (fit_item_mean(each.interactions, each.parts["train"]) for each in (data, other))
    assert np.array_equal(one.total, two.total)
    assert one.count[~data.seen].sum() == 0
    assert np.ptp(one.values(np.flatnonzero(~data.seen))) == 0


def test_meta_training_batches_hold_no_cold_item(load: Any) -> None:
    data = load(**split(by="item", unseen=0.3))
    for step in range(5):
        batch = training_batch(
            data.interactions,
            data.parts["train"],
            batch_users=8,
            shots=(5,),
            max_query=9,
            min_query=2,
            seed=0,
            step=step,
        )
        for episode in batch:
            assert data.seen[episode.support.items].all()
            assert data.seen[episode.query.items].all()


def test_cold_items_have_the_same_users_as_warm_ones(load: Any) -> None:
    warm, cold = load(), load(**split(by="item", unseen=0.3))
    assert warm.parts["test"].tolist() == cold.parts["test"].tolist()


def test_known_users_are_trained_on_but_not_their_queries(load: Any) -> None:
    data = load(**split(users="known"))
    assert set(data.parts["test"]) < set(data.parts["train"])
    asked = sum(len(episode.query) for part in ("validation", "test") for episode in data.episodes(part)[0])
    assert len(data.interactions) == len(DATA) - asked


def test_a_temporal_split_knows_nothing_from_after_a_test_user_came(load: Any) -> None:
    shuffled = replace(DATA, timestamp=np.random.default_rng(0).permutation(len(DATA)))
    data = load(data=shuffled, **split(by="time", order="time"))
    rows = {part: np.isin(data.interactions.user, users) for part, users in data.parts.items()}
    times = data.interactions.timestamp
    assert times is not None
    assert times[rows["train"]].max() < times[rows["validation"]].min()
    assert times[rows["validation"]].max() < times[rows["test"]].min()


def test_a_temporal_split_needs_times(load: Any) -> None:
    with pytest.raises(DataError, match="no timestamps"):
        load(data=replace(DATA, timestamp=None), **split(by="time"))


def test_items_may_be_unseen_by_a_field(load: Any) -> None:
    years = tuple(str(1980 + code % 40) for code in range(40))
    dated = replace(DATA, catalog=replace(DATA.catalog, fields={**DATA.catalog.fields, "year": years}))
    data = load(data=dated, **split(by="both", unseen={"field": "year", "since": 2000}))
    assert data.seen.tolist() == [int(year) < 2000 for year in years]
    warm = load(data=dated, **split(unseen={"field": "year", "since": 2000}))
    assert all(warm.seen[episode.query.items].all() for episode in warm.episodes("test")[0])


def test_another_seed_splits_differently_and_a_fixed_one_does_not(load: Any) -> None:
    assert load(0).hashes["split"] != load(1).hashes["split"]
    assert load(0, **split(seed=7)).hashes == load(1, **split(seed=7)).hashes


def test_hashes_follow_data_split_and_prompt_each(load: Any) -> None:
    base = load().hashes
    turned = replace(DATA, rating=np.flip(DATA.rating).copy())
    prompt = {"prompt": {"text": "{{ genres }}", "positive": " Yes", "negative": " No"}}
    for changed, key in ((load(data=turned), "data"), (load(1), "split"), (load(**prompt), "prompt")):
        assert {name for name in base if base[name] != changed.hashes[name]} == {key}


# Labels.


@pytest.mark.parametrize(
    ("rule", "likes"),
    [
        ("rating >= 4", [1, 0, 1, 1]),
        ("rating > 4", [1, 0, 0, 0]),
        ("rating  >= 4.5", [1, 0, 0, 0]),
        ("rating > user mean", [1, 0, 0, 0]),
        ("rating", [1, 0, 0, 0]),
    ],
)
def test_a_label_rule_says_what_it_reads(rule: str, likes: list[int]) -> None:
    data = replace(DATA, users=("a", "b"), user=np.array([0, 0, 1, 1]), item=np.arange(4))
    data = replace(data, rating=np.array([5, 1, 4, 4], np.float32), timestamp=None)
    assert read_rule(rule).liked(data).tolist() == likes


@pytest.mark.parametrize("rule", ["", "rating", "stars > 3", "rating >= user mean", "rating > nan", "rating > 1e999"])
def test_other_rules_are_refused(rule: str) -> None:
    if rule == "rating":
        assert read_rule(rule).kind == "rating"
        return
    with pytest.raises(ConfigError, match="Write 'rating >= 4'"):
        read_rule(rule)


@given(st.text(max_size=30))
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    try:
        read_rule(text)
    except MetarecError:
        return
    assert "rating" in text or "implicit" in text


def test_a_users_mean_labels_everybody_on_their_own_scale(load: Any) -> None:
    strict = replace(DATA, rating=np.where(DATA.user % 3 == 0, DATA.rating / 5, DATA.rating).astype(np.float32))
    data = load(data=strict, label="rating > user mean")
    for episode in data.episodes("test")[0]:
        assert 0 < episode.query.likes(np.nan).sum() < len(episode.query)


def test_a_request_keeps_no_label_that_a_rule_made_from_the_query(load: Any) -> None:
    episode = load(label="rating > user mean").episodes("test")[0][0]
    assert episode.support.liked is not None
    assert request(episode, 5).support.liked is None


def test_hours_become_opinions_by_their_logarithm(load: Any) -> None:
    for rule in ("rating >= 3", "rating > 3", "rating > 0", "rating >= 4.5"):
        raw = load(label=rule).interactions.liked
        np.testing.assert_array_equal(load(label=rule, rating={"transform": "log"}).interactions.liked, raw)
    hours = replace(DATA, rating=np.float32(10) ** DATA.rating, scale=RatingScale(0.0, 1e5))
    plain = load(data=hours, label="rating >= 1000").interactions
    data = load(data=hours, label="rating >= 1000", rating={"transform": "log"}).interactions
    np.testing.assert_allclose(data.rating, np.log1p(plain.rating))
    np.testing.assert_array_equal(data.liked, plain.liked)
    assert (data.rating.min() >= data.scale.low, data.rating.max() <= data.scale.high) == (True, True)
    task = load(data=hours, label="rating >= 1000", rating={"transform": "log"}).task
    np.testing.assert_array_equal(data.rating >= task.like_threshold, data.liked)
    assert validated(Task, BASE, "x").digest == validated(Task, BASE | {"rating": {"transform": "none"}}, "x").digest
    with pytest.raises(DataError, match="have no logarithm"):
        load(data=replace(DATA, scale=RatingScale(-1.0, 5.0)), rating={"transform": "log"})


def test_enough_ratings_are_counted_for_every_part_and_number_of_shots(load: Any) -> None:
    data = load(shots=[0, 5, 13, 500], query={"max": 5, "min": 2})
    for part, users in data.parts.items():
        rated = data.interactions.items_of_user[users]
        for shots in data.task.shots:
            kept = int((rated >= shots + 2).sum())
            assert data.enough(shots)[part] == (kept, len(users) - kept)
    assert data.enough(500)["train"][0] == 0


def test_like_threshold_is_still_understood() -> None:
    old = {key: value for key, value in BASE.items() if key != "label"} | {"like_threshold": 3.5}
    task = validated(Task, old, "old")
    assert (task.label, task.like_threshold) == ("rating >= 3.5", 3.5)
    assert validated(Task, task.model_dump(mode="json"), "dumped") == task


# Views.


def test_a_domain_is_an_episode_of_many_users_and_of_items_of_its_own(load: Any) -> None:
    data = load(by="domain", domain={"field": "genres"}, **split(fractions=[0.5, 0.25, 0.25]))
    assert data.interactions.users == ("action", "comedy", "drama", "horror")
    genres = data.interactions.catalog.fields["genres"]
    for episode in data.episodes("test")[0]:
        items = [*episode.support.items, *episode.query.items]
        assert len(set(items)) == len(items), "an item is asked about once"
        assert {genres[item] for item in items} == {episode.user}
        raters = {
            DATA.user[(DATA.item == item) & (DATA.rating == value)][0]
            for item, value in zip(episode.query.items, episode.query.values, strict=True)
        }
        assert len(raters) > 1


def test_an_item_of_several_domains_belongs_to_the_rarest() -> None:
    fields = {"title": ("A", "B", "C"), "genres": ("x, y", "x", "")}
    catalog = replace(DATA.catalog, ids=("a", "b", "c"), fields=fields)
    data = replace(DATA, catalog=catalog, user=np.zeros(3, np.int64), item=np.arange(3), rating=np.ones(3, np.float32))
    domains = as_domains(replace(data, timestamp=None), "genres", ", ")
    assert [domains.users[code] for code in domains.user] == ["y", "x"]
    assert domains.dropped == {"item without genres": 1}
    with pytest.raises(DataError, match="Did you mean 'genres'"):
        as_domains(data, "genre", ", ")


def test_negatives_are_seeded_and_never_what_a_user_touched() -> None:
    one, again, other = (with_negatives(DATA, 1, seed) for seed in (0, 0, 1))
    assert np.array_equal(one.item, again.item)
    assert not np.array_equal(one.item, other.item)
    touched = set(zip(DATA.user.tolist(), DATA.item.tolist(), strict=True))
    added = one.rating == 0
    assert not touched & set(zip(one.user[added].tolist(), one.item[added].tolist(), strict=True))
    # Every user has touched 24 of 40 items: 16 are left.
    assert np.bincount(one.user[added]).tolist() == [16] * 60
    assert one.rating[: len(DATA)].tolist() == [1.0] * len(DATA)


def test_a_users_negatives_do_not_depend_on_who_else_there_is() -> None:
    alone = with_negatives(DATA.subset(DATA.user == 5), 1, 0)
    among = with_negatives(DATA, 1, 0)
    assert np.array_equal(alone.item[alone.rating == 0], among.item[(among.user == 5) & (among.rating == 0)])


def test_popular_negatives_are_more_popular() -> None:
    counts = np.bincount(DATA.item, minlength=40) ** 4
    item = np.repeat(np.arange(40), counts // counts.min())
    skewed = replace(DATA, user=np.zeros(len(item), np.int64), item=item, rating=np.ones(len(item), np.float32))
    skewed = replace(skewed, timestamp=None, users=("crowd", "one"))
    first = np.append(np.zeros(len(item), np.int64), 1)
    data = replace(skewed, user=first, item=np.append(item, 0), rating=np.ones(len(item) + 1, np.float32))
    draws = [[int(with_negatives(data, 1, seed, popular).item[-1]) for seed in range(200)] for popular in (False, True)]
    share = np.bincount(item, minlength=40)
    assert np.mean(share[draws[1]]) > 1.2 * np.mean(share[draws[0]])


def test_merged_datasets_keep_their_users_items_and_stars() -> None:
    tens = replace(DATA, rating=DATA.rating * 2, scale=replace(DATA.scale, low=1.0, high=10.0))
    both = merge({"movies": DATA, "books": tens})
    assert len(both.catalog) == 80
    assert both.catalog.fields["domain"] == ("movies",) * 40 + ("books",) * 40
    assert np.allclose(both.rating[: len(DATA)], both.rating[len(DATA) :])
    assert both.users[0] == "movies/u0"
    assert both.users[both.user[-1]] == f"books/{DATA.users[DATA.user[-1]]}"


def test_users_outside_the_interval_are_left_out_and_counted() -> None:
    thin = DATA.subset(~((DATA.user == 3) & (np.arange(len(DATA)) % 2 == 0)))
    kept = keep_users(thin, 20, 100)
    assert "u3" not in kept.users
    assert kept.dropped == {"user outside ratings_per_user": 1}
    assert [kept.users[code] for code in kept.user[:24]] == ["u0"] * 24
    with pytest.raises(DataError, match="no user has 200"):
        keep_users(DATA, 200, None)


def test_transfer_tests_the_users_that_the_other_domains_own_task_tests(load: Any) -> None:
    parts = {"movies": {"source": "embedded-movielens"}, "books": {"source": "embedded-movielens"}}
    data = load(dataset={"source": "mix", "parts": parts}, **split(transfer={"train": "movies", "test": "books"}))
    users = {part: [data.interactions.users[code] for code in codes] for part, codes in data.parts.items()}
    assert all(user.startswith("movies/") for user in [*users["train"], *users["validation"]])
    own = load()
    assert users["test"] == [f"books/{DATA.users[code]}" for code in own.parts["test"]]
    assert data.leaks() == []


def test_sampled_candidates_join_as_not_liked_and_were_never_rated(load: Any) -> None:
    plain = load().episodes("test")[0]
    more = load(query={"max": 14, "min": 2, "candidates": "sampled", "sampled": 6}).episodes("test")[0]
    full = load(query={"max": 14, "min": 2, "candidates": "full"}).episodes("test")[0]
    for few, some, all_ in zip(plain, more, full, strict=True):
        rated = set(DATA.item[DATA.rows_of_user[DATA.users.index(few.user)]].tolist())
        held_out = len(few.query)
        assert some.query.items[:held_out].tolist() == few.query.items.tolist()
        assert len(some.query) == held_out + 6
        assert not rated & set(some.query.items[held_out:].tolist())
        assert not some.query.likes(0.0)[held_out:].any()
        assert len(all_.query) == held_out + 40 - len(rated)


def test_short_supports_give_what_there_is(load: Any) -> None:
    data = load(shots=[0, 3, 90], short_supports=True, query={"max": 10, "min": 10})
    for episode in data.episodes("test")[0]:
        assert (len(episode.support), len(episode.query)) == (14, 10)


def test_a_seed_and_a_name_are_one_stream() -> None:
    assert seeded(1, "x").integers(1 << 30) == seeded(1, "x").integers(1 << 30)
    assert seeded(1, "x").integers(1 << 30) != seeded(1, "y").integers(1 << 30)


# Files.


@pytest.mark.parametrize("name", task_names())
def test_every_shipped_task_says_where_it_comes_from(name: str) -> None:
    task = load_task(name)
    assert task.origin
    assert task.name == name
    family = task_files.tasks_dir() / name.split("/")[0]
    assert "## Changelog" in (family / "README.md").read_text(encoding="utf-8")


EMBEDDED = [name for name in task_names() if load_task(name).dataset.source == "embedded-movielens"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_embedded_task_loads_splits_and_leaks_nothing(name: str) -> None:
    data = load_task_data(load_task(name), 0)
    assert data.leaks() == []
    for part in ("validation", "test"):
        episodes, _ = data.episodes(part)  # type: ignore[arg-type]
        assert len(episodes) >= 3


def test_user_cold_is_the_split_it_always_was() -> None:
    data = load_task_data(load_task("movielens/user-cold"), 0)
    episode = data.episodes("test")[0][0]
    assert data.parts["test"][:5].tolist() == [12, 18, 19, 23, 35]
    assert (episode.user, episode.query.items[:4].tolist()) == ("13", [315, 290, 626, 57])


@pytest.mark.parametrize("group", sorted(group_names()))
def test_every_group_names_tasks_that_exist(group: str) -> None:
    assert set(load_group(group)) <= set(task_names())


def test_a_group_whose_tasks_are_no_list_is_refused_where_a_task_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text("group: a\ntasks: 5\n")
    with pytest.raises(ConfigError, match=r"'tasks' is 5\. Input should be a list"):
        load_task(str(tmp_path / "g.yaml"))


def test_a_family_and_a_task_are_groups_too() -> None:
    assert "movielens/item-cold" in load_group("movielens")
    assert load_group("movielens/item-cold") == ["movielens/item-cold"]
    with pytest.raises(ConfigError, match="Did you mean 'movielens/item-cold'"):
        load_group("movielens/item-colt")


def folder(root: Path, **files: object) -> Path:
    (root / "mine").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (root / "mine" / f"{name}.yaml").write_text(text)
    return root


def test_a_folder_of_ones_own_is_searched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = folder(tmp_path, task=BASE | {"name": "mine/task"})
    assert "mine/task" not in task_names()
    assert load_task("mine/task", [own]).name == "mine/task"
    monkeypatch.setenv("METAREC_TASKS", str(own))
    assert load_task("mine/task").name == "mine/task"
    with pytest.raises(ConfigError, match="does not exist"):
        task_names([tmp_path / "nothing"])


def test_an_include_is_shared_and_its_keys_can_be_replaced(tmp_path: Path) -> None:
    own = folder(tmp_path, _base=BASE, task="include: _base.yaml\nname: mine/task\nsplit: {order: time}\n")
    task = load_task("mine/task", [own])
    assert (task.split.order, task.split.fractions) == ("time", (0.6, 0.2, 0.2))
    assert "_base" not in str(task_names([own]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include: x.yaml\n", "in a circle"),
        ("include: nothing.yaml\n", "cannot be read"),
        ("include: 3\n", "'include' is 3"),
        ("group: g\ntasks: [nothing/here]\n", "which does not exist"),
        ("group: g\ntasks: []\n", "'tasks'"),
    ],
)
def test_files_that_lead_nowhere_are_named(text: str, message: str, tmp_path: Path) -> None:
    own = folder(tmp_path, x=text)
    read = load_group if text.startswith("group") else load_task
    with pytest.raises(ConfigError, match=message):
        read("mine/x", [own])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splitt": {}}, "Did you mean 'split'"),
        ({"label": "stars"}, "label rule 'stars'"),
        ({"metrics": ["ndgc@5"]}, "Did you mean 'ndcg@5'"),
        ({"metrics": ["ndcg"]}, "no metric is called"),
        ({"by": "domain"}, "belong together"),
        ({"label": "implicit"}, "needs 'negatives' beside it"),
        ({"negatives": {"per_positive": 1}}, "'negatives' are of label 'implicit'"),
        ({"label": "implicit", "negatives": {}, "rating": {"transform": "log"}}, "reads no ratings"),
        ({"split": {"by": "item"}}, "'unseen'"),
        ({"split": {"by": "time", "users": "known"}}, "split by time"),
        ({"split": {"transfer": {"train": "a", "test": "b"}}}, "names no parts"),
        ({"query": {"candidates": "sampled"}}, "'sampled' says how many"),
        ({"query": {"candidates": "full"}, "label": "rating"}, "rated items"),
        ({"dataset": {"source": "mix"}}, "belong together"),
        ({"dataset": {"source": "table", "options": {"seperator": ";"}}}, "'dataset.options.seperator' is unknown"),
    ],
)
def test_a_task_that_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        validated(Task, BASE | changes, "x")
    assert len(str(caught.value)) < 300, "names the value, not the whole task"


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@given(st.sampled_from(sorted(Task.model_fields)), JUNK)
@settings(max_examples=300, deadline=None)
def test_any_value_of_any_key_is_a_task_or_a_typed_error(key: str, value: object) -> None:
    try:
        task = validated(Task, BASE | {key: value}, "x")
    except MetarecError:
        return
    assert task.digest


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_file_is_a_task_or_a_typed_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("t") / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(MetarecError):
        load_task(str(file))
