"""Side information: what is known of users, and of the moments in which they rate, beside the ratings.

It is kept as texts, under the names that the data give; what reads it decides what is a category, a number or a text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Texts = NDArray[np.object_]
Rows = NDArray[np.int64] | NDArray[np.bool_]
# The field of a user that is a sentence or more about them.
ABOUT = "about"


@dataclass(frozen=True)
class Side:
    """What is known beside one user's ratings.

    Args:
        about: Field of the user to its value.
        friends: Ids of the user's friends.
        rated: Field of a moment to its value at each rating, shape (ratings,).
        asked: The same at each item that is asked about, shape (items,), or once for all of them, shape (1,).
        reviews: The text that came with each rating, shape (ratings,); None where there are none.
    """

    about: Mapping[str, str] = field(default_factory=dict)
    friends: tuple[str, ...] = ()
    rated: Mapping[str, Texts] = field(default_factory=dict)
    asked: Mapping[str, Texts] = field(default_factory=dict)
    reviews: Texts | None = None

    def rows(self, chosen: Rows | slice) -> Side:
        """Returns what is known beside the ratings in some positions."""
        return replace(
            self,
            rated={name: column[chosen] for name, column in self.rated.items()},
            reviews=None if self.reviews is None else self.reviews[chosen],
        )

    def asking(self, moments: Mapping[str, Texts]) -> Side:
        """Returns the same for a question that is asked in other moments."""
        return replace(self, asked=moments)


@dataclass(frozen=True)
class SideColumns:
    """The side information of a dataset, by user and by row.

    Args:
        about: Field of users to its values, shape (users,).
        friends: Ids of each user's friends; empty where there is no graph of users.
        moments: Field of rows to its values, shape (rows,).
        reviews: The text of each row, shape (rows,); None where there are none.
    """

    about: Mapping[str, Texts] = field(default_factory=dict)
    friends: tuple[tuple[str, ...], ...] = ()
    moments: Mapping[str, Texts] = field(default_factory=dict)
    reviews: Texts | None = None

    def __bool__(self) -> bool:
        return bool(self.about or self.friends or self.moments or self.reviews is not None)

    def __repr__(self) -> str:
        return f"SideColumns(about={list(self.about)}, moments={list(self.moments)}, friends={bool(self.friends)})"

    def of(self, users: NDArray[np.int64], rows: Rows) -> Side:
        """Returns what is known beside some rows, all of the user of the first."""
        user = int(users[0])
        return Side(
            {name: column[user] for name, column in self.about.items()},
            self.friends[user] if self.friends else (),
            {name: column[rows] for name, column in self.moments.items()},
            reviews=None if self.reviews is None else self.reviews[rows],
        )

    def rows(self, chosen: Rows) -> SideColumns:
        """Returns the side information of some rows, of the same users."""
        return replace(
            self,
            moments={name: column[chosen] for name, column in self.moments.items()},
            reviews=None if self.reviews is None else self.reviews[chosen],
        )

    def users(self, kept: NDArray[np.int64]) -> SideColumns:
        """Returns the side information of some users, of the same rows."""
        return replace(
            self,
            about={name: column[kept] for name, column in self.about.items()},
            friends=tuple(self.friends[user] for user in kept) if self.friends else (),
        )

    def followed(self, users: int, rows: NDArray[np.int64]) -> SideColumns:
        """Returns the side information with more users, of whom nothing is known, and more rows.

        Args:
            users: How many users.
            rows: For each further row the one whose moment it takes; nothing is written about it.
        """
        return SideColumns(
            about={name: np.append(column, np.full(users, "", object)) for name, column in self.about.items()},
            friends=self.friends + ((),) * users if self.friends else (),
            moments={name: np.append(column, column[rows]) for name, column in self.moments.items()},
            reviews=None if self.reviews is None else np.append(self.reviews, np.full(len(rows), "", object)),
        )

    @property
    def digest(self) -> bytes:
        """Names the side information by its content."""
        found = hashlib.sha256()
        columns: list[tuple[str, Iterable[str]]] = [
            *((name, column.tolist()) for name, column in sorted(self.about.items())),
            *((name, column.tolist()) for name, column in sorted(self.moments.items())),
            ("friends", ["\2".join(some) for some in self.friends]),
            ("reviews", [] if self.reviews is None else self.reviews.tolist()),
        ]
        for name, column in columns:
            found.update(f"{name}\1".encode() + "\0".join(column).encode("utf-8", "surrogatepass"))
        return found.digest()
