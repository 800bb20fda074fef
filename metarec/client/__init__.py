"""A client of the HTTP service: a method for each of its operations, and answers as dataclasses.

It needs Python's standard library alone, and neither torch nor the model.

    client = Client("http://127.0.0.1:8000")
    client.rate("ann", {"1": 5, "6": 2})
    for movie in client.recommendations("ann", 5).items:
        print(movie.title)
"""

from __future__ import annotations

from metarec.client.answers import (
    Adapter,
    Added,
    Erased,
    EventAnswer,
    FeedbackAnswer,
    InformativeItem,
    InformativeItems,
    PreferenceAnswer,
    Preferences,
    Rating,
    ReasonAnswer,
    Recommendations,
    Recommended,
    Removed,
    ScoresAnswer,
    SearchAnswer,
    SearchHit,
    UserAnswer,
)
from metarec.client.service_client import Client, ServiceError

__all__ = [
    "Adapter",
    "Added",
    "Client",
    "Erased",
    "EventAnswer",
    "FeedbackAnswer",
    "InformativeItem",
    "InformativeItems",
    "PreferenceAnswer",
    "Preferences",
    "Rating",
    "ReasonAnswer",
    "Recommendations",
    "Recommended",
    "Removed",
    "ScoresAnswer",
    "SearchAnswer",
    "SearchHit",
    "ServiceError",
    "UserAnswer",
]
