"""Baselines that ignore the user's ratings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from metarec.data.interactions import Catalog
from metarec.scorer import Request, score_each
from metarec.scorers.collaborative.item_mean import ItemPrior


@dataclass(frozen=True)
class ItemMean:
    """Scores an item by its shrunk mean over the meta-training users, for every user alike."""

    prior: ItemPrior
    name: str = "item mean"
    bytes_per_user: int = 0

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_each(requests, len(self.prior.count), lambda request: self.prior.values(request.candidates))


@dataclass(frozen=True)
class Popularity:
    """Scores an item by the number of meta-training users who rated it."""

    prior: ItemPrior
    name: str = "popularity"
    bytes_per_user: int = 0

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_each(requests, len(self.prior.count), lambda request: self.prior.count[request.candidates])


@dataclass(frozen=True)
class Constant:
    """Scores all items the same; its metrics are those of ties."""

    catalog: Catalog
    name: str = "constant"
    bytes_per_user: int = 0

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_each(requests, len(self.catalog), lambda request: np.zeros(len(request.candidates)))


@dataclass(frozen=True)
class Random:
    """Scores by a hash of seed, user and item, so that a score does not depend on position or other candidates."""

    catalog: Catalog
    seed: int
    name: str = "random"
    bytes_per_user: int = 0

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_each(requests, len(self.catalog), self._draw)

    def _draw(self, request: Request) -> np.ndarray:
        names = [f"{self.seed}\0{request.user}\0{self.catalog.ids[code]}" for code in request.candidates]
        drawn = b"".join(hashlib.blake2b(name.encode(), digest_size=4).digest() for name in names)
        return np.frombuffer(drawn, np.uint32) / 2**32
