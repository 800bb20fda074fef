"""What the service computes: isolated users, cold items, honest fallbacks, reasons."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import LOVES_DRAMA, LOVES_HORROR, small_recommender
from small_recommenders import SETTINGS, known_task

from metarec.adapted_user import AdaptedUser
from metarec.config import RunConfig, validated
from metarec.data.interactions import Ratings
from metarec.errors import ConfigError, ConflictError, UnknownItemError
from metarec.lm.answer_model import AnswerModel
from metarec.lm.cached_forward import CachedForward
from metarec.lm.forward import ItemBatch
from metarec.recommender import MetaRecommender
from metarec.scorers.language.adapted import MetaScorer
from metarec.serve import batching, retrieval
from metarec.serve.bulk import adapt_users, bulk_feedback
from metarec.serve.engine import Engine
from metarec.serve.items import ExtendedAnswerModel
from metarec.serve.person import Person
from metarec.serve.rankings import Ranking
from metarec.serve.records import Feedback
from metarec.serve.store import AdapterStore

NEW = ("n1", {"title": "night war of love", "genres": "drama"})


@pytest.fixture(scope="session")
def recommender(model_dir: Callable[[str], Path]) -> MetaRecommender:
    return small_recommender(model_dir("llama"))


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def engine(recommender: MetaRecommender, store: AdapterStore) -> Engine:
    return Engine(recommender, store)


def rate(engine: Engine, user: str, ratings: tuple[tuple[str, float], ...]) -> Person:
    engine.store.append([Feedback(user, ratings)])
    return engine.people([user])[user]


def bytes_per_item(recommender: MetaRecommender) -> int:
    """What an engine keeps of an item for the first step."""
    meta = recommender.fitted.meta
    return 4 * sum(value.numel() for name, value in meta.init.items() if name in meta.log_rate)


def all_scores(engine: Engine, person: Person) -> list[float]:
    return engine.score(person, [f"m{code}" for code in range(40)])[1]


def test_the_served_adapter_is_the_one_the_python_api_gives(engine: Engine, recommender: MetaRecommender) -> None:
    person = rate(engine, "ann", LOVES_DRAMA)
    expected = recommender.adapt(sorted(LOVES_DRAMA))
    np.testing.assert_allclose(all_scores(engine, person), expected.score([f"m{c}" for c in range(40)]), atol=1e-5)
    assert (person.version, person.latest, len(person.losses)) == (5, 5, 3)
    assert person.losses[-1] < person.losses[0]


@pytest.mark.parametrize("users_at_once", [1, 3])
@pytest.mark.parametrize("covered", [0, 6, 40])
def test_a_neighbours_feedback_erasure_or_adapter_never_changes_a_bit_of_yours(
    recommender: MetaRecommender, tmp_path: Path, users_at_once: int, covered: int
) -> None:
    """Whatever company users are adapted in, and of however many items the first step is known beforehand."""
    shape = {"users_at_once": users_at_once, "linearized_bytes": covered * bytes_per_item(recommender)}
    alone = Engine(recommender, AdapterStore(tmp_path / "alone"), **shape)
    mine = rate(alone, "me", LOVES_DRAMA)
    generator = np.random.default_rng(0)
    for crowd in (1, 3, 9):
        busy = Engine(recommender, AdapterStore(tmp_path / f"busy{crowd}"), **shape)
        for other in range(crowd):
            items = generator.choice(40, generator.integers(1, 9), replace=False)
            ratings = tuple((f"m{item}", float(generator.choice([1.0, 5.0]))) for item in items)
            busy.store.append([Feedback(f"other{other}", ratings)])
        busy.store.append([Feedback("me", LOVES_DRAMA)])
        names = [f"other{other}" for other in range(crowd)]
        names.insert(crowd // 2, "me")
        person = busy.people(names)["me"]
        for name, tensor in mine.adapted.state.items():
            assert torch.equal(tensor, person.adapted.state[name]), (crowd, name)
        busy.erase("other0")
        assert all_scores(busy, busy.people(["me"])["me"]) == all_scores(alone, mine)


def test_a_first_step_from_what_was_read_at_the_start_is_the_models_own(
    recommender: MetaRecommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Engine(recommender, AdapterStore(tmp_path / "plain"))
    quick = Engine(recommender, AdapterStore(tmp_path / "quick"), linearized_bytes=1 << 20)
    read = []
    last_states = CachedForward.last_states
    monkeypatch.setattr(CachedForward, "last_states", lambda *given: read.append(given) or last_states(*given))
    people = []
    for engine in (plain, quick):
        read.clear()
        people.append(rate(engine, "ann", LOVES_DRAMA))
        assert len(read) == (3 if engine is plain else 2)
    mine, theirs = people
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-5)
    # Adapters are kept in float16: a last bit of float32 may become a step of that.
    np.testing.assert_allclose(all_scores(quick, theirs), all_scores(plain, mine), atol=1e-3)
    # An item that came later is not known beforehand; then all steps ask the model.
    quick.add_items([NEW])
    read.clear()
    rate(quick, "ann", (("n1", 1.0),))
    assert len(read) == 6  # each step reads both the trained catalog's part and the added one's


def test_an_adapter_read_back_or_computed_again_is_the_same_to_the_last_bit(
    recommender: MetaRecommender, store: AdapterStore
) -> None:
    first = Engine(recommender, store)
    scores = all_scores(first, rate(first, "ann", LOVES_DRAMA))
    second = Engine(recommender, store)
    assert all_scores(second, second.people(["ann"])["ann"]) == scores
    assert second.counters.adapted == 0
    forgetful = Engine(recommender, store, hot_bytes=0)
    record = store.records(store.profile("ann").key)[0]  # type: ignore[union-attr]
    damaged = store.path(record) / "adapter_model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))
    assert all_scores(forgetful, forgetful.people(["ann"])["ann"]) == scores
    assert (forgetful.counters.damaged, forgetful.counters.adapted) == (1, 1)
    store.verify(store.records(record.key)[0])


def test_when_nothing_can_be_computed_the_last_good_version_is_served(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = all_scores(engine, rate(engine, "ann", LOVES_DRAMA))
    engine.hot.limit = 0
    engine.hot.drop(engine.store.profile("ann").key)  # type: ignore[union-attr]

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(MetaScorer, "adapt", fail)
    person = rate(engine, "ann", (("m9", 1.0),))
    assert person.facts() == {"version": 5, "ratings": 5, "diverged": False, "stale": True}
    assert all_scores(engine, person) == old
    assert rate(engine, "new", (("m9", 1.0),)).facts()["version"] == 0


def test_a_diverged_adaptation_serves_everybodys_adapter_and_says_so(
    engine: Engine, recommender: MetaRecommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt = MetaScorer.adapt
    monkeypatch.setattr(MetaScorer, "adapt", lambda self, *given: adapt(replace(self, rate_scale=1e30), *given))
    person = rate(engine, "ann", LOVES_DRAMA)
    assert person.facts()["diverged"]
    # The Gaussian process still knows what was rated: it takes no steps that could diverge.
    unadapted = replace(person.adapted, state=recommender.adapt([]).state)
    assert all_scores(engine, person) == unadapted.score([f"m{code}" for code in range(40)])
    assert engine.counters.diverged == 1


def test_scores_that_are_not_numbers_are_never_served(engine: Engine) -> None:
    person = rate(engine, "ann", LOVES_DRAMA)
    for tensor in person.adapted.state.values():
        tensor.fill_(math.nan)
    served, scores = engine.score(person, ["m1", "m2"])
    assert served.facts()["diverged"]
    unadapted = replace(person.adapted, state=engine.new_user.state)
    assert scores == pytest.approx(unadapted.score(["m1", "m2"]), abs=1e-5)
    served, ranked = engine.recommend(person, 3)
    assert served.facts()["diverged"]
    assert len(ranked) == 3


def test_a_ranking_is_the_python_apis(engine: Engine, recommender: MetaRecommender) -> None:
    person = rate(engine, "ann", LOVES_DRAMA)
    _, ranked = engine.recommend(person, 10)
    assert [entry.item for entry, _ in ranked] == [
        entry.item for entry in recommender.adapt(sorted(LOVES_DRAMA)).recommend(10)
    ]
    assert {"m0", "m1"} <= {entry.item for entry, _ in engine.recommend(person, 40, exclude_seen=False)[1]}
    assert len(engine.recommend(person, 1000)[1]) == 35


def test_of_a_large_catalog_the_service_reads_what_other_terms_put_in_front(
    recommender: MetaRecommender, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "WHOLE_CATALOG", 10)
    monkeypatch.setattr(retrieval, "CANDIDATES", 12)
    asked: list[int] = []
    gather = AnswerModel.gather

    def noted(self: AnswerModel, items: torch.Tensor, width: int = 0) -> ItemBatch:
        asked.extend(items.flatten().tolist())
        return gather(self, items, width)

    monkeypatch.setattr(AnswerModel, "gather", noted)
    engine = Engine(recommender, store, candidates=32, linearized_bytes=1 << 20)
    engine._candidates = 12
    engine.prepare()
    assert not asked, "nothing is read before somebody asks"
    assert "_words" not in vars(engine._search), "nor are titles indexed before somebody searches"
    person = rate(engine, "ann", LOVES_DRAMA)
    found = [entry.item for entry, _ in engine.recommend(person, 3)[1]]
    codes = np.setdiff1d(np.arange(40), person.adapted.support.items)
    terms = person.adapted.term_scores(person.adapted.fitted.cheap_terms)[codes]
    front = codes[np.argsort(-terms, kind="stable")[:12]]
    assert set(asked) <= {*front.tolist(), *person.adapted.support.items.tolist(), 0}, "0 fills up a block"
    scores = person.adapted.scores(front).numpy()
    assert found == [f"m{code}" for code in front[np.argsort(-scores)[:3]]]
    assert engine.search(engine.catalog.title(7), 1)[0].item == "m7"


def test_adapting_users_scores_no_item_that_nobody_asked_to_rank(
    recommender: MetaRecommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users adapted in bulk would otherwise wait until the language model has read the whole catalog."""
    read: list[int] = []
    scores = AdaptedUser.scores
    monkeypatch.setattr(AdaptedUser, "scores", lambda user, codes: read.append(len(codes)) or scores(user, codes))
    engine = Engine(recommender, AdapterStore(tmp_path / "store"))
    assert adapt_users(engine, {"a": bulk_feedback("a", list(LOVES_DRAMA))}).adapted == 1
    assert read == []
    engine.prepare()
    assert read == [len(engine.catalog)]
    engine.add_items([("new", {"title": "new"})])
    assert read[1:] == [1], "once there are scores, an added item gets its own at once"


