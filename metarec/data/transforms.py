"""Other views of a dataset: domains in the place of users, several datasets as one, seeded negatives, thinner users.

Every function takes `Interactions` and returns `Interactions`; `merge` and `log_ratings` alone change a rating that
somebody gave, to another scale. Knows nothing of files, splits or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from metarec.data.episodes import seeded
from metarec.data.interactions import Catalog, Codes, Interactions, RatingScale, Values
from metarec.data.side import SideColumns, Texts
from metarec.errors import DataError, suggest

DOMAIN = "domain"


def as_domains(interactions: Interactions, field: str, separator: str) -> Interactions:
    """Puts an item field's values in the place of users: an episode is then a domain, its rows many users' ratings.

    An item with several values (a movie of three genres) belongs to the rarest of them alone, so that domains share
    no item and a held-out domain is one that meta-training has seen nothing of. Items without a value belong to none.

    Args:
        interactions: The dataset.
        field: The catalog field.
        separator: What stands between several values.

    Raises:
        DataError: The catalog has no such field, or it is empty everywhere.
    """
    if field not in interactions.catalog.fields:
        raise DataError(
            f"the catalog has no field '{field}' to take domains from", suggest(field, interactions.catalog.fields)
        )
    values = [
        [part.strip() for part in text.split(separator) if part.strip()] for text in interactions.catalog.fields[field]
    ]
    frequency = Counter(part for parts in values for part in parts)
    domains = sorted(frequency)
    if not domains:
        raise DataError(f"catalog field '{field}' is empty everywhere", "Choose another field for the domains")
    code = {domain: position for position, domain in enumerate(domains)}
    domain_of_item = np.array(
        [code[min(parts, key=lambda part: (frequency[part], part))] if parts else -1 for parts in values], np.int64
    )
    domain = domain_of_item[interactions.item]
    kept = domain >= 0
    lost = int((~kept).sum())
    dropped = {**interactions.dropped, **({f"item without {field}": lost} if lost else {})}
    moments = SideColumns(moments=interactions.side.moments, reviews=interactions.side.reviews).rows(kept)
    return replace(interactions.subset(kept), users=tuple(domains), user=domain[kept], dropped=dropped, side=moments)


def merge(parts: Mapping[str, Interactions], *, shared_users: bool = False) -> Interactions:
    """Joins several datasets into one catalog, with a ``domain`` field that says which one an item is from.

    Ids get their part's name in front. Ratings are multiplied so that the highest of every part is the first one's:
    4 of 5 stays 4 of 5, 8 of 10 becomes it.

    Args:
        parts: Name to dataset, at least one.
        shared_users: An id that stands in several parts is one person; users' ids stay as they are then.
    """
    named = list(parts.items())
    high = named[0][1].scale.high
    factors = [high / part.scale.high for _, part in named]
    scale = RatingScale(min(part.scale.low * factor for (_, part), factor in zip(named, factors, strict=True)), high)
    timed = all(part.timestamp is not None for _, part in named)
    names = sorted({name for _, part in named for name in part.catalog.fields})
    columns: dict[str, tuple[str, ...]] = {
        name: tuple(text for _, part in named for text in part.catalog.fields.get(name, ("",) * len(part.catalog)))
        for name in names
    }
    columns[DOMAIN] = tuple(label for label, part in named for _ in part.catalog.ids)
    everybody = [user if shared_users else f"{label}/{user}" for label, part in named for user in part.users]
    users = dict.fromkeys(everybody)
    place = {user: code for code, user in enumerate(users)}
    code = np.array([place[user] for user in everybody], np.int64)
    first_user = np.cumsum([0, *(len(part.users) for _, part in named)])
    first_item = np.cumsum([0, *(len(part.catalog) for _, part in named)])
    return Interactions(
        users=tuple(users),
        user=code[np.concatenate([part.user + start for (_, part), start in zip(named, first_user, strict=False)])],
        item=np.concatenate([part.item + start for (_, part), start in zip(named, first_item, strict=False)]),
        rating=np.concatenate(
            [(part.rating * factor).astype(np.float32) for (_, part), factor in zip(named, factors, strict=True)]
        ),
        timestamp=np.concatenate([part.timestamp for _, part in named if part.timestamp is not None])
        if timed
        else None,
        catalog=Catalog(tuple(f"{label}/{item}" for label, part in named for item in part.catalog.ids), columns),
        scale=scale,
        dropped={f"{label}: {reason}": count for label, part in named for reason, count in part.dropped.items()},
        item_vectors=_joined_vectors([part for _, part in named]),
        vector_sources=_joined_sources(named),
        side=_joined_sides(named, code, len(users), prefixed=not shared_users),
    )


def _joined_vectors(parts: Sequence[Interactions]) -> dict[str, Values]:
    """Returns the items' vectors of several datasets, NaN where a dataset has none of a name."""
    found: dict[str, Values] = {}
    for name in dict.fromkeys(name for part in parts for name in part.item_vectors):
        widths = {part.item_vectors[name].shape[1] for part in parts if name in part.item_vectors}
        if len(widths) > 1:
            raise DataError(
                f"the vectors '{name}' are {' and '.join(map(str, sorted(widths)))} numbers wide",
                "Give them names of their own in each part",
            )
        blank = [np.full((len(part.catalog), max(widths)), np.nan, np.float32) for part in parts]
        found[name] = np.concatenate(
            [part.item_vectors.get(name, none) for part, none in zip(parts, blank, strict=True)]
        )
    return found


