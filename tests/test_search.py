"""Search by words, by meaning and by taste: what each finds that the others do not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Ran
from small_recommenders import NO_MODEL, known_task

from metarec.config import RunConfig, validated
from metarec.data.interactions import Catalog
from metarec.data.templates import PromptTemplate
from metarec.errors import BackboneError, ConfigError
from metarec.lm.names import MINILM
from metarec.recommender import MetaRecommender
from metarec.recommending.search import TextSearch, WordIndex, fused, tokens

FILMS = Catalog(
    ("1", "2", "3", "4", "5", "6"),
    {
        "title": ("Alien", "The Little Mermaid", "Jaws", "東京物語", "Speed", "Little Women"),
        "about": (
            "a crew in outer space is hunted by a creature",
            "a girl with a fish's tail falls in love",
            "a shark attacks swimmers at the beach",
            "an old couple visits their children",
            "a bus must not slow down",
            "four sisters grow up",
        ),
    },
)
TEXT = PromptTemplate("{{ title }}: {{ about }}", "good", "bad")


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("The Little Mermaid (1989)", ["the", "little", "mermaid", "1989"]),
        ("東京物語 (1953)", ["東京", "京物", "物語", "1953"]),
        ("猫", ["猫"]),
        ("ゴジラ2000", ["コシ", "シラ", "2000"]),  # marks are no part of a folded letter
        ("物語2", ["物語", "2"]),
        ("Amélie 愛 ok", ["amelie", "愛", "ok"]),
        ("기생충", ["기생", "생충"]),
        ("", []),
    ],
)
def test_words_are_split_and_unspaced_writing_into_pairs(text: str, split: list[str]) -> None:
    import unicodedata

    assert [unicodedata.normalize("NFC", token) for token in tokens(text)] == [
        unicodedata.normalize("NFC", token) for token in split
    ]


def test_word_scores_are_bm25_by_hand() -> None:
    index = WordIndex(["red road", "red red sea", "blue"])
    idf = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    mean = 2.0  # words a text
    by_hand = [idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * length / mean)) for tf, length in ((1, 2), (2, 3), (0, 1))]
    assert index.scores("red").tolist() == pytest.approx(by_hand, rel=1e-5)
    assert index.scores("green").tolist() == [0, 0, 0]
    assert index.scores("").tolist() == [0, 0, 0]
    assert WordIndex(["", ""]).scores("red").tolist() == [0, 0]


def test_orders_are_fused_by_reciprocal_ranks() -> None:
    found = fused([np.array([2, 0]), np.array([2, 1, 0])], 4)
    assert found.tolist() == pytest.approx([(61 / 62 + 61 / 63) / 2, 61 / 62 / 2, 1.0, 0.0])


def ids(search: TextSearch, query: str, k: int = 1, **more: object) -> list[str]:
    return [entry.item for entry in search.find(query, k, **more)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def search() -> TextSearch:
    return TextSearch(FILMS, TEXT, MINILM)


@pytest.mark.parametrize(
    ("query", "item"),
    [
        ("mermaid", "2"),
        ("womne little", "6"),
        ("東京", "4"),
        ("sisters", "6"),
        ("extraterrestrial monster on a starship", "1"),  # shares no word but 'a' and 'on' with any
        ("great white fish bites bathers", "3"),
        ("jaws", "3"),
    ],
)
def test_the_whole_search_finds(query: str, item: str, search: TextSearch) -> None:
    assert ids(search, query) == [item]


def test_words_alone_find_no_meaning_but_respell() -> None:
    search = TextSearch(FILMS, TEXT, None)
    assert ids(search, "extraterrestrial starship") == []
    assert ids(search, "the litle mermiad") == ["2"], "spelling counts beside 'the', which others have"
    assert ids(search, "京物") == ["4"]
    assert search.find("sisters")[0].similarity == 1


def test_a_person_moves_what_is_found_but_not_what_is_named(search: TextSearch) -> None:
    def loves(*codes: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda asked: np.isin(asked, codes).astype(np.float32)

    assert ids(search, "little", 2) in (["2", "6"], ["6", "2"])
    assert ids(search, "little", 1, score=loves(5), weight=5.0) == ["6"]
    assert ids(search, "little", 1, score=loves(1), weight=5.0) == ["2"]
    assert ids(search, "Little Women", 1, score=loves(1), weight=100.0) == ["6"]
    plain = search.find("little", 6)
    same = search.find("little", 6, score=loves(4), weight=0.0)
    assert [entry.item for entry in plain] == [entry.item for entry in same]
    assert {entry.item: entry.score for entry in same}["5"] == 1.0
    assert plain[0].score is None
    kept = np.array([True, False, True, True, True, True])
    assert "2" not in ids(search, "little mermaid", 6, kept=kept)


def test_a_catalog_that_grew_finds_its_new_items() -> None:
    search = TextSearch(FILMS, TEXT, MINILM)
    ids(search, "bus")
    fields = {"title": (*FILMS.fields["title"], "Duel"), "about": (*FILMS.fields["about"], "a lorry chases a driver")}
    search.index(Catalog((*FILMS.ids, "7"), fields))
    assert ids(search, "lorry") == ["7"]
    assert ids(search, "truck hunts motorist") == ["7"]


def test_without_its_encoder_search_goes_by_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: object) -> None:
        raise BackboneError("no model 'minilm'", "Install it")

    monkeypatch.setattr("metarec.scorers.language.item_vectors.text_vectors", missing)
    search = TextSearch(FILMS, TEXT, MINILM)
    assert ids(search, "shark") == ["3"]
    assert "by words alone: no model 'minilm'" in caplog.text
    assert ids(search, "shark") == ["3"]
    assert len(caplog.records) == 1


def test_without_bm25s_search_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigError, match=r"pip install 'metarec\[search\]'"):
        TextSearch(FILMS, TEXT, None).find("shark")


def test_recommender_and_command_search_alike(tmp_path: Path, metarec: Callable[..., Ran]) -> None:
    recommender = MetaRecommender(None, validated(RunConfig, NO_MODEL, "test")).fit(known_task())
    title = recommender.fitted.catalog.fields["title"][11]
    found = recommender.search(title, 3)
    assert found[0].title == title
    me = recommender.adapt([("m0", 5.0)])
    mine = recommender.search("drama", 5, user=me)
    assert [entry.score for entry in mine] == pytest.approx(me.score([entry.item for entry in mine]))
    with pytest.raises(ConfigError, match="k is 0"):
        recommender.search("drama", 0)
    run = tmp_path / "runs" / "mine"
    recommender.save_pretrained(run / "model")
    done = metarec("search", run, title, "-k", 3, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out) == [vars(entry) for entry in found]
    printed = metarec("search", run, "drama", "-k", 2, "--rating", "m0=5").out.splitlines()
    assert len(printed) == 2
    assert printed[0].startswith("  1  ")
