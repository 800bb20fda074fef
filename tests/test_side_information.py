"""What is known of items, users and moments beside titles and ratings: found where it carries taste, else left out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Ran
from made_shop import (
    ITEMS,
    KINDS,
    MANY_SUBJECTS,
    PLAIN,
    SAID,
    SUBJECTS,
    USERS,
    Shop,
    bookshop,
    own_tastes,
    pictures,
    reviewed,
    shop,
    write_friends,
    write_graph,
    write_sentences,
    write_vectors,
)

from metarec import MetaRecommender
from metarec.bench.plan import Cell
from metarec.bench.robustness import flipped, most_rated, with_profiles
from metarec.cli.bench import _side_notes
from metarec.config import RunConfig, validated
from metarec.data.interactions import Catalog, Interactions, Ratings
from metarec.data.item_graph import graph_vectors
from metarec.data.item_vectors import read_item_vectors
from metarec.data.own_data import load_own, reload_own
from metarec.data.side import Side, SideColumns
from metarec.data.task_data import TaskData
from metarec.data.task_files import load_task
from metarec.data.templates import PromptTemplate
from metarec.data.transforms import keep_users, merge, with_negatives
from metarec.errors import ConfigError, DataError, RatingError
from metarec.evaluation.evaluate import validation_auc
from metarec.evaluation.recommended_lists import best_lists, catalog_facts
from metarec.lm.loading import load_backbone
from metarec.scorer import Request
from metarec.scorers.collaborative.features import Features
from metarec.scorers.collaborative.graph_network import fit_graph_network
from metarec.scorers.collaborative.item_mean import fit_item_mean
from metarec.scorers.collaborative.network_forms import Form
from metarec.scorers.collaborative.networks import fit_network
from metarec.scorers.collaborative.side_effects import SideEffects
from metarec.scorers.collaborative.side_fitting import fit_effects, fit_side
from metarec.scorers.collaborative.side_inputs import SideInputs, side_inputs
from metarec.scorers.collaborative.side_readers import friends_of, reader_of
from metarec.scorers.collaborative.terms import SideTerm
from metarec.scorers.collaborative.two_towers import TowerText
from metarec.scorers.language.encoded_text import EncodedText
from metarec.scorers.language.in_context import History, InContext
from metarec.scorers.language.listwise import Listwise
from metarec.training.task_features import SIDE_TERM, side_note

NEW_USERS: dict[str, Any] = {"split": {"fractions": [0.6, 0.2, 0.2]}, "shots": [0, 5], "query": {"max": 10, "min": 3}}
NEW_ITEMS: dict[str, Any] = {**NEW_USERS, "split": {"by": "item", "unseen": 0.2, "fractions": [0.6, 0.2, 0.2]}}
GENERATOR = np.random.default_rng(5)
GROUP = GENERATOR.integers(0, 3, USERS)
BY_GROUP = GENERATOR.normal(size=(3, KINDS))[GROUP] + 0.3 * GENERATOR.normal(size=(USERS, KINDS))


def fitted(
    world: Shop, folder: Path, monkeypatch: pytest.MonkeyPatch, task: dict[str, Any], **files: Any
) -> MetaRecommender:
    """Fits a recommender without a language model to a shop whose files lie in a folder."""
    monkeypatch.chdir(folder)
    features = ["fields", *(["vectors"] if {"vectors", "item_graph"} & set(files) else [])]
    settings = {**PLAIN, "collaborative": {**PLAIN["collaborative"], "features": features}}
    recommender = MetaRecommender.from_pretrained("smollm2-135m-instruct", validated(RunConfig, settings, "test"))
    return recommender.fit(world.orders, items=world.items, label="rating >= 4", **task, **files)


def gains(recommender: MetaRecommender) -> list[float]:
    """Returns the gain over the item mean in AUC for each K."""
    frame = recommender.evaluate().to_frame()
    return frame[frame["method"] == "metarec, adapted"]["auc_gain"].tolist()


def effects(recommender: MetaRecommender) -> SideTerm:
    term = recommender.fitted.terms["side information"]
    assert isinstance(term, SideTerm)
    return term


def users_file(folder: Path, group: np.ndarray) -> str:
    shoes = np.random.default_rng(7).integers(36, 46, USERS)
    rows = [f"u{user},{'abc'[code]},{shoes[user]}" for user, code in enumerate(group)]
    (folder / "users.csv").write_text("\n".join(["user,group,shoe", *rows]) + "\n")
    return "users.csv"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> MetaRecommender:
    """Fitted to a shop where groups of users have one taste, without knowing the groups."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return fitted(shop(BY_GROUP), tmp_path_factory.mktemp("plain"), monkeypatch, NEW_USERS)


@pytest.fixture(scope="module")
def informed(tmp_path_factory: pytest.TempPathFactory) -> MetaRecommender:
    """Fitted to the same shop, with a file of users that names the groups."""
    folder = tmp_path_factory.mktemp("informed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return fitted(shop(BY_GROUP), folder, monkeypatch, NEW_USERS, users=users_file(folder, GROUP))


def scores(recommender: MetaRecommender) -> list[float]:
    items = [f"i{code}" for code in range(20)]
    return recommender.adapt({"i30": 5, "i31": 1}).score(items)


@pytest.fixture
def kinds(tmp_path: Path) -> Shop:
    """A shop of own tastes, with vectors and a graph of what kind an item is, and vectors of nothing."""
    world = shop(own_tastes())
    write_vectors(tmp_path / "covers.npz", pictures(world.kind, 0))
    write_vectors(tmp_path / "noise.npz", np.random.default_rng(7).normal(size=(ITEMS, 16)))
    write_graph(tmp_path / "graph.csv", world.kind)
    return world


@pytest.mark.parametrize(
    "files", [{"vectors": {"cover": "covers.npz"}}, {"item_graph": "graph.csv"}], ids=["vectors", "graph"]
)
def test_vectors_and_graphs_of_items_tell_taste_for_items_that_nobody_rated(
    kinds: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, Any]
) -> None:
    found = gains(fitted(kinds, tmp_path, monkeypatch, NEW_ITEMS, **files))
    plain = gains(fitted(kinds, tmp_path, monkeypatch, NEW_ITEMS))
    assert found[1] > 0.1
    assert found[1] > plain[1] + 0.1


