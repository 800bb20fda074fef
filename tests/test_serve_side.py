"""What the service takes beside ratings: kept with the user, used in every ranking, named where it is not read."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_shop import PLAIN, by_group, reviewed, shop, write_friends

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
from starlette.testclient import TestClient

from metarec.cli.options import side_options
from metarec.cli.store import recommend_stored
from metarec.config import RunConfig, validated
from metarec.data.source_options import SourceOptions
from metarec.data.sources.store import store as store_tables
from metarec.errors import MetarecError
from metarec.files.run_directory import RUN_MODEL
from metarec.recommender import MetaRecommender
from metarec.serve.app import create_app
from metarec.serve.bulk import adapt_users, read_feedback
from metarec.serve.engine import Engine
from metarec.serve.records import Beside, Feedback, UserFacts
from metarec.serve.service import ServeSettings
from metarec.serve.store import AdapterStore

TASK: dict[str, Any] = {"split": {"fractions": [0.6, 0.2, 0.2]}, "shots": [0, 5], "query": {"max": 10, "min": 3}}
RATED = {"i0": 5.0, "i1": 1.0, "i2": 4.0}
ASKED = [f"i{code}" for code in range(10, 30)]
SECRET = "I keep dogs in Katzhuette"


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> MetaRecommender:
    """Fitted to a shop where groups of users share a taste, and the device moves every rating."""
    folder = tmp_path_factory.mktemp("known")
    group, tastes = by_group(0)
    world = reviewed(shop(tastes), 3)
    kind = world.kind[world.orders["item"].str[1:].astype(int)]
    moved = np.where(world.orders["device"] == "phone", 1.0, -1.0) * np.where(kind < 2, 1.0, -1.0)
    orders = world.orders.assign(rating=np.clip(world.orders["rating"] + np.round(moved), 1, 5))
    # Of every third user the group is known, of every third a sentence, of the others friends alone.
    words = ("cats", "dogs", "birds")
    rows = [
        f"u{user},{'abc'[code] if user % 3 == 0 else ''},{f'I keep {words[code]}' if user % 3 == 1 else ''}"
        for user, code in enumerate(group)
    ]
    (folder / "users.csv").write_text("\n".join(["user,group,about", *rows]) + "\n")
    files = {"users": "users.csv", "friends": write_friends(folder / "friends.csv", group)}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        found = MetaRecommender.from_pretrained("smollm2-135m-instruct", validated(RunConfig, PLAIN, "test"))
        return found.fit(
            orders, items=world.items, label="rating >= 4", context=["device"], review="text", **TASK, **files
        )


@pytest.fixture
def start(known: MetaRecommender, tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    clients = []

    def make(recommender: MetaRecommender = known, **options: Any) -> TestClient:
        engine = Engine(recommender, AdapterStore(tmp_path / "store"), **options)
        client = TestClient(create_app(engine), "http://localhost", False)
        clients.append(client.__enter__())
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)


def test_the_page_asks_for_what_the_recommender_reads_and_keeps_the_answer(
    known: MetaRecommender, tmp_path: Path
) -> None:
    engine = Engine(known, AdapterStore(tmp_path / "store"))
    with TestClient(create_app(engine, ServeSettings(ui=True)), "http://localhost", False) as client:
        page = client.get("/").text
        assert "In a sentence" in page
        assert "<option>a</option>" in page
        said = client.post("/ui/about", data={"group": "a", "about": ""}, headers={"Metarec-Parts": "1"})
        assert "What you said of yourself is used." in said.text
        assert "Your ranking" in said.text
        assert "<option selected>a</option>" in client.get("/").text
        visitor = client.cookies["metarec_visitor"]
        assert client.get(f"/v1/users/{visitor}").json()["about"]["group"] == "a"
        refused = client.post("/ui/about", data={"shoe size": "9"}, headers={"Metarec-Parts": "1"})
        assert "no field of a user" in refused.json()["error"]["message"]


@pytest.fixture
def client(start: Callable[..., TestClient]) -> TestClient:
    return start()


def say(client: TestClient, user: str = "ann", **said: Any) -> Any:
    answer = client.post(f"/v1/users/{user}/feedback", json=said)
    assert answer.status_code == 200, answer.text
    return answer.json()


def scores(client: TestClient, user: str = "ann", **asked: Any) -> list[float]:
    answer = client.post(f"/v1/users/{user}/score", json={"items": ASKED, **asked})
    assert answer.status_code == 200, answer.text
    found: list[float] = answer.json()["scores"]
    return found


def ratings() -> list[dict[str, Any]]:
    return [{"item": item, "rating": rating} for item, rating in RATED.items()]


def test_what_is_said_of_a_user_ranks_as_it_does_in_python(client: TestClient, known: MetaRecommender) -> None:
    said = say(client, ratings=ratings(), about={"group": "b"}, friends=["u3", "u9"])
    assert said["accepted"] == 3
    assert said["unknown"] == []
    me = known.adapt(sorted(RATED.items()), about={"group": "b"}, friends=["u3", "u9"])
    np.testing.assert_allclose(scores(client), me.score(ASKED), atol=1e-5)
    assert scores(client) != scores(client, "bob")
    phone = client.get("/v1/users/ann/recommendations", params={"k": 5, "context": "device=phone"}).json()
    assert [entry["item"] for entry in phone["items"]] == [entry.item for entry in me.at(device="phone").recommend(5)]
    np.testing.assert_allclose(scores(client, context={"device": "desk"}), me.at(device="desk").score(ASKED), atol=1e-5)


def test_a_user_is_known_before_any_rating(client: TestClient, known: MetaRecommender) -> None:
    assert say(client, about="I keep dogs")["adapter"] == {
        "version": 1,
        "ratings": 0,
        "diverged": False,
        "stale": False,
    }
    np.testing.assert_allclose(scores(client), known.adapt({}, about="I keep dogs").score(ASKED), atol=1e-5)
    np.testing.assert_allclose(
        scores(client, "bob", friends=["u3"]), known.adapt({}, friends=["u3"]).score(ASKED), atol=1e-5
    )


def test_a_large_catalog_is_ranked_by_what_is_known_of_a_user(
    start: Callable[..., TestClient], known: MetaRecommender
) -> None:
    """Candidates are chosen by approximate scores, of a user without ratings too."""
    client = start(candidates=32)
    found = client.get("/v1/users/bob/recommendations", params={"k": 8, "about": "group=c"}).json()
    best = [entry.item for entry in known.adapt({}, about={"group": "c"}).recommend(8)]
    assert [entry["item"] for entry in found["items"]] == best


def test_what_one_question_says_is_not_kept(client: TestClient, known: MetaRecommender) -> None:
    say(client, ratings=ratings(), about={"group": "b"})
    before = scores(client)
    once = scores(client, about={"group": "a"})
    assert once != before
    np.testing.assert_allclose(once, known.adapt(sorted(RATED.items()), about={"group": "a"}).score(ASKED), atol=1e-5)
    assert scores(client) == before


def test_a_search_takes_the_moment_of_the_user_it_names(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, searched = client.app.state.service.engine, []  # type: ignore[attr-defined]
    monkeypatch.setattr(engine, "search", lambda q, k, person: searched.append(person) or [])
    client.get("/v1/search", params={"q": "thing", "user": "ann", "context": "device=phone"})
    assert searched[0].adapted.support.side.asked["device"].tolist() == ["phone"]
    assert client.get("/v1/search", params={"q": "thing", "context": "device=phone"}).status_code == 422


def test_the_command_line_ranks_for_a_stored_user_in_a_moment(known: MetaRecommender, tmp_path: Path) -> None:
    AdapterStore(tmp_path / "store").append([Feedback("ann", (("i0", 5.0),), about={"group": "b"})])
    found = recommend_stored(known, str(tmp_path / "store"), None, "ann", 5, False, {"device": "phone"})
    me = known.adapt({"i0": 5}, about={"group": "b"}, context={"device": "phone"})
    assert [entry["item"] for entry in found["items"]] == [entry.item for entry in me.recommend(5)]


def test_moments_and_reviews_stay_beside_their_ratings(client: TestClient, known: MetaRecommender) -> None:
    """A rating that a moment explains says less of the person."""
    say(client, "ann", item="i0", rating=5, context={"device": "phone"}, review="I hated it")
    say(client, "bob", item="i0", rating=5)
    assert scores(client, "ann") != scores(client, "bob")
    engine = client.app.state.service.engine  # type: ignore[attr-defined]
    support = engine.people(["ann"])["ann"].adapted.support
    assert {name: list(column) for name, column in support.side.rated.items()} == {"device": ["phone"]}
    bare = replace(support.side, rated={})
    assert engine.adapt([replace(support, side=bare)])[0][0].score(ASKED) != scores(client, "ann")
    held = client.get("/v1/users/ann").json()["ratings"][0]
    assert (held["context"], held["review"]) == ({"device": "phone"}, "I hated it")


def test_a_review_without_a_rating_is_read_as_one(client: TestClient, known: MetaRecommender) -> None:
    said = say(client, ratings=[*ratings(), {"item": "i9", "review": "I hated it"}])
    given = {**RATED, "i9": "I hated it"}
    me = known.adapt(sorted(given.items()))
    np.testing.assert_allclose(scores(client), me.score(ASKED), atol=1e-5)
    assert scores(client) != known.adapt(sorted(RATED.items())).score(ASKED)
    assert said["read"] == {"i9": pytest.approx(me.support.values[-1], abs=0.01)}
    assert said["read"]["i9"] < 2.5
    held = client.get("/v1/users/ann").json()["ratings"]
    assert [(event["review"], event["read"]) for event in held] == [("", False)] * 3 + [("I hated it", True)]


def test_a_review_without_a_rating_is_sent_twice_and_erased_as_a_rating_is(
    client: TestClient, start: Callable[..., TestClient], tmp_path: Path
) -> None:
    body = {"item": "i9", "review": "I hated it Schnabeltier"}
    for replayed in (False, True):
        answer = client.post("/v1/users/ann/feedback", json=body, headers={"Idempotency-Key": "1"}).json()
        assert answer["replayed"] is replayed
    before = scores(client)
    for path in (tmp_path / "store" / "adapters").glob("*/*/adapter*"):
        path.write_bytes(b"damaged")
    assert scores(start()) == before
    assert client.post("/v1/users/ann/feedback", json={"item": "i9", "review": " "}).status_code == 422
    assert "neither" not in (error := client.post("/v1/users/a/feedback", json={"item": "i9"}).json()["error"])["cure"]
    assert error["message"] == "'rating' of the body is missing"
    assert client.delete("/v1/users/ann").status_code == 200
    found = subprocess.run(["grep", "-ral", "Schnabeltier", tmp_path / "store"], capture_output=True, check=False)
    assert found.stdout == b""


def test_a_review_without_a_rating_is_no_label_of_the_next_training(client: TestClient, tmp_path: Path) -> None:
    say(client, ratings=[{**ratings()[0], "review": "good", "context": {"device": "phone"}}])
    say(client, item="i9", review="I hated it")
    client.app.state.service.engine.trained.save_pretrained(tmp_path / "run" / RUN_MODEL)  # type: ignore[attr-defined]
    options = SourceOptions(items=str(tmp_path / "run"), context=("device",), review="review")
    found = store_tables(tmp_path / "store", options).ratings
    assert found[["user", "item", "device", "review"]].to_numpy().tolist() == [["ann", "i0", "phone", "good"]]


def test_what_is_said_survives_a_restart_and_a_lost_adapter(start: Callable[..., TestClient], tmp_path: Path) -> None:
    first = start()
    say(first, ratings=[{**ratings()[0], "context": {"device": "phone"}, "review": "I loved it"}], about={"group": "b"})
    before = scores(first)
    assert scores(start()) == before
    for path in (tmp_path / "store" / "adapters").glob("*/*/adapter*"):
        path.write_bytes(b"damaged")
    assert scores(start()) == before


def test_what_is_said_again_changes_only_what_it_names(client: TestClient) -> None:
    say(client, about={"group": "b"}, friends=["u3"])
    again = say(client, about={"group": "b"}, ratings=ratings())
    assert again["adapter"]["version"] == 1 + 3  # the same words again are nothing new
    say(client, friends=[])
    held = client.get("/v1/users/ann").json()
    assert (held["about"], held["friends"], held["version"]) == ({"group": "b"}, [], 5)


def test_an_idempotency_key_covers_what_is_said_beside_ratings(client: TestClient) -> None:
    def send(**said: Any) -> int:
        headers = {"Idempotency-Key": "1"}
        return client.post("/v1/users/ann/feedback", json={"ratings": ratings(), **said}, headers=headers).status_code

    assert send(about={"group": "b"}) == 200
    assert send(about={"group": "b"}) == 200
    assert send(about={"group": "a"}) == 409
    assert client.get("/v1/users/ann").json()["version"] == 4


@pytest.mark.parametrize(
    ("said", "problem", "cure"),
    [
        ({"about": {"grup": "a"}}, "'grup' is no field of a user", "Did you mean 'group'?"),
        ({"item": "i0", "rating": 5, "context": {"devise": "x"}}, "'devise' is no field of a moment", "'device'"),
        ({"about": 5}, "'about' of the body is a number", "dictionary"),
        ({"about": {"group": [1]}}, "'about.group' of the body is a list", "string"),
        ({"friends": "u1"}, "'friends' of the body is a text", "list"),
        ({"friends": ["a\nb"]}, "the id of a friend holds control characters", "printable"),
    ],
)
def test_what_is_not_read_is_refused_and_nothing_of_it_is_kept(
    client: TestClient, said: dict[str, Any], problem: str, cure: str
) -> None:
    answer = client.post("/v1/users/ann/feedback", json=said)
    assert answer.status_code == 422
    assert problem in answer.json()["error"]["message"]
    assert cure in answer.json()["error"]["cure"]
    assert client.get("/v1/users/ann").status_code == 404


@pytest.mark.parametrize("query", [{"context": "devise=x"}, {"context": "device"}, {"about": "grup=a"}])
def test_a_question_that_is_not_understood_is_refused(client: TestClient, query: dict[str, str]) -> None:
    assert client.get("/v1/users/ann/recommendations", params=query).status_code == 422


def test_values_that_meta_training_did_not_see_are_named_to_the_client_alone(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        said = say(client, about={"group": "zz"}, friends=["Katzhuette"])
        asked = client.get("/v1/users/ann/recommendations", params={"context": "device=Katzhuette"}).json()
    assert [text.partition(".")[0] for text in said["unknown"]] == [
        "nothing is known of group 'zz'",
        "none of 1 friends is among the users that it was fitted on",
    ]
    assert "nothing is known of device 'Katzhuette'. Known: 'desk', 'phone'" in asked["unknown"]
    logged = str([vars(record) for record in caplog.records if record.name.startswith("metarec")])
    assert "recommendations" in logged
    assert "Katzhuette" not in logged
    assert "zz" not in logged


BULK = """user,item,rating,device,text,shop
ann,i0,5,phone,,north
ann,i1,1,,"awful,
I hated it",north
ann,i9,,,I hated it,north
bob,i0,I loved it,,,south
"""


def test_many_users_are_adapted_with_what_is_known_of_each(
    known: MetaRecommender, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "feedback.csv").write_text(BULK)
    (tmp_path / "people.csv").write_text("user,group,shoe\nann,b,43\neve,c,40\n")
    (tmp_path / "friends.csv").write_text("user,friend\nu3,bob\neve,u4\n")
    options = SourceOptions(users="people.csv", friends="friends.csv", context=("device",), review="text")
    engine = Engine(known, AdapterStore(tmp_path / "store"))
    users = read_feedback(tmp_path / "feedback.csv", engine, options)
    assert (adapt_users(engine, users).adapted, adapt_users(engine, users).ratings) == (3, 0)
    found = engine.people(["ann", "bob", "eve"])
    me = known.adapt([("i0", 5), ("i1", 1, "awful,\nI hated it"), ("i9", "I hated it")], about={"group": "b"})
    support = found["ann"].adapted.support
    assert (support.side.about, list(support.side.rated["device"])) == ({"group": "b"}, ["phone", "", ""])  # type: ignore[union-attr]
    np.testing.assert_allclose(support.values, me.support.values)
    bob = known.adapt({"i0": "I loved it"}, friends=["u3"])
    np.testing.assert_allclose(found["bob"].adapted.score(ASKED), bob.score(ASKED), atol=1e-5)
    eve = known.adapt([], about={"group": "c"}, friends=["u4"])
    np.testing.assert_allclose(found["eve"].adapted.score(ASKED), eve.score(ASKED), atol=1e-5)
    assert "feedback.csv' that nothing reads: 'shop'" in caplog.text
    assert "people.csv' that nothing reads: 'shoe'" in caplog.text


def test_people_without_a_rating_are_adapted_to_what_else_is_known_of_them(
    known: MetaRecommender, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "feedback.csv").write_text("user,item,rating\n")
    (tmp_path / "people.csv").write_text("user,group,about\nann,b,\nbob,,\nu0,a,\n")
    (tmp_path / "friends.csv").write_text("user,friend\nu3,cat\ndan,cat\nu3,u9\n")
    options = SourceOptions(users="people.csv", friends="friends.csv")
    engine = Engine(known, AdapterStore(tmp_path / "store"))
    users = read_feedback(tmp_path / "feedback.csv", engine, options)
    # Of bob nothing is known, dan's friend is nobody that meta-training saw, u0, u3 and u9 have ratings of their own.
    assert {user: (said.ratings, said.about, said.friends) for user, said in users.items()} == {
        "ann": ((), {"group": "b"}, None),
        "cat": ((), None, ("u3", "dan")),
    }
    assert "2 users without ratings are adapted to what else is known of them" in caplog.text
    assert "3 users without ratings here are left out: it was fitted on theirs" in caplog.text
    assert adapt_users(engine, users).adapted == 2
    me = known.adapt([], friends=["u3", "dan"])
    np.testing.assert_allclose(engine.people(["cat"])["cat"].adapted.score(ASKED), me.score(ASKED), atol=1e-5)
    (tmp_path / "people.csv").write_text("user,group\nu0,a\n")
    with pytest.raises(MetarecError, match="tell nothing of anybody"):
        read_feedback(tmp_path / "feedback.csv", engine, SourceOptions(users="people.csv"))


@pytest.fixture(scope="module")
def weekly() -> MetaRecommender:
    """Fitted to a shop where the weekday, read off timestamps, turns everybody's taste around."""
    world = shop(np.tile(np.resize([1.0, -1.0], 4), (240, 1)))
    weekday = pd.to_datetime(world.orders["timestamp"], unit="s").dt.day_of_week
    sign = np.where(weekday < 3, 1.0, -1.0)
    orders = world.orders.assign(rating=3 + sign * (world.orders["rating"] - 3)).drop(columns="device")
    found = MetaRecommender.from_pretrained("smollm2-135m-instruct", validated(RunConfig, PLAIN, "test"))
    return found.fit(orders, items=world.items, label="rating >= 4", context=["weekday"], **TASK)


