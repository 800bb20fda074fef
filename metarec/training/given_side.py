"""Side information as a person or a file gives it: checked against what a recommender knows, kept beside ratings."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from metarec.data.given_ratings import GivenRatings, rating_pairs
from metarec.data.interactions import Ratings, read_ratings
from metarec.data.side import ABOUT, Side, Texts
from metarec.errors import ConfigError, shown, suggest
from metarec.scorers.collaborative.review_head import ReviewHead
from metarec.scorers.collaborative.side_effects import FRIENDS, SideEffects
from metarec.scorers.collaborative.side_readers import Categories, Reader
from metarec.scorers.collaborative.terms import SideTerm
from metarec.training.fitting import Fitted

_LOG = logging.getLogger(__name__)
About: TypeAlias = "str | Mapping[str, str | float] | None"
Moment: TypeAlias = "Mapping[str, str | float] | None"


def with_side(
    fitted: Fitted,
    support: Ratings,
    about: About = None,
    friends: Sequence[str] = (),
    moment: Moment = None,
) -> Ratings:
    """Returns a support with what is known of the person and of the moment, beside what it knows already.

    Args:
        fitted: The recommender.
        support: The person's ratings.
        about: A sentence about them, or fields of users to their values; other fields stay as they are.
        friends: Ids of friends; those that meta-training knows count. With none, they stay as they are.
        moment: Columns of `context` to their values now. With none, they stay as they are.

    Raises:
        ConfigError: The recommender knows no such field, column or friends, or reads no side information; or what is
            given is of another type.
    """
    fields = {ABOUT: about} if isinstance(about, str) else about or {}
    _check_types(fields, friends, moment)
    if not (fields or friends or moment):
        return support
    effects, (of_users, of_moments) = _effects(fitted), known_names(fitted)
    for what, names, fields_of in (("user", fields, of_users), ("moment", moment or {}, of_moments)):
        for name in names:
            if name not in fields_of:
                cure = suggest(name, fields_of) if fields_of else f"The data have no fields of a {what}"
                raise ConfigError(f"'{name}' is no field of a {what}", cure)
    if friends and effects.friends is None and FRIENDS not in effects.unread:
        raise ConfigError("the recommender knows no friends", "Name 'friends' with the data it is fitted on")
    before = support.side or Side()
    side = replace(
        before,
        about={**before.about, **{name: _text(value) for name, value in fields.items()}},
        friends=tuple(map(str, friends)) or before.friends,
        asked={name: _texts([value]) for name, value in moment.items()} if moment else before.asked,
    )
    return replace(support, side=side)


def about_readers(fitted: Fitted) -> Mapping[str, Reader]:
    """Returns the fields of users that a recommender reads, with what reads each; none where it reads none."""
    return next((term.effects.about for term in fitted.terms.values() if isinstance(term, SideTerm)), {})


def known_names(fitted: Fitted) -> tuple[list[str], list[str]]:
    """Returns the fields of users and the columns of moments that the data had, those that are not read among them.

    Raises:
        ConfigError: The recommender reads no side information.
    """
    effects = _effects(fitted)
    of_users, of_moments = (*effects.about, *effects.unread), (*effects.moments, *effects.unread_moments)
    return [name for name in of_users if name != FRIENDS], list(of_moments)


def knows_a_friend(fitted: Fitted, friends: Sequence[str]) -> bool:
    """Says whether one of some friends is among the users that a recommender was fitted on, and it reads friends."""
    known = _effects(fitted).friends
    return known is not None and known.known(Side(friends=tuple(friends))).size > 0


def unknown_values(fitted: Fitted, side: Side | None) -> list[str]:
    """Names what is given and says nothing: categories and friends that meta-training did not see, fields left out."""
    if side is None or not (side.about or side.friends or side.asked):
        return []
    effects = _effects(fitted)
    given = {name: (effects.about.get(name), value) for name, value in side.about.items()}
    given |= {name: (effects.moments.get(name), str(column[0])) for name, column in side.asked.items()}
    found = []
    for name, (reader, value) in given.items():
        if isinstance(reader, Categories) and not reader.words and value.strip() and not reader.knows(value):
            found.append(f"nothing is known of {name} '{value[:80]}'. {suggest(value, reader.tokens)}")
    found += unread_fields(fitted, side)
    if side.friends and effects.friends is not None and not effects.friends.known(side).size:
        found.append(f"none of {len(side.friends)} friends is among the users that it was fitted on")
    return found


def unread_fields(fitted: Fitted, side: Side) -> list[str]:
    """Names in a sentence the fields that are given and that training left out; nothing where there are none."""
    if not (side.about or side.friends or side.asked):
        return []
    effects = _effects(fitted)
    unread = [name for name in side.about if name in effects.unread]
    unread += [name for name in side.asked if name in effects.unread_moments]
    unread += [FRIENDS] if side.friends and FRIENDS in effects.unread else []
    return [f"no effects follow from {', '.join(unread)}: training left them out"] if unread else []


def warn_of_unknown_values(fitted: Fitted, side: Side | None) -> None:
    """Writes what `unknown_values` names to the log, of a person who is at this machine."""
    for text in unknown_values(fitted, side):
        _LOG.warning("%s", text)


def _check_types(about: object, friends: object, moment: object) -> None:
    """Refuses what is no field and value, and friends that are one text, which would be read letter by letter."""
    if not isinstance(about, Mapping):
        raise ConfigError(f"about is {shown(about)}", "Give a text, or fields and values: {'age': 30}")
    if not isinstance(moment or {}, Mapping):
        raise ConfigError(f"context is {shown(moment)}", "Give columns and values: {'device': 'phone'}")
    if isinstance(friends, str) or not isinstance(friends, Iterable):
        raise ConfigError(f"friends is {shown(friends)}", f"Give a list of ids: [{shown(friends)}]")


def given_support(
    fitted: Fitted,
    ratings: GivenRatings,
    about: About = None,
    friends: Sequence[str] = (),
    moment: Moment = None,
) -> Ratings:
    """Returns a person's ratings, checked, with what is known of the person; see `with_side`.

    A rating that is a text is a review: the head that was trained on reviews reads it.
    """
    pairs, reviews = _read_reviews(fitted, rating_pairs(ratings))
    support = with_side(fitted, read_ratings(pairs, fitted.catalog, fitted.scale), about, friends, moment)
    if not any(reviews):
        return support
    side = support.side or Side()
    return replace(support, side=replace(side, reviews=np.array(reviews, object)))


def _read_reviews(fitted: Fitted, rated: Sequence[tuple[Any, ...]]) -> tuple[list[tuple[Any, Any]], list[str]]:
    """Returns pairs of item and rating, and the text beside each; a review without a rating gets the head's."""
    pairs: list[tuple[Any, Any]] = []
    reviews: list[str] = []
    reads = reads_reviews(fitted)
    for given in rated:
        item, rating, review = given if len(given) == 3 else (*given, "") if len(given) == 2 else (None, 0, "")
        if reads and is_review(rating):
            rating, review = read_review(fitted, str(rating)), ""  # it is the reading already
        pairs.append((item, rating) if len(given) in (2, 3) else given)  # others are refused with their place
        reviews.append(_text(review))
    return pairs, reviews


