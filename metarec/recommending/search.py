"""Finds items by text: by words (BM25) and by meaning (a sentence encoder), fused, and ordered by a person's taste too.

Writings without spaces are split into pairs of characters. The encoder is loaded when it is first needed.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from metarec.data.interactions import Catalog, Codes, Flags
from metarec.data.templates import PromptTemplate
from metarec.data.titles import words
from metarec.errors import BackboneError, ConfigError

if TYPE_CHECKING:
    from metarec.adapted_user import AdaptedUser
    from metarec.config import RunConfig
    from metarec.training.fitting import Fitted

_LOG = logging.getLogger(__name__)
Floats = NDArray[np.float32]
# Of reciprocal rank fusion, as published.
_DAMPING = 60
# So many items are ordered by a person's scores too, and so many that are spelt alike may be meant.
_RERANKED, _RESPELT = 100, 10
# How much a person's order counts beside one of the text's.
PERSONAL = 1.0
# Larger catalogs are read by the encoder only where their items' vectors are features of the recommender, and cached.
LARGEST_READ = 20_000
# Han, kana, Hangul.
_UNSPACED = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]+"
)


def tokens(text: str) -> list[str]:
    """Returns a text's words without case and accents; runs of Han, kana and Hangul as pairs of characters.

    A run of one character is itself. ``東京物語 (1953)`` is ``東京``, ``京物``, ``物語``, ``1953``.
    """
    found: list[str] = []
    for folded in words(text):
        word, end = unicodedata.normalize("NFC", folded), 0
        for run in _UNSPACED.finditer(word):
            found += [word[end : run.start()]] if word[end : run.start()] else []
            found += [run[0][place : place + 2] for place in range(max(len(run[0]) - 1, 1))]
            end = run.end()
        found += [word[end:]] if word[end:] else []
    return found


class WordIndex:
    """BM25 over texts.

    Args:
        texts: One per item.
        split: Splits texts and queries into words.

    Raises:
        ConfigError: The package bm25s is not installed.

    Source: Robertson and Zaragoza 2009, "The probabilistic relevance framework: BM25 and beyond", by the package bm25s
    (Lu 2024, arXiv 2407.03618), with Lucene's weights.
    """

    def __init__(self, texts: Iterable[str], split: Callable[[str], list[str]] = tokens) -> None:
        try:
            import bm25s
        except ImportError:
            raise ConfigError("search needs the package bm25s", "Run: pip install 'metarec[search]'") from None
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it says each step, whatever the root's level is
        self._split = split
        rows = [split(text) for text in texts]
        self._items = len(rows)
        self._known = {token for row in rows for token in row}
        self._index: Any = None
        if any(rows):
            self._index = bm25s.BM25(method="lucene")
            self._index.index(rows, show_progress=False)

    def unknown(self, text: str) -> bool:
        """Says whether a query has a word that no text has."""
        return not self._known.issuperset(self._split(text))

    def scores(self, text: str) -> Floats:
        """Returns how well each item's text answers a query, shape (items,); 0 where no word is shared."""
        asked = self._split(text)
        if self._index is None or not asked:
            return np.zeros(self._items, np.float32)
        found: Floats = np.asarray(self._index.get_scores(asked), np.float32)
        return found


class MeaningIndex:
    """A sentence encoder's vectors of items.

    Args:
        encoder: The encoder's name or directory.
        text: What is read of an item.
    """

    def __init__(self, encoder: str, text: PromptTemplate) -> None:
        self._encoder = encoder
        self._text = text
        self._vectors: Floats = np.zeros((0, 0), np.float32)

    def extend(self, catalog: Catalog) -> None:
        """Reads the items that it does not hold yet; those that it holds are the catalog's first ones."""
        from metarec.scorers.language.item_vectors import text_vectors

        held = len(self._vectors)
        if held == len(catalog):
            return
        fields = {name: column[held:] for name, column in catalog.fields.items()}
        fresh = text_vectors(Catalog(catalog.ids[held:], fields), self._text, self._encoder)
        lengths = np.linalg.norm(fresh, axis=1, keepdims=True)
        unit = (fresh / np.maximum(lengths, 1e-9)).astype(np.float32)
        self._vectors = np.concatenate([self._vectors, unit]) if held else unit

    def similarity(self, text: str) -> Floats:
        """Returns the cosine of every item's vector and a query's, shape (items,); leaves nothing on disk."""
        query = self._read(text)
        found: Floats = self._vectors @ (query / max(float(np.linalg.norm(query)), 1e-9))
        return found

    @cached_property
    def _backbone(self) -> Any:
        from metarec.lm.loading import load_backbone

        return load_backbone(self._encoder)

    def _read(self, text: str) -> Floats:
        from metarec.scorers.language.item_vectors import unkept_text_vectors

        vector: Floats = unkept_text_vectors([text], self._backbone)[0].astype(np.float32)
        return vector


@dataclass(frozen=True)
class Found:
    """An item found by text.

    Args:
        item: Its id.
        title: Its title.
        similarity: How near to the top the orders by words and by meaning have it: 1 where both have it first.
        score: The person's score, where there is a person.
    """

    item: str
    title: str
    similarity: float
    score: float | None


def fused(orders: Sequence[Codes], items: int) -> Floats:
    """Fuses orders of items by reciprocal ranks.

    Args:
        orders: Item codes, the best first; an item that an order leaves out gains nothing by it.
        items: How many items there are.

    Returns:
        From 0 to 1, shape (items,).

    Source: Cormack, Clarke and Buettcher 2009, "Reciprocal rank fusion outperforms Condorcet", with k = 60.
    """
    total = np.zeros(items, np.float64)
    for order in orders:
        total[order] += (_DAMPING + 1) / (_DAMPING + 1 + np.arange(len(order)))
    found: Floats = (total / max(len(orders), 1)).astype(np.float32)
    return found


