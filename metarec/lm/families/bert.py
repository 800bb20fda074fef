"""Encoders of the BERT family: learned positions, attention in both directions, LayerNorm after every residual sum.

Source: Devlin et al. 2019, "BERT".
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metarec.lm.layouts import Layout, no_places, with_positions


def _head(model: Any, hidden: Tensor) -> Tensor:
    transformed: Tensor = model.cls.predictions.transform(hidden)
    return transformed


BERT = Layout(
    model_types=("bert",),
    kinds=("masked", "encoder"),
    attention="attention.self",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    mlp=("intermediate.dense", "output.dense"),
    activation="intermediate.intermediate_act_fn",
    attention_norms=(None, None, "attention.output.LayerNorm"),
    mlp_norms=(None, None, "output.LayerNorm"),
    layers="encoder.layer",
    final_norm=None,
    embed=with_positions,
    places=no_places,
    head=_head,
    takes_prefix=False,
)
