"""Ranks a catalog for people: scores, the best items and their reasons, what is believed of a person, and search."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarec.adapted_user import Recommendation
from metarec.data.interactions import Codes, Flags, Ratings
from metarec.evaluation.metrics import rank_order
from metarec.recommending.explanations import Reason, explain
from metarec.recommending.preferences import Informative, Knowledge, PreferenceModel
from metarec.recommending.reranking import check_diversity, mmr, pool_size
from metarec.recommending.search import Found
from metarec.scorers.language.left_out import scores_without_each
from metarec.serve.person import Person
from metarec.serve.retrieval import is_small
from metarec.serve.served_catalog import ServedCatalog

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranking:
    """What is asked of a ranking of the catalog.

    Args:
        k: How many items; fewer come back where there are fewer.
        exclude_seen: Leaves out what the user has rated.
        explain: Adds the ratings that changed each item's score most.
        diversity: See `AdaptedUser.recommend`.
        where: See `AdaptedUser.recommend`.
        block: See `AdaptedUser.recommend`.
    """

    k: int
    exclude_seen: bool = True
    explain: bool = False
    diversity: float = 0.0
    where: str | None = None
    block: Sequence[str] = ()

    @property
    def pool(self) -> int:
        """How many of the best items it is chosen from."""
        return pool_size(self.k) if self.diversity else self.k


# Who was served, and the best items, each with its reasons.
Ranked = tuple[Person, list[tuple[Recommendation, list[Reason]]]]


class RankedCatalog(ServedCatalog):
    """A served catalog in the order that a person is expected to like it."""

    def score(self, person: Person, items: Sequence[str]) -> tuple[Person, list[float]]:
        """Scores items by id; higher is better.

        Returns:
            Who was served, which is the user without adaptation where the scores were not finite; and the scores.

        Raises:
            UnknownItemError: An item is not in the catalog.
        """
        codes = np.array([self.code(item) for item in items], np.int64)
        person, scores = self._finite_scores(person, codes)
        return person, [float(value) for value in scores]

    def _finite_scores(self, person: Person, codes: Codes) -> tuple[Person, NDArray[np.float32]]:
        return self._all_finite([(person, codes)])[0]

    def _all_finite(self, asked: Sequence[tuple[Person, Codes]]) -> list[tuple[Person, NDArray[np.float32]]]:
        """Returns who is served and the scores, for several people together; see `score`."""
        together = self._model.scores_of([(person.adapted, codes) for person, codes in asked])
        served = []
        for (person, codes), scores in zip(asked, together, strict=True):
            if np.isfinite(scores).all():
                served.append((person, scores))
                continue
            self.counters.diverged += 1
            _LOG.error("an adapter's scores are not finite; the scores before adaptation are served")
            unadapted = replace(self.new_user, support=person.adapted.support, diverged=True, seconds=0.0)
            scores = self._model.scores(unadapted, codes)
            served.append((replace(person, adapted=unadapted, losses=()), scores))
        return served

    def recommend(self, person: Person, k: int, **how: Any) -> Ranked:
        """Ranks the catalog for one person; see `recommend_all`.

        Args:
            person: For whom.
            k: See `Ranking`.
            **how: The other settings of a `Ranking`.

        Raises:
            MetarecError: `diversity`, `where` or `block` are not understood.
        """
        found = self.recommend_all([(person, Ranking(k, **how))])[0]
        if isinstance(found, Exception):
            raise found
        return found

    def recommend_all(self, asked: Sequence[tuple[Person, Ranking]]) -> list[Ranked | Exception]:
        """Ranks the catalog for several people, whose items are scored together; nobody's ranking depends on others'.

        Args:
            asked: Who asks for what.

        Returns:
            For each who was served (see `score`) and the best items, each with its reasons; or why there is no ranking.
        """
        # A large catalog's terms are computed on all threads for each person, a small one's for each on one.
        each = self._model.each if is_small(len(self.catalog)) else map
        if len(asked) > 1:
            self._retrieval.prepare()  # of items that were added since, before several threads would do it
        chosen = list(each(lambda pair: _tried(self._candidates_of, *pair), asked))
        rows = [row for row, codes in enumerate(chosen) if not isinstance(codes, Exception)]
        scored = self._all_finite([(asked[row][0], chosen[row]) for row in rows]) if rows else []
        ranked = {
            row: _tried(self._ranked, person, asked[row][1], chosen[row], scores)
            for row, (person, scores) in zip(rows, scored, strict=True)
        }
        return [ranked.get(row, refused) for row, refused in enumerate(chosen)]

    def _candidates_of(self, person: Person, ranking: Ranking) -> Codes:
        check_diversity(ranking.diversity)
        filtered = ranking.where is not None or ranking.block
        kept = self._filter.kept(ranking.where, ranking.block) if filtered else None
        return self.retrieve(person, ranking.pool, ranking.exclude_seen, kept)

    def _ranked(self, person: Person, ranking: Ranking, codes: Codes, scores: NDArray[np.float32]) -> Ranked:
        catalog = self.catalog
        seed = self.recommender.config.seed
        order = rank_order(scores, [catalog.ids[code] for code in codes], seed)[: ranking.pool]
        if ranking.diversity:
            order = order[mmr(scores[order], self._vectors.of(codes[order]), ranking.k, ranking.diversity)]
        best = [
            Recommendation(catalog.ids[codes[row]], catalog.title(int(codes[row])), float(scores[row])) for row in order
        ]
        reasons = self.explain(person, codes[order]) if ranking.explain else [[] for _ in best]
        return person, list(zip(best, reasons, strict=True))

    def retrieve(self, person: Person, k: int, exclude_seen: bool = True, kept: Flags | None = None) -> Codes:
        """Chooses the items that are worth an exact score; all of them where the catalog is small enough.

        Args:
            person: For whom.
            k: How many items are asked for.
            exclude_seen: Leaves out what the user has rated.
            kept: Which items may be chosen, shape (items,); None for all but those that were removed.
        """
        allowed = self._kept.copy() if kept is None else self._kept & kept
        if exclude_seen:
            allowed[person.adapted.support.items] = False
        codes = np.flatnonzero(allowed)
        return self._retrieval.choose(person.adapted, codes, max(self._candidates, 2 * k))

    def explain(self, person: Person, codes: Codes, most: int = 3) -> list[list[Reason]]:
        """Returns the ratings that changed some items' scores most; see `metarec.recommending.explanations.explain`.

        Users who take gradient steps are adapted without each rating in one pass, see `scores_without_each`.
        """
        adapted = person.adapted
        if adapted.diverged or not len(adapted.support):
            return [[] for _ in codes]
        scorer = self.recommender.scorer()
        if scorer.inner.head is not None:
            return explain(
                adapted.support, self._model.scores(adapted, codes), partial(self._again, codes), self.catalog
            )
        items = np.concatenate([adapted.support.items, codes])
        slopes = self._retrieval.slopes(scorer, items) if scorer.answer_model is not None else None
        found = scores_without_each(scorer, adapted.support.unlabelled(), codes, slopes)
        return explain(adapted.support, found[-1], lambda _: list(found[:-1]), self.catalog, most)

    def _again(self, codes: Codes, supports: Sequence[Ratings]) -> list[NDArray[np.float32]]:
        """Scores items with each of several supports, by adapting to it."""
        return [self._model.scores(other, codes) for other, _ in self.adapt(supports)]

    @cached_property
    def _preferences(self) -> PreferenceModel | None:
        return PreferenceModel.of(self.trained.fitted)

    def knowledge(self, person: Person) -> Knowledge:
        """Returns what is believed of a person; nothing where the recommender's score has no Gaussian process."""
        return self._preferences.knowledge(person.adapted.support) if self._preferences else Knowledge(0.0, ())

    def informative(self, person: Person, k: int, without: Sequence[str] = ()) -> list[Informative]:
        """Returns the items whose ratings would tell most about a person; see `PreferenceModel.informative`.

        Args:
            person: For whom.
            k: How many.
            without: Ids of items to leave out; those that are unknown do not matter.

        Returns:
            Fewer where there are fewer; none where the recommender's score has no Gaussian process.
        """
        if self._preferences is None:
            return []
        allowed = self._kept.copy()
        allowed[[self._code[item] for item in without if item in self._code]] = False
        return self._preferences.informative(person.adapted.support, k, allowed)

    def search(self, text: str, k: int, person: Person | None = None) -> list[Found]:
        """Finds items by text, and with a user by their scores too; see `TextSearch.find`."""
        self.reload_items()
        if person is None:
            return self._search.find(text, k, kept=self._kept)
        user = person
        return self._search.find(text, k, score=lambda codes: self._finite_scores(user, codes)[1], kept=self._kept)


def _tried(function: Callable[..., Any], *given: Any) -> Any:
    """Returns a function's result, or its error: one person's must not be the others'."""
    try:
        return function(*given)
    except Exception as error:
        return error
