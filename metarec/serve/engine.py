"""Serves a recommender over a store: adapters from ratings, rankings from adapters, explanations, added items.

One thread calls it; it divides the work of a call among several. `served_catalog` has the items, `rankings` what is
asked of them; here are the users. `batching` adapts and scores, `retrieval` chooses the items worth an exact score,
`metarec.recommending.search` finds items by text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from metarec.data.interactions import Ratings
from metarec.errors import ArtifactError, ConfigError, MetarecError, UnknownItemError
from metarec.recommender import MetaRecommender
from metarec.serve.batching import BLOCK, USERS_AT_ONCE
from metarec.serve.hot_adapters import HotAdapters
from metarec.serve.person import Person
from metarec.serve.rankings import RankedCatalog
from metarec.serve.records import Feedback, FeedbackEvent, NewAdapter, Profile, UserFacts
from metarec.serve.store import AdapterStore
from metarec.system.tensors import AdapterState
from metarec.training.given_side import kept_side, read_review, reads_reviews, unknown_values, with_side

_LOG = logging.getLogger(__name__)

MAX_RATINGS = 64
# Bytes of a tensor object beside its numbers; most of a small adapter's size.
_TENSOR_BYTES = 512


class Engine(RankedCatalog):
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
        warm: The directory that keeps what is computed of the items at the first start; None keeps nothing.
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
        super().__init__(
            recommender,
            store,
            candidates=candidates,
            users_at_once=users_at_once,
            workers=workers,
            linearized_bytes=linearized_bytes,
            warm=warm,
        )
        self.hot: HotAdapters[Person] = HotAdapters(hot_bytes)
        self._save: Callable[[NewAdapter], object] = self.keep
        self._forget: list[Callable[[str], object]] = []
        self._adapter_bytes = _size(self.new_user.state)
        self.forget_erased()

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


def _nothing() -> None:
    """Ends no work."""


def _size(state: AdapterState) -> int:
    """Returns the bytes that an adapter takes in memory; every user's are the same."""
    return sum(value.numel() * value.element_size() + _TENSOR_BYTES for value in state.values())