def test_retrieval_finds_what_the_adapter_ranks_best(engine: Engine, recommender: MetaRecommender) -> None:
    narrow = Engine(recommender, engine.store, candidates=32)
    narrow._candidates = 14
    hits = []
    for user, taste in (("ann", LOVES_DRAMA), ("bob", LOVES_HORROR)):
        exact = {entry.item for entry, _ in engine.recommend(rate(engine, user, taste), 7)[1]}
        found = {entry.item for entry, _ in narrow.recommend(narrow.people([user])[user], 7)[1]}
        assert len(narrow.retrieve(narrow.people([user])[user], 7)) == 14
        hits.append(len(exact & found))
    assert sum(hits) >= 13, hits  # candidates at random would find 6 of 14


@pytest.mark.parametrize("covered", [0, 6, 40])
def test_near_the_start_an_adapters_effect_on_every_item_is_its_scores_own(
    recommender: MetaRecommender, store: AdapterStore, covered: int
) -> None:
    """Also on items that are added later, and of however many items the gradient is kept."""
    engine = Engine(recommender, store, linearized_bytes=covered * bytes_per_item(recommender))
    assert len(engine.prepare()) == 40
    engine.add_items([NEW, ("n2", {"title": "dead king"})])
    start = engine.new_user.state
    adapted = {name for name in recommender.fitted.meta.log_rate if not name.startswith("score.")}
    far = recommender.adapt(sorted(LOVES_DRAMA)).state
    state = {name: start[name] + (0.03 * (far[name] - start[name]) if name in adapted else 0.0) for name in start}
    effect = engine.prepare()(state, start)
    items = np.arange(42)
    moved = (replace(engine.new_user, state=state).scores(items) - engine.new_user.scores(items)).numpy()
    assert np.abs(moved).max() > 1e-4
    np.testing.assert_allclose(effect, moved, atol=0.03 * np.abs(moved).max())


