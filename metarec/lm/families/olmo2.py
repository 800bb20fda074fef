"""OLMo 2: Llama's parts, with norms behind attention and MLP, and over all heads of queries and keys together.

Source: Walsh et al. 2025, "2 OLMo 2 Furious", section 3.
"""

from __future__ import annotations

from dataclasses import replace

from metarec.lm.families.llama import LLAMA

OLMO2 = replace(
    LLAMA,
    model_types=("olmo2",),
    attention_norms=(None, "post_attention_layernorm", None),
    mlp_norms=(None, "post_feedforward_layernorm", None),
    qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
)
