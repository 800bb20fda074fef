"""A recommender over a catalog that grows: items that are added and removed, and what is computed of each once.

The catalog is the trained one and, after it, the items of the store, which other servers change too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from metarec.adapted_user import AdaptedUser
from metarec.data.filters import ItemFilter
from metarec.data.interactions import Catalog, Ratings
from metarec.errors import ConfigError, ConflictError, UnknownItemError
from metarec.recommender import MetaRecommender
from metarec.recommending.reranking import ItemVectors
from metarec.recommending.search import TextSearch
from metarec.serve.batching import BLOCK, USERS_AT_ONCE, BatchedModel, linearize_most_rated
from metarec.serve.items import check_fields, extend
from metarec.serve.retrieval import CandidateRetrieval, Effects, is_small, reads_all
from metarec.serve.store import AdapterStore
from metarec.serve.warm import Warm, read_warm, warm_key, write_warm


@dataclass
class Counters:
    """Numbers of events since the start, for the metrics."""

    adapted: int = 0
    diverged: int = 0
    damaged: int = 0
    failed: int = 0
    unsaved: int = 0
    erased: int = 0


class ServedCatalog:
    """The items that are served, and the model that scores them; `engine.Engine` says what the arguments are."""

    def __init__(
        self,
        recommender: MetaRecommender,
        store: AdapterStore,
        *,
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
        self.counters = Counters()
        self._candidates = candidates
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

    def adapt(self, supports: Sequence[Ratings]) -> list[tuple[AdaptedUser, tuple[float, ...]]]:
        """Adapts to several users' ratings; see `BatchedModel.adapt`."""
        return self._model.adapt(self.recommender, supports)