def test_moments_are_read_off_timestamps_of_many_users_as_off_those_of_training(
    weekly: MetaRecommender, tmp_path: Path
) -> None:
    engine = Engine(weekly, AdapterStore(tmp_path / "store"))
    written = {
        "named": "user,item,rating,weekday\nann,i0,5,Monday\nann,i1,1,\nann,i2,5,Friday\n",
        "dates": "user,item,rating,Date\nann,i0,5,2024-01-01 20:00\nann,i1,1,\nann,i2,5,2024-01-05\n",
        "seconds": "user;item;rating;timestamp\nann;i0;5;1704139200\nann;i1;1;\nann;i2;5;1704412800\n",
        "none": "user,item,rating,weekday\nann,i0,5,\nann,i1,1,\nann,i2,5,\n",
    }
    read = {}
    for name, text in written.items():
        (tmp_path / f"{name}.csv").write_text(text)
        read[name] = read_feedback(tmp_path / f"{name}.csv", engine, SourceOptions(context=("weekday",)))["ann"]
    assert read["named"] == read["dates"] == read["seconds"]
    assert [beside.context for beside in read["named"].beside] == [{"weekday": "Monday"}, {}, {"weekday": "Friday"}]
    scores = {}
    for name in ("dates", "none"):
        users = {name: replace(read[name], user=name)}
        adapt_users(engine, users)
        scores[name] = engine.people([name])[name].adapted.at(weekday="Monday").score(ASKED)
    assert np.abs(np.subtract(scores["dates"], scores["none"])).max() > 0.01


