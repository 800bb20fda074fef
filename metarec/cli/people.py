"""A person as a command line describes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarec.errors import ConfigError, shown

if TYPE_CHECKING:
    from metarec.adapted_user import AdaptedUser
    from metarec.recommender import MetaRecommender


def adapted(
    recommender: MetaRecommender, ratings: list[str] | None, file: Path | None, facts: dict[str, Any]
) -> AdaptedUser:
    """Adapts to the ratings that the command line gives, ``ITEM=RATING`` and a file's, and to other facts."""
    pairs: list[tuple[str, Any]] = []
    for entry in ratings or []:
        item, equals, value = entry.rpartition("=")
        if not equals:
            raise ConfigError(f"--rating {shown(entry)} has no '='", "Write --rating 'Toy Story=5'")
        pairs.append((item, value))
    if file is not None:
        from metarec.data.sources.rated import own_ratings

        pairs += own_ratings(file, recommender.fitted.catalog, recommender.fitted.scale)
    return recommender.adapt(pairs, **facts)
