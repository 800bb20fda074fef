"""Packs items of different lengths side by side into rows, so that short ones leave almost no padding.

A row holds a prefix that all its items share, and then the items one after another; a mask keeps attention within an
item, so all layers run on dense rows.

Source: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination", section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Attention within a row grows with its square, the prefix's share falls: in between lies a wide flat optimum.
_ITEMS_PER_ROW = 10
PREFIX, PADDING = -1, -2


@dataclass(frozen=True)
class Packed:
    """Says where every item's tokens are.

    Args:
        owner: Which of its row's items a place belongs to, or `PREFIX` or `PADDING`, shape (rows, places).
        offset: Place within its item or within the prefix, shape (rows, places).
        last: Place of each item's last token, shape (rows, items per row); rows that are not full repeat a place.
    """

    owner: NDArray[np.int64]
    offset: NDArray[np.int64]
    last: NDArray[np.int64]

    def visible(self, *, causal: bool) -> NDArray[np.bool_]:
        """Returns which place sees which, shape (rows, places, places): its own item, and the prefix before it."""
        seen: NDArray[np.bool_] = self.owner[:, :, None] == self.owner[:, None, :]
        if causal:
            seen |= (self.owner == PREFIX)[:, None, :]
            seen &= np.tri(self.owner.shape[1], dtype=bool)
        return seen


def pack(lengths: NDArray[np.int64], prefix: int, width: int = 0) -> Packed:
    """Lays items out in rows of at most ten.

    Args:
        lengths: Tokens of every item, shape (users, items), without the prefix.
        prefix: Tokens of the prefix that every row starts with.
        width: Where it is not 0, every item has a row of its own, of so many tokens at least beside the prefix.

    Returns:
        Rows of one user follow each other; every user has the same number of rows.
    """
    users, items = lengths.shape
    rows_each = max(1, -(-items // (1 if width else _ITEMS_PER_ROW)))
    per_row = max(1, -(-items // rows_each))
    filled = np.zeros((users, rows_each * per_row), np.int64)
    filled[:, :items] = lengths
    by_row = filled.reshape(users * rows_each, per_row)
    ends = prefix + np.cumsum(by_row, 1)
    places = np.arange(max(int(ends[:, -1].max(initial=0)), prefix + width, 1))
    slot = (places[None, :, None] >= ends[:, None, :]).sum(2)
    starts = np.concatenate([ends - by_row, np.zeros((len(ends), 1), np.int64)], 1)
    offset = np.where(places < prefix, places, places - np.take_along_axis(starts, slot, 1))
    owner = np.where(places < prefix, PREFIX, np.where(slot == per_row, PADDING, slot))
    return Packed(owner, offset, np.maximum(ends - 1, 0))
