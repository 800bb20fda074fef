"""What counts as a like: a task's label rule, read from a short text and applied to a whole dataset at once.

Knows the rules and nothing of splits, files or models. Labels become a column of the data, so that no method has to
know which rule made them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from metarec.data.interactions import Flags, Interactions
from metarec.errors import ConfigError, shown

_RULE = re.compile(r"rating\s*(>=|>)\s*(user mean|[-+]?\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class LabelRule:
    """One label rule.

    Args:
        kind: ``threshold`` (rating at or above a number), ``user mean`` (above the user's own mean rating),
            ``implicit`` (whatever was interacted with), or ``rating`` (the rating itself is predicted; for ranking,
            ratings above the user's own mean are likes).
        threshold: Ratings from here on are likes; NaN where the user's own mean decides.
        above: The rule said ``>``: the threshold is the first number above the one that was written.
    """

    kind: Literal["threshold", "user mean", "implicit", "rating"]
    threshold: float
    above: bool = False

    def on_log_scale(self) -> LabelRule:
        """Returns a rule with a threshold for ratings r that have become log(1 + r)."""
        number = np.float32(self.threshold)
        if not self.above:
            return replace(self, threshold=float(np.log1p(number)))
        # The logarithm of the next higher number may be the number's own in single precision.
        limit = np.log1p(np.nextafter(number, np.float32(-np.inf)))
        return replace(self, threshold=float(np.nextafter(limit, np.float32(np.inf))))

    def liked(self, interactions: Interactions) -> Flags:
        """Says which rows are likes, shape (rows,). A user's mean is over all of the user's ratings."""
        if not np.isnan(self.threshold):
            return interactions.rating >= self.threshold
        count = np.bincount(interactions.user, minlength=len(interactions.users))
        total = np.bincount(interactions.user, interactions.rating, minlength=len(interactions.users))
        mean = total / np.maximum(count, 1)
        flags: Flags = interactions.rating > mean[interactions.user] + 1e-6
        return flags

    def apply(self, interactions: Interactions) -> Interactions:
        """Returns the data with its ``liked`` column."""
        return replace(interactions, liked=self.liked(interactions))


def read_rule(text: str) -> LabelRule:
    """Reads a label rule: ``rating >= 4``, ``rating > 3``, ``rating > user mean``, ``implicit`` or ``rating``.

    Raises:
        ConfigError: The text is none of these.
    """
    rule = " ".join(text.split())
    if rule == "implicit":
        return LabelRule("implicit", 0.5)
    if rule == "rating":
        return LabelRule("rating", float("nan"))
    match = _RULE.fullmatch(rule)
    if not match or match.groups() == (">=", "user mean"):
        raise ConfigError(
            f"label rule {shown(text)} is not understood",
            "Write 'rating >= 4', 'rating > user mean', 'implicit' or 'rating'",
        )
    sign, bound = match.groups()
    if bound == "user mean":
        return LabelRule("user mean", float("nan"))
    number = float(bound)
    if sign == ">=":
        return LabelRule("threshold", number)
    return LabelRule("threshold", float(np.nextafter(np.float32(number), np.float32(np.inf))), above=True)
