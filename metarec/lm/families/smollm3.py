"""SmolLM3: Llama's blocks, some of which know no positions.

Source: Yang et al. 2025, "Rope to Nope and Back Again", section 4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from metarec.lm.blocks import Places
from metarec.lm.families.llama import LLAMA
from metarec.lm.layouts import rotary, sliding_window


def _some_rotary(base: Any, positions: Tensor) -> list[Places]:
    flags = base.config.no_rope_layers  # 1 where a block has rotary positions, whatever the name says
    return [rope if flag else None for rope, flag in zip(rotary(base, positions), flags, strict=True)]


SMOLLM3 = replace(LLAMA, model_types=("smollm3",), window=sliding_window, places=_some_rotary)