def test_vectors_say_the_same_wherever_their_origin_is(
    kinds: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = pictures(kinds.kind, 0) + 50.0  # as of encoders of images, whose vectors point one way
    write_vectors(tmp_path / "moved.npz", moved)
    here, there = (
        fitted(kinds, tmp_path, monkeypatch, NEW_ITEMS, vectors={"cover": name}) for name in ("covers.npz", "moved.npz")
    )
    np.testing.assert_allclose(scores(here), scores(there), atol=1e-3)


def test_vectors_that_say_nothing_are_left_out_and_named(
    kinds: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    noisy = fitted(kinds, tmp_path, monkeypatch, NEW_ITEMS, vectors={"noise": "noise.npz"})
    assert "vectors 'noise' explain" in caplog.text
    assert "left out" in caplog.text
    assert scores(noisy) == scores(fitted(kinds, tmp_path, monkeypatch, NEW_ITEMS))


def test_what_is_known_of_a_user_ranks_before_any_rating(plain: MetaRecommender, informed: MetaRecommender) -> None:
    assert min(gains(informed)) > gains(plain)[0] + 0.08
    assert list(effects(informed).effects.about) == ["group"]
    assert effects(informed).effects.unread == ("shoe",)
    one, other = (informed.adapt({}, about={"group": name}).recommend(5) for name in "ab")
    assert [entry.item for entry in one] != [entry.item for entry in other]


def test_a_sentence_about_a_user_ranks_before_any_rating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"u{user},Person {user} keeps {('cats', 'dogs', 'birds')[code]} at home" for user, code in enumerate(GROUP)]
    (tmp_path / "users.csv").write_text("\n".join(["user,about", *rows]) + "\n")
    found = fitted(shop(BY_GROUP), tmp_path, monkeypatch, NEW_USERS, users="users.csv")
    assert gains(found)[0] > 0.1
    keeper, group = found.adapt({}, about="I have three dogs"), int(np.flatnonzero(GROUP == 1)[0])
    liked = BY_GROUP[group][shop(BY_GROUP).kind]
    best = [int(entry.item[1:]) for entry in keeper.recommend(10)]
    assert liked[best].mean() > liked.mean() + 0.3


def subjects(
    folder: Path,
    own: np.ndarray | None = None,
    shop_of: tuple[Shop, np.ndarray] | None = None,
    names: tuple[str, ...] = SUBJECTS,
    width: int = 32,
) -> tuple[TaskData, Features]:
    """A shop of many subjects, each user's own named by what they write; items' vectors tell theirs, with noise."""
    generator = np.random.default_rng(0)
    world, liked = shop_of or bookshop()
    users = write_sentences(folder / "users.csv", liked if own is None else own, names)
    data = load_own(world.orders, {"items": world.items, "label": "rating >= 4", **NEW_USERS, "users": users}, 0)
    codes = [int(item[1:]) for item in data.interactions.catalog.ids]
    centres, noise = generator.normal(size=(len(names), width)), generator.normal(size=(len(codes), width))
    vectors = centres[world.kind[codes]] + 0.3 * noise
    return data, Features({"text": vectors}, vectors)


def test_two_towers_explain_what_a_text_about_a_user_and_items_texts_have_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, features = subjects(tmp_path)
    train = data.parts["train"]
    side = fit_side(data.interactions, train, features, threshold=4.0, folds=2, seed=0)
    reader = side.whole.about["about"]
    assert isinstance(reader, TowerText)
    gain, error = side.whole.worth["about"]
    assert gain > 2 * error > 0
    towers = side.whole.effects["about"][-reader.users.shape[1] :]
    assert np.abs(side.whole.items @ towers.T).max() > 0
    # Of users whom no tower saw, likes stand above the rest.
    aucs = []
    for episode in data.episodes("test")[0]:
        value, likes = side.whole.asked(episode.query.side, episode.query.items), episode.query.likes(4.0)
        if 0 < likes.sum() < len(likes):
            aucs.append((value[likes][:, None] > value[~likes][None]).mean())
    assert np.mean(aucs) > 0.85
    assert not side.whole.asked(Side({"about": "nothing known"}), np.arange(5)).any()
    added = side.whole.extended(ITEMS + 2).asked(Side({"about": "I like dogs"}), np.arange(ITEMS, ITEMS + 2))
    assert not added.any()


def test_two_towers_tell_more_subjects_apart_than_the_regression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = bookshop(9, MANY_SUBJECTS, items=576, users=480)
    data, features = subjects(tmp_path, None, world, MANY_SUBJECTS, 64)
    train = data.parts["train"]

    def auc(towers: bool) -> np.ndarray:
        side = fit_side(data.interactions, train, features, threshold=4.0, folds=2, seed=0, towers=towers)
        found = []
        for episode in data.episodes("test")[0]:
            value, likes = side.whole.asked(episode.query.side, episode.query.items), episode.query.likes(4.0)
            if 0 < likes.sum() < len(likes):
                more, less = value[likes][:, None], value[~likes][None]
                found.append(((more > less) + (more == less) / 2).mean())
        return np.array(found)

    gain = auc(True) - auc(False)
    assert gain.mean() > 3 * gain.std() / np.sqrt(len(gain)) > 0


def test_a_setting_leaves_the_towers_out_and_the_regression_reads_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, features = subjects(tmp_path)
    train = data.parts["train"]
    side = fit_side(data.interactions, train, features, threshold=4.0, folds=2, seed=0, towers=False)
    assert "about" in side.whole.about
    assert not isinstance(side.whole.about["about"], TowerText)


def test_two_towers_get_no_weight_where_texts_are_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, features = subjects(tmp_path, np.random.default_rng(3).integers(0, len(SUBJECTS), USERS))
    side = fit_side(data.interactions, data.parts["train"], features, threshold=4.0, folds=2, seed=0)
    assert not side.whole.effects
    assert side.interactions.rating.tolist() == data.interactions.rating.tolist()


def test_a_sentence_is_read_by_the_encoder_where_items_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that no meta-training user wrote are understood."""
    said = ("I keep a small dog", "my car is fast", "I read poems in bed")
    rows = [f"u{user},{said[code]} since {1990 + user % 20}" for user, code in enumerate(GROUP)]
    (tmp_path / "users.csv").write_text("\n".join(["user,about", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    settings = {**PLAIN, "collaborative": {**PLAIN["collaborative"], "features": ["text", "fields"]}}
    found = MetaRecommender.from_pretrained("smollm2-135m-instruct", validated(RunConfig, settings, "test"))
    world = shop(BY_GROUP)
    found.fit(world.orders, items=world.items, label="rating >= 4", **NEW_USERS, users="users.csv")
    read = effects(found).effects.about["about"]
    assert isinstance(read.reader if isinstance(read, TowerText) else read, EncodedText)
    items = [f"i{code}" for code in range(ITEMS)]
    puppy, lorry = (found.adapt({}, about=text).score(items) for text in ("the puppies are mine", "a lorry driver"))
    tastes = [BY_GROUP[np.flatnonzero(group == GROUP)[0]][world.kind] for group in range(2)]
    assert np.corrcoef(puppy, tastes[0])[0, 1] > np.corrcoef(puppy, tastes[1])[0, 1]
    assert np.corrcoef(lorry, tastes[1])[0, 1] > np.corrcoef(lorry, tastes[0])[0, 1]
    found.save_pretrained(tmp_path / "saved")
    again = MetaRecommender.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(again.adapt({}, about="the puppies are mine").score(items), puppy, atol=1e-5)


def test_friends_rank_before_any_rating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: MetaRecommender
) -> None:
    write_friends(tmp_path / "friends.csv", GROUP)
    found = fitted(shop(BY_GROUP), tmp_path, monkeypatch, NEW_USERS, friends="friends.csv")
    assert gains(found)[0] > gains(plain)[0] + 0.08
    nobody = found.adapt({}, friends=["a stranger"]).score(["i0", "i1"])
    assert nobody == found.adapt({}).score(["i0", "i1"])


def test_the_moment_of_a_question_changes_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everybodys = np.array([1.0, 1.0, -1.0, -1.0])
    world = shop(np.tile(everybodys, (USERS, 1)), flipped=np.ones(1))
    found = fitted(world, tmp_path, monkeypatch, NEW_USERS, context=["device", "hour"])
    assert min(gains(found)) > 0.1
    assert effects(found).effects.unread_moments == ("hour",)
    me = found.adapt({"i0": 5}, context={"device": "phone"})
    assert me.at(device="phone").score(["i1", "i2"]) == me.score(["i1", "i2"])
    liked = everybodys[world.kind]
    desk, phone = ([int(entry.item[1:]) for entry in me.at(device=name).recommend(10)] for name in ("desk", "phone"))
    assert liked[phone].mean() > 0 > liked[desk].mean()


def test_side_information_that_says_nothing_changes_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, plain: MetaRecommender
) -> None:
    name = users_file(tmp_path, np.random.default_rng(7).permutation(GROUP))
    found = fitted(shop(BY_GROUP), tmp_path, monkeypatch, NEW_USERS, users=name)
    assert "side information 'group' does not help users held out" in caplog.text
    np.testing.assert_allclose(scores(found), scores(plain), atol=0.02)


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (
            ("item mean", SIDE_TERM, "prompt", "adapter"),
            "read by 'side information'; 'prompt' and 'adapter' read",
        ),
        (("item mean", "history"), "read by 'history'"),
        (("item mean", "adapter"), "read by no term of the score"),
    ],
)
def test_what_reads_users_and_moments_is_said(score: tuple[str, ...], said: str) -> None:
    task = load_task("ml-100k/known-users")
    note = side_note(task, score)
    assert note is not None
    assert note.startswith("fields of users (ml-100k.user), moments (hour, weekday): read by")
    assert said in note
    assert side_note(load_task("ml-100k/user-cold"), score) is None


def test_a_benchmark_says_which_methods_do_not_read_users_and_moments() -> None:
    cells = [Cell("ml-100k/known-users", name, 0) for name in ("GP", "MeLU", "GP, without side information")]
    (note,) = _side_notes([*cells, Cell("ml-100k/user-cold", "GP", 0)])
    assert note.endswith("not read by GP")


def test_a_field_of_users_that_holds_nothing_to_read_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f"u{user},{'abc'[code]},earth" for user, code in enumerate(GROUP)]
    (tmp_path / "users.csv").write_text("\n".join(["user,group,planet", *rows]) + "\n")
    world = shop(BY_GROUP)
    data = load_own(world.orders, {"items": world.items, "label": "rating >= 4", **NEW_USERS, "users": "users.csv"}, 0)
    features = Features({"kind": np.eye(KINDS)[world.kind]}, np.eye(KINDS)[world.kind])
    fit_side(data.interactions, data.parts["train"], features, threshold=4.0, folds=2, seed=0)
    assert caplog.text.count("users' field 'planet' is not read: one value") == 1


def test_a_setting_leaves_side_information_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, name = shop(BY_GROUP), users_file(tmp_path, GROUP)
    monkeypatch.chdir(tmp_path)
    settings = {**PLAIN, "collaborative": {**PLAIN["collaborative"], "side": False}}
    recommender = MetaRecommender.from_pretrained("smollm2-135m-instruct", validated(RunConfig, settings, "test"))
    recommender.prepare(world.orders, items=world.items, label="rating >= 4", **NEW_USERS, users=name)
    assert "side information" not in recommender.fitted.terms


def test_a_saved_recommender_and_a_saved_person_know_what_they_knew(tmp_path: Path, informed: MetaRecommender) -> None:
    found = informed
    me = found.adapt({"i0": 5}, about={"group": "b"})
    me.save(tmp_path / "me")
    found.save_pretrained(tmp_path / "saved")
    again = MetaRecommender.from_pretrained(tmp_path / "saved")
    items = [f"i{code}" for code in range(20)]
    assert again.load_user(tmp_path / "me").score(items) == me.score(items)
    assert me.score(items) != found.adapt({"i0": 5}).score(items)
    assert "u17" not in (tmp_path / "saved" / "terms.json").read_text()
    assert json.loads((tmp_path / "me" / "user.json").read_text())["side"]["about"] == {"group": "b"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"context": ["rating"]}, "'rating' is no side information"),
        ({"review": "timestamp"}, "'timestamp' is no side information"),
        ({"context": ["place", "place"]}, "'place' is named twice"),
        ({"context": ["place"], "review": "place"}, "'place' is named twice"),
    ],
)
def test_what_is_predicted_is_no_side_information(tmp_path: Path, files: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path, **files)


def test_a_frame_of_users_is_refused_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^fit: 'users' is a DataFrame\. Write it to a file") as refused:
        loaded(tmp_path, users=pd.DataFrame({"user": ["u1"], "about": ["a secret"]}))
    assert "secret" not in str(refused.value)


def test_what_is_not_read_of_a_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "friends.csv").write_text("from,to,since\nu1,u2,2010\nu1,nobody,2011\n")
    (tmp_path / "users.csv").write_bytes("user, town ,\nu1,Köln,0\nu2,Aš,1\n".encode("iso-8859-2"))
    data = loaded(tmp_path, friends="friends.csv", users="users.csv", encoding="iso-8859-2")
    assert data.side.friends[data.users.index("u1")] == ("u2",)
    assert {name: set(column) for name, column in data.side.about.items()} == {"town": {"Köln", "Aš", ""}}
    assert "columns of 'friends.csv' that nothing reads: 'since'" in caplog.text
    assert "'friends.csv': 1 of 2 edges join no two users of the ratings" in caplog.text
    assert "'column 3, without a name'" in caplog.text


def test_what_a_recommender_does_not_know_of_people_is_refused(
    plain: MetaRecommender, informed: MetaRecommender
) -> None:
    with pytest.raises(ConfigError, match=r"'grup' is no field of a user.*group"):
        informed.adapt({}, about={"grup": "a"})
    with pytest.raises(ConfigError, match="'device' is no field of a moment"):
        informed.adapt({}).at(device="phone")
    with pytest.raises(ConfigError, match=r"reads no side information.*'users'"):
        plain.adapt({}, about="I like cats")
    with pytest.raises(ConfigError, match="knows no friends"):
        informed.adapt({}, friends=["u1"])
    with pytest.raises(ConfigError, match=r"friends is 'anna'.*\['anna'\]"):
        informed.adapt({}, friends="anna")
    for given in ({"about": 5}, {"about": ["I read"]}, {"context": "phone"}):
        with pytest.raises(ConfigError, match=f"{next(iter(given))} is "):
            informed.adapt({}, **given)  # type: ignore[arg-type]
    unknown = informed.adapt({"i30": 5}, about={"group": None, "shoe": float("nan")})  # type: ignore[dict-item]
    assert unknown.score(["i1"]) == informed.adapt({"i30": 5}).score(["i1"])


def test_a_user_sees_no_effects_that_were_learned_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every meta-training user's term comes from a fold without them: another fold gives other effects."""
    monkeypatch.chdir(tmp_path)
    name = users_file(tmp_path, GROUP)
    settings = validated(RunConfig, PLAIN, "test")
    recommender = MetaRecommender.from_pretrained("smollm2-135m-instruct", settings)
    world = shop(BY_GROUP)
    data = load_own(world.orders, {"items": world.items, "label": "rating >= 4", **NEW_USERS, "users": name}, 0)
    crossed = recommender._prepare(data).crossed["side information"]
    assert len(crossed.folds) == 2
    episode = data.episodes("test")[0][0]
    one, other = (fold.values([episode.support], [episode.query.items])[0] for fold in crossed.folds)
    assert not np.array_equal(one, other)
    assert np.corrcoef(one, other)[0, 1] > 0.6


ORDERS = pd.DataFrame(
    {
        "user": [f"u{n % 6}" for n in range(60)],
        "item": [f"i{n // 6}" for n in range(60)],
        "rating": [n % 5 + 1 for n in range(60)],
    }
)
THINGS = pd.DataFrame({"item": [f"i{n}" for n in range(10)], "title": [f"thing {n}" for n in range(10)]})


def loaded(folder: Path, **files: Any) -> Interactions:
    options = {"items": THINGS, "label": "rating >= 4", "shots": [0, 2], "query": {"min": 2, "max": 5}, **files}
    return load_own(ORDERS.assign(place=["home", "away"] * 30, timestamp=np.arange(60) * 7200), options, 0).interactions


IDS = [f"i{n}" for n in range(10)]


@pytest.mark.parametrize(
    "form", ["npz", "named npz", "npy", "safetensors", "named safetensors", "parquet", "wide parquet"]
)
def test_vectors_are_read_in_every_form(tmp_path: Path, form: str) -> None:
    from safetensors.numpy import save_file

    ids, vectors = IDS[1:], np.arange(18, dtype=np.float32).reshape(9, 2)
    path = tmp_path / f"v.{form.split()[-1]}"
    if form == "npz":
        np.savez(path, ids=np.array(ids), vectors=vectors)
    elif form == "named npz":
        np.savez(path, **dict(zip(ids, vectors, strict=True)))
    elif form == "npy":
        np.save(path, vectors)
        path.with_suffix(".txt").write_text("\n".join(ids) + "\n")
    elif form == "safetensors":
        save_file({"vectors": vectors}, path, {"ids": json.dumps(ids)})
    elif form == "named safetensors":
        save_file(dict(zip(ids, vectors, strict=True)), path)
    elif form == "parquet":
        pd.DataFrame({"item": ids, "vector": vectors.tolist()}).to_parquet(path)
    else:
        pd.DataFrame({"item": ids, "x": vectors[:, 0], "y": vectors[:, 1]}).to_parquet(path)
    found = read_item_vectors(path, IDS)
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1:], vectors)


