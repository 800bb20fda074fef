"""Measures search on MovieLens: words, meaning and both, on made queries; and what a person's taste adds.

    python benchmarks/search.py                          # fits --preset fast first; benchmarks/results/search.json
    python benchmarks/search.py --run runs/fast          # with a recommender that is there
    python benchmarks/search.py --unspaced               # benchmarks/results/search-unspaced.json; seconds

Queries are made from the catalog: titles with words dropped, shuffled or misspelt, and categories with a year. For the
taste, every test user asks for the genre that is most frequent among the movies they like in their query; what they
like of it answers. Titles in Chinese, Japanese and Korean are made up (`made_titles`), and found by words as they are
split and as they stand.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from made_titles import WORDS, titles_and_queries

from metarec import MetaRecommender, preset
from metarec.adapted_user import AdaptedUser
from metarec.bench.query_items import KINDS, ItemQuery, make_queries, measure, ndcg
from metarec.data.item_fields import tokens_in
from metarec.data.titles import words
from metarec.evaluation.metrics import bootstrap_interval
from metarec.files.artifacts import write_json
from metarec.recommending.search import TextSearch, WordIndex
from metarec.system.doctor import environment

RESULT = Path(__file__).parent / "results" / "search.json"
UNSPACED = RESULT.with_name("search-unspaced.json")
TASK = "movielens/user-cold"
TITLES = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run of movielens/user-cold; without it one is fitted")
    parser.add_argument("--queries", type=int, default=300, help="how many of each kind")
    parser.add_argument("--unspaced", action="store_true", help="made titles in Chinese, Japanese and Korean alone")
    arguments = parser.parse_args()
    if arguments.unspaced:
        results = {language: unspaced(language) for language in WORDS}
        print(results)
        write_json(UNSPACED, {"items": TITLES, **results, **environment()})
        return
    if arguments.run:
        recommender = MetaRecommender.from_pretrained(arguments.run)
    else:
        recommender = MetaRecommender.from_pretrained("smollm2-135m-instruct", preset("fast")).fit(TASK)
    fitted = recommender.fitted
    catalog, code = fitted.catalog, {item: place for place, item in enumerate(fitted.catalog.ids)}
    searches = {
        "words": TextSearch(catalog, fitted.task.item_text, None),
        "words and meaning": TextSearch.of(fitted, recommender.config),
    }
    for search in searches.values():
        search.prepare()
    meanings = searches["words and meaning"].meanings
    assert meanings is not None

    def found(name: str) -> Any:
        if name == "meaning":
            return lambda text, k: np.argsort(-meanings.similarity(text), kind="stable")[:k]
        return lambda text, k: [code[entry.item] for entry in searches[name].find(text, k)]

    results = {}
    for kind in KINDS:
        queries = make_queries(catalog, kind, arguments.queries, seed=0)
        results[kind] = {}
        for name in ("words", "meaning", "words and meaning"):
            began = time.perf_counter()
            measured = measure(found(name), queries, 10)
            took = (time.perf_counter() - began) / len(queries)
            results[kind][name] = {**measured, "seconds_per_query": took}
            print(f"{kind}: {name} {results[kind][name]}")
    results["by taste"] = by_taste(recommender, searches["words and meaning"])
    print(results["by taste"])
    write_json(RESULT, {"task": TASK, "items": len(catalog), **results, **environment()})


def unspaced(language: str) -> dict[str, dict[str, Any]]:
    """Returns what words find of made titles in a language, split and as they stand between spaces."""
    catalog, asked = titles_and_queries(language, TITLES, seed=0)
    titles = catalog.fields["title"]
    indexes = {"words split": WordIndex(titles), "words as they stand": WordIndex(titles, words)}
    return {
        kind: {name: measure(partial(best_scored, index), queries, 10) for name, index in indexes.items()}
        for kind, queries in asked.items()
    }


def best_scored(index: WordIndex, text: str, k: int) -> np.ndarray:
    """Returns the items with the best scores that share a word with a text."""
    scores = index.scores(text)
    return np.argsort(-scores, kind="stable")[: min(k, int((scores > 0).sum()))]


def scores_of(user: AdaptedUser, codes: np.ndarray) -> np.ndarray:
    return user.scores(codes).numpy()


def by_taste(recommender: MetaRecommender, search: TextSearch) -> dict[str, Any]:
    """Returns what a person's order adds to a search for their favourite genre, by its weight."""
    data = recommender.task_data()
    threshold, catalog = data.task.like_threshold, recommender.fitted.catalog
    code = {item: place for place, item in enumerate(catalog.ids)}
    genres = tokens_in(catalog.fields["genres"])
    asked = []
    for episode in data.episodes("test")[0]:
        liked = episode.query.items[episode.query.likes(threshold)]
        common = Counter(genre for item in liked for genre in genres[item])
        if common:
            genre = min(common, key=lambda name: (-common[name], name))
            relevant = frozenset(int(item) for item in liked if genre in genres[item])
            asked.append((episode, ItemQuery(genre, relevant)))
    supports = [episode.support.head(data.task.shots[-1]).unlabelled() for episode, _ in asked]
    adapted = recommender.scorer().adapt(supports)
    values: dict[float, list[float]] = {}
    for row, ((_, query), support) in enumerate(zip(asked, supports, strict=True)):
        state = {name: value[row] for name, value in adapted.state.items()}
        user = recommender.adapted_user(support, state, False, 0.0)
        kept = ~np.isin(np.arange(len(catalog)), support.items)
        for weight in (0.0, 1.0, 4.0):
            entries = search.find(query.text, 20, score=partial(scores_of, user), weight=weight, kept=kept)
            values.setdefault(weight, []).append(ndcg([code[entry.item] for entry in entries], query.relevant, 20))
    plain = np.array(values[0.0])
    found: dict[str, Any] = {"users": len(plain), "K": data.task.shots[-1]}
    for weight, own in values.items():
        difference = np.array(own) - plain
        low, high = bootstrap_interval(difference, 0)
        found[f"weight {weight:g}"] = {
            "ndcg@20": float(np.mean(own)), "difference": float(difference.mean()), "low": low, "high": high
        }  # fmt: skip
    return found


if __name__ == "__main__":
    main()
