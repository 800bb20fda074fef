"""Judges a served model by feedback: what it had said of an item before the rating of it came, and what has shifted.

A rating is scored by the adapter that is in memory when it arrives, which has not seen it, after the request is
answered. Sums are kept by model, range of K and group of users, and added to the store, see `prequential`. Of single
users only the latest scores and likes are kept, in memory alone, for pairs of what the same user rated.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from metarec.data.interactions import Values
from metarec.errors import MetarecError, UnknownItemError
from metarec.serve.drift import RECENT, Reference, drift, recent_drift
from metarec.serve.engine import Engine
from metarec.serve.person import Person
from metarec.serve.prequential import BINS, GROUPS, RANGES, Sums, ordered, range_of
from metarec.serve.records import Accepted, Feedback
from metarec.serve.store import AdapterStore
from metarec.training.fitting import Fitted

_LOG = logging.getLogger(__name__)
# Of so many users the latest scores are kept, so many of each.
_USERS, _SCORES = 4096, 16
# Sums are added to the store after so many seconds; a process that is killed loses those since.
_SAVE_SECONDS = 10.0
# Names of facts of the store begin so.
_SUMS, _REFERENCE = "sums", "trained on"


@dataclass(frozen=True)
class Known:
    """A user before their feedback: who they are to the store, and the adapter that is in memory.

    Args:
        key: The user's random key; empty where the store does not know them yet.
        person: None where their adapter is not in memory.
    """

    key: str
    person: Person | None


@dataclass(eq=False)
class _Model:
    """What is kept of one model: sums since the start, those that the store has, and the latest ratings' bins."""

    reference: Reference
    sums: Sums = field(default_factory=Sums.empty)
    saved: Sums = field(default_factory=Sums.empty)
    counted: tuple[int, int] = (0, 0)
    recent: deque[tuple[int, int, float]] = field(default_factory=lambda: deque(maxlen=RECENT))


