"""GPT-NeoX and Pythia: LayerNorm, an MLP beside attention, and rotary positions in a part of each head.

Source: Black et al. 2022, "GPT-NeoX-20B", section 2.1.
"""

from __future__ import annotations

from metarec.lm.layouts import Layout

GPT_NEOX = Layout(
    model_types=("gpt_neox",),
    kinds=("causal",),
    attention="attention",
    qkv=("attention.query_key_value",),
    interleaved=True,
    out="attention.dense",
    mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    activation="mlp.act",
    attention_norms=("input_layernorm", None, None),
    mlp_norms=("post_attention_layernorm", None, None),
    final_norm="final_layer_norm",
    parallel=lambda config, index: config.use_parallel_residual,
)
