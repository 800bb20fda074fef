"""A user as the service serves them: their adapter, the version it was made for, and what became of their ratings."""

from __future__ import annotations

from dataclasses import dataclass

from metarec.adapted_user import AdaptedUser


@dataclass(frozen=True)
class Person:
    """A user as they are served.

    Args:
        adapted: The adapter and the ratings it was adapted to.
        version: How many ratings the user had given when it was adapted; 0 is the meta-initialization.
        latest: How many ratings the user has given.
        losses: Support loss before each inner step; empty where the adapter was read from the store.
        left_out: Number of the items rated last that the catalog does not have.
    """

    adapted: AdaptedUser
    version: int
    latest: int
    losses: tuple[float, ...] = ()
    left_out: int = 0

    def facts(self) -> dict[str, object]:
        """Returns the facts about the adapter that every answer carries."""
        return {
            "version": self.version,
            "ratings": len(self.adapted.support),
            "diverged": self.adapted.diverged,
            "stale": self.version != self.latest,
        }