class TextSearch:
    """Searches a catalog that may grow.

    Args:
        catalog: The items.
        text: What the encoder reads of an item.
        encoder: The sentence encoder's name or directory; None searches by words alone.
    """

    def __init__(self, catalog: Catalog, text: PromptTemplate, encoder: str | None) -> None:
        self.meanings = None if encoder is None else MeaningIndex(encoder, text)
        self.index(catalog)

    @classmethod
    def of(cls, fitted: Fitted, config: RunConfig) -> TextSearch:
        """Returns the search of a recommender's catalog, by its settings' sentence encoder.

        A catalog that would take long to read is searched by words alone, unless its vectors were read for fitting.
        """
        read = "text" in (config.collaborative.features or ("text",))
        encoder = config.collaborative.encoder if read or len(fitted.catalog) <= LARGEST_READ else None
        return cls(fitted.catalog, fitted.task.item_text, encoder)

    def index(self, catalog: Catalog) -> None:
        """Takes a catalog whose first items are those of before."""
        self._catalog = catalog
        self.__dict__.pop("_words", None)

    @cached_property
    def _words(self) -> WordIndex:
        return WordIndex(" ".join(row) for row in zip(*self._catalog.fields.values(), strict=True))

    def prepare(self) -> None:
        """Reads what the first search would read, so that nobody waits for it."""
        self._orders("")

    def find(
        self,
        text: str,
        k: int = 10,
        *,
        score: Callable[[Codes], NDArray[np.floating]] | None = None,
        weight: float = PERSONAL,
        kept: Flags | None = None,
    ) -> list[Found]:
        """Returns items that answer a text, best first; those that the text names come before all others.

        What names an item is what a person's ratings may call it, `Catalog.find`; or the words of its title in any
        order. Where a word is unknown, titles that are spelt alike are another order beside words and meaning. Without
        the encoder nothing is found that shares no word and is spelt like nothing.

        Args:
            text: The query.
            k: How many items.
            score: Scores items for a person: the hundred best are ordered by these scores too.
            weight: How much the person's order counts beside one of the text's.
            kept: Which items may be found, shape (items,); None for all.

        Raises:
            ConfigError: The package bm25s is not installed.
        """
        orders = self._orders(text)
        similarity = fused(orders, len(self._catalog))
        named = self._named(text)
        best = np.lexsort((-similarity, ~named))
        known = (similarity > 0) | named
        best = best[(known if kept is None else known & kept)[best]][: max(k, _RERANKED)]
        scores: NDArray[np.floating] | None = None
        if score is not None and len(best):
            scores = score(best)
            place = np.empty(len(best), np.int64)
            place[np.argsort(-scores, kind="stable")] = np.arange(len(best))
            personal = (_DAMPING + 1) / (_DAMPING + 1 + place)
            order = np.lexsort((-(similarity[best] * len(orders) + weight * personal), ~named[best]))
            best, scores = best[order], scores[order]
        return [
            Found(
                self._catalog.ids[code],
                self._catalog.title(int(code)),
                float(similarity[code]),
                None if scores is None else float(scores[place]),
            )
            for place, code in enumerate(best[:k].tolist())
        ]

    def _orders(self, text: str) -> list[Codes]:
        """Returns the items by words, by spelling where a word is unknown, and by meaning."""
        by_words = self._words.scores(text)
        orders = [np.argsort(-by_words, kind="stable")[: int((by_words > 0).sum())]]
        if self._words.unknown(text):
            respelt = np.array(self._catalog.titles.nearest(text, _RESPELT), np.int64)
            orders = [order for order in (*orders, respelt) if len(order)]
        if self.meanings is not None:
            try:
                self.meanings.extend(self._catalog)
            except BackboneError as error:
                _LOG.warning("search goes by words alone: %s", error)
                self.meanings = None
                return orders
            if text:
                orders.append(np.argsort(-self.meanings.similarity(text), kind="stable"))
        return orders

    def _named(self, text: str) -> Flags:
        named: Flags = np.asarray(self._catalog.titles.shared(text) == 1, bool)
        named[self._catalog.titles.find(text)] = True
        return named


class SearchesItems(ABC):
    """What a recommender's catalog is searched by; see `TextSearch`."""

    config: RunConfig
    _searched: tuple[Fitted, TextSearch] | None = None

    @property
    @abstractmethod
    def fitted(self) -> Fitted:
        """What fitting left behind."""

    def search(
        self, query: str, k: int = 10, *, user: AdaptedUser | None = None, weight: float = PERSONAL
    ) -> list[Found]:
        """Finds items by text: by words and by meaning, and with a person by their taste too.

        Args:
            query: Words of a title, or a description.
            k: How many items.
            user: A person, from `adapt`.
            weight: How much the person's order counts beside one of the text's.

        Raises:
            ConfigError: The package bm25s is not installed, or `k` is not positive.
        """
        if k < 1:
            raise ConfigError(f"k is {k}", "Choose 1 or more")
        if self._searched is None or self._searched[0] is not self.fitted:
            self._searched = (self.fitted, TextSearch.of(self.fitted, self.config))
        score = None if user is None else (lambda codes: user.scores(codes).numpy())
        return self._searched[1].find(query, k, score=score, weight=weight)