class Watch(Collector):
    """What is known of how well models serve; a collector of Prometheus metrics.

    Args:
        share: The share of users whose feedback is judged.
    """

    def __init__(self, share: float = 1.0) -> None:
        self.share = share
        self.failures = 0
        # Names the time that is counted for, a canary or always; the wanted one begins with the next feedback.
        self.period = self.wanted = "always"
        self._models: dict[str, _Model] = {}
        self._latest: OrderedDict[str, tuple[str, deque[tuple[float, bool]]]] = OrderedDict()
        self._lock = threading.Lock()
        self._saved_at = time.monotonic()

    def model(self, engine: Engine) -> _Model:
        """Returns what is kept of an engine's model."""
        if engine.digest not in self._models:
            fresh = _Model(Reference.of(engine.trained.fitted))
            with self._lock:
                self._models[engine.digest] = fresh
        return self._models[engine.digest]

    def before(self, engine: Engine, users: Iterable[str]) -> dict[str, Known]:
        """Returns users as they are before feedback of theirs is stored; those who are not judged are left out."""
        found = {}
        try:
            if self.period != self.wanted:
                self.save(engine.store)
            for user in set(users):
                if _share_of(engine.store.pseudonym(user)) < self.share:
                    found[user] = self._before(engine, user)
        except Exception as error:  # feedback is worth more than what is said of it
            self._failed(error)
        return found

    def _before(self, engine: Engine, user: str) -> Known:
        profile = engine.store.profile(user)
        if profile is None or profile.version == 0:
            return Known("" if profile is None else profile.key, Person(engine.new_user, 0, 0))
        return Known(profile.key, engine.hot.peek(profile.key, profile.version))

    def after(self, engine: Engine, feedback: Feedback, accepted: Accepted, known: Known | None) -> None:
        """Judges the model by feedback that was stored; changes nothing else.

        Args:
            engine: Serves the user.
            feedback: What was stored.
            accepted: The outcome.
            known: The user before it; None where it is not judged.
        """
        if accepted.replayed or not feedback.ratings:
            return
        try:
            self._after(engine, feedback, known)
        except Exception as error:
            self._failed(error)

    def _after(self, engine: Engine, feedback: Feedback, known: Known | None) -> None:
        model = self.model(engine)
        rated = [(_code(engine, item), rating) for item, rating in dict(feedback.ratings).items()]
        with self._lock:
            for code, rating in rated:
                unknown = code is None or code >= len(model.reference.place)
                place = 0 if code is None or unknown else int(model.reference.place[code])
                tenth = int(model.reference.scale.tenths(np.array([rating]))[0])
                model.sums.count_came(place, tenth, rating, unknown=unknown)
                model.recent.append((place, tenth, rating))
        if known is None:
            return
        if known.person is None:
            model.sums.count_unjudged(len(rated))
            return
        person = known.person
        seen = set(person.adapted.support.items.tolist())
        fresh = [(code, rating) for code, rating in rated if code is not None and code not in seen]
        if fresh:
            adapted = replace(person.adapted, fitted=engine.recommender.fitted)
            scores = adapted.scores(np.array([code for code, _ in fresh], np.int64)).numpy()
            key = known.key or getattr(engine.store.profile(feedback.user), "key", "")
            at, group = range_of(len(adapted.support)), _group_of(engine.store.pseudonym(feedback.user))
            likes = _likes(engine.trained.fitted, adapted.support.values, [rating for _, rating in fresh])
            chances = adapted.predicted_likes(scores)
            self._count(engine.digest, key, at, group, scores, likes, chances)

    def _count(
        self,
        digest: str,
        key: str,
        at: int,
        group: int,
        scores: Values,
        likes: Sequence[bool | None],
        chances: Sequence[float] | None,
    ) -> None:
        sums = self._models[digest].sums
        with self._lock:
            whose, latest = self._latest.pop(key, (digest, deque(maxlen=_SCORES)))
            if whose != digest:  # scores of two models are not compared
                latest.clear()
            for place, (score, liked) in enumerate(zip(map(float, scores), likes, strict=True)):
                if liked is None or not math.isfinite(score):
                    continue
                if chances is not None:
                    sums.count_rating(at, group, chances[place], liked)
                for other, other_liked in latest:
                    if other_liked != liked:
                        sums.count_pair(at, group, ordered(score, liked, other))
                latest.append((score, liked))
            if key:
                self._latest[key] = (digest, latest)
            while len(self._latest) > _USERS:
                self._latest.popitem(last=False)

    def forget(self, key: str) -> None:
        """Forgets the latest scores of a user who was erased; sums stay."""
        with self._lock:
            self._latest.pop(key, None)

    def count_adapted(self, engines: Iterable[Engine]) -> None:
        """Counts the adaptations since the last call."""
        for engine in engines:
            model, now = self.model(engine), (engine.counters.adapted, engine.counters.diverged)
            model.sums.count_adapted(now[0] - model.counted[0], now[1] - model.counted[1])
            model.counted = now

    def save(self, store: AdapterStore, *, now: bool = False) -> None:
        """Adds what came since the last time to the store, at most every few seconds unless it is to be now."""
        if not now and self.period == self.wanted and time.monotonic() < self._saved_at + _SAVE_SECONDS:
            return
        wanted = self.wanted
        self._saved_at = time.monotonic()
        for digest, model in self._models.items():
            with self._lock:
                total = model.sums.copy()
            fresh = total - model.saved
            if not fresh:
                continue
            try:
                if not model.saved:
                    reference = json.dumps(model.reference.to_json())
                    store.set_fact(f"{_REFERENCE}/{digest}", reference)
                add_sums(store, self.period, digest, fresh)
                model.saved = total
            except MetarecError as error:  # they are added the next time
                self._failed(error)
                return
        self.period = wanted

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        _LOG.error("feedback could not be judged", extra={"failure": type(error).__name__})

    def collect(self) -> Iterable[Metric]:
        """Yields the metrics; their names and labels hold no user and no item."""
        with self._lock:
            models = dict(self._models)
        yield CounterMetricFamily("metarec_watch_failures", "feedback that could not be judged", self.failures)
        yield from _judgements({digest: model.sums for digest, model in models.items()})
        yield from _shifts(models)


def _judgements(models: Mapping[str, Sums]) -> Iterable[Metric]:
    """Yields counters from which AUC, log-loss and calibration error of any time are computed."""
    by_range = {
        "judged_pairs": ("pairs of a user's liked and disliked items, by K", "pairs", 0),
        "judged_pairs_ordered": ("such pairs whose scores were in order; a tie is a half", "pairs", 1),
        "judged_ratings": ("ratings with a probability made before they came, by K", "losses", 0),
        "judged_log_loss": ("sum of their log-losses", "losses", 1),
    }
    for name, (what, array, column) in by_range.items():
        family = CounterMetricFamily(f"metarec_{name}", what, labels=["model", "k"])
        for digest, sums in models.items():
            for (_, shots), value in zip(RANGES, sums.arrays[array].sum(1)[:, column], strict=True):
                family.add_metric([digest, shots], value)
        yield family
    by_bin = {
        "calibration_ratings": "ratings by K and tenth of the probability of a like",
        "calibration_probability": "sum of these probabilities",
        "calibration_likes": "likes among them",
    }
    for column, (name, what) in enumerate(by_bin.items()):
        family = CounterMetricFamily(f"metarec_{name}", what, labels=["model", "k", "tenth"])
        for digest, sums in models.items():
            for at, (_, shots) in enumerate(RANGES):
                for tenth in range(BINS):
                    family.add_metric([digest, shots, str(tenth)], sums.arrays["bins"][at, tenth, column])
        yield family
    for column, (name, what) in enumerate(
        {"model_adapted": "adapters computed", "model_diverged": "adapters that diverged"}.items()
    ):
        family = CounterMetricFamily(f"metarec_{name}", f"{what}, by model", labels=["model"])
        for digest, sums in models.items():
            family.add_metric([digest], sums.arrays["adapted"][column])
        yield family


