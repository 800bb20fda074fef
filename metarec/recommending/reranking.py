"""Re-ranks recommendations so that they are less alike, by maximal marginal relevance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarec.data.interactions import Codes
from metarec.errors import ConfigError
from metarec.evaluation.recommended_lists import token_vectors
from metarec.scorers.collaborative.terms import CollaborativeTerm
from metarec.scorers.collaborative.text import TextRidge
from metarec.training.fitting import Fitted

Floats = NDArray[np.float64]
# How many of the best items take part: so many, and at least so many for each that is asked for.
POOL, POOL_PER_ITEM = 100, 5


def check_diversity(diversity: float) -> float:
    """Returns how much diversity weighs.

    Raises:
        ConfigError: It is not between 0 and 1.
    """
    if not 0 <= diversity <= 1:
        raise ConfigError(
            f"diversity is {diversity}", "Choose 0 (the order of the scores) to 1 (as different as can be)"
        )
    return diversity


class ItemVectors:
    """Vectors of length one of a recommender's items, as far as it has them: of text, and of categories.

    Args:
        fitted: The recommender.
    """

    def __init__(self, fitted: Fitted) -> None:
        self._fitted = fitted

    @cached_property
    def _categories(self) -> Any:
        return token_vectors(self._fitted.catalog)

    def of(self, codes: Codes) -> list[Floats]:
        """Returns arrays of shape (items, width); the similarity of two items is the mean of their products.

        An item that was added later has no vector of text, but zeros.
        """
        term = self._fitted.terms.get("collaborative")
        members = term.stack.members if isinstance(term, CollaborativeTerm) else ()
        texts = [np.asarray(member.vectors[codes], np.float64) for member in members if isinstance(member, TextRidge)]
        return [*texts[:1], self._categories[codes].toarray()]


def mmr(scores: NDArray[np.floating], vectors: Sequence[Floats], k: int, diversity: float) -> Codes:
    """Returns the places of `k` candidates: each next one is good, and unlike those before it.

    Args:
        scores: The candidates' scores, the best one first.
        vectors: Their vectors, see `ItemVectors.of`.
        k: How many.
        diversity: 0 keeps the order; with 1 only the first one is chosen by its score.

    Source: Carbonell and Goldstein 1998, "The use of MMR, diversity-based reranking", with scores scaled to 0 to 1 over
    the candidates.
    """
    count = min(k, len(scores))
    if diversity == 0 or count == 0:
        return np.arange(count)
    relevance = (np.asarray(scores, np.float64) - np.min(scores)) / (np.ptp(scores) or 1.0)
    likeness: Floats = np.mean([block @ block.T for block in vectors], 0)
    nearest = np.full(len(scores), -np.inf)
    chosen: list[int] = [0]
    while len(chosen) < count:
        nearest = np.maximum(nearest, likeness[chosen[-1]])
        value = (1 - diversity) * relevance - diversity * nearest
        value[chosen] = -np.inf
        chosen.append(int(np.argmax(value)))
    return np.array(chosen, np.int64)


def pool_size(k: int) -> int:
    """Returns how many of the best items a re-ranking of `k` looks at."""
    return max(POOL, POOL_PER_ITEM * k)
