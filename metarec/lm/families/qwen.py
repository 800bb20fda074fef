"""Qwen2, and Qwen3 with an RMSNorm over each head of queries and keys: otherwise Llama's blocks.

Sources: Yang et al. 2024, "Qwen2 Technical Report"; Yang et al. 2025, "Qwen3 Technical Report", section 2.
"""

from __future__ import annotations

from dataclasses import replace

from metarec.lm.families.llama import LLAMA
from metarec.lm.layouts import sliding_window

QWEN2 = replace(LLAMA, model_types=("qwen2",), window=sliding_window)
QWEN3 = replace(QWEN2, model_types=("qwen3",), qk_norms=("self_attn.q_norm", "self_attn.k_norm"))
