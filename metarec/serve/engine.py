"""What the service computes: adapters from feedback, rankings from adapters, reasons from both.

One thread calls it. Users are adapted one by one, or in bulk in batches of one fixed shape, so that nobody's numbers
depend, to the last bit, on who else is there. The first step starts where everybody starts, so what it needs of an item
may be read once, when the service starts. A whole catalog is ranked in two stages: an adapter's effect on every item to
first order chooses the candidates, which are then scored exactly, in blocks of one size on as many cores as there are.

Knows nothing of HTTP, queues or keys.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from metarec.data.interactions import Catalog, Codes, Ratings
from metarec.errors import ArtifactError, ConfigError, ConflictError, MetarecError, UnknownItemError
from metarec.lm.answer_model import AnswerModel
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.tokenized import tokenize_catalog
from metarec.metrics import rank_order
from metarec.recommender import AdaptedUser, MetaRecommender, Recommendation
from metarec.scorers.language.linearized import Linearized, linearize
from metarec.serve.hot_adapters import HotAdapters
from metarec.serve.items import check_fields, extend, longest
from metarec.serve.retrieval import Effects, extended, fit_effects
from metarec.serve.store import AdapterStore, NewAdapter, Profile, latest_ratings

_LOG = logging.getLogger(__name__)

# In bulk users are adapted in one shape: so many at a time and a row that keeps the shape, with ratings padded to a
# multiple of four. Larger batches serve more users a second and make a single one wait longer.
USERS_AT_ONCE = 1
BULK_USERS_AT_ONCE = 15
_FEWEST_RATINGS = 8
_RATINGS_STEP = 4
MAX_RATINGS = 64
_DIMENSIONS = 32
# Items are scored so many at a time, whatever else is asked: fewer take hardly less time.
_BLOCK = 32
# What a tensor takes beside its numbers: for small adapters that is most of it.
_TENSOR_BYTES = 512
_SEARCHED = 100
_TASTE_IN_SEARCH = 0.25


@dataclass(frozen=True)
class Person:
    """A user as they are served.

    Args:
        adapted: The adapter and the ratings it was adapted to.
        version: How many ratings the user had given when it was adapted; 0 is the meta-initialization.
        latest: How many ratings the user has given.
        losses: Support loss before each inner step, where this process took the steps.
        left_out: Ratings of items that the catalog does not have, and of more items than count.
    """

    adapted: AdaptedUser
    version: int
    latest: int
    losses: tuple[float, ...] = ()
    left_out: int = 0

    def facts(self) -> dict[str, object]:
        """What every answer says of the adapter that it used."""
        return {
            "version": self.version,
            "ratings": len(self.adapted.support),
            "diverged": self.adapted.diverged,
            "stale": self.version != self.latest,
        }


@dataclass(frozen=True)
class Reason:
    """A rated item, and how far a recommended item's score would fall without that rating."""

    item: str
    title: str
    rating: float
    moved: float


@dataclass(frozen=True)
class Found:
    """An item found by text: cosine of its vector and the query's, and the user's score where there is a user."""

    item: str
    title: str
    similarity: float
    score: float | None