def test_a_file_of_many_users_without_moments_or_with_false_timestamps_is_refused(
    weekly: MetaRecommender, tmp_path: Path
) -> None:
    engine, file = Engine(weekly, AdapterStore(tmp_path / "store")), tmp_path / "feedback.csv"
    options = SourceOptions(context=("weekday",))
    file.write_text("user,item,rating\nann,i0,5\n")
    with pytest.raises(MetarecError, match="no column 'weekday'") as refused:
        read_feedback(file, engine, options)
    assert "'weekday' may be read off a column 'timestamp'" in str(refused.value)
    file.write_text("user,item,rating,timestamp\nann,i0,5,soon\n")
    with pytest.raises(MetarecError, match="row 2: timestamp 'soon' is neither a number nor a date"):
        read_feedback(file, engine, options)


def test_a_store_reads_moments_off_the_time_of_ratings_that_came_without_one(
    weekly: MetaRecommender, tmp_path: Path
) -> None:
    store = AdapterStore(tmp_path / "store")
    store.append([Feedback("ann", (("i0", 5.0), ("i1", 1.0)), beside=(Beside({"weekday": "Noday"}), Beside()))])
    weekly.save_pretrained(tmp_path / "run" / RUN_MODEL)
    options = SourceOptions(items=str(tmp_path / "run"), context=("weekday",))
    today = pd.to_datetime(store.events("ann")[1].at, unit="s").day_name()
    assert store_tables(tmp_path / "store", options).ratings["weekday"].tolist() == ["Noday", today]