def test_vectors_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "nan.npz", ids=np.array(IDS), vectors=np.full((10, 2), np.nan))
    np.savez(tmp_path / "others.npz", ids=np.array(["x", "y"]), vectors=np.zeros((2, 2)))
    np.savez(tmp_path / "short.npz", ids=np.array(IDS), vectors=np.zeros((9, 2)))
    np.savez(tmp_path / "objects.npz", ids=np.array(IDS, object), vectors=np.zeros((10, 2)))
    np.savez(tmp_path / "complex.npz", ids=np.array(IDS), vectors=np.ones((10, 2), complex))
    np.savez(tmp_path / "narrow.npz", ids=np.array(IDS), vectors=np.ones((10, 0)))
    (tmp_path / "broken.npz").write_bytes(b"PK broken")
    (tmp_path / "v.bin").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    for name, said in {
        "nan.npz": "vector of 'i0' holds a number that is not finite",
        "others.npz": "holds no vector of any item",
        "short.npz": "10 ids beside vectors of shape",
        "objects.npz": "cannot be read",
        "complex.npz": "holds complex128, which are no real numbers",
        "narrow.npz": "10 ids beside vectors of shape",
        "broken.npz": "cannot be read",
        "v.bin": "of no kind",
        "broken.safetensors": "cannot be read",
        "missing.npz": "does not exist",
    }.items():
        with pytest.raises(DataError, match=said):
            read_item_vectors(tmp_path / name, IDS)


