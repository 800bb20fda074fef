"""What the classes of a sequence-classification model stand for: one rating each, as in most fine-tuning tutorials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarec.errors import BackboneError, ConfigError

# The keys of a checkpoint's config.json.
_RATINGS, _LIKED = "rating_classes", "liked_classes"


@dataclass(frozen=True)
class RatingClasses:
    """The rating that each class stands for, and which of them are likes.

    Args:
        ratings: One rating per class, ascending.
        liked: Which classes are likes; none where a score is the expected rating.

    Raises:
        ConfigError: There are fewer than two classes, or all of them are likes.
    """

    ratings: tuple[float, ...]
    liked: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if len(self.ratings) < 2 or list(self.ratings) != sorted(set(self.ratings)):
            raise ConfigError(f"the classes stand for {list(self.ratings)}", "Name two or more ratings that ascend")
        if self.liked and (len(self.liked) != len(self.ratings) or all(self.liked) or not any(self.liked)):
            raise ConfigError(f"of {len(self.ratings)} classes, {sum(self.liked)} are likes", "Name more classes")

    @classmethod
    def even(cls, count: int, low: float, high: float, threshold: float) -> RatingClasses:
        """Returns classes for evenly spaced ratings.

        Args:
            count: How many.
            low: The rating of the first.
            high: The rating of the last.
            threshold: Ratings from here on are likes; NaN, or one that all or none reach, scores by the expected
                rating instead.
        """
        ratings = tuple(float(rating) for rating in np.linspace(low, high, count))
        liked = tuple(rating >= threshold for rating in ratings)
        return cls(ratings, liked if any(liked) and not all(liked) else ())

    @classmethod
    def of_config(cls, config: Any) -> RatingClasses | None:
        """Returns what a checkpoint's configuration says; None where it says nothing.

        Raises:
            BackboneError: What it says cannot be.
        """
        ratings, liked = getattr(config, _RATINGS, None), getattr(config, _LIKED, None) or ()
        if ratings is None:
            return None
        try:
            found = cls(tuple(map(float, ratings)), tuple(map(bool, liked)))
        except (ConfigError, TypeError, ValueError) as error:
            raise BackboneError(f"'{_RATINGS}' in config.json: {error}", "Fine-tune the model again") from None
        if len(found.ratings) != config.num_labels:
            raise BackboneError(
                f"config.json names {len(found.ratings)} ratings for {config.num_labels} classes", "Fetch it again"
            )
        return found

    def to_config(self) -> Mapping[str, Any]:
        """Returns the keys that a checkpoint's configuration keeps."""
        return {_RATINGS: list(self.ratings), _LIKED: list(self.liked)}

    def answer(self, logits: Tensor) -> Tensor:
        """Returns the log-odds of a like; where no class is one, the expected rating.

        Args:
            logits: Shape (..., classes).

        Returns:
            Shape (...).
        """
        if not self.liked:
            return (logits.softmax(-1) * logits.new_tensor(self.ratings)).sum(-1)
        liked = torch.tensor(self.liked, device=logits.device)
        return logits[..., liked].logsumexp(-1) - logits[..., ~liked].logsumexp(-1)

    def nearest(self, ratings: Sequence[float] | np.ndarray) -> Tensor:
        """Returns the class whose rating is nearest to each of some ratings, shape (ratings,)."""
        away = np.abs(np.asarray(ratings, np.float64)[:, None] - np.array(self.ratings)[None])
        return torch.from_numpy(away.argmin(1))
