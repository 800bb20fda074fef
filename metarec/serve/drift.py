"""How far the ratings that come are from those that a model was trained on: of which items they are, and how high."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metarec.data.interactions import RatingScale, Values
from metarec.serve.prequential import BINS, Floats, stability_index
from metarec.training.fitting import Fitted

# Drift is of so many ratings, the latest; of fewer than the second number it says nothing.
RECENT, _FEWEST = 1000, 100


@dataclass(frozen=True, eq=False)
class Reference:
    """What feedback is compared with: the ratings of meta-training users.

    Args:
        place: Of every trained item its tenth of the ratings, 1 to 10 by popularity; 0 where nobody rated it.
        items: The share of ratings in each of these bins.
        ratings: The share of ratings by tenth of the scale; None of a recommender that was saved without them.
        scale: The rating scale.
        mean: Mean rating.
    """

    place: Floats
    items: Floats
    ratings: Floats | None
    scale: RatingScale
    mean: float

    @classmethod
    def of(cls, fitted: Fitted) -> Reference:
        """Returns what a recommender was fitted on."""
        place, shares = popularity_bins(fitted.prior.count)
        known = fitted.training.get("rating_shares")
        ratings = None if known is None else np.array(known, np.float64)
        return cls(place, shares, ratings, fitted.scale, fitted.prior.mean)

    def to_json(self) -> dict[str, Any]:
        """Returns the shares, without the items."""
        ratings = None if self.ratings is None else self.ratings.tolist()
        scale = [self.scale.low, self.scale.high]
        return {"items": self.items.tolist(), "ratings": ratings, "scale": scale, "mean": self.mean}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Reference:
        """Inverts `to_json`; it knows no item."""
        ratings = None if values["ratings"] is None else np.array(values["ratings"])
        return cls(np.zeros(0), np.array(values["items"]), ratings, RatingScale(*values["scale"]), values["mean"])


def popularity_bins(count: Values) -> tuple[Floats, Floats]:
    """Divides items by popularity into tenths of all ratings.

    Args:
        count: Ratings of each item, shape (items,).

    Returns:
        Each item's bin, shape (items,): 1 for the least popular, 10 for the most, 0 where there are no ratings; and the
        share of ratings in each bin, shape (11,).
    """
    order = np.argsort(count, kind="stable")
    total = max(float(count.sum()), 1.0)
    middle = (np.cumsum(count[order]) - count[order] / 2) / total
    place = np.zeros(len(count))
    place[order] = np.minimum((middle * BINS).astype(int), BINS - 1) + 1
    place[count <= 0] = 0
    shares = np.bincount(place.astype(int), count, BINS + 1) / total
    return place, shares


def recent_drift(reference: Reference, recent: Sequence[tuple[int, int, float]]) -> dict[str, float | None]:
    """Returns `drift` of ratings: of each the bin of its item's popularity, the tenth of the scale, and the rating."""
    places = np.bincount([place for place, *_ in recent], minlength=BINS + 1).astype(np.float64)
    tenths = np.bincount([tenth for _, tenth, _ in recent], minlength=BINS).astype(np.float64)
    return drift(reference, places, tenths, sum(rating for *_, rating in recent))


def drift(reference: Reference, places: Floats, tenths: Floats, total: float) -> dict[str, float | None]:
    """Returns how far feedback is from what a model was trained on; None of little feedback.

    Args:
        reference: The training ratings.
        places: Ratings by popularity of the item, shape (11,).
        tenths: Ratings by tenth of the scale, shape (10,).
        total: Sum of the ratings.
    """
    count = places.sum()
    if count < _FEWEST:
        return dict.fromkeys(("item_drift", "rating_drift", "rating_shift"))
    return {
        "item_drift": stability_index(places, reference.items),
        "rating_drift": None if reference.ratings is None else stability_index(tenths, reference.ratings),
        "rating_shift": float(total / count) - reference.mean,
    }
