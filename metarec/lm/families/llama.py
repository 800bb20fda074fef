"""Decoders built like Llama: RMSNorm, rotary positions, grouped-query attention, gated MLP.

Rotary positions are scaled as the model's own configuration says (Llama 3.1: ``rope_type: llama3``).

Source: Touvron et al. 2023, "LLaMA".
"""

from __future__ import annotations

from metarec.lm.layouts import Layout

LLAMA = Layout(
    model_types=("llama",),
    kinds=("causal",),
    attention="self_attn",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    activation="mlp.act_fn",
    attention_norms=("input_layernorm", None, None),
    mlp_norms=("post_attention_layernorm", None, None),
)