def is_review(rating: object) -> bool:
    """Says whether what stands for a rating is a text that is no number."""
    if not isinstance(rating, str) or not rating.strip():
        return False
    try:
        float(rating)
    except ValueError:
        return True
    return False


def reads_reviews(fitted: Fitted) -> bool:
    """Says whether the recommender reads the text beside a rating."""
    return _review_head(fitted) is not None


def read_review(fitted: Fitted, text: str) -> float:
    """Returns the rating that a review without one stands for: the head that was trained on reviews reads it.

    Raises:
        ConfigError: The recommender has no such head.
    """
    head = _review_head(fitted)
    if head is None:
        raise ConfigError("the recommender reads no reviews", "Name 'review' with the data it is fitted on")
    return round(float(head.ratings([text])[0]), 2)


def _review_head(fitted: Fitted) -> ReviewHead | None:
    return next((term.effects.reviews for term in fitted.terms.values() if isinstance(term, SideTerm)), None)


def kept_side(
    fitted: Fitted,
    about: Mapping[str, str],
    friends: Sequence[str],
    rated: Sequence[Mapping[str, str]],
    reviews: Sequence[str],
) -> Side | None:
    """Returns what was kept of a person, without what the recommender does not know of; None where nothing is left.

    Fields that it knows and that say nothing stay, as they do in Python: prompts say them.

    Args:
        fitted: The recommender; another one may have been there when these were kept.
        about: Fields of users to their values.
        friends: Ids of friends.
        rated: The moment of each rating: columns to values.
        reviews: The text beside each rating.
    """
    effects = next((term.effects for term in fitted.terms.values() if isinstance(term, SideTerm)), None)
    if effects is None:
        return None
    of_users, of_moments = known_names(fitted)
    columns = {name: _texts([moment.get(name, "") for moment in rated]) for name in of_moments}
    known = Side(
        {name: value for name, value in about.items() if name in of_users},
        tuple(friends) if effects.friends is not None or FRIENDS in effects.unread else (),
        rated={name: column for name, column in columns.items() if any(column)},
        reviews=_texts(reviews) if effects.reviews is not None and any(reviews) else None,
    )
    return known if known.about or known.friends or known.rated or known.reviews is not None else None


def side_facts(support: Ratings) -> dict[str, Any]:
    """Returns what is known beside a person's ratings, as JSON values; nothing where nothing is."""
    side = support.side
    if side is None:
        return {}
    moments = {"asked": side.asked, "rated": side.rated}
    columns = {of: {name: list(column) for name, column in columns.items()} for of, columns in moments.items()}
    reviews = {} if side.reviews is None else {"reviews": list(side.reviews)}
    return {"side": {"about": dict(side.about), "friends": list(side.friends), **columns, **reviews}}


def saved_support(fitted: Fitted, facts: Mapping[str, Any]) -> Ratings:
    """Returns the support of a person whose facts were kept, with the side information that `side_facts` wrote."""
    support = read_ratings([*map(tuple, facts["ratings"])], fitted.catalog, fitted.scale)
    if "side" not in facts:
        return support
    given = facts["side"]
    asked, rated = ({name: _texts(column) for name, column in given[of].items()} for of in ("asked", "rated"))
    reviews = _texts(given["reviews"]) if "reviews" in given else None
    side = Side(given["about"], tuple(given["friends"]), rated=rated, asked=asked, reviews=reviews)
    return replace(support, side=side)


def _effects(fitted: Fitted) -> SideEffects:
    found = next((term.effects for term in fitted.terms.values() if isinstance(term, SideTerm)), None)
    if found is None:
        raise ConfigError(
            "the recommender reads no side information of users or moments",
            "Name 'users', 'friends' or 'context' with the data it is fitted on",
        )
    return found


def _text(value: object) -> str:
    """Returns a value as text; nothing where it is unknown."""
    if value is None or value != value:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _texts(values: Sequence[object]) -> Texts:
    return np.array([_text(value) for value in values], object)
