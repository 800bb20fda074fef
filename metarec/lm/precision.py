"""Keeps frozen keys and values in fewer bytes."""

from __future__ import annotations

import numpy as np

_LARGEST = 127


def to_int8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds every vector of the last dimension to 8-bit integers with a scale of its own.

    The error of a number is at most half a step, its vector's largest magnitude / 254, plus the scale's own rounding.

    Args:
        values: Shape (..., width).

    Returns:
        Integers, shape (..., width), and float16 scales, shape (...).
    """
    smallest = np.finfo(np.float16).tiny
    # The scale is rounded first, so that the integers fit the one that is kept.
    scales = np.maximum(np.abs(values).max(-1) / _LARGEST, smallest).astype(np.float16)
    integers = np.rint(values / scales.astype(np.float32)[..., None])
    return np.clip(integers, -_LARGEST, _LARGEST).astype(np.int8), scales
