"""What every recommender here is: something that scores candidates of a request.

A `Request` is an episode without its labels, so that no method, classical or LLM, can see what it is tested on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from metarec.interactions import Codes, Ratings


@dataclass(frozen=True)
class Request:
    """One user's question: given these ratings, how good are these items?

    Args:
        user: The user's id; scorers may not look anything up by it.
        support: What is known of the user; may be empty.
        candidates: Item codes to score, shape (candidates,).
    """

    user: str
    support: Ratings
    candidates: Codes


class Scorer(Protocol):
    """Scores candidates; higher is better. Scores of different users need not be comparable."""

    @property
    def name(self) -> str:
        """How the method is called in tables."""
        ...

    @property
    def bytes_per_user(self) -> int:
        """What the method keeps of an adapted user between two requests, in bytes."""
        ...

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """Returns one float tensor of shape (candidates,) per request, finite everywhere."""
        ...