def test_items_of_one_maker_get_vectors_that_point_the_same_way() -> None:
    edges = [(f"i{n}", "maker", f"m{n % 2}") for n in range(8)] + [("i9", "maker", "m9"), ("nobody", "maker", "m1")]
    vectors = graph_vectors(edges, IDS)
    assert np.isnan(vectors[8]).all()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert unit[0] @ unit[2] > 0.9
    assert abs(unit[0] @ unit[1]) < 0.1


def test_a_graph_gives_the_same_vectors_and_names_the_data_by_its_edges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"i{code}" for code in range(80)]
    edges = [
        (item, relation, f"{relation}{at % size}")
        for at, item in enumerate(ids)
        for relation, size in (("a", 12), ("b", 4))
    ]
    once, again = graph_vectors(edges, ids), graph_vectors(edges, ids)
    np.testing.assert_array_equal(once, again)
    monkeypatch.chdir(tmp_path)
    rows = [f"i{n},maker,m{n % 3}" for n in range(10)]
    (tmp_path / "graph.csv").write_text("\n".join(["item,relation,other", *rows]) + "\n")
    data = loaded(tmp_path, item_graph="graph.csv")
    turned = replace(data, item_vectors={"graph": -data.item_vectors["graph"]})
    assert turned.digest == data.digest
    joined = merge({"one": data, "two": data})
    assert joined.digest == merge({"one": turned, "two": data}).digest
    (tmp_path / "graph.csv").write_text("\n".join(["item,relation,other", *rows[1:]]) + "\n")
    other = loaded(tmp_path, item_graph="graph.csv")
    assert other.digest != data.digest
    assert merge({"one": other, "two": data}).digest != joined.digest