@pytest.mark.parametrize(
    ("side", "problem"),
    [
        (["context=mood"], "'mood' is no field of a moment"),
        (["context=device"], "has no column 'device'"),
        (["vectors.cover=covers.npz"], "vectors and graphs are of items"),
        (["vectors=covers.npz"], "does not name the vectors"),
        (["users=people.csv"], "has no field of users that the recommender knows"),
        (["users=nobody.csv"], "names no user of the ratings"),
        (["friends=edges.csv"], "does not exist"),
    ],
)
def test_what_is_known_of_many_users_and_cannot_be_meant_is_refused(
    known: MetaRecommender, tmp_path: Path, side: list[str], problem: str
) -> None:
    (tmp_path / "feedback.csv").write_text("user,item,rating\nann,i0,5\n")
    (tmp_path / "people.csv").write_text("user,mail\nann,a@b\n")
    (tmp_path / "nobody.csv").write_text("user,group\neve,c\n")
    engine = Engine(known, AdapterStore(tmp_path / "store"))
    with pytest.raises(MetarecError, match=problem):
        read_feedback(tmp_path / "feedback.csv", engine, side_options(side))


def test_a_recommender_without_side_information_says_so(
    start: Callable[..., TestClient], known: MetaRecommender
) -> None:
    terms = {name: term for name, term in known.fitted.terms.items() if name != "side information"}
    plain = MetaRecommender(None, known.config, replace(known.fitted, terms=terms))
    client = start(plain)
    for said in ({"about": "I keep dogs"}, {"friends": ["u1"]}, {**ratings()[0], "context": {"device": "x"}}):
        answer = client.post("/v1/users/ann/feedback", json=said)
        assert answer.status_code == 422
        assert "reads no side information" in answer.json()["error"]["message"]
    answer = client.post("/v1/users/ann/feedback", json={**ratings()[0], "review": "good"})
    assert "reads no reviews" in answer.json()["error"]["message"]


