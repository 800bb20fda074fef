"""One person's ratings as people give them: pairs, a dictionary, a DataFrame or a series."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from metarec.data.frames import is_frame, is_series
from metarec.errors import RatingError

if TYPE_CHECKING:
    import pandas as pd

GivenRatings: TypeAlias = (
    "Iterable[tuple[str, float | str] | tuple[str, float, str]] | Mapping[str, float | str] | pd.DataFrame | pd.Series"
)
_TAKES = "Give (title or id, rating) pairs, a dict {title or id: rating}, or a DataFrame with the columns item, rating"
# Column of a DataFrame with the text that came with a rating.
REVIEW = "review"
_LOG = logging.getLogger(__name__)


def rating_pairs(ratings: GivenRatings) -> list[tuple[Any, ...]]:
    """Returns one person's ratings as ``(title or id, rating)`` pairs; a third part is the text that came with one.

    Args:
        ratings: Pairs, a dictionary or a series by title or id; or a DataFrame with the columns ``item`` (or ``title``)
            and ``rating``, perhaps ``review``. Ids that are whole numbers in a DataFrame are read as texts, as those of
            a table are.

    Raises:
        RatingError: It is none of these, a column is missing, or it holds the ratings of several users.
    """
    if is_frame(ratings):
        return _of_frame(ratings)
    if is_series(ratings):
        return [(_item(item), rating) for item, rating in ratings.items()]
    if isinstance(ratings, Mapping):
        return list(ratings.items())
    if isinstance(ratings, str | bytes) or not isinstance(ratings, Iterable):
        raise RatingError(f"ratings are a {type(ratings).__name__}", _TAKES)
    return list(ratings)


def _of_frame(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    from metarec.data.sources.names import recognise

    names = [str(name) for name in frame.columns]
    frame = frame.set_axis(names, axis=1)
    found = {**recognise(names, ["item"]), **recognise(names, ["rating"])}
    if "item" not in found and (title := recognise(names, ["title"])):
        found["item"] = title["title"]
    if REVIEW in names:
        found[REVIEW] = REVIEW
    if missing := [name for name in ("item", "rating") if name not in found]:
        raise RatingError(f"the DataFrame has no column '{missing[0]}', but {', '.join(map(repr, names))}", _TAKES)
    users = recognise(names, ["user"]).get("user")
    if users is not None and users not in found.values() and frame[users].nunique(dropna=False) > 1:
        raise RatingError(
            f"the DataFrame holds ratings of {frame[users].nunique(dropna=False)} users", "Adapt to one user at a time"
        )
    if unread := [name for name in names if name not in found.values() and name != users]:
        _LOG.warning("columns of the ratings that nothing reads: %s", ", ".join(unread))
    columns = [frame[found[name]] for name in ("item", "rating", "review") if name in found]
    return [(_item(item), *rest) for item, *rest in zip(*columns, strict=True)]


def _item(value: object) -> str:
    """Returns an id as a table's ids are read: 7 and 7.0 are ``7``."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)
