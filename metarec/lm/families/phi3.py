"""Phi-3 and Phi-4: Llama's blocks, with one layer for queries, keys and values, and one for the MLP's gate and input.

Rotary positions may turn a part of each head only, and change with the text's length ("longrope"): a prompt longer than
the model was first trained on is run whole.

Source: Abdin et al. 2024, "Phi-3 Technical Report", section 2.
"""

from __future__ import annotations

from dataclasses import replace

from metarec.lm.families.llama import LLAMA
from metarec.lm.layouts import sliding_window

PHI3 = replace(
    LLAMA,
    model_types=("phi3",),
    qkv=("self_attn.qkv_proj",),
    mlp=("mlp.gate_up_proj", "mlp.down_proj"),
    gate_with_up=True,
    activation="mlp.activation_fn",
    window=sliding_window,
)