@pytest.mark.parametrize("head", ["ridge", "prototypes", "dkt"])
def test_the_effect_of_a_head_on_every_item_is_exact(
    model_dir: Callable[[str], Path], store: AdapterStore, head: str
) -> None:
    settings = SETTINGS | {"meta": {"inner_steps": 1, "algorithm": head}, "train": SETTINGS["train"] | {"steps": 4}}
    fitted = MetaRecommender.from_pretrained(model_dir("llama"), validated(RunConfig, settings, "test"))
    engine = Engine(fitted.fit(known_task()), store)
    person = rate(engine, "ann", LOVES_DRAMA)
    items = np.arange(40)
    moved = (person.adapted.scores(items) - engine.new_user.scores(items)).numpy()
    assert np.abs(moved).max() > 1e-3
    effect = engine.prepare()(person.adapted.state, engine.new_user.state)
    np.testing.assert_allclose(effect, moved, atol=1e-5)


def test_what_else_is_asked_and_how_many_cores_there_are_never_change_a_score(
    recommender: MetaRecommender, tmp_path: Path
) -> None:
    many, one = (Engine(recommender, AdapterStore(tmp_path / str(cores)), workers=cores) for cores in (2, 1))
    person = rate(one, "ann", LOVES_DRAMA)
    assert all_scores(many, rate(many, "ann", LOVES_DRAMA)) == all_scores(one, person)
    some = [f"m{code}" for code in range(32)]
    assert one.score(person, some)[1] == all_scores(many, person)[:32]