def test_what_was_kept_and_is_not_read_any_more_is_left_alone(
    start: Callable[..., TestClient], known: MetaRecommender
) -> None:
    client = start()
    client.app.state.service.engine.store.append(  # type: ignore[attr-defined]
        [Feedback("ann", (("i0", 5.0),), beside=(Beside({"mood": "x"}, ""),), about={"town": "y"})]
    )
    np.testing.assert_allclose(scores(client), known.adapt({"i0": 5}).score(ASKED), atol=1e-5)


def test_an_erased_user_leaves_nothing_that_was_said_of_them(client: TestClient, tmp_path: Path) -> None:
    say(
        client,
        "ann",
        ratings=[{**ratings()[0], "review": "a rare Schnabeltier"}],
        about={"about": SECRET},
        friends=["friend-of-ann"],
    )
    say(client, "bob", ratings=ratings(), friends=["ann-herself", "u3"])
    say(client, "ann-herself", ratings=ratings())
    held = client.get("/v1/users/ann").json()
    assert (held["about"], held["friends"]) == ({"about": SECRET}, ["friend-of-ann"])
    assert client.delete("/v1/users/ann").status_code == client.delete("/v1/users/ann-herself").status_code == 200
    assert client.get("/v1/users/bob").json()["friends"] == ["u3"]
    found = subprocess.run(
        [
            "grep",
            "-ral",
            "-e",
            "Katzhuette",
            "-e",
            "Schnabeltier",
            "-e",
            "of-ann",
            "-e",
            "ann-herself",
            tmp_path / "store",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == ""
    assert client.get("/v1/users/bob").json()["version"] == 5  # they are adapted again


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_both_databases_keep_what_is_said(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    location = tmp_path / "store" if kind == "sqlite" else request.getfixturevalue("postgres")
    store = AdapterStore(location, tmp_path / "adapters")
    try:
        for user in ("eve", "fay"):
            store.erase(user)
        said = Feedback(
            "eve", (("m1", 5.0), ("m2", 1.0)), None, (Beside({"device": "\0"}), Beside()), {"a": "\ud800"}, ("fay", "b")
        )
        assert store.append([said])[0].version == 3  # type: ignore[union-attr]
        assert store.facts("eve") == UserFacts({"a": "\ud800"}, ("b", "fay"))
        assert [event.context for event in store.events("eve")] == [{"device": "\0"}, {}]
        store.append([Feedback("fay", (("m1", 5.0),))])
        assert store.erase("fay") == [True]
        profile = store.profile("eve")
        assert profile is not None
        assert (profile.version, store.facts("eve").friends) == (4, ("b",))
        assert dict(store.users())["eve"] == profile
        assert json.dumps(store.export("eve"))
    finally:
        store.close()
