"""The mean of several scorers, each in standard deviations of its scores of a request's candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarec.errors import ConfigError
from metarec.scorer import Request


@dataclass(frozen=True)
class Ensemble:
    """Scores candidates by the mean of other scorers' standardized scores.

    Args:
        members: The scorers; what they were fitted on has the same catalog.
        name: How the method is called in tables.

    Raises:
        ConfigError: There is one member, or none.

    Source: Montague and Aslam 2001, "Relevance Score Normalization for Metasearch", "zero-mean, unit-variance".
    """

    members: tuple[Any, ...]
    name: str = "ensemble"

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise ConfigError(f"an ensemble of {len(self.members)}", "Name two scorers or more")

    @property
    def bytes_per_user(self) -> int:
        """See `Scorer`; the sum over members."""
        return sum(int(member.bytes_per_user) for member in self.members)

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        found = [member.score(requests) for member in self.members]
        return [torch.stack([_standardized(one) for one in scores]).mean(0) for scores in zip(*found, strict=True)]


def _standardized(scores: Tensor) -> Tensor:
    """Returns scores around their mean over their spread; zeros where all are the same."""
    exact = scores.double()
    spread = exact.std(correction=0) if len(exact) else exact.new_zeros(())
    return ((exact - exact.mean()) / spread if spread > 0 else torch.zeros_like(exact)).float()