def _shifts(models: Mapping[str, _Model]) -> Iterable[Metric]:
    """Yields what feedback is about, beside what the models were trained on."""
    items = CounterMetricFamily(
        "metarec_feedback_items",
        "ratings by tenth of the training ratings' popularity; 0: of items that nobody had rated",
        labels=["model", "popularity"],
    )
    counts = {
        "feedback_ratings": ("ratings", 0),
        "feedback_unknown_items": ("ratings of items that the model was not trained with", 2),
        "feedback_unjudged": ("ratings of users whose adapter was not in memory", 3),
    }
    families = {
        name: CounterMetricFamily(f"metarec_{name}", what, labels=["model"]) for name, (what, _) in counts.items()
    }
    gauges = {
        "item_drift": f"population stability index of items' popularity, of the last {RECENT} ratings",
        "rating_drift": f"population stability index of ratings, of the last {RECENT} ratings",
        "rating_shift": f"mean of the last {RECENT} ratings minus that of the training ratings",
    }
    shifts = {name: GaugeMetricFamily(f"metarec_{name}", what, labels=["model"]) for name, what in gauges.items()}
    for digest, model in models.items():
        for place, count in enumerate(model.sums.arrays["popularity"]):
            items.add_metric([digest, str(place)], count)
        for name, (_, column) in counts.items():
            families[name].add_metric([digest], model.sums.arrays["came"][column])
        for name, value in recent_drift(model.reference, list(model.recent)).items():
            shifts[name].add_metric([digest], math.nan if value is None else value)
    yield from (items, *families.values(), *shifts.values())


def report(store: AdapterStore) -> list[dict[str, Any]]:
    """Returns what a store's feedback says of every model: by K, in all, and how far feedback is from training."""
    models: dict[str, Sums] = {}
    for name, text in store.facts_named(f"{_SUMS}/").items():
        digest = name.rpartition("/")[2]
        models[digest] = models.get(digest, Sums.empty()) + Sums.from_json(json.loads(text))
    rows = []
    for digest, sums in models.items():
        kept = store.fact(f"{_REFERENCE}/{digest}")
        came = sums.arrays["came"]
        facts: dict[str, Any] = {
            "model": digest,
            "feedback": int(came[0]),
            "not_judged": int(came[3]),
            "of_unknown_items": float(came[2] / came[0]) if came[0] else None,
            "diverged": sums.diverged,
            **sums.values(),
            "by_shots": sums.by_range(),
        }
        if kept is not None:
            facts |= drift(
                Reference.from_json(json.loads(kept)), sums.arrays["popularity"], sums.arrays["tenths"], came[1]
            )
        rows.append(facts)
    return rows


def add_sums(store: AdapterStore, period: str, digest: str, sums: Sums) -> None:
    """Adds sums to those that the store holds of a model for a period."""

    def added(text: str | None) -> str:
        before = Sums.empty() if text is None else Sums.from_json(json.loads(text))
        return json.dumps((before + sums).to_json())

    store.change_fact(sums_name(period, digest), added)


def sums_name(period: str, digest: str) -> str:
    """Returns the name of the fact of a store that holds a model's sums of a period."""
    return f"{_SUMS}/{period}/{digest}"


def _code(engine: Engine, item: str) -> int | None:
    """Returns an item's code, None where the engine does not know it."""
    try:
        return engine.code(item)
    except UnknownItemError:
        return None


def _likes(fitted: Fitted, given: Values, ratings: Sequence[float]) -> list[bool | None]:
    """Says of ratings whether they are likes; None where that is above a mean of ratings and there are none yet."""
    threshold = fitted.task.like_threshold
    if not math.isnan(threshold):
        return [rating >= threshold for rating in ratings]
    if not len(given):
        return [None] * len(ratings)
    return [rating > float(given.mean()) for rating in ratings]


def _share_of(pseudonym: str) -> float:
    return int(pseudonym[:8], 16) / 2**32


def _group_of(pseudonym: str) -> int:
    return int(pseudonym[8:16], 16) % GROUPS
