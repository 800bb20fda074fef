"""Methods that learn nothing about the user: the floor that everything else has to clear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metarec.priors import ItemPrior
from metarec.scorer import Request


@dataclass(frozen=True)
class ItemMean:
    """Scores an item by its shrunk mean over the meta-training users, whoever asks."""

    prior: ItemPrior
    name: str = "item mean"
    bytes_per_user: int = 0

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return [torch.from_numpy(self.prior.values(request.candidates)) for request in requests]