def test_an_items_score_depends_on_nothing_that_is_asked_with_it(engine: Engine) -> None:
    """Neither on how long the prompts of the others are nor on its place among them."""
    person = rate(engine, "ann", LOVES_DRAMA)
    generator = np.random.default_rng(0)
    alone = engine.score(person, ["m7"])[1][0]
    for count in (2, 5, 31, 33, 39):
        for _ in range(4):
            others = [f"m{code}" for code in generator.permutation(np.delete(np.arange(40), 7))[: count - 1]]
            place = int(generator.integers(count))
            asked = [*others[:place], "m7", *others[place:]]
            assert engine.score(person, asked)[1][place] == alone, (count, place)


def test_rankings_that_are_computed_together_are_the_ones_computed_alone_to_the_last_bit(
    recommender: MetaRecommender, tmp_path: Path
) -> None:
    engine = Engine(recommender, AdapterStore(tmp_path), workers=2)
    rate(engine, "ann", LOVES_DRAMA)
    rate(engine, "bob", LOVES_HORROR)
    rate(engine, "cas", LOVES_DRAMA[:2])
    engine.add_items([NEW])
    people = list(engine.people(["ann", "bob", "cas", "nobody"]).values())
    asked = [
        (person, Ranking(k)) for person, k in zip(people * 3, (1, 3, 9, 20, 5, 2, 40, 7, 8, 4, 6, 10), strict=True)
    ]
    asked.append((people[0], Ranking(3, where="nothing at all")))
    assert engine._model.units_at_once(np.array([40])) >= 2, "tried on items of the trained catalog alone"
    *together, refused = engine.recommend_all(asked)
    assert isinstance(refused, ConfigError)
    for (person, ranking), ranked in zip(asked[:-1], together, strict=True):
        assert not isinstance(ranked, Exception)
        assert ranked[1] == engine.recommend(person, ranking.k)[1]


