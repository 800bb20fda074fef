"""Side information as numbers that a network reads beside an item's features: of users, and of ratings' moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from metarec.data.interactions import Codes, Interactions, Ratings
from metarec.data.side import Side, Texts
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.side_effects import FRIENDS, SideEffects
from metarec.scorers.collaborative.side_readers import Friends, Reader


@dataclass(frozen=True)
class SideInputs:
    """Reads what is known of users and moments, each block of mean squared length one over meta-training users.

    Args:
        about: Field of users to what reads it.
        moments: Field of moments to what reads it.
        friends: What reads friends; None where nothing does.
        scales: Block to the factor on it.
    """

    about: Mapping[str, Reader]
    moments: Mapping[str, Reader]
    friends: Friends | None
    scales: Mapping[str, float]

    @property
    def width(self) -> int:
        """How many numbers there are."""
        return int(self.of([Ratings.empty()])[0].shape[1])

    def of(self, ratings: Sequence[Ratings]) -> list[Floats]:
        """Returns the numbers beside each rating of several users, each of shape (ratings, width); 0 is unknown."""
        users = [one.side or Side() for one in ratings]
        sizes = np.array([len(one) for one in ratings])
        blocks: list[Floats] = []
        for name, reader in self.about.items():
            known = reader.read(np.array([side.about.get(name, "") for side in users], object))
            blocks.append(self.scales[name] * np.repeat(known, sizes, axis=0))
        if self.friends is not None:
            blocks.append(self.scales[FRIENDS] * np.repeat(self.friends.read(users), sizes, axis=0))
        for name, reader in self.moments.items():
            columns = [_column(side.rated, name, size) for side, size in zip(users, sizes, strict=True)]
            blocks.append(self.scales[name] * reader.read(np.concatenate(columns)))
        return np.split(np.concatenate(blocks, 1), np.cumsum(sizes)[:-1])

    def asked(self, side: Side | None, items: Codes) -> Ratings:
        """Returns items that a user is asked about, unrated, with the moment of each question."""
        values = np.zeros(len(items), np.float32)
        if side is None:
            return Ratings(items, values)
        moments = {name: np.resize(column, len(items)) for name, column in side.asked.items()}
        return Ratings(items, values, side=Side(side.about, side.friends, rated=moments))


def _column(moments: Mapping[str, Texts], name: str, size: int) -> Texts:
    unknown: Texts = np.full(size, "", object)
    return moments.get(name, unknown)


def side_inputs(effects: SideEffects, interactions: Interactions, users: Codes) -> SideInputs | None:
    """Returns what reads the blocks that effects were found of; None where there are none.

    Args:
        effects: The effects, fitted on `users`: noise has none, and is no input.
        interactions: The dataset.
        users: The meta-training users.
    """
    if not effects.effects:
        return None
    side = interactions.side
    own = np.isin(interactions.user, users)
    known = {name: reader.read(side.about[name][users]) for name, reader in effects.about.items()}
    known |= {name: reader.read(side.moments[name][own]) for name, reader in effects.moments.items()}
    if effects.friends is not None:
        known[FRIENDS] = effects.friends.read([Side(friends=side.friends[code]) for code in users])
    scales = {name: 1 / np.sqrt(max(float((block**2).sum(1).mean()), 1e-12)) for name, block in known.items()}
    return SideInputs(effects.about, effects.moments, effects.friends, {name: float(at) for name, at in scales.items()})
