"""The query-item task: what is asked, what answers it, and what a search is worth on it."""

from __future__ import annotations

import numpy as np
import pytest
from made_titles import WORDS, titles_and_queries
from search import best_scored

from metarec.bench.query_items import (
    DESCRIBED,
    DROPPED,
    KINDS,
    MISSPELT,
    SHUFFLED,
    ItemQuery,
    make_queries,
    measure,
    ndcg,
    recall,
)
from metarec.data.interactions import Catalog
from metarec.data.templates import PromptTemplate
from metarec.data.titles import words
from metarec.errors import DataError
from metarec.recommending.search import TextSearch, WordIndex

CATALOG = Catalog(
    ("1", "2", "3", "4", "5"),
    {
        "title": ("The Red Road Home", "Blue Sea", "Blue Sea", "Jaws", "A Long Way Down the River"),
        "genres": ("Drama", "Comedy, Drama", "Drama, Comedy", "", "Drama"),
        "year": ("1990", "1991", "1991", "1975", ""),
    },
)


def test_recall_and_ndcg_by_hand() -> None:
    relevant = frozenset({3, 5, 9})
    assert recall([3, 1, 5, 2], relevant, 3) == pytest.approx(2 / 3)
    assert recall([3, 1, 5, 2], relevant, 1) == 1
    assert ndcg([3, 1, 5, 2], relevant, 4) == pytest.approx(1.5 / (1 + 1 / np.log2(3) + 0.5))
    assert ndcg([1, 2], relevant, 2) == 0


def test_queries_are_what_their_kind_says() -> None:
    dropped = make_queries(CATALOG, DROPPED, 9, 0)
    assert len(dropped) == 4, "a title of one word is left out"
    lengths = {query.relevant: len(query.text.split()) for query in dropped}
    assert lengths[frozenset({0})] == 3
    assert lengths[frozenset({4})] == 4
    assert lengths[frozenset({1, 2})] == 1, "all items of that title answer"
    for query in make_queries(CATALOG, SHUFFLED, 9, 0):
        title = CATALOG.fields["title"][min(query.relevant)]
        assert sorted(query.text.split()) == sorted(title.split())
        assert query.text != title
    misspelt = make_queries(CATALOG, MISSPELT, 9, 0)
    assert any(query.text not in CATALOG.fields["title"] for query in misspelt)
    described = {query.text: query.relevant for query in make_queries(CATALOG, DESCRIBED, 9, 0)}
    assert described == {"Drama 1990": {0}, "Comedy Drama 1991": {1, 2}}
    assert make_queries(CATALOG, DROPPED, 2, 1) == make_queries(CATALOG, DROPPED, 2, 1)
    assert make_queries(CATALOG, DROPPED, 9, 0) != make_queries(CATALOG, DROPPED, 9, 1)
    with pytest.raises(DataError, match="no field 'genres'"):
        make_queries(Catalog(("1",), {"title": ("x y",)}), DESCRIBED, 1, 0)


def test_a_search_that_knows_and_one_that_does_not() -> None:
    queries = [ItemQuery("a", frozenset({0})), ItemQuery("b", frozenset({1}))]
    perfect = measure(lambda text, _: [0 if text == "a" else 1, 4], queries, 2)
    assert (perfect["recall@2"], perfect["ndcg@2"], perfect["queries"]) == (1, 1, 2)
    half = measure(lambda *_: [0, 4], queries, 2)
    assert half["recall@2"] == 0.5
    assert half["recall@2_low"] == 0 < half["recall@2_high"] == 1
    assert measure(lambda *_: [4, 3], queries, 2)["ndcg@2"] == 0


@pytest.mark.parametrize("language", WORDS)
def test_words_of_unspaced_writing_are_found_split_alone(language: str) -> None:
    catalog, asked = titles_and_queries(language, 600, 1)
    for queries in asked.values():
        split, whole = (
            measure(lambda text, k, index=index: best_scored(index, text, k), queries, 10)["recall@10"]
            for index in (WordIndex(catalog.fields["title"]), WordIndex(catalog.fields["title"], words))
        )
        assert split > 0.85
        assert whole < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_words_alone_answer_most_of_what_is_made_of_words(kind: str) -> None:
    search = TextSearch(CATALOG, PromptTemplate("{{ title }}", "a", "b"), None)
    code = {item: place for place, item in enumerate(CATALOG.ids)}
    found = measure(
        lambda text, k: [code[entry.item] for entry in search.find(text, k)], make_queries(CATALOG, kind, 9, 0), 2
    )
    assert found["recall@2"] >= (0.5 if kind == MISSPELT else 1)