def test_users_are_scored_together_only_where_this_machine_gives_each_the_same_bits(
    recommender: MetaRecommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Engine(recommender, AdapterStore(tmp_path / "one"))._model.units_at_once(np.arange(20)) in (2, 4, 6, 8)
    whole = batching.score_adapted

    def rounds_by_size(state: Any, supports: Any, *rest: Any) -> Any:
        return [scores + 1e-6 * (len(supports) > 4) for scores in whole(state, supports, *rest)]

    monkeypatch.setattr(batching, "score_adapted", rounds_by_size)
    assert Engine(recommender, AdapterStore(tmp_path / "two"))._model.units_at_once(np.arange(20)) <= 4


def test_the_reasons_are_what_leaving_a_rating_out_changes(engine: Engine, recommender: MetaRecommender) -> None:
    person = rate(engine, "ann", LOVES_DRAMA)
    _, ranked = engine.recommend(person, 2, explain=True)
    (best, reasons), _ = ranked
    for reason in reasons:
        without = [(item, rating) for item, rating in sorted(LOVES_DRAMA) if item != reason.item]
        exact = best.score - recommender.adapt(without).score([best.item])[0]
        # To first order in the adapter, which a random model bends more than others.
        assert reason.moved == pytest.approx(exact, abs=0.03 if reason is reasons[0] else 0.3)
    assert [abs(reason.moved) for reason in reasons] == sorted((abs(r.moved) for r in reasons), reverse=True)
    assert engine.recommend(engine.people(["nobody"])["nobody"], 2, explain=True)[1][0][1] == []


def test_a_cold_item_is_recommendable_at_once_and_changes_nobodys_scores(engine: Engine) -> None:
    person = rate(engine, "ann", LOVES_DRAMA)
    before = all_scores(engine, person)
    assert engine.add_items([NEW]) == 1
    assert engine.add_items([NEW]) == 0
    person = engine.people(["ann"])["ann"]
    assert all_scores(engine, person) == before
    assert "n1" in {entry.item for entry, _ in engine.recommend(person, 40)[1]}
    again = rate(engine, "bob", LOVES_DRAMA)
    assert all_scores(engine, again) == before
    rated = rate(engine, "ann", (("n1", 1.0),))
    assert len(rated.adapted.support) == 6
    assert all_scores(engine, rated) != before
    assert "n1" not in {entry.item for entry, _ in engine.recommend(rated, 40)[1]}


def test_an_added_item_scores_as_if_it_had_always_been_there(engine: Engine, recommender: MetaRecommender) -> None:
    catalog = recommender.fitted.catalog
    twin = {name: column[7] for name, column in catalog.fields.items()}
    others = [(f"n{number}", {"title": f"{word} city", "genres": "action"}) for number, word in enumerate(("a", "of"))]
    for item in [("twin", twin), *others]:
        engine.add_items([item])
    answer_model = engine.recommender.fitted.answer_model
    assert isinstance(answer_model, ExtendedAnswerModel)
    assert len(answer_model.segments) == 2
    torch.testing.assert_close(answer_model.states[40], answer_model.states[7], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*answer_model.frozen_log_odds(np.array([40, 7])), atol=1e-5, rtol=1e-4)
    person = rate(engine, "ann", (*LOVES_DRAMA, ("n0", 4.0)))
    # What the ratings of others say differs, for nobody has rated the twin; what the model reads does not.
    prior, state = engine.recommender.fitted.prior.values(np.array([40, 7])), person.adapted.state
    nobody = engine.new_user.score(["twin", "m7"])
    base = np.array(nobody) - float(engine.new_user.state["score.item mean"]) * prior
    scores = np.array(engine.score(person, ["twin", "m7"])[1])
    term = engine.recommender.fitted.terms["collaborative"]
    asked = [np.array([40, 7])]
    collaborative = term.values([person.adapted.support], asked)[0] - term.values([Ratings.empty()], asked)[0]
    read = scores - float(state["score.item mean"]) * prior - collaborative * float(state["score.collaborative"]) - base
    assert read[0] == pytest.approx(read[1], abs=1e-5)
    assert abs(read[0]) > 1e-4
    assert collaborative[0] == 0


def test_added_items_survive_a_restart_with_the_ratings_of_them(
    recommender: MetaRecommender, store: AdapterStore
) -> None:
    first = Engine(recommender, store)
    first.add_items([NEW])
    first.add_items([("n2", {"title": "dead king"}), ("n3", {"title": "the house"})])
    person = rate(first, "ann", (*LOVES_DRAMA, ("n1", 5.0)))
    second = Engine(recommender, store)
    again = second.people(["ann"])["ann"]
    assert second.counters.adapted == 0
    assert second.catalog.ids == first.catalog.ids
    np.testing.assert_allclose(second.score(again, ["n1", "n2"])[1], first.score(person, ["n1", "n2"])[1], atol=1e-5)


@pytest.mark.parametrize(
    ("item", "error"),
    [
        (("n1", {"genres": "drama"}), ConfigError),
        (("n1", {"title": "x", "director": "y"}), ConfigError),
        (("m1", {"title": "x"}), ConflictError),
    ],
)
def test_items_that_cannot_be_added_are_refused(
    item: tuple[str, dict[str, str]], error: type[Exception], engine: Engine
) -> None:
    with pytest.raises(error):
        engine.add_items([item])
    assert engine.store.count_items() == 0
    assert len(engine.catalog) == 40


def test_search_finds_titles_and_a_taste_moves_what_is_alike(engine: Engine) -> None:
    title = engine.catalog.fields["title"][11]
    assert engine.search(title, 3)[0].title == title
    assert engine.search(title.lower().replace(" ", ", "), 3)[0].title == title
    plain = engine.search("drama of love", 40)
    drama, horror = (
        engine.search("drama of love", 40, rate(engine, user, taste))
        for user, taste in (("ann", LOVES_DRAMA), ("bob", LOVES_HORROR))
    )
    assert [entry.item for entry in drama] != [entry.item for entry in horror]
    assert sorted(entry.item for entry in drama) == sorted(entry.item for entry in plain)
    assert plain[0].score is None


def test_unknown_items_in_the_log_are_left_out_and_counted(engine: Engine) -> None:
    person = rate(engine, "ann", (*LOVES_DRAMA, ("gone", 5.0)))
    assert (len(person.adapted.support), person.left_out, person.version) == (5, 1, 6)
    with pytest.raises(UnknownItemError):
        engine.score(person, ["gone"])


def test_a_removed_item_is_never_ranked_again_on_any_server_and_after_a_restart(
    recommender: MetaRecommender, store: AdapterStore, engine: Engine
) -> None:
    other = Engine(recommender, AdapterStore(store.location))
    engine.add_items([NEW])
    person = rate(engine, "ann", LOVES_DRAMA)
    before = all_scores(engine, person)
    assert engine.remove_item("m8")
    assert engine.remove_item("n1")
    assert not engine.remove_item("n1")
    assert not engine.remove_item("nothing")
    assert engine.recommendable == 39
    title = engine.catalog.fields["title"][8]
    for server in (engine, other, Engine(recommender, AdapterStore(store.location))):
        served = server.people(["ann"])["ann"]
        ranked = {entry.item for entry, _ in server.recommend(served, 100)[1]}
        assert len(ranked) == 34
        assert not ranked & {"m8", "n1"}
        assert "m8" not in {found.item for found in server.search(title, 50)}
        with pytest.raises(UnknownItemError):
            server.score(served, ["m8"])
        with pytest.raises(ConflictError, match="removed"):
            server.add_items([NEW])
    left = [f"m{code}" for code in range(40) if code != 8]
    assert engine.score(person, left)[1] == [score for code, score in enumerate(before) if code != 8]


def test_a_rating_of_a_removed_item_still_counts(engine: Engine) -> None:
    person = rate(engine, "ann", LOVES_DRAMA)
    engine.remove_item("m0")
    again = rate(engine, "ann", (("m5", 4.0),))
    assert len(again.adapted.support) == 6
    assert (person.left_out, again.left_out) == (0, 0)


def test_a_ranking_is_filtered_blocked_and_made_diverse_as_in_python(
    engine: Engine, recommender: MetaRecommender
) -> None:
    person = rate(engine, "ann", LOVES_DRAMA)
    me = recommender.adapt(sorted(LOVES_DRAMA))
    chosen = {"diversity": 0.5, "where": "genres in ['drama', 'horror', 'action']", "block": ["m8", "genres=action"]}
    expected = [entry.item for entry in me.recommend(6, **chosen)]
    assert [entry.item for entry, _ in engine.recommend(person, 6, **chosen)[1]] == expected
    assert {int(item[1:]) % 4 for item in expected} == {0, 3}
    with pytest.raises(ConfigError, match="no field"):
        engine.recommend(person, 6, where="yaer > 3")
