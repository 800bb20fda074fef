"""Gemma: Llama's blocks with norms that multiply by 1 + weight, and scaled embeddings.

Gemma 2 also normalizes what attention and the MLP add, caps attention logits, and alternates windows with full
attention. Gemma 3 has no caps, but norms of queries and keys, and other rotary positions in blocks with windows.

Sources: Gemma Team 2024, "Gemma"; Gemma Team 2024, "Gemma 2", section 2; Gemma Team 2025, "Gemma 3", section 2.
"""

from __future__ import annotations

from dataclasses import replace

from metarec.lm.families.llama import LLAMA
from metarec.lm.layouts import rotary_by_type, sliding_window

GEMMA = replace(LLAMA, model_types=("gemma",), norm_offset=1.0)
GEMMA2 = replace(
    GEMMA,
    model_types=("gemma2",),
    attention_norms=("input_layernorm", "post_attention_layernorm", None),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm", None),
    cap=lambda config, index: config.attn_logit_softcapping,
    window=sliding_window,
)
GEMMA3 = replace(
    GEMMA2,
    model_types=("gemma3_text",),
    qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
    cap=lambda config, index: None,
    places=rotary_by_type,
)
