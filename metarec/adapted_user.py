"""`AdaptedUser`: one person's adapter over a fitted recommender; scores, recommendations, a directory.

Knows nothing of how it was adapted: `MetaRecommender.adapt` and the service do that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec.config import RunConfig
from metarec.data.filters import ItemFilter
from metarec.data.interactions import Codes, Ratings, Values
from metarec.data.side import Side
from metarec.errors import ConfigError
from metarec.evaluation.calibration import Calibration, at_count
from metarec.evaluation.metrics import leaders, rank_order
from metarec.lm.answer_model import AnswerModel
from metarec.recommending.explanations import Reason, explain
from metarec.recommending.preferences import Informative, Knowledge, PreferenceModel
from metarec.recommending.recommender_files import digest_of, write_user
from metarec.recommending.reranking import ItemVectors, check_diversity, mmr, pool_size
from metarec.scorers.language.score import score_adapted
from metarec.scorers.term import weighted_sum
from metarec.system.notebook import facts_table
from metarec.system.progress import progress
from metarec.system.tensors import AdapterState, expand_users, select_user
from metarec.training.fitting import Fitted, adapted_model, meta_scorer
from metarec.training.given_side import side_facts, warn_of_unknown_values, with_side

if TYPE_CHECKING:
    import pandas as pd

_ITEMS_AT_ONCE = 512
# Terms without a language model copy the rows of the items that they are asked about.
_TERM_ITEMS_AT_ONCE = 65_536
# How many items a ranking scores in full; see `AdaptedUser.recommend`.
CANDIDATES = 200


@dataclass(frozen=True)
class Recommendation:
    """One recommended item: its id, its title and its score (higher is better, comparable within one user)."""

    item: str
    title: str
    score: float


@dataclass(frozen=True)
class AdaptedUser:
    """One person's adapter over a recommender.

    Args:
        fitted: The recommender's parts.
        config: The recommender's settings.
        support: What the person rated.
        state: The person's tensors, without a user dimension.
        diverged: Whether adapting met a non-finite number, so that the unadapted ranking is served.
        seconds: How long adapting took.
    """

    fitted: Fitted
    config: RunConfig
    support: Ratings
    state: AdapterState
    diverged: bool
    seconds: float

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={value}" for name, value in self._facts().items())
        return f"AdaptedUser({facts})"

    def _repr_html_(self) -> str:
        catalog = self.fitted.catalog
        rated = zip(self.support.items.tolist(), self.support.values.tolist(), strict=True)
        given = {f"{catalog.ids[code]} {catalog.title(code)}": f"{rating:g}" for code, rating in rated}
        return facts_table("AdaptedUser", self._facts()) + facts_table("ratings", given)

    def _facts(self) -> dict[str, object]:
        return {
            "ratings": len(self.support),
            "items": len(self.fitted.catalog),
            "diverged": self.diverged,
            "seconds": round(self.seconds, 3),
        }

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "an adapted user is not pickled",
            "Call save(path), pass the path, and call load_user(path) of the recommender in the worker",
        )

    @overload
    def score(self, items: Sequence[str], *, as_frame: Literal[False] = False) -> list[float]: ...

    @overload
    def score(self, items: Sequence[str], *, as_frame: Literal[True]) -> pd.DataFrame: ...

    def score(self, items: Sequence[str], *, as_frame: bool = False) -> list[float] | pd.DataFrame:
        """Scores items by id or title; higher is better.

        Args:
            items: The items.
            as_frame: Returns a DataFrame with the columns ``item`` (the id), ``title``, ``score``.

        Raises:
            UnknownItemError: An item is not in the catalog.
        """
        codes = self._codes(items)
        scores = [float(value) for value in self.scores(codes)]
        return _frame(self._entries(codes, scores)) if as_frame else scores

    def at(self, **moment: str | float) -> AdaptedUser:
        """Returns the same person in a moment, e.g. ``at(device="phone", hour=20)``, without adapting again.

        Args:
            **moment: Columns that the task's `context` names, to their values now.

        Raises:
            ConfigError: The recommender knows no such column.
        """
        asking = with_side(self.fitted, self.support, moment=moment)
        warn_of_unknown_values(self.fitted, Side(asked=asking.side.asked) if asking.side else None)
        return replace(self, support=asking)

    def _codes(self, items: Sequence[str]) -> Codes:
        if isinstance(items, str):
            raise ConfigError(f"items are '{items}'", f"Give a list: ['{items}']")
        return np.array([self.fitted.catalog.find(item) for item in items], np.int64)

    def _entries(self, codes: Codes, scores: Sequence[float]) -> list[Recommendation]:
        catalog = self.fitted.catalog
        named = zip(codes.tolist(), scores, strict=True)
        return [Recommendation(catalog.ids[code], catalog.title(code), float(score)) for code, score in named]

    @overload
    def recommend(
        self,
        k: int = 10,
        *,
        exclude: Sequence[str] = (),
        candidates: int = CANDIDATES,
        diversity: float = 0.0,
        where: str | None = None,
        block: Sequence[str] = (),
        as_frame: Literal[False] = False,
    ) -> list[Recommendation]: ...

    @overload
    def recommend(
        self,
        k: int = 10,
        *,
        exclude: Sequence[str] = (),
        candidates: int = CANDIDATES,
        diversity: float = 0.0,
        where: str | None = None,
        block: Sequence[str] = (),
        as_frame: Literal[True],
    ) -> pd.DataFrame: ...

    def recommend(
        self,
        k: int = 10,
        *,
        exclude: Sequence[str] = (),
        candidates: int = CANDIDATES,
        diversity: float = 0.0,
        where: str | None = None,
        block: Sequence[str] = (),
        as_frame: bool = False,
    ) -> list[Recommendation] | pd.DataFrame:
        """Ranks the catalog and returns its best items that the person has not rated.

        The terms that need no language model choose candidates from the whole catalog; the whole score orders these.

        Args:
            k: How many items.
            exclude: More items to leave out, by id or title.
            candidates: How many items the language model reads, at least twice `k`.
            diversity: 0 keeps the order of the scores; up to 1 the items are less and less alike, see
                `metarec.recommending.reranking.mmr`. Scores stay what they are.
            where: Only items of which this holds, e.g. ``year >= 1990 and "Comedy" in genres``, see
                `metarec.data.filters.ItemFilter.where`.
            block: Items never to recommend, by id or title, or ``FIELD=CATEGORY`` as in ``genres=Horror``.
            as_frame: Returns a DataFrame with the columns ``item`` (the id), ``title``, ``score``.

        Raises:
            ConfigError: `k` is not positive or exceeds what is left of the catalog, `diversity` is not between 0 and 1,
                or `where` is not understood.
            UnknownItemError: An item to leave out or to block is not in the catalog.
        """
        check_diversity(diversity)
        catalog = self.fitted.catalog
        left_out = {*self.support.items.tolist(), *self._codes(exclude).tolist()}
        kept = ItemFilter(catalog).kept(where, block) if where is not None or block else np.ones(len(catalog), bool)
        kept[sorted(left_out)] = False
        codes = np.flatnonzero(kept)
        if not 1 <= k <= len(codes):
            raise ConfigError(f"k is {k}", f"There are {len(codes)} items to recommend: choose 1 to {len(codes)}")
        codes = self._retrieved(codes, max(candidates, 2 * k, pool_size(k) if diversity else 0))
        scores = self.scores(codes).numpy()
        front = leaders(scores, pool_size(k) if diversity else k)
        codes, scores = codes[front], scores[front]
        order = rank_order(scores, [catalog.ids[code] for code in codes], self.config.seed)
        if diversity:
            order = order[: pool_size(k)]
            order = order[mmr(scores[order], ItemVectors(self.fitted).of(codes[order]), k, diversity)]
        best = self._entries(codes[order[:k]], scores[order[:k]].tolist())
        return _frame(best) if as_frame else best

    def predict_rating(self, items: Sequence[str]) -> list[float]:
        """Predicts the person's ratings of items, by id or title, on the scale of the recommender's task.

        Scores become ratings by the line that evaluation uses, fitted on validation users.

        Raises:
            UnknownItemError: An item is not in the catalog.
            ConfigError: The task has likes only, or no validation user had enough ratings.
        """
        calibration, codes = self._calibration(), self._codes(items)
        if self.fitted.task.rule.kind == "implicit":
            raise ConfigError(f"task '{self.fitted.task.name}' has likes only, no ratings", "Call predict_proba(items)")
        return _floats(calibration.ratings(self.support.values, self.scores(codes).numpy()))

    def predict_proba(self, items: Sequence[str]) -> list[float]:
        """Predicts with which probabilities the person likes items, by id or title; see `predict_rating`."""
        calibration, codes = self._calibration(), self._codes(items)
        return _floats(calibration.probabilities(self.support.values, self.scores(codes).numpy()))

    def predicted_ratings(self, scores: Sequence[float]) -> list[float] | None:
        """Returns what scores of this person stand for as ratings; None where `predict_rating` refuses."""
        if not self.fitted.calibration or self.fitted.task.rule.kind == "implicit":
            return None
        return _floats(self._calibration().ratings(self.support.values, np.array(scores, np.float32)))

    def predicted_likes(self, scores: NDArray[np.floating]) -> list[float] | None:
        """Returns the probabilities of a like that scores of this person stand for; None without a calibration."""
        if not self.fitted.calibration:
            return None
        return _floats(self._calibration().probabilities(self.support.values, scores))

    def _calibration(self) -> Calibration:
        if not self.fitted.calibration:
            raise ConfigError(
                "the recommender has no calibration: no validation user had enough ratings",
                "Lower 'shots' or 'query.min' of the task",
            )
        return at_count(self.fitted.calibration, len(self.support))

    def explain(self, item: str, most: int = 3) -> list[Reason]:
        """Says which of the person's ratings moved an item's score most.

        The person is adapted again without each rating; `Reason.moved` is how far the score would fall without it.

        Args:
            item: By id or title.
            most: How many ratings.

        Returns:
            The largest change first; none for a person without ratings, or whose adapting diverged.

        Raises:
            UnknownItemError: The item is not in the catalog.
        """
        return self.reasons([item], most)[0]

    def reasons(self, items: Sequence[str], most: int = 3) -> list[list[Reason]]:
        """Says of each item which of the person's ratings moved its score most; see `explain`."""
        codes = self._codes(items)
        if self.diverged:
            return [[] for _ in codes]

        def scores_without(supports: Sequence[Ratings]) -> list[NDArray[np.float32]]:
            adapted = meta_scorer(self.fitted, self.config).adapt(supports)
            states = (select_user(adapted.state, row) for row in range(len(supports)))
            pairs = zip(supports, states, strict=True)
            return [replace(self, support=support, state=state).scores(codes).numpy() for support, state in pairs]

        return explain(self.support, self.scores(codes).numpy(), scores_without, self.fitted.catalog, most)

    def preferences(self) -> Knowledge:
        """Says how much more the person is believed to like each category than others do, and how surely.

        Raises:
            ConfigError: The recommender's score has no Gaussian process.
        """
        return self._preference_model().knowledge(self.support)

    def informative(self, k: int = 10, *, exclude: Sequence[str] = ()) -> list[Informative]:
        """Returns the items whose ratings would tell most about the person; see `PreferenceModel.informative`.

        Args:
            k: How many items.
            exclude: More items to leave out, by id or title, e.g. those that the person does not know.

        Raises:
            ConfigError: The recommender's score has no Gaussian process.
            UnknownItemError: An item to leave out is not in the catalog.
        """
        allowed = np.ones(len(self.fitted.catalog), bool)
        allowed[self._codes(exclude)] = False
        return self._preference_model().informative(self.support, k, allowed)

    def _preference_model(self) -> PreferenceModel:
        model = PreferenceModel.of(self.fitted)
        if model is None:
            raise ConfigError(
                "the recommender's score has no Gaussian process, which preferences are read from",
                "Fit it with 'collaborative' in 'score' and 'collaborative.members' that are not 'none'",
            )
        return model

    def _retrieved(self, codes: Codes, count: int) -> Codes:
        """Returns the best items by the terms that need no language model; all of them where no term says anything."""
        cheap = self.fitted.cheap_terms
        if len(codes) <= count or not cheap or not (self.adapted_model or len(cheap) < len(self.fitted.terms)):
            return codes
        scores = self.term_scores(cheap)[codes]
        front = leaders(scores, count)
        best = front[np.argsort(-scores[front], kind="stable")[:count]]
        retrieved: Codes = np.sort(codes[best])
        return retrieved

    @torch.no_grad()
    def term_scores(self, names: Sequence[str] | None = None, each: Callable[..., Iterable[Any]] = map) -> Values:
        """Returns the sum of some terms of every item, each times its weight, shape (items,).

        Args:
            names: The terms; None takes all but the adapter.
            each: Calls a function with each of several blocks of items, as `map` does, or on several threads.
        """
        terms = {name: self.fitted.terms[name] for name in (self.fitted.terms if names is None else names)}
        everything = np.arange(len(self.fitted.catalog))
        if not terms:
            return np.zeros(len(everything), np.float32)
        state = {name: value.cpu() for name, value in expand_users(self.state, 1).items()}
        blocks = np.array_split(everything, max(1, -(-len(everything) // _TERM_ITEMS_AT_ONCE)))

        @torch.no_grad()
        def of_block(block: Codes) -> Values:
            values = {name: torch.from_numpy(term.values([self.support], [block])[0]) for name, term in terms.items()}
            total: Values = weighted_sum(state, {name: value[None] for name, value in values.items()})[0].numpy()
            return total

        return np.concatenate(list(each(of_block, blocks)))

    def save(self, path: str | Path, *, whole: bool = True) -> None:
        """Writes the adapter as a PEFT directory, with the person's ratings beside it.

        A head that was fitted in closed form is there as a rank-1 update of the output layer: loaded by PEFT, it moves
        the answer's log-odds as it moves the score, but for a constant of the person, which orders nothing. Where PEFT
        has no place for it, a warning says so.

        Args:
            path: Directory to create or replace.
            whole: False leaves the output layer's update out, which takes two bytes for every word of the vocabulary;
                `MetaRecommender.load_user` does not need it.

        Raises:
            ArtifactError: The directory exists and holds something else.
        """
        fitted = self.fitted
        rated = zip(self.support.items.tolist(), self.support.values.tolist(), strict=True)
        facts = {
            "recommender": digest_of(fitted),
            "ratings": [[fitted.catalog.ids[code], rating] for code, rating in rated],
            "diverged": self.diverged,
            "seconds": self.seconds,
            **side_facts(self.support),
        }
        write_user(Path(path), self.state, facts, fitted, self.config, whole=whole)

    @property
    def adapted_model(self) -> AnswerModel | None:
        """The language model that carries the adapter; None where the score has no adapter."""
        return adapted_model(self.config, self.fitted.answer_model)

    def scores(self, codes: Codes) -> Tensor:
        """Scores items by code, shape (items,); higher is better."""
        fitted = self.fitted
        state = expand_users(self.state, 1)
        at_once = _TERM_ITEMS_AT_ONCE if len(self.fitted.cheap_terms) == len(self.config.score) else _ITEMS_AT_ONCE
        blocks = np.array_split(codes, max(1, -(-len(codes) // at_once)))
        values = []
        with progress("ranking", len(blocks), after=2.0) as advance:
            for done, block in enumerate(blocks, start=1):
                values += score_adapted(
                    state,
                    [self.support],
                    [block],
                    fitted.terms,
                    fitted.prior,
                    self.adapted_model,
                    self.config.device,
                )
                advance(done)
        return torch.cat(values)


def _frame(entries: Sequence[Recommendation]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([vars(entry) for entry in entries], columns=["item", "title", "score"])


def _floats(values: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in values]
