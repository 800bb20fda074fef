"""Packing puts every token in exactly one place and lets it see nothing but its own item and the prefix."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from metarec.lm.packing import PADDING, PREFIX, pack

LENGTHS = st.integers(1, 4).flatmap(
    lambda users: st.integers(0, 23).flatmap(
        lambda items: st.lists(
            st.lists(st.integers(1, 9), min_size=items, max_size=items), min_size=users, max_size=users
        )
    )
)


@given(LENGTHS, st.integers(0, 5))
def test_every_token_has_one_place_and_sees_its_own_item_and_the_prefix(lengths: list[list[int]], prefix: int) -> None:
    table = np.array(lengths, np.int64).reshape(len(lengths), -1)
    packed = pack(table, prefix)
    rows_each, per_row = len(packed.owner) // len(table), packed.last.shape[1]
    visible = packed.visible(causal=True)
    for row in range(len(packed.owner)):
        assert (packed.owner[row] == PREFIX).sum() == prefix
        assert packed.offset[row, :prefix].tolist() == list(range(prefix))
    for user, items in enumerate(lengths):
        for item, length in enumerate(items):
            row, slot = user * rows_each + item // per_row, item % per_row
            places = np.flatnonzero(packed.owner[row] == slot)
            assert packed.offset[row, places].tolist() == list(range(length))
            assert packed.last[row, slot] == places[-1]
            seen = np.flatnonzero(visible[row, places[-1]])
            assert seen.tolist() == [*range(prefix), *places.tolist()]
    tokens = table.sum() + prefix * len(packed.owner)
    assert (packed.owner != PADDING).sum() == tokens


@given(LENGTHS, st.integers(0, 5))
def test_no_place_sees_nothing_which_would_make_attention_undefined(lengths: list[list[int]], prefix: int) -> None:
    packed = pack(np.array(lengths, np.int64).reshape(len(lengths), -1), prefix)
    for causal in (True, False):
        assert packed.visible(causal=causal).any(2).all()


def test_short_items_leave_less_padding_than_one_row_each() -> None:
    lengths = np.random.default_rng(0).integers(5, 40, (8, 30))
    packed = pack(lengths, 14)
    one_each = lengths.size * (lengths.max() + 14)
    assert packed.owner.size < 0.75 * one_each
    assert (packed.owner == PADDING).mean() < 0.25
