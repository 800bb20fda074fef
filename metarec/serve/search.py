"""Finds items by text: by the similarity of hidden states, and by the words that a title shares with the query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from metarec.data.interactions import Catalog, Codes, Flags
from metarec.lm.answer_model import AnswerModel
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.tokenized import tokenize_catalog
from metarec.recommender import MetaRecommender
from metarec.serve.retrieval import reads_all

_DIMENSIONS = 32
_RERANKED = 100
_SCORE_WEIGHT = 0.25
# Titles that a misspelt text may mean.
_RESPELT = 10


@dataclass(frozen=True)
class Found:
    """An item found by text: its similarity to the query, and the user's score where there is a user."""

    item: str
    title: str
    similarity: float
    score: float | None


class TextSearch:
    """Vectors and titles of a catalog's items.

    Args:
        trained: The recommender, without items that were added later; its items' hidden states fit the projection.
    """

    def __init__(self, trained: MetaRecommender) -> None:
        self._trained = trained
        self.index(trained)

    def index(self, recommender: MetaRecommender) -> None:
        """Takes the vectors and titles of a recommender's current catalog."""
        fitted = recommender.fitted
        self._catalog = fitted.catalog
        model = fitted.answer_model
        read = model is not None and reads_all(self._trained)
        self._vectors = self._project(model.states.cpu().numpy()) if model is not None and read else None

    def find(
        self,
        text: str,
        k: int,
        score: Callable[[Codes], NDArray[np.float32]] | None = None,
        kept: Flags | None = None,
    ) -> list[Found]:
        """Returns the items most similar to a text, best first; those that the text names come before all others.

        What names an item is what a person's ratings may call it, `Catalog.find`; or the words of its title in any
        order. Where no word is a title's, titles that are spelt alike come next.

        Args:
            text: The query.
            k: How many items.
            score: Scores items for a user; then the hundred most similar items are ordered by similarity and score.
            kept: Which items may be found, shape (items,); None for all.
        """
        similarity, exact = self._similarity(text)
        best = np.lexsort((-similarity, ~exact))
        best = (best if kept is None else best[kept[best]])[: max(k, _RERANKED)]
        scores = None
        if score is not None:
            scores = score(best)
            both = _standardized(similarity[best]) + _SCORE_WEIGHT * _standardized(scores)
            order = np.lexsort((-both, ~exact[best]))
            best, scores = best[order], scores[order]
        return [
            Found(
                self._catalog.ids[code],
                self._catalog.title(int(code)),
                float(similarity[code]),
                None if scores is None else float(scores[place]),
            )
            for place, code in enumerate(best[:k])
        ]

    def _similarity(self, text: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Returns every item's cosine plus its share of common words, and whether the text names it."""
        similarity = np.zeros(len(self._catalog), np.float32)
        model = self._trained.fitted.answer_model
        if model is not None and self._vectors is not None:
            query = self._read_query(text, model)
            norms = np.linalg.norm(self._vectors, axis=1) * np.linalg.norm(query)
            similarity = self._vectors @ query / np.maximum(norms, 1e-6)
        titles = self._catalog.titles
        shared = titles.shared(text).astype(np.float32)
        named = shared == 1
        named[titles.find(text)] = True
        if not shared.any():
            for place, code in enumerate(titles.nearest(text, _RESPELT)):
                shared[code] = 1 - place / (2 * _RESPELT)
        return similarity + shared, named

    def _read_query(self, text: str, answer_model: AnswerModel) -> NDArray[np.float32]:
        """Returns the vector of a text that is read as if it were an item's title."""
        fitted, backbone = self._trained.fitted, answer_model.backbone
        fields = {name: (text if name == "title" else "",) for name in fitted.catalog.fields}
        prompts = tokenize_catalog(backbone, fitted.task.template, Catalog(("query",), fields))
        # The whole model runs without a cache: a query must leave nothing on disk.
        states = ReferenceForward(backbone, prompts, answer_model.placement).frozen_states(np.zeros(1, np.int64))
        vector: NDArray[np.float32] = self._project(states.cpu().numpy())[0]
        return vector

    @cached_property
    def _projection(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean, standard deviation and whitened principal directions of the trained catalog's hidden states."""
        model = self._trained.fitted.answer_model
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


def _standardized(values: NDArray[np.float32]) -> NDArray[np.float32]:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else values * 0
