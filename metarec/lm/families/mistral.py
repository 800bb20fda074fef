"""Mistral: Llama's blocks with attention that looks back over a window.

Source: Jiang et al. 2023, "Mistral 7B", section 2.
"""

from __future__ import annotations

from dataclasses import replace

from metarec.lm.families.llama import LLAMA
from metarec.lm.layouts import sliding_window

MISTRAL = replace(LLAMA, model_types=("mistral",), window=sliding_window)