@dataclass
class Counters:
    """What happened so far, for the metrics."""

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
        users_at_once: In what company users are adapted; the same number gives the same bits.
        tangent_bytes: Bytes of what the first step needs of items, read when the service starts; where not all fit,
            the most rated ones have it. Other items cost a longer first step.
        workers: How many such batches are adapted, and blocks of items scored, side by side.
    """

    def __init__(
        self,
        recommender: MetaRecommender,
        store: AdapterStore,
        *,
        hot_bytes: int = 256 << 20,
        candidates: int = _BLOCK,
        users_at_once: int = USERS_AT_ONCE,
        workers: int = 1,
        tangent_bytes: int = 0,
    ) -> None:
        if candidates < _BLOCK:
            raise ConfigError(f"candidates is {candidates}", f"Choose {_BLOCK} or more")
        self.trained = self.recommender = recommender
        self.digest = recommender.digest
        self.store = store
        self.hot: HotAdapters[Person] = HotAdapters(hot_bytes)
        self.counters = Counters()
        self._candidates = candidates
        self._users_at_once = users_at_once
        self._workers = ThreadPoolExecutor(workers, "model")
        model = recommender.adapted_model
        self._longest = 0 if model is None else longest(model)
        self._save: Callable[[NewAdapter], object] = self.keep
        # Every adapter has the same shape, so one user's size is everybody's.
        self.stranger = recommender.adapt([])
        tensors = self.stranger.state.values()
        self._adapter_bytes = sum(value.numel() * value.element_size() + _TENSOR_BYTES for value in tensors)
        self._linearized = self._at_the_start(tangent_bytes)
        self._effects: Effects | None = None
        self._learn_catalog()
        self.reload_items()

    # The catalog.

    @property
    def catalog(self) -> Catalog:
        """The items that can be recommended now."""
        return self.recommender.fitted.catalog

    def _at_the_start(self, limit: int) -> Linearized | None:
        """Reads the trained catalog's items at the meta-initialization, the most rated first; added items have none."""
        fitted, inner = self.trained.fitted, self.trained.scorer().inner
        numbers = sum(value.numel() for name, value in fitted.meta.init.items() if name in fitted.meta.log_rate)
        model = self.trained.adapted_model
        if model is None or inner.head is not None or not inner.steps or not numbers:
            return None
        count = limit // (4 * numbers)
        chosen = np.sort(np.argsort(-fitted.prior.count, kind="stable")[:count])
        return linearize(model, fitted.meta, chosen) if count else None

    def _learn_catalog(self) -> None:
        """Prepares what ranking the current catalog needs: everybody's scores before adaptation, and vectors."""
        fitted = self.recommender.fitted
        self._code = {item: code for code, item in enumerate(fitted.catalog.ids)}
        known = len(getattr(self, "_prior_scores", ()))
        self.stranger = AdaptedUser(self.recommender, Ratings.empty(), self.stranger.state, False, 0.0)
        fresh = self.stranger.scores(np.arange(known, len(fitted.catalog))).numpy()
        self._prior_scores = np.concatenate([getattr(self, "_prior_scores", fresh[:0]), fresh])
        self._start_terms = self.stranger.term_scores()
        model = fitted.answer_model
        self.vectors = None if model is None else self._project(model.states.cpu().numpy())
        self._title_words = [set(_words(title)) for title in fitted.catalog.fields["title"]]

    def prepare(self) -> Effects:
        """Reads what ranking a large catalog needs of items that have not been read yet, so that no user waits for it.

        Returns:
            What an adapter does to every item.
        """
        meta = self.trained.fitted.meta
        if self._effects is None:
            self._effects = fit_effects(self.trained.adapted_model, meta, self.trained.scorer().inner)
        if len(self._effects) < len(self.catalog):
            answer_model = self.recommender.adapted_model
            self._effects = extended(self._effects, answer_model, meta, len(self.catalog), self._linearized)
        return self._effects

    @cached_property
    def _projection(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean, spread and whitened principal directions of the trained catalog's states."""
        model = self.trained.fitted.answer_model
        assert model is not None
        states = model.states.cpu().numpy().astype(np.float64)
        mean, spread = states.mean(0), states.std(0) + 1e-6
        values, directions = np.linalg.eigh(np.cov((states - mean) / spread, rowvar=False))
        top = np.argsort(-values)[:_DIMENSIONS]
        return mean, spread, directions[:, top] / np.sqrt(np.maximum(values[top], 1e-6))

    def _project(self, states: np.ndarray) -> NDArray[np.float32]:
        mean, spread, directions = self._projection
        projected: NDArray[np.float32] = (((states - mean) / spread) @ directions).astype(np.float32)
        return projected

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
        # The model reads them first: what it cannot read is not kept.
        fresh = [(item, fields) for item, fields in checked.items() if item not in self._code]
        longer = extend(self.trained, self.recommender, fresh) if fresh else self.recommender
        new = self.store.add_items(list(checked.items()))
        self.recommender = longer
        self._learn_catalog()
        return new

    def reload_items(self) -> None:
        """Takes over items that another server, or an earlier run, has added to the store."""
        if self.store.count_items() <= len(self.catalog) - len(self.trained.fitted.catalog):
            return
        empty = dict.fromkeys(self.trained.fitted.catalog.fields, "")
        fresh = [(item, empty | fields) for item, fields in self.store.items() if item not in self._code]
        if fresh:
            self.recommender = extend(self.trained, self.recommender, fresh)
            self._learn_catalog()

    # People.

    def people(self, users: Sequence[str]) -> dict[str, Person]:
        """Returns users as the log has them now: from memory, from the store, or adapted here."""
        self.reload_items()
        found: dict[str, Person] = {}
        waiting: list[tuple[str, Profile]] = []
        for user in dict.fromkeys(users):
            profile = self.store.profile(user)
            if profile is None or profile.version == 0:
                found[user] = Person(self.stranger, 0, 0)
            elif (hot := self.hot.get(profile.key, profile.version)) is not None:
                found[user] = self._renewed(hot)
            elif (kept := self._from_store(profile)) is not None and kept.version == profile.version:
                found[user] = kept
                self.hot.put(profile.key, profile.version, kept, self._adapter_bytes)
            else:
                waiting.append((user, profile))
        try:
            found |= self._adapt_people(waiting)
        except RuntimeError as error:
            # Out of memory, say: an older adapter is better than no answer.
            self.counters.failed += len(waiting)
            _LOG.error("adapting failed", extra={"failure": type(error).__name__})
            for user, profile in waiting:
                found[user] = self._from_store(profile) or Person(self.stranger, 0, profile.version)
        return found

    def _renewed(self, person: Person) -> Person:
        adapted = person.adapted
        if adapted.recommender is self.recommender:
            return person
        current = AdaptedUser(self.recommender, adapted.support, adapted.state, adapted.diverged, adapted.seconds)
        return Person(current, person.version, person.latest, person.losses, person.left_out)

    def _from_store(self, profile: Profile) -> Person | None:
        """Reads the last good version of an adapter."""
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
            self._save(NewAdapter(profile.key, profile.version, self.digest, adapted.save))
        return found

    def save_with(self, save: Callable[[NewAdapter], object]) -> None:
        """Hands adapters that are to be kept to somebody else, who calls `keep`."""
        self._save = save

    def keep(self, adapter: NewAdapter) -> None:
        """Writes an adapter into the store; a full disk costs a later computation, not the answer."""
        try:
            self.store.put([adapter])
        except (OSError, MetarecError) as error:
            self.counters.unsaved += 1
            _LOG.error("an adapter could not be kept", extra={"failure": type(error).__name__})

    def adapt(self, supports: Sequence[Ratings]) -> list[tuple[AdaptedUser, tuple[float, ...]]]:
        """Adapts to several users' ratings, each exactly as if they were alone.

        Returns:
            Each user's adapter, and their support loss before each step.
        """
        scorer = self.recommender.scorer()
        shapes = [
            (
                max(_FEWEST_RATINGS, -(-len(support) // _RATINGS_STEP) * _RATINGS_STEP),
                self._linearized is not None and self._linearized.covers(support.items),
            )
            for support in supports
        ]
        blocks: list[tuple[tuple[int, bool], list[int]]] = []
        for shape in sorted(set(shapes)):
            rows = [row for row, own in enumerate(shapes) if own == shape]
            blocks += [
                (shape, rows[start : start + self._users_at_once]) for start in range(0, len(rows), self._users_at_once)
            ]

        def adapt_block(job: tuple[tuple[int, bool], list[int]]) -> list[tuple[AdaptedUser, tuple[float, ...]]]:
            (width, linearized), block = job
            together = [supports[row] for row in block]
            if self._users_at_once > 1:
                together += [*[Ratings.empty()] * (self._users_at_once - len(block)), self._ruler(width)]
            began = time.perf_counter()
            adapted = scorer.adapt(together, self._linearized if linearized else None)
            seconds = (time.perf_counter() - began) / len(block)
            states = [
                {name: value[place].clone() for name, value in adapted.state.items()} for place in range(len(block))
            ]
            return [
                (
                    AdaptedUser(self.recommender, supports[row], state, bool(adapted.diverged[place]), seconds),
                    tuple(map(float, adapted.losses[:, place])),
                )
                for place, (row, state) in enumerate(zip(block, states, strict=True))
            ]

        done = self._workers.map(adapt_block, blocks) if len(blocks) > 1 else map(adapt_block, blocks)
        found = {
            row: user
            for (_, block), users in zip(blocks, done, strict=True)
            for row, user in zip(block, users, strict=True)
        }
        return [found[row] for row in range(len(supports))]

    def _ruler(self, width: int) -> Ratings:
        """Ratings of nobody that make every batch as wide, and its prompts as long, as any batch can be."""
        mean = self.trained.fitted.prior.mean
        return Ratings(np.full(width, self._longest, np.int64), np.full(width, mean, np.float32))

    def erase(self, user: str) -> bool:
        """Removes a user from memory and from the store."""
        profile = self.store.profile(user)
        if profile is not None:
            self.hot.drop(profile.key)
        return self.store.erase(user)

    # Rankings.

    def _scores(self, adapted: AdaptedUser, codes: Codes) -> NDArray[np.float32]:
        if not len(codes):
            return np.zeros(0, np.float32)
        # Whole blocks of one size, so that neither one item more nor one core more changes how the others are rounded.
        blocks = np.resize(codes, (-(-len(codes) // _BLOCK), _BLOCK))
        done = self._workers.map(adapted.scores, blocks) if len(blocks) > 1 else map(adapted.scores, blocks)
        scores: NDArray[np.float32] = torch.cat(list(done)).numpy()
        return scores[: len(codes)]

    def score(self, person: Person, items: Sequence[str]) -> tuple[Person, list[float]]:
        """Scores items by id; higher is better.

        Returns:
            Who was served, who is nobody in particular where the scores were not finite, and the scores.

        Raises:
            UnknownItemError: An item is not in the catalog.
        """
        codes = np.array([self.code(item) for item in items], np.int64)
        person, scores = self._finite(person, codes)
        return person, [float(value) for value in scores]

    def _finite(self, person: Person, codes: Codes) -> tuple[Person, NDArray[np.float32]]:
        scores = self._scores(person.adapted, codes)
        if np.isfinite(scores).all():
            return person, scores
        self.counters.diverged += 1
        _LOG.error("an adapter scored what is not a number; the prior is served")
        prior = AdaptedUser(self.recommender, person.adapted.support, self.stranger.state, True, 0.0)
        return Person(prior, person.version, person.latest, (), person.left_out), self._scores(prior, codes)

    def recommend(
        self, person: Person, k: int, *, exclude_seen: bool = True, explain: bool = False
    ) -> tuple[Person, list[tuple[Recommendation, list[Reason]]]]:
        """Ranks the catalog.

        Args:
            person: For whom.
            k: How many items; fewer come back where there are fewer.
            exclude_seen: Leaves out what the user has rated.
            explain: Adds the ratings that moved each item's score most.

        Returns:
            Who was served (see `score`), and the best items, each with its reasons.
        """
        codes = self.retrieve(person, k, exclude_seen)
        person, scores = self._finite(person, codes)
        catalog = self.catalog
        order = rank_order(scores, [catalog.ids[code] for code in codes], self.recommender.config.seed)[:k]
        best = [
            Recommendation(catalog.ids[codes[row]], catalog.title(int(codes[row])), float(scores[row])) for row in order
        ]
        reasons = self.explain(person, codes[order]) if explain else [[] for _ in best]
        return person, list(zip(best, reasons, strict=True))

    def retrieve(self, person: Person, k: int, exclude_seen: bool = True) -> Codes:
        """Chooses the candidates that are worth an exact score: the whole catalog where it is small enough.

        An adapter's effect on every item is taken to first order around the initialization.
        """
        seen = person.adapted.support.items if exclude_seen else np.zeros(0, np.int64)
        codes = np.setdiff1d(np.arange(len(self.catalog)), seen)
        count = max(self._candidates, 2 * k)
        if len(codes) <= count or person.adapted.state is self.stranger.state:
            approximate = self._prior_scores
        else:
            state, start = person.adapted.state, self.stranger.state
            # All terms but the adapter are cheap enough for the whole catalog, exactly.
            moved = person.adapted.term_scores() - self._start_terms + self.prepare()(state, start)
            approximate = self._prior_scores + np.nan_to_num(moved)
        best = np.argsort(-approximate[codes], kind="stable")[:count]
        chosen: Codes = np.sort(codes[best])
        return chosen

    def explain(self, person: Person, codes: Codes, most: int = 3) -> list[list[Reason]]:
        """Says which ratings moved some items' scores most, by adapting again without each of them.

        Returns:
            Up to `most` reasons per item, the strongest first; none where nothing was rated.
        """
        support = person.adapted.support
        if not len(support) or person.adapted.diverged or not len(codes):
            return [[] for _ in codes]
        without = [
            Ratings(np.delete(support.items, row), np.delete(support.values, row)) for row in range(len(support))
        ]
        full = self._scores(person.adapted, codes)
        moved = np.stack([full - self._scores(adapted, codes) for adapted, _ in self.adapt(without)])
        catalog = self.catalog
        return [
            [
                Reason(
                    catalog.ids[support.items[row]],
                    catalog.title(int(support.items[row])),
                    float(support.values[row]),
                    float(column[row]),
                )
                for row in np.argsort(-np.abs(column), kind="stable")[:most]
            ]
            for column in moved.T
        ]

    def _read_query(self, text: str, answer_model: AnswerModel) -> NDArray[np.float32]:
        """Returns the vector of a text read as if it were an item's title."""
        catalog, backbone = self.trained.fitted.catalog, answer_model.backbone
        fields = {name: (text if name == "title" else "",) for name in catalog.fields}
        prompts = tokenize_catalog(backbone, self.trained.fitted.task.template, Catalog(("query",), fields))
        # The whole model runs without a cache: a query must leave nothing on disk.
        states = ReferenceForward(backbone, prompts, answer_model.placement).frozen_states()
        vector: NDArray[np.float32] = self._project(states.cpu().numpy())[0]
        return vector

    def search(self, text: str, k: int, person: Person | None = None) -> list[Found]:
        """Finds items by text: the query is read as if it were a title, and compared with the items' vectors.

        Words that a title shares with the query count too. With a user, the best hundred are ordered by similarity and
        taste together.
        """
        fitted = self.trained.fitted
        similarity = np.zeros(len(self.catalog), np.float32)
        if fitted.answer_model is not None and self.vectors is not None:
            query = self._read_query(text, fitted.answer_model)
            norms = np.linalg.norm(self.vectors, axis=1) * np.linalg.norm(query)
            similarity = self.vectors @ query / np.maximum(norms, 1e-6)
        words = set(_words(text))
        shared = np.array([len(words & title) / len(words | title) for title in self._title_words])
        similarity = similarity + shared
        # A title that was asked for by name comes first, whatever the vectors or the taste say.
        named = shared < 1
        best = np.lexsort((-similarity, named))[: max(k, _SEARCHED)]
        scores = None
        if person is not None:
            scores = self._finite(person, best)[1]
            both = _standard(similarity[best]) + _TASTE_IN_SEARCH * _standard(scores)
            order = np.lexsort((-both, named[best]))
            best, scores = best[order], scores[order]
        return [
            Found(
                self.catalog.ids[code],
                self.catalog.title(int(code)),
                float(similarity[code]),
                None if scores is None else float(scores[place]),
            )
            for place, code in enumerate(best[:k])
        ]


def side_by_side(workers: int = 0) -> int:
    """Gives every batch one core of its own, which serves more users than all cores on one batch after another.

    Args:
        workers: How many batches; 0 takes one per core.

    Returns:
        How many.
    """
    workers = workers or torch.get_num_threads()
    torch.set_num_threads(1)
    return workers


def _words(text: str) -> list[str]:
    return "".join(char if char.isalnum() else " " for char in text.casefold()).split()


def _standard(values: NDArray[np.float32]) -> NDArray[np.float32]:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else values * 0
