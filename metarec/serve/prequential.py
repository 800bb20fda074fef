"""Sums over feedback by which a served model is judged: each rating against the score that was made before it came.

Sums hold no user and no item. Those of several servers, or of several days, are added, and every value below is
computed from them. Users are divided into groups by a keyed digest, so that an interval needs no user either.

Sources: Dawid 1984, "The prequential approach", for judging a forecast before its outcome is used; Naeini et al. 2015,
"Obtaining well calibrated probabilities using Bayesian binning", section 2, for the expected calibration error; Wolter
2007, "Introduction to Variance Estimation", section 4.2, for intervals by the jackknife over random groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# The number of ratings that a score was adapted to, in ranges: the first of each, and its name.
RANGES = ((0, "0"), (1, "1-4"), (5, "5-9"), (10, "10-19"), (20, "20+"))
GROUPS = 32
BINS = 10
# What `Sums` holds: counts of what came, by array.
SHAPES: dict[str, tuple[int, ...]] = {
    "pairs": (len(RANGES), GROUPS, 2),  # a liked and a disliked item of one user, and how many are ordered so
    "losses": (len(RANGES), GROUPS, 2),  # ratings with a probability, and the sum of their log-losses
    "bins": (len(RANGES), BINS, 3),  # ratings by tenth of the probability; the sum of probabilities; likes
    "adapted": (2,),  # adaptations, and those that diverged
    "popularity": (BINS + 1,),  # ratings by tenth of the training ratings' popularity; 0: of items nobody had rated
    "tenths": (BINS,),  # ratings by tenth of the scale
    "came": (4,),  # ratings; their sum; those of items that the model was not trained with; those not judged
}
# A probability of 0 would make one wrong rating count for ever.
_SURE = 1e-6


def range_of(ratings: int) -> int:
    """Returns the place in `RANGES` of a number of ratings."""
    return sum(ratings >= first for first, _ in RANGES) - 1


def log_loss(probability: float, liked: bool) -> float:
    """Returns the negative log-likelihood of one like or dislike, in nats."""
    sure = min(max(probability, _SURE), 1 - _SURE)
    return -math.log(sure if liked else 1 - sure)


def ordered(score: float, liked: bool, other: float) -> float:
    """Returns how far a pair of a liked and a disliked item is in order: 1, 0, or 1/2 at a tie.

    Args:
        score: Of the item whose label is `liked`.
        liked: Whether it was liked; the other one was not, or the other way round.
        other: Of the other item.
    """
    if score == other:
        return 0.5
    return float((score > other) == liked)


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over feedback, by name; see `SHAPES`."""

    arrays: Mapping[str, Floats]

    @classmethod
    def empty(cls) -> Sums:
        """Returns sums over nothing."""
        return cls({name: np.zeros(shape) for name, shape in SHAPES.items()})

    def __add__(self, other: Sums) -> Sums:
        return Sums({name: value + other.arrays[name] for name, value in self.arrays.items()})

    def __sub__(self, other: Sums) -> Sums:
        return Sums({name: value - other.arrays[name] for name, value in self.arrays.items()})

    def __bool__(self) -> bool:
        return any(value.any() for value in self.arrays.values())

    def copy(self) -> Sums:
        """Returns the same sums, which further feedback does not change."""
        return Sums({name: value.copy() for name, value in self.arrays.items()})

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {name: value.tolist() for name, value in self.arrays.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Sums:
        """Inverts `to_json`; arrays that another version wrote, or did not, count nothing."""
        found = {name: np.array(values.get(name, 0.0), np.float64) for name in SHAPES}
        return cls(
            {name: value if value.shape == SHAPES[name] else np.zeros(SHAPES[name]) for name, value in found.items()}
        )

    def count_rating(self, at: int, group: int, probability: float, liked: bool) -> None:
        """Counts a rating whose score had become a probability.

        Args:
            at: Place in `RANGES` of the number of ratings that the user had given before.
            group: The user's group.
            probability: Of a like, before the rating came.
            liked: Whether the rating is a like.
        """
        self.arrays["losses"][at, group] += (1, log_loss(probability, liked))
        place = min(int(probability * BINS), BINS - 1)
        self.arrays["bins"][at, place] += (1, probability, liked)

    def count_pair(self, at: int, group: int, value: float) -> None:
        """Counts a pair of a user's items of which one was liked; `value` is what `ordered` returned."""
        self.arrays["pairs"][at, group] += (1, value)

    def count_came(self, popularity: int, tenth: int, rating: float, *, unknown: bool) -> None:
        """Counts a rating, whether it is judged or not.

        Args:
            popularity: The bin of its item's popularity.
            tenth: The tenth of the scale.
            rating: The rating.
            unknown: Whether the model was not trained with the item.
        """
        self.arrays["popularity"][popularity] += 1
        self.arrays["tenths"][tenth] += 1
        self.arrays["came"][:3] += (1, rating, unknown)

    def count_unjudged(self, ratings: int) -> None:
        """Counts ratings of users whose adapter was not in memory."""
        self.arrays["came"][3] += ratings

    def count_adapted(self, adaptations: int, diverged: int) -> None:
        """Counts adaptations, and those that diverged."""
        self.arrays["adapted"][:] += (adaptations, diverged)

    @property
    def auc(self) -> float | None:
        """The chance that a liked item had a higher score than a disliked one of the same user; None without pairs."""
        return _ratio(self.arrays["pairs"].sum((0, 1)))

    @property
    def log_loss(self) -> float | None:
        """Mean log-loss of likes, in nats; None where no score had become a probability."""
        return _ratio(self.arrays["losses"].sum((0, 1)))

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error: the mean distance of probabilities from the share of likes, by tenth."""
        ratings, probability, likes = self.arrays["bins"].sum(0).T
        return float(np.abs(probability - likes).sum() / ratings.sum()) if ratings.any() else None

    @property
    def diverged(self) -> float | None:
        """The share of adaptations that diverged."""
        return _ratio(self.arrays["adapted"])

    @property
    def ratings(self) -> int:
        """How many ratings were judged by their probability."""
        return int(self.arrays["losses"][..., 0].sum())

    @property
    def came(self) -> int:
        """How many ratings came, judged or not."""
        return int(self.arrays["came"][0])

    @property
    def pairs(self) -> int:
        """How many pairs were judged."""
        return int(self.arrays["pairs"][..., 0].sum())

    def within(self, at: int) -> Sums:
        """Returns the sums of one range of K alone."""
        inside = {name: np.zeros_like(value) for name, value in self.arrays.items()}
        for name in ("pairs", "losses", "bins"):
            inside[name][at] = self.arrays[name][at]
        return Sums(inside)

    def by_range(self) -> list[dict[str, Any]]:
        """Returns one row for each range of K: ratings, AUC and its pairs, log-loss, calibration error."""
        return [{"shots": name, **self.within(at).values()} for at, (_, name) in enumerate(RANGES)]

    def values(self) -> dict[str, Any]:
        """Returns ratings, AUC and its pairs, log-loss and calibration error."""
        return {
            "ratings": self.ratings,
            "pairs": self.pairs,
            "auc": self.auc,
            "log_loss": self.log_loss,
            "calibration_error": self.calibration_error,
        }


def _ratio(sums: Floats) -> float | None:
    """Returns the second of two sums by the first; None where that is 0."""
    return float(sums[1] / sums[0]) if sums[0] else None


def difference(first: Sums, second: Sums, name: str) -> tuple[float, float, float] | None:
    """Returns how much higher a value is in the first sums than in the second, and the ends of its 95% interval.

    Each group of users is left out in turn, of both at once: the two models serve different users, and groups are
    independent.

    Args:
        first: Sums of one model.
        second: Sums of another one, for other users.
        name: ``pairs`` compares the AUC, ``losses`` the log-loss.

    Returns:
        None where one of them has fewer than two groups.
    """
    ours, theirs = first.arrays[name].sum(0), second.arrays[name].sum(0)
    if min((ours[:, 0] > 0).sum(), (theirs[:, 0] > 0).sum()) < 2:
        return None
    left_out = [_without_each(groups) for groups in (ours, theirs)]
    found = float(ours[:, 1].sum() / ours[:, 0].sum() - theirs[:, 1].sum() / theirs[:, 0].sum())
    error = 1.96 * math.sqrt(sum(_jackknife_variance(values) for values in left_out))
    return found, found - error, found + error


def _without_each(groups: Floats) -> Floats:
    """Returns the ratio without each group that has anything, shape (groups with anything,)."""
    there = groups[groups[:, 0] > 0]
    rest = there.sum(0) - there
    found: Floats = rest[:, 1] / rest[:, 0]
    return found


def _jackknife_variance(values: Floats) -> float:
    count = len(values)
    return float((count - 1) / count * ((values - values.mean()) ** 2).sum())


def stability_index(counts: Floats, expected: Floats) -> float:
    """Returns the population stability index of counts against expected shares: 0 where they agree.

    It is the sum of (share - expected share) times the logarithm of their ratio; above 0.25 is by convention a shift.
    Half a count is added to each bin, so that an empty one does not make it infinite.

    Args:
        counts: What came, by bin.
        expected: Shares that are expected, by bin; they sum to 1.

    Source: Siddiqi 2006, "Credit Risk Scorecards", chapter 9.
    """
    smoothed = counts + 0.5
    came = smoothed / smoothed.sum()
    foreseen = expected * counts.sum() + 0.5
    foreseen /= foreseen.sum()
    return float(((came - foreseen) * np.log(came / foreseen)).sum())
