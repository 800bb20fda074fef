"""`AdaptedUser`: one person's adapter over a fitted recommender; scores, recommendations, a directory.

Knows nothing of how it was adapted: `MetaRecommender.adapt` and the service do that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from metarec.config import RunConfig
from metarec.data.interactions import Codes, Ratings, Values
from metarec.errors import ConfigError
from metarec.fitting import Fitted, adapted_model
from metarec.lm.answer_model import AnswerModel
from metarec.metrics import rank_order
from metarec.notebook import facts_table
from metarec.progress import progress
from metarec.recommender_files import digest_of, write_user
from metarec.scorers.language.score import score_adapted
from metarec.scorers.term import weighted_sum
from metarec.tensors import AdapterState, expand_users

_ITEMS_AT_ONCE = 512


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

    def score(self, items: Sequence[str]) -> list[float]:
        """Scores items by id or title; higher is better.

        Raises:
            UnknownItemError: An item is not in the catalog.
        """
        catalog = self.fitted.catalog
        codes = np.array([catalog.find(item) for item in items], np.int64)
        return [float(value) for value in self.scores(codes)]

    def recommend(self, k: int = 10, *, exclude: Sequence[str] = ()) -> list[Recommendation]:
        """Ranks the whole catalog and returns its best items that the person has not rated.

        Args:
            k: How many items.
            exclude: More items to leave out, by id or title.

        Raises:
            ConfigError: `k` is not positive or exceeds what is left of the catalog.
        """
        catalog = self.fitted.catalog
        left_out = {*self.support.items.tolist(), *(catalog.find(item) for item in exclude)}
        codes = np.array([code for code in range(len(catalog)) if code not in left_out], np.int64)
        if not 1 <= k <= len(codes):
            raise ConfigError(f"k is {k}", f"There are {len(codes)} items to recommend: choose 1 to {len(codes)}")
        scores = self.scores(codes).numpy()
        order = rank_order(scores, [catalog.ids[code] for code in codes], self.config.seed)
        return [
            Recommendation(catalog.ids[codes[row]], catalog.title(int(codes[row])), float(scores[row]))
            for row in order[:k]
        ]

    @torch.no_grad()
    def term_scores(self) -> Values:
        """Returns every item's score without the adapter's part: all other terms, each times its weight, (items,)."""
        fitted = self.fitted
        everything = np.arange(len(fitted.catalog))
        if not fitted.terms:
            return np.zeros(len(everything), np.float32)
        values = {
            name: torch.from_numpy(term.values([self.support], [everything])[0])[None]
            for name, term in fitted.terms.items()
        }
        state = {name: value.cpu() for name, value in expand_users(self.state, 1).items()}
        total: Values = weighted_sum(state, values)[0].numpy()
        return total

    def save(self, path: str | Path) -> None:
        """Writes the adapter as a PEFT directory, with the person's ratings beside it.

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
        }
        write_user(Path(path), self.state, facts, fitted, self.config)

    @property
    def adapted_model(self) -> AnswerModel | None:
        """The language model that carries the adapter; None where the score has no adapter."""
        return adapted_model(self.config, self.fitted.answer_model)

    def scores(self, codes: Codes) -> Tensor:
        """Scores items by code, shape (items,); higher is better."""
        fitted = self.fitted
        state = expand_users(self.state, 1)
        blocks = np.array_split(codes, max(1, -(-len(codes) // _ITEMS_AT_ONCE)))
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