def test_rows_keep_their_moments_through_every_view_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users.csv").write_text("user,age\n" + "".join(f"u{n},{20 + n}\n" for n in range(6)))
    data = loaded(tmp_path, context=["place", "hour"], users="users.csv")
    row = 7
    side = data.ratings(np.array([row])).side
    assert side is not None
    assert side.about == {"age": "21"}
    assert {name: column.tolist() for name, column in side.rated.items()} == {"place": ["away"], "hour": ["14"]}
    fewer = data.subset(np.arange(60) % 2 == 1)
    assert set(fewer.side.moments["place"]) == {"away"}
    drawn = with_negatives(fewer, 1, 0)
    assert len(drawn.side.moments["place"]) == len(drawn)
    assert set(drawn.side.moments["place"]) == {"away"}
    joined = merge({"one": data, "two": fewer})
    assert joined.side.about["age"].tolist() == [str(20 + n) for n in range(6)] * 2
    assert len(joined.side.moments["hour"]) == len(joined)
    few = keep_users(data.subset(~np.isin(np.arange(60), [0, 6])), 9, None)
    assert few.side.about["age"].tolist() == [str(20 + n) for n in range(1, 6)]


def test_effects_of_all_rows_are_those_of_one_user_after_another(informed: MetaRecommender) -> None:
    """In bulk as one by one, with users, friends and moments."""
    data = informed.task_data().interactions
    generator = np.random.default_rng(2)
    users, rows = len(data.users), len(data)
    side = SideColumns(
        {"group": data.side.about["group"]},
        tuple((data.users[int(code)],) for code in generator.integers(0, users, users)),
        {"device": np.array(["phone", "desk", ""], object)[generator.integers(0, 3, rows)]},
    )
    data = replace(data, side=side)
    read = {"group": reader_of("group", side.about["group"]), "device": reader_of("device", side.moments["device"])}
    assert not any(isinstance(reader, str) for reader in read.values())
    widths = {"group": 3, "device": 2, "friends": 4}
    found = SideEffects(
        {"group": read["group"]},
        {"device": read["device"]},
        friends_of(data.users, generator.normal(size=(users, 4))),
        generator.normal(size=(len(data.catalog), 5)),
        {name: generator.normal(size=(width, 5)) for name, width in widths.items()},
        {},
    )
    bulk = found.of_rows(data, np.arange(rows))
    for code in (0, 7, 33):
        own = data.rows_of_user[code]
        np.testing.assert_allclose(bulk[own], found.rated(data.ratings(own)), atol=1e-5)
    assert np.abs(bulk).max() > 0.1


