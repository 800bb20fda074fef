"""DistilBERT: BERT's blocks under other names.

Source: Sanh et al. 2019, "DistilBERT".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from metarec.lm.families.bert import BERT


def _head(model: Any, hidden: Tensor) -> Tensor:
    states: Tensor = model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
    return states


DISTILBERT = replace(
    BERT,
    model_types=("distilbert",),
    attention="attention",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    mlp=("ffn.lin1", "ffn.lin2"),
    activation="ffn.activation",
    attention_norms=(None, None, "sa_layer_norm"),
    mlp_norms=(None, None, "output_layer_norm"),
    layers="transformer.layer",
    head=_head,
)
