"""Serves a recommender over a store: adapters from ratings, rankings from adapters, explanations, added items.

One thread calls it; it divides the work of a call among several. `batching` adapts and scores, `retrieval` chooses the
items worth an exact score, `search` finds items by text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from metarec.adapted_user import AdaptedUser, Recommendation
from metarec.data.interactions import Catalog, Codes, Ratings
from metarec.errors import ArtifactError, ConfigError, ConflictError, MetarecError, UnknownItemError
from metarec.explanations import Reason, explain
from metarec.metrics import rank_order
from metarec.recommender import MetaRecommender
from metarec.serve.batching import BLOCK, USERS_AT_ONCE, BatchedModel, linearize_most_rated
from metarec.serve.hot_adapters import HotAdapters
from metarec.serve.items import check_fields, extend
from metarec.serve.person import Person
from metarec.serve.records import NewAdapter, Profile, latest_ratings
from metarec.serve.retrieval import CandidateRetrieval, Effects
from metarec.serve.search import Found, TextSearch
from metarec.serve.store import AdapterStore
from metarec.tensors import AdapterState

_LOG = logging.getLogger(__name__)

MAX_RATINGS = 64
# Bytes of a tensor object beside its numbers; most of a small adapter's size.
_TENSOR_BYTES = 512


@dataclass
class Counters:
    """Numbers of events since the start, for the metrics."""

    adapted: int = 0
    diverged: int = 0
    damaged: int = 0
    failed: int = 0
    unsaved: int = 0


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
            all items fit, the most rated ones have them. A user who rated another item takes a slower first step.
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
        linearized = linearize_most_rated(recommender, linearized_bytes)
        self._model = BatchedModel(recommender, users_at_once=users_at_once, workers=workers, linearized=linearized)
        self.new_user = recommender.adapt([])
        self._adapter_bytes = _size(self.new_user.state)
        self._retrieval = CandidateRetrieval(recommender, linearized)
        self._search = TextSearch(recommender)
        self._serve(recommender)
        self.reload_items()

    # The catalog.

    @property
    def catalog(self) -> Catalog:
        """The items that can be recommended now."""
        return self.recommender.fitted.catalog

    def _serve(self, recommender: MetaRecommender) -> None:
        """Takes a recommender over a longer catalog into service."""
        self.recommender = recommender
        self._code = {item: code for code, item in enumerate(recommender.fitted.catalog.ids)}
        self.new_user = replace(self.new_user, fitted=recommender.fitted)
        self._retrieval.update(self.new_user)
        self._search.index(recommender)

    def prepare(self) -> Effects:
        """Computes what ranking a large catalog needs of items that do not have it yet, so that no user waits for it.

        Returns:
            The effect of an adapter on every item.
        """
        return self._retrieval.prepare()

    def code(self, item: str) -> int:
        """Returns an item's code.

        Raises:
            UnknownItemError: The catalog has no such id.
        """
        if item not in self._code:
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
            if item in trained or checked[item] != check_fields(self.trained.fitted.catalog, fields):
                raise ConflictError("an item of that id is there already", "Choose another id")
        # The model reads them before the store keeps them: an item that cannot be read is not kept.
        fresh = [(item, fields) for item, fields in checked.items() if item not in self._code]
        longer = extend(self.trained, self.recommender, fresh) if fresh else self.recommender
        new = self.store.add_items(list(checked.items()))
        self._serve(longer)
        return new

    def reload_items(self) -> None:
        """Reads items that another server, or an earlier run, has added to the store."""
        if self.store.count_items() <= len(self.catalog) - len(self.trained.fitted.catalog):
            return
        empty = dict.fromkeys(self.trained.fitted.catalog.fields, "")
        fresh = [(item, empty | fields) for item, fields in self.store.items() if item not in self._code]
        if fresh:
            self._serve(extend(self.trained, self.recommender, fresh))

    # Users.

    def people(self, users: Sequence[str]) -> dict[str, Person]:
        """Returns users with the adapters of their latest ratings: from memory, from the store, or adapted here."""
        self.reload_items()
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
            events = self.store.events(user)
            latest = latest_ratings(events, MAX_RATINGS)
            known = sorted((self._code[item], rating) for item, rating in latest if item in self._code)
            items, values = [code for code, _ in known], [rating for _, rating in known]
            supports.append(Ratings(np.array(items, np.int64), np.array(values, np.float32)))
            left_out.append(len({event.item for event in events}) - len(known))
        found = {}
        for (user, profile), missing, (adapted, losses) in zip(waiting, left_out, self.adapt(supports), strict=True):
            person = Person(adapted, profile.version, profile.version, losses, missing)
            found[user] = person
            self.counters.adapted += 1
            self.counters.diverged += adapted.diverged
            self.hot.put(profile.key, profile.version, person, self._adapter_bytes)
            self._save(NewAdapter(profile.key, profile.version, self.digest, partial(adapted.save, whole=False)))
        return found

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
        """Removes a user from memory and from the store; returns whether there was one."""
        profile = self.store.profile(user)
        if profile is not None:
            self.hot.drop(profile.key)
        return self.store.erase(user)

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
        scores = self._model.scores(person.adapted, codes)
        if np.isfinite(scores).all():
            return person, scores
        self.counters.diverged += 1
        _LOG.error("an adapter's scores are not finite; the scores before adaptation are served")
        unadapted = replace(self.new_user, support=person.adapted.support, diverged=True, seconds=0.0)
        return replace(person, adapted=unadapted, losses=()), self._model.scores(unadapted, codes)

    def recommend(
        self, person: Person, k: int, *, exclude_seen: bool = True, explain: bool = False
    ) -> tuple[Person, list[tuple[Recommendation, list[Reason]]]]:
        """Ranks the catalog.

        Args:
            person: For whom.
            k: How many items; fewer come back where there are fewer.
            exclude_seen: Leaves out what the user has rated.
            explain: Adds the ratings that changed each item's score most.

        Returns:
            Who was served (see `score`), and the best items, each with its reasons.
        """
        codes = self.retrieve(person, k, exclude_seen)
        person, scores = self._finite_scores(person, codes)
        catalog = self.catalog
        order = rank_order(scores, [catalog.ids[code] for code in codes], self.recommender.config.seed)[:k]
        best = [
            Recommendation(catalog.ids[codes[row]], catalog.title(int(codes[row])), float(scores[row])) for row in order
        ]
        reasons = self.explain(person, codes[order]) if explain else [[] for _ in best]
        return person, list(zip(best, reasons, strict=True))

    def retrieve(self, person: Person, k: int, exclude_seen: bool = True) -> Codes:
        """Chooses the items that are worth an exact score; all of them where the catalog is small enough."""
        seen = person.adapted.support.items if exclude_seen else np.zeros(0, np.int64)
        codes = np.setdiff1d(np.arange(len(self.catalog)), seen)
        return self._retrieval.choose(person.adapted, codes, max(self._candidates, 2 * k))

    def explain(self, person: Person, codes: Codes, most: int = 3) -> list[list[Reason]]:
        """Returns the ratings that changed some items' scores most; see `metarec.explanations.explain`."""
        adapted = person.adapted
        if adapted.diverged:
            return [[] for _ in codes]

        def scores_without(supports: Sequence[Ratings]) -> list[NDArray[np.float32]]:
            return [self._model.scores(other, codes) for other, _ in self.adapt(supports)]

        return explain(adapted.support, self._model.scores(adapted, codes), scores_without, self.catalog, most)

    def search(self, text: str, k: int, person: Person | None = None) -> list[Found]:
        """Finds items by text, and with a user by their scores too; see `TextSearch.find`."""
        if person is None:
            return self._search.find(text, k)
        user = person
        return self._search.find(text, k, lambda codes: self._finite_scores(user, codes)[1])


def _size(state: AdapterState) -> int:
    """Returns the bytes that an adapter takes in memory; every user's are the same."""
    return sum(value.numel() * value.element_size() + _TENSOR_BYTES for value in state.values())