def test_side_information_is_part_of_what_names_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = loaded(tmp_path)
    assert loaded(tmp_path, context=["place"]).digest != plain.digest
    write_vectors(tmp_path / "v.npz", np.eye(10))
    assert loaded(tmp_path, vectors={"v": "v.npz"}).digest != plain.digest


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"context": ["plaice"]}, "no column 'plaice'.*'place'"),
        ({"users": "nobody.csv"}, "'nobody.csv' does not exist"),
        ({"users": "twice.csv"}, "names user 'u1' twice"),
        ({"users": "others.csv"}, "names no user of the ratings"),
        ({"friends": "others.csv"}, "joins two users"),
        ({"item_graph": "edges.csv"}, "no edge of the graph names an item"),
        ({"review": "text"}, "no column 'text'"),
        ({"users": "columns.csv"}, "has two columns 'age'"),
        ({"users": "places.csv", "context": ["place"]}, "'place' is a field of users and a column"),
        ({"users": "friendly.csv"}, "is called 'friends'"),
        ({"friends": "columns.csv"}, "has two columns 'age'"),
        ({"users": "alone.csv"}, "has no column beside 'user'"),
        ({"users": "ragged.csv"}, "row 3 has 3 fields.*none is left out"),
        ({"users": "headless.csv"}, "first row of 'headless.csv' is data: 'u1' is an id"),
        ({"friends": "headless.csv"}, "first row of 'headless.csv' is data: 'u1' is an id"),
        ({"item_graph": "nothing.csv"}, "names an 'other'"),
    ],
)
def test_faulty_side_information_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "twice.csv").write_text("user,age\nu1,20\nu1,21\n")
    (tmp_path / "others.csv").write_text("user,friend\nx,y\n")
    (tmp_path / "edges.csv").write_text("item,relation,other\nx,r,y\n")
    (tmp_path / "columns.csv").write_text("user,age,age\nu1,20,21\n")
    (tmp_path / "places.csv").write_text("user,place\nu1,home\n")
    (tmp_path / "friendly.csv").write_text("user,friends\nu1,3\n")
    (tmp_path / "alone.csv").write_text("user\nu1\n")
    (tmp_path / "ragged.csv").write_text("user,age\nu1,20\nu2,21,22\n")
    (tmp_path / "headless.csv").write_text("u1,u2\nu3,u4\n")
    (tmp_path / "nothing.csv").write_text("item,relation,other\ni1,r,\n")
    with pytest.raises(DataError, match=said):
        loaded(tmp_path, **files)


def test_a_column_of_rows_is_no_field_of_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        data = loaded(tmp_path, context=["place"])
    assert "place" not in data.catalog.fields
    assert "'place'" not in caplog.text


def test_the_command_line_takes_what_is_known(tmp_path: Path, metarec: Callable[..., Ran]) -> None:
    world = shop(BY_GROUP)
    world.orders.to_csv(tmp_path / "orders.csv", index=False)
    world.items.to_csv(tmp_path / "items.csv", index=False)
    side = ["--side", f"users={users_file(tmp_path, GROUP)}", "--side", "context=device"]
    settings = [f"--set=collaborative.{name}" for name in ("features=[fields]", "members=gp", "stack.folds=2")]
    settings += ["--set=score=[item mean, collaborative]", "--set=train.steps=2", "--set=train.validate_every=2"]
    orders = ["train", tmp_path / "orders.csv", "--items-file", "items.csv", "--runs", tmp_path]
    ran = metarec(*orders, "--name", "shop", *side, *settings)
    assert ran.status == 0, ran.err
    run = tmp_path / "shop"
    one, other = (metarec("recommend", run, "--about", f"group={name}", "--json").out for name in "ab")
    assert [entry["item"] for entry in json.loads(one)] != [entry["item"] for entry in json.loads(other)]
    wrong = metarec("recommend", run, "--context", "devise=phone")
    assert wrong.status == 2
    assert "'devise' is no field of a moment" in wrong.err
    assert metarec("recommend", run, "--context", "phone").status == 2
    assert metarec(*orders, "--name", "no", "--side", "users").status == 2


