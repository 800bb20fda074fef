"""GPT-2: learned positions, LayerNorm before attention and MLP, one layer for queries, keys and values.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metarec.lm.layouts import Layout, no_places


def _embed(base: Any, tokens: Tensor, start: int) -> Tensor:
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
    states: Tensor = base.wte(tokens) + base.wpe(positions)
    return states


GPT2 = Layout(
    model_types=("gpt2",),
    kinds=("causal",),
    attention="attn",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    mlp=("mlp.c_fc", "mlp.c_proj"),
    activation="mlp.act",
    attention_norms=("ln_1", None, None),
    mlp_norms=("ln_2", None, None),
    layers="h",
    final_norm="ln_f",
    embed=_embed,
    places=no_places,
    takes_prefix=False,
)