def _joined_sources(named: Sequence[tuple[str, Interactions]]) -> dict[str, str]:
    """Returns what items' vectors of several datasets were computed from, where all of a name were computed."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(name for _, part in named for name in part.vector_sources):
        having = [(label, part) for label, part in named if name in part.item_vectors]
        if all(name in part.vector_sources for _, part in having):
            found[name] = " ".join(f"{label} {part.vector_sources[name]}" for label, part in having)
    return found


def _joined_sides(named: Sequence[tuple[str, Interactions]], code: Codes, users: int, *, prefixed: bool) -> SideColumns:
    """Returns the side information of several datasets, empty texts where a dataset has no column of a name.

    Args:
        named: The datasets by name.
        code: The code of each dataset's users, one dataset after the other.
        users: How many users there are; of one who is in several datasets, the first that is not empty counts.
        prefixed: Whether the datasets' names stand in front of ids.
    """

    def joined(columns: Sequence[Mapping[str, Texts]], lengths: Sequence[int]) -> dict[str, Texts]:
        names = dict.fromkeys(name for column in columns for name in column)
        blanks = [np.full(length, "", object) for length in lengths]
        return {
            name: np.concatenate([some.get(name, blank) for some, blank in zip(columns, blanks, strict=True)])
            for name in names
        }

    sides, rows = [part.side for _, part in named], [len(part) for _, part in named]
    listed = [
        [f"{label}/{friend}" if prefixed else friend for friend in some]
        for label, part in named
        for some in part.side.friends or ((),) * len(part.users)
    ]
    friends: list[dict[str, None]] = [{} for _ in range(users)]
    for user, some in zip(code, listed, strict=True):
        friends[user] |= dict.fromkeys(some)
    about = joined([side.about for side in sides], [len(part.users) for _, part in named])
    for name, column in about.items():
        about[name] = np.full(users, "", object)
        for user, value in zip(code[::-1], column[::-1], strict=True):
            about[name][user] = value or about[name][user]
    reviews = joined([{} if side.reviews is None else {"": side.reviews} for side in sides], rows).get("")
    return SideColumns(
        about,
        tuple(map(tuple, friends)) if any(friends) else (),
        joined([side.moments for side in sides], rows),
        reviews,
    )


def with_negatives(interactions: Interactions, per_positive: int, seed: int, popular: bool = False) -> Interactions:
    """Turns what users interacted with into ones, and adds items that they did not as zeros.

    Each user's negatives are a function of the seed and the user's id alone, carry the time of the positives they
    stand beside, and never name an item that the user interacted with.

    Args:
        interactions: The dataset; its ratings are ignored, each row counts as an interaction.
        per_positive: Negatives for every positive; fewer where a user has touched almost everything.
        seed: Seed of the draw.
        popular: Draw items by how often they were interacted with instead of evenly (harder negatives).
    """
    share = np.bincount(interactions.item, minlength=len(interactions.catalog)).astype(np.float64)
    share = share / share.sum() if popular else np.full(len(share), 1 / len(share))
    users, items, sources = [], [], []
    for user, rows in enumerate(interactions.rows_of_user):
        if not len(rows):
            continue
        left = share.copy()
        left[interactions.item[rows]] = 0
        count = min(per_positive * len(rows), int((left > 0).sum()))
        if not count:
            continue
        drawn = seeded(seed, f"{interactions.users[user]}\0negatives").choice(
            len(left), count, replace=False, p=left / left.sum()
        )
        users.append(np.full(count, user, np.int64))
        items.append(drawn.astype(np.int64))
        sources.append(np.resize(rows, count))
    extra_user, extra_item, source = (
        np.concatenate([*part, np.zeros(0, np.int64)]) for part in (users, items, sources)
    )
    time, part = interactions.timestamp, interactions.part
    source = source.astype(np.int64)
    return replace(
        interactions,
        user=np.concatenate([interactions.user, extra_user]).astype(np.int64),
        item=np.concatenate([interactions.item, extra_item]).astype(np.int64),
        rating=np.repeat(np.array([1, 0], np.float32), [len(interactions), len(extra_user)]),
        timestamp=None if time is None else np.concatenate([time, time[source]]),
        scale=RatingScale(0.0, 1.0),
        liked=None,
        part=None if part is None else np.concatenate([part, part[source]]),
        side=interactions.side.followed(0, source),
    )


def log_ratings(interactions: Interactions) -> Interactions:
    """Puts hours and counts on a scale of opinions: log(1 + rating).

    Raises:
        DataError: A rating is negative.
    """
    low, high = interactions.scale.low, interactions.scale.high
    if low < 0:
        raise DataError(
            f"ratings from {low:g} on have no logarithm", "Set rating.transform to 'none', or add a constant"
        )
    scale = RatingScale(float(np.log1p(np.float32(low))), float(np.log1p(np.float32(high))))
    return replace(interactions, rating=np.log1p(interactions.rating), scale=scale)


def keep_users(interactions: Interactions, fewest: int, most: int | None) -> Interactions:
    """Leaves out users with fewer or more ratings than stated; the rest of the data stays as it is.

    Raises:
        DataError: Nobody is left.
    """
    count = np.bincount(interactions.user, minlength=len(interactions.users))
    kept: Codes = np.flatnonzero((count >= fewest) & (count <= (most if most is not None else count.max(initial=0))))
    if len(kept) == len(interactions.users):
        return interactions
    if not len(kept):
        raise DataError(
            f"no user has {fewest} to {most or 'any number of'} ratings", "Widen 'ratings_per_user' in the task"
        )
    new = np.full(len(interactions.users), -1, np.int64)
    new[kept] = np.arange(len(kept))
    rows = new[interactions.user] >= 0
    data = interactions.subset(rows)
    dropped = {**interactions.dropped, "user outside ratings_per_user": len(interactions.users) - len(kept)}
    return replace(
        data,
        users=tuple(interactions.users[user] for user in kept),
        user=new[data.user],
        dropped=dropped,
        side=data.side.users(kept),
    )