def test_reviews_are_a_second_reading_of_noisy_ratings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = reviewed(shop(own_tastes()), 3)
    found = fitted(world, tmp_path, monkeypatch, NEW_USERS, review="text")
    head = effects(found).effects.reviews
    assert head is not None
    assert head.share > 0
    assert gains(found)[1] > gains(fitted(world, tmp_path, monkeypatch, NEW_USERS))[1] + 0.01
    read = dict(zip(SAID, head.ratings(list(SAID.values())), strict=True))
    assert read[5] > read[4] > read[2] > read[1] - 0.3
    me = found.adapt([("i0", "I loved it"), ("i1", "I hated it, not good"), ("i2", 4, "quite good")])
    assert me.support.values[0] > 3 > me.support.values[1]
    shown = [reason.rating for reason in me.explain("i5")]
    assert all(rating == round(rating, 2) for rating in shown)
    assert any(rating != round(rating) for rating in shown)
    with pytest.raises(RatingError, match="rating '' of 'i0' is not a number"):
        found.adapt({"i0": ""})
    me.save(tmp_path / "me")
    assert found.load_user(tmp_path / "me").score(["i5", "i6"]) == me.score(["i5", "i6"])
    frame = pd.DataFrame({"item": ["i2"], "rating": [4], "review": ["I hated it"]})
    assert found.adapt(frame).score(["i5", "i6"]) != found.adapt({"i2": 4}).score(["i5", "i6"])


def test_reviews_that_say_nothing_change_no_rating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = reviewed(shop(own_tastes()), 3)
    shuffled = np.random.default_rng(0).permutation(world.orders["text"])
    noise = replace(world, orders=world.orders.assign(text=shuffled))
    head = effects(fitted(noise, tmp_path, monkeypatch, NEW_USERS, review="text")).effects.reviews
    assert head is None or head.share == 0


def test_a_review_without_a_head_is_no_rating(plain: MetaRecommender) -> None:
    with pytest.raises(RatingError, match="not a number"):
        plain.adapt({"i0": "I loved it"})


def test_what_people_wrote_stands_in_the_in_context_prompt() -> None:
    template = PromptTemplate("{{ title }} :", " yes", " no")
    catalog = Catalog(("a", "b"), {"title": ("Alien", "Heat")})
    side = Side(reviews=np.array(["too\nloud", ""], object))
    support = Ratings(np.array([0, 1]), np.array([1.0, 5.0], np.float32), side=side)
    text = History(template, catalog, 3.5).text(support, ())
    assert "Alien : no (too loud)" in text
    assert "Heat : yes\n" in text


def test_what_is_known_of_a_user_and_of_the_moment_stands_in_the_in_context_prompt(
    model_dir: Callable[[str], Path],
) -> None:
    template = PromptTemplate("{{ title }} :", " yes", " no")
    catalog = Catalog(("a", "b", "c"), {"title": ("Alien", "Heat", "Up")})
    reader = InContext(load_backbone(str(model_dir("llama"))), History(template, catalog, 3.5))
    texts = lambda *words: np.array(words, object)  # noqa: E731
    ratings = Ratings(np.array([0, 1]), np.array([1.0, 5.0], np.float32))

    def prompt(support: Ratings, candidate: int) -> str:
        return reader.prompt_text(Request("", support, np.array([2, 0])), candidate)

    side = Side(
        {"about": "I read\non trains.", "age": "30", "town": ""},
        rated={"device": texts("phone", "")},
        asked={"device": texts("desk", "phone"), "hour": texts("20")},
    )
    known = replace(ratings, side=side)
    assert prompt(known, 2).startswith("About the person: I read on trains; age: 30.\n\n")
    assert "Alien : no (device: phone)\n\n" in prompt(known, 2)
    assert "Heat : yes\n\n" in prompt(known, 2)
    assert prompt(known, 2).endswith("Now: device: desk; hour: 20.\n\nUp :")
    assert prompt(known, 0).endswith("Now: device: phone; hour: 20.\n\nAlien :")
    nobody = replace(ratings, side=Side({"age": ""}, rated={"device": texts("", "")}, asked={"device": texts("")}))
    assert prompt(nobody, 2) == prompt(ratings, 2)
    before_ratings = replace(Ratings.empty(), side=Side({"age": "30"}))
    assert prompt(before_ratings, 2) == "About the person: age: 30.\n\nUp :"
    listed = Listwise(reader.backbone, reader.history)
    one_moment = replace(known, side=side.asking({"device": texts("desk", "phone"), "hour": texts("20", "20")}))
    text = listed.prompt_text(Request("", one_moment, np.array([2, 0])), 2)
    assert text.startswith("About the person: I read on trains")
    assert "Now: hour: 20.\n\nWhich one" in text


