"""Serves a recommender over a store: adapters from ratings, rankings from adapters, explanations, added items.

One thread calls it; it divides the work of a call among several. `batching` adapts and scores, `retrieval` chooses the
items worth an exact score, `metarec.recommending.search` finds items by text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarec.adapted_user import AdaptedUser, Recommendation
from metarec.data.filters import ItemFilter
from metarec.data.interactions import Catalog, Codes, Flags, Ratings
from metarec.errors import ArtifactError, ConfigError, ConflictError, MetarecError, UnknownItemError
from metarec.evaluation.metrics import rank_order
from metarec.recommender import MetaRecommender
from metarec.recommending.explanations import Reason, explain
from metarec.recommending.preferences import Informative, Knowledge, PreferenceModel
from metarec.recommending.reranking import ItemVectors, check_diversity, mmr, pool_size
from metarec.recommending.search import Found, TextSearch
from metarec.scorers.language.left_out import scores_without_each
from metarec.serve.batching import BLOCK, USERS_AT_ONCE, BatchedModel, linearize_most_rated
from metarec.serve.hot_adapters import HotAdapters
from metarec.serve.items import check_fields, extend
from metarec.serve.person import Person
from metarec.serve.records import Feedback, FeedbackEvent, NewAdapter, Profile, UserFacts
from metarec.serve.retrieval import CandidateRetrieval, Effects, is_small, reads_all
from metarec.serve.store import AdapterStore
from metarec.serve.warm import Warm, read_warm, warm_key, write_warm
from metarec.system.tensors import AdapterState
from metarec.training.given_side import kept_side, read_review, reads_reviews, unknown_values, with_side

_LOG = logging.getLogger(__name__)

MAX_RATINGS = 64
# Bytes of a tensor object beside its numbers; most of a small adapter's size.
_TENSOR_BYTES = 512


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


@dataclass
class Counters:
    """Numbers of events since the start, for the metrics."""

    adapted: int = 0
    diverged: int = 0
    damaged: int = 0
    failed: int = 0
    unsaved: int = 0
    erased: int = 0


class Engine:
    """A recommender over a store.

    Args:
        recommender: The fitted recommender.
        store: Feedback and adapters.
        hot_bytes: Bytes of adapters to keep in memory.
        candidates: How many items are scored exactly when a whole catalog is ranked.
        users_at_once: Users per batch; the same number gives the same adapters to the last bit.
        workers: How many batches of users, or blocks of items, are computed at the same time.
        linearized_bytes: Bytes of item log-odds and gradients at the initialization, computed once, here; where not
            all items fit, the most rated ones have them. A user who rated another item takes a slower first step. Of a
            catalog that is too large to be read, no item has them.
    """

    def __init__(
        self,
        recommender: MetaRecommender,
        store: AdapterStore,
        *,
        hot_bytes: int = 256 << 20,
        candidates: int = BLOCK,
        users_at_once: int = USERS_AT_ONCE,
        workers: int = 1,
        linearized_bytes: int = 0,
        warm: Path | None = None,
    ) -> None:
        if candidates < BLOCK:
            raise ConfigError(f"candidates is {candidates}", f"Choose {BLOCK} or more")
        self.trained = recommender
        self.digest = recommender.digest
        self.store = store
        self.hot: HotAdapters[Person] = HotAdapters(hot_bytes)
        self.counters = Counters()
        self._candidates = candidates
        self._save: Callable[[NewAdapter], object] = self.keep
        self._forget: list[Callable[[str], object]] = []
        # Without a language model there is nothing that takes long; an accelerator's numbers stay there.
        worth = reads_all(recommender) and recommender.adapted_model is not None and recommender.config.device == "cpu"
        self._warm = warm if worth else None
        self._warm_key = warm_key(recommender, linearized_bytes)
        kept = None if self._warm is None else read_warm(self._warm, self._warm_key)
        if kept is not None:
            self._warm = None
        linearized = kept.linearized if kept is not None else None
        if kept is None and reads_all(recommender):
            linearized = linearize_most_rated(recommender, linearized_bytes)
        self._linearized = linearized
        self._model = BatchedModel(recommender, users_at_once=users_at_once, workers=workers, linearized=linearized)
        self.new_user = recommender.adapt([])
        self._adapter_bytes = _size(self.new_user.state)
        self._retrieval = CandidateRetrieval(
            recommender,
            linearized,
            None if kept is None else kept.effects,
            None if kept is None else kept.new_user_scores,
            self._model.each,
        )
        self._search = TextSearch.of(recommender.fitted, recommender.config)
        self._removed: frozenset[str] = frozenset()
        self._items_read = 0
        self._serve(recommender)
        self.reload_items()
        self.forget_erased()

    # The catalog.

    @property
    def catalog(self) -> Catalog:
        """The items there are now, those that were removed among them."""
        return self.recommender.fitted.catalog

    @property
    def recommendable(self) -> int:
        """How many items can be recommended: those of the catalog that were not removed."""
        return int(self._kept.sum())

    def _serve(self, recommender: MetaRecommender) -> None:
        """Takes a recommender over a longer catalog into service."""
        self.recommender = recommender
        self._code = {item: code for code, item in enumerate(recommender.fitted.catalog.ids)}
        self.new_user = replace(self.new_user, fitted=recommender.fitted)
        self._retrieval.update(self.new_user)
        self._search.index(recommender.fitted.catalog)
        self._filter = ItemFilter(recommender.fitted.catalog)
        self._vectors = ItemVectors(recommender.fitted)
        self._hide(self._removed)

    def _hide(self, removed: Collection[str]) -> None:
        """Takes items out of every ranking from now on."""
        self._removed = frozenset(removed)
        self._kept = np.ones(len(self.catalog), bool)
        self._kept[[self._code[item] for item in self._removed if item in self._code]] = False

    def prepare(self) -> Effects:
        """Computes what rankings and searches need of items that do not have it yet, so that no user waits for it.

        Returns:
            The effect of an adapter on every item.
        """
        if is_small(len(self.catalog)):  # of a larger one, the first search waits instead of every start
            self._search.prepare()
        effects = self._retrieval.prepare()
        if self._warm is not None:
            count = len(self.trained.fitted.catalog)
            first = replace(effects, coordinates=effects.coordinates[:count])
            found = Warm(self._linearized, first, self._retrieval.new_user_scores[:count])
            write_warm(self._warm, self._warm_key, found)
            self._warm = None
        return effects

    def code(self, item: str) -> int:
        """Returns an item's code.

        Raises:
            UnknownItemError: The catalog has no such id, or the item was removed.
        """
        if item not in self._code or item in self._removed:
            raise UnknownItemError("no item has that id", "Find ids with GET /v1/search")
        return self._code[item]

    def add_items(self, items: Sequence[tuple[str, Mapping[str, str]]]) -> int:
        """Adds items; they can be recommended at once.

        Returns:
            How many were new.

        Raises:
            ConfigError: A field is unknown or the title is missing.
            ConflictError: An item is there already with other fields.
        """
        self.reload_items()
        checked = {item: check_fields(self.trained.fitted.catalog, fields) for item, fields in items}
        trained = set(self.trained.fitted.catalog.ids)
        for item, fields in items:
            if item in self._removed:
                raise ConflictError("an item of that id was removed", "Choose another id")
            if item in trained or checked[item] != check_fields(self.trained.fitted.catalog, fields):
                raise ConflictError("an item of that id is there already", "Choose another id")
        # The model reads them before the store keeps them: an item that cannot be read is not kept.
        fresh = [(item, fields) for item, fields in checked.items() if item not in self._code]
        longer = extend(self.trained, self.recommender, fresh) if fresh else self.recommender
        new = self.store.add_items(list(checked.items()))
        self._serve(longer)
        return new

    def remove_item(self, item: str) -> bool:
        """Takes an item out of every ranking and search, for good; returns whether there was one.

        Ratings of it stay, and users' adapters with them.
        """
        self.reload_items()
        if item not in self._code or item in self._removed:
            return False
        self.store.remove_item(item)
        self._hide({*self._removed, item})
        return True

    def reload_items(self) -> None:
        """Reads items that another server, or an earlier run, has added to the store or removed."""
        if self.store.count_removed() > len(self._removed):
            self._hide(self.store.removed_items())
        added = self.store.count_items()  # the recommender may have been trained with some of them
        if added <= self._items_read:
            return
        self._items_read = added
        empty = dict.fromkeys(self.trained.fitted.catalog.fields, "")
        fresh = [(item, empty | fields) for item, fields in self.store.items() if item not in self._code]
        if fresh:
            self._serve(extend(self.trained, self.recommender, fresh))

    # Users.

    def people(self, users: Sequence[str]) -> dict[str, Person]:
        """Returns users with the adapters of their latest ratings: from memory, from the store, or adapted here."""
        self.reload_items()
        self.forget_erased()
        found: dict[str, Person] = {}
        waiting: list[tuple[str, Profile]] = []
        for user in dict.fromkeys(users):
            profile = self.store.profile(user)
            if profile is None or profile.version == 0:
                found[user] = Person(self.new_user, 0, 0)
            elif (hot := self.hot.get(profile.key, profile.version)) is not None:
                found[user] = replace(hot, adapted=replace(hot.adapted, fitted=self.recommender.fitted))
            elif (kept := self._from_store(profile)) is not None and kept.version == profile.version:
                found[user] = kept
                self.hot.put(profile.key, profile.version, kept, self._adapter_bytes)
            else:
                waiting.append((user, profile))
        try:
            found |= self._adapt_people(waiting)
        except RuntimeError as error:
            # For example out of memory; an older adapter is better than no answer.
            self.counters.failed += len(waiting)
            _LOG.error("adapting failed", extra={"failure": type(error).__name__})
            for user, profile in waiting:
                found[user] = self._from_store(profile) or Person(self.new_user, 0, profile.version)
        return found

    def _from_store(self, profile: Profile) -> Person | None:
        """Reads the newest undamaged version of an adapter."""
        record, damaged = self.store.newest(profile.key, self.digest)
        self.counters.damaged += len(damaged)
        if damaged:
            _LOG.error("damaged adapters were refused", extra={"count": len(damaged)})
        if record is None:
            return None
        try:
            adapted = self.recommender.load_user(self.store.path(record))
        except (ArtifactError, UnknownItemError, OSError) as error:
            _LOG.error("an adapter cannot be read", extra={"failure": type(error).__name__})
            return None
        return Person(adapted, record.version, profile.version)

    def _adapt_people(self, waiting: Sequence[tuple[str, Profile]]) -> dict[str, Person]:
        supports, left_out = [], []
        for user, _ in waiting:
            rated = self.store.support(user, MAX_RATINGS)
            known = [event for event in rated if event.item in self._code]
            known.sort(key=lambda event: self._code[event.item])
            supports.append(self._support(known, self.store.facts(user)))
            left_out.append(len(rated) - len(known))
        found = {}
        for (user, profile), missing, (adapted, losses) in zip(waiting, left_out, self.adapt(supports), strict=True):
            person = Person(adapted, profile.version, profile.version, losses, missing)
            found[user] = person
            self.counters.adapted += 1
            self.counters.diverged += adapted.diverged
            self.hot.put(profile.key, profile.version, person, self._adapter_bytes)
            self._save(NewAdapter(profile.key, profile.version, self.digest, partial(adapted.save, whole=False)))
        return found

    def _support(self, rated: Sequence[FeedbackEvent], facts: UserFacts) -> Ratings:
        """Returns ratings with what came with them and what was said of the user."""
        items = np.array([self._code[event.item] for event in rated], np.int64)
        fitted, contexts = self.trained.fitted, [event.context for event in rated]
        # A review without a rating was read as one already; another recommender reads it again.
        reviews = ["" if event.read else event.review for event in rated]
        again = reads_reviews(fitted)
        values = [read_review(fitted, event.review) if event.read and again else event.rating for event in rated]
        side = kept_side(fitted, facts.about, facts.friends, contexts, reviews)
        times = np.array([event.at for event in rated], np.float64)
        return Ratings(items, np.array(values, np.float32), side=side, times=times)

    def check(self, said: Feedback) -> None:
        """Checks that the recommender reads what feedback says beside ratings.

        Raises:
            ConfigError: It does not.
        """
        fitted, nothing = self.trained.fitted, Ratings.empty()
        with_side(fitted, nothing, said.about, said.friends or ())
        for beside in said.beside:
            with_side(fitted, nothing, moment=beside.context)
            if beside.review and not reads_reviews(fitted):
                raise ConfigError("the recommender reads no reviews", "Name 'review' with the data it is fitted on")

    def read(self, reviews: Mapping[str, str]) -> dict[str, float]:
        """Returns what reviews of items that came without a rating are read as; see `read_review`."""
        return {item: read_review(self.trained.fitted, text) for item, text in reviews.items()}

    def unknown(self, person: Person) -> list[str]:
        """Says what is given of a person and of the moment and says nothing; see `unknown_values`."""
        return unknown_values(self.trained.fitted, person.adapted.support.side)

    def asking(
        self, person: Person, about: Mapping[str, str], friends: Sequence[str], moment: Mapping[str, str]
    ) -> Person:
        """Returns a person with what one question says of them, beside what was said before; nothing is kept.

        Raises:
            ConfigError: The recommender does not read it; see `with_side`.
        """
        support = with_side(self.trained.fitted, person.adapted.support, about, friends, moment)
        if not about and not friends:
            return replace(person, adapted=replace(person.adapted, support=support))
        adapted, losses = self.adapt([support])[0]
        return replace(person, adapted=adapted, losses=losses)

    def save_with(self, save: Callable[[NewAdapter], object]) -> None:
        """Passes new adapters to `save` instead of writing them here; it calls `keep`, or writes them itself."""
        self._save = save

    def keep(self, adapter: NewAdapter) -> None:
        """Writes an adapter into the store; if that fails, it is counted, and computed again when it is needed."""
        try:
            self.store.put([adapter])
        except (OSError, MetarecError) as error:
            self.counters.unsaved += 1
            _LOG.error("an adapter could not be kept", extra={"failure": type(error).__name__})

    def adapt(self, supports: Sequence[Ratings]) -> list[tuple[AdaptedUser, tuple[float, ...]]]:
        """Adapts to several users' ratings; see `BatchedModel.adapt`."""
        return self._model.adapt(self.recommender, supports)

    def erase(self, user: str) -> bool:
        """Removes a user from the store and from memory; returns whether there was one."""
        return self.erase_all([user])[0]

    def erase_all(self, users: Sequence[str]) -> list[bool]:
        """Removes users, for the price of one; see `erase`."""
        found = self.store.erase(*users)
        self.forget_erased()
        return found

    def forget_erased(self) -> None:
        """Removes from memory, and from this server's adapters, whom any server has erased since the last call."""
        for key in self.store.newly_erased():
            self.counters.erased += 1
            self.hot.drop(key)
            for forget in self._forget:
                forget(key)

    def probe(self) -> None:
        """Tests the model on one item.

        Raises:
            RuntimeError: It does not give a number.
        """
        if not np.isfinite(self._model.scores(self.new_user, np.zeros(1, np.int64))).all():
            raise RuntimeError("the model gives no number")

    def check_with(self, check: Callable[[], None] | None) -> None:
        """Calls `check` between two blocks of work from now on; what it raises ends the work."""
        self._model.check = check or _nothing

    def forget_with(self, forget: Callable[[str], object]) -> None:
        """Calls `forget` with the key of every user who is erased from now on."""
        self._forget.append(forget)

    # Rankings.

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


def _nothing() -> None:
    """Ends no work."""


def _tried(function: Callable[..., Any], *given: Any) -> Any:
    """Returns a function's result, or its error: one person's must not be the others'."""
    try:
        return function(*given)
    except Exception as error:
        return error


def _size(state: AdapterState) -> int:
    """Returns the bytes that an adapter takes in memory; every user's are the same."""
    return sum(value.numel() * value.element_size() + _TENSOR_BYTES for value in state.values())
