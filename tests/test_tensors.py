"""Rows of different lengths become one tensor."""

from __future__ import annotations

import numpy as np
import torch

from metarec.system.tensors import pad_rows


def test_rows_are_padded_with_zeros_to_the_longest_or_to_a_width() -> None:
    rows = [np.array([1, 2, 3]), np.array([4]), np.array([], np.int64)]
    expected = torch.tensor([[1, 2, 3], [4, 0, 0], [0, 0, 0]])
    assert torch.equal(pad_rows(rows, np.int64), expected)
    assert torch.equal(pad_rows(rows, np.float32, 5)[:, :3], expected.float())
    assert pad_rows(rows, bool, 5).shape == (3, 5)


def test_no_rows_and_backward_views_are_padded_too() -> None:
    assert pad_rows([], np.float32).shape == (0, 0)
    assert pad_rows([np.arange(3)[::-1]], np.int64).tolist() == [[2, 1, 0]]
