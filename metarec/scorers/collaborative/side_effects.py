"""What side information adds to a rating: features of the user and of the moment, times features of the item.

    effect(z, i) = z' P x_i

where z are features of who rates, and when, and x_i those of the item: 1, its fields and text, and factors of ratings.
How P is learned: `metarec.scorers.collaborative.side_fitting`.

Source: Rendle 2012, "Factorization machines with libFM", section 3: side features times item features; here linear in
both, so that a new user's effects need no gradient steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from metarec.data.interactions import Codes, Interactions, Ratings, Values
from metarec.data.side import Side, Texts
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.review_head import ReviewHead
from metarec.scorers.collaborative.side_readers import Friends, Reader

_ROWS_AT_ONCE = 500_000
FRIENDS = "friends"


@dataclass(frozen=True)
class SideEffects:
    """What side information adds to each rating, in standard deviations of the rating.

    Args:
        about: Field of users to what reads it.
        moments: Field of moments to what reads it.
        friends: What reads friends; None where there are none, or they say nothing.
        items: Features of items, the first one 1, shape (items, width).
        effects: Block of side information to P's rows of it, shape (width of block, width).
        worth: Block to how far it lowers held-out users' squared error, with its standard error.
        unread: Fields of users that the data have and that are not read; ``friends`` where these are not.
        unread_moments: The same of moments.
        reviews: What reads the text that came with a rating; None where nothing does.
    """

    about: Mapping[str, Reader]
    moments: Mapping[str, Reader]
    friends: Friends | None
    items: Floats
    effects: Mapping[str, Floats]
    worth: Mapping[str, tuple[float, float]]
    unread: tuple[str, ...] = ()
    unread_moments: tuple[str, ...] = ()
    reviews: ReviewHead | None = None

    def asked(self, side: Side | None, items: Codes) -> Values:
        """Returns the effects on items that a user is asked about, shape (items,)."""
        return self._values(side, {} if side is None else side.asked, items)

    def rated(self, support: Ratings) -> Values:
        """Returns the effects on a user's ratings, shape (ratings,)."""
        return self._values(support.side, {} if support.side is None else support.side.rated, support.items)

    def _values(self, side: Side | None, moments: Mapping[str, Texts], items: Codes) -> Values:
        if side is None or not self.effects:
            return np.zeros(len(items), np.float32)
        weights = np.zeros((1, self.items.shape[1]))
        for name, reader in self.about.items():
            weights = weights + reader.read(np.array([side.about.get(name, "")], object)) @ self.effects[name]
        if self.friends is not None:
            weights = weights + self.friends.read([side]) @ self.effects[FRIENDS]
        for name, reader in self.moments.items():
            if name in moments:
                weights = weights + reader.read(moments[name]) @ self.effects[name]
        return np.asarray((weights * self.items[items]).sum(1), np.float32)

    def of_rows(self, interactions: Interactions, rows: Codes) -> Values:
        """Returns the effects on some rows of a dataset, shape (rows,)."""
        side, width = interactions.side, self.items.shape[1]
        users, place = np.unique(interactions.user[rows], return_inverse=True)
        weights = np.zeros((len(users), width))
        for name, reader in self.about.items():
            weights += reader.read(side.about[name][users]) @ self.effects[name]
        if self.friends is not None:
            weights += self.friends.read([Side(friends=side.friends[user]) for user in users]) @ self.effects[FRIENDS]
        found = np.zeros(len(rows), np.float32)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            own = weights[place[some]]
            for name, reader in self.moments.items():
                own = own + reader.read(side.moments[name][rows[some]]) @ self.effects[name]
            found[some] = (own * self.items[interactions.item[rows[some]]]).sum(1)
        return found

    def without(self, support: Ratings, scale: float) -> Ratings:
        """Returns a support of readings that lack the effects; `scale` is a rating's standard deviation."""
        if support.side is None:
            return support
        read = self.reviews.readings(support.values, support.side.reviews) if self.reviews else support.values
        return replace(support, values=(read - scale * self.rated(support)).astype(np.float32))

    def extended(self, items: int) -> SideEffects:
        """Returns the effects for a catalog of so many items, the new ones last: on these there are none."""
        return replace(self, items=np.pad(self.items, ((0, items - len(self.items)), (0, 0))))


def no_effects(items: int) -> SideEffects:
    """Returns the effects of no side information on so many items: all 0."""
    return SideEffects({}, {}, None, np.ones((items, 1)), {}, {})