def test_a_graph_network_ranks_by_friends_before_any_rating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(7)
    rows = [
        f"u{one},u{other}" for one in range(USERS) for other in generator.choice(np.flatnonzero(GROUP[one] == GROUP), 4)
    ]
    (tmp_path / "friends.csv").write_text("\n".join(["user,friend", *rows]) + "\n")
    world = shop(BY_GROUP)
    data = load_own(
        world.orders, {"items": world.items, "label": "rating >= 4", **NEW_USERS, "friends": "friends.csv"}, 0
    )
    train = data.parts["train"]
    prior = fit_item_mean(data.interactions, train)
    network = fit_graph_network(
        data.interactions,
        train,
        prior,
        np.zeros((ITEMS, 1)),
        validation=data.episodes("validation")[0],
        threshold=4.0,
        seed=0,
        steps=50,
    )
    episodes = data.episodes("test")[0]
    alone = [replace(episode, support=replace(episode.support, side=None)) for episode in episodes]
    assert validation_auc(network, episodes, [0], 4.0) > validation_auc(network, alone, [0], 4.0) + 0.08


@pytest.mark.parametrize("form", ["melu", "neural process"])
def test_a_network_ranks_by_fields_of_users_before_any_rating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form
) -> None:
    """A field that carries all taste is found; one that carries none is no input."""
    monkeypatch.chdir(tmp_path)
    world = shop(BY_GROUP)
    kinds = np.eye(KINDS)[world.kind]

    def data(group: np.ndarray) -> TaskData:
        choices = {"items": world.items, "label": "rating >= 4", **NEW_USERS, "users": users_file(tmp_path, group)}
        return load_own(world.orders, choices, 0)

    def inputs(data: TaskData) -> SideInputs | None:
        train = data.parts["train"]
        effects = fit_effects(data.interactions, train, Features({"kind": kinds}, kinds), threshold=4.0, seed=0)
        return side_inputs(effects, data.interactions, train)

    informed = data(GROUP)
    train, prior = informed.parts["train"], fit_item_mean(informed.interactions, informed.parts["train"])
    aucs = []
    for side in (None, inputs(informed)):
        network = fit_network(
            form,
            informed.interactions,
            train,
            prior,
            kinds,
            validation=informed.episodes("validation")[0],
            threshold=4.0,
            side=side,
            steps=50,
            lr=3e-3,
            shots=(5,),
        )
        aucs.append(validation_auc(network, informed.episodes("test")[0], [0], 4.0))
    assert aucs[1] > aucs[0] + 0.08
    assert inputs(data(np.random.default_rng(7).permutation(GROUP))) is None


def test_a_person_asked_about_the_whole_catalog_is_asked_in_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = shop(np.tile([1.0, 1.0, -1.0, -1.0], (USERS, 1)), flipped=np.ones(1))
    found = fitted(world, tmp_path, monkeypatch, NEW_USERS, context=["device"])
    data = reload_own(world.orders, found.fitted.task, 0, world.items)
    episodes, facts = data.evaluated("test")[0][:6], catalog_facts(data)
    scorer = found.scorer()
    for episode, best in zip(episodes, best_lists(scorer, episodes, 0, 5, facts, 0), strict=True):
        assert episode.support.side is not None
        device = episode.support.side.asked["device"][0]
        me = found.adapt([], context={"device": device})
        assert {entry.item for entry in me.recommend(5)} == {data.interactions.catalog.ids[code] for code in best}


def test_a_disturbance_leaves_what_else_is_known_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    users_file(tmp_path, GROUP)
    (tmp_path / "friends.csv").write_text("user,friend\nu1,u2\n")
    world = reviewed(shop(own_tastes()), 3)
    files = {"users": "users.csv", "friends": "friends.csv", "context": ["device"], "review": "text"}
    vectors = write_vectors(tmp_path / "covers.npz", np.eye(ITEMS, dtype=np.float32))
    choices = {"items": world.items, "label": "rating >= 4", "vectors": {"cover": vectors}, **NEW_USERS, **files}
    data = load_own(world.orders, choices, 0)
    whole = data.interactions
    attacked = with_profiles(data, np.array([3, 4, 5, 6]), 2, 0).interactions
    more = len(attacked) - len(whole)
    assert attacked.side.about["group"].tolist() == [*whole.side.about["group"], "", ""]
    assert attacked.side.friends == (*whole.side.friends, (), ())
    assert attacked.side.moments["device"][:-more].tolist() == whole.side.moments["device"].tolist()
    assert set(attacked.side.moments["device"][-more:]) == {"phone", "desk"}
    assert attacked.side.reviews is not None
    assert len(attacked.side.reviews) == len(attacked)
    assert attacked.item_vectors["cover"] is whole.item_vectors["cover"]
    few = most_rated(data, 30).interactions
    assert few.item_vectors["cover"].argmax(1).tolist() == [int(item[1:]) for item in few.catalog.ids]
    support = data.evaluated("test")[0][0].support
    assert flipped(support, 1.0, whole.scale, np.random.default_rng(0)).side is support.side


def test_a_value_that_meta_training_did_not_see_is_named(
    informed: MetaRecommender, caplog: pytest.LogCaptureFixture
) -> None:
    known = informed.adapt({}, about={"group": "a"}).score(["i0", "i1"])
    assert not caplog.records
    unknown = informed.adapt({}, about={"group": "aa"}).score(["i0", "i1"])
    assert "nothing is known of group 'aa'. Known: 'a', 'b', 'c'" in caplog.text
    assert unknown != known
    assert unknown == informed.adapt({}).score(["i0", "i1"])


def test_a_field_that_training_left_out_is_named_once_where_it_is_given(
    informed: MetaRecommender, caplog: pytest.LogCaptureFixture
) -> None:
    me = informed.adapt({"i30": 5}, about={"shoe": 40, "group": "zz"})
    assert caplog.messages == [
        "nothing is known of group 'zz'. Known: 'a', 'b', 'c'",
        "no effects follow from shoe: training left them out",
    ]
    assert me.support.side.about == {"shoe": "40", "group": "zz"}  # type: ignore[union-attr]
