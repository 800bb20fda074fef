"""What every recommender here is: something that scores candidates of a request.

A `Request` is an episode without its labels, so that no method, classical or LLM, can see what it is tested on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec.data.episodes import Episode
from metarec.data.interactions import Codes, Ratings
from metarec.errors import UnknownItemError
from metarec.system.threads import one_thread


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

    def instead(self, items: Codes) -> Request:
        """Returns the same user's question about other items, all in the moment of the first that was asked about."""
        return Request(self.user, self.support.asking_once(), items)


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


ScoreArray = NDArray[np.floating]


def check_codes(requests: Sequence[Request], items: int) -> None:
    """Refuses requests that name a code outside the catalog.

    Args:
        requests: The requests.
        items: How many items the method knows.

    Raises:
        UnknownItemError: A candidate's or a support's code is negative or too large.
    """
    for request in requests:
        for where, codes in (("candidate", request.candidates), ("support", request.support.items)):
            unknown = codes[(codes < 0) | (codes >= items)]
            if len(unknown):
                raise UnknownItemError(
                    f"{where} item code {unknown[0]} is not one of the {items} items the method was fitted on",
                    "Fit again with the catalog that holds it",
                )


def items_of(requests: Sequence[Request]) -> Codes:
    """Returns the codes of all items that some requests name, each once, ascending."""
    named = [codes for request in requests for codes in (request.support.items, request.candidates)]
    return np.unique(np.concatenate(named)).astype(np.int64)


@one_thread(scipy=False)
def score_each(requests: Sequence[Request], items: int, values: Callable[[Request], ScoreArray]) -> list[Tensor]:
    """Scores requests one by one.

    Args:
        requests: The requests.
        items: How many items the method knows.
        values: Scores of one request's candidates.

    Raises:
        UnknownItemError: See `check_codes`.
    """
    check_codes(requests, items)
    return [torch.from_numpy(np.asarray(values(request), np.float32)) for request in requests]


@dataclass(frozen=True)
class OwnLikeShare:
    """Scores every item by the user's own share of likes in the support; a half where there is none.

    It orders nothing within a user, so that what it is worth in a pooled metric is what comes of telling users apart.

    Args:
        items: How many items there are.
        threshold: See `Ratings.likes`.
        name: How the method is called in tables.
        bytes_per_user: One number in float32.
    """

    items: int
    threshold: float
    name: str = "own like share"
    bytes_per_user: int = 4

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_each(requests, self.items, self._values)

    def _values(self, request: Request) -> ScoreArray:
        liked = request.support.likes(self.threshold)
        return np.full(len(request.candidates), liked.mean() if len(liked) else 0.5)


def request(episode: Episode, shots: int) -> Request:
    """Returns an episode as a request: K ratings without labels, and the query's items."""
    return Request(episode.user, episode.support.head(shots).unlabelled(), episode.query.items)
