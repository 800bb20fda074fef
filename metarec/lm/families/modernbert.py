"""ModernBERT: an encoder with norms in front, rotary positions, a gated MLP, and blocks that see only what is near.

Source: Warner et al. 2024, "Smarter, Better, Faster, Longer", section 2.1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metarec.lm.layouts import Layout, rotary_by_type, sliding_window, with_positions


def _head(model: Any, hidden: Tensor) -> Tensor:
    states: Tensor = model.head(hidden)
    return states


def _near(config: Any, index: int) -> int | None:
    # The configuration says how many tokens are seen on either side.
    beside = sliding_window(config, index)
    return None if beside is None else beside + 1


MODERNBERT = Layout(
    model_types=("modernbert",),
    kinds=("masked", "encoder"),
    attention="attn",
    qkv=("attn.Wqkv",),
    out="attn.Wo",
    mlp=("mlp.Wi", "mlp.Wo"),
    gate_with_up=True,
    activation="mlp.act",
    attention_norms=("attn_norm", None, None),
    mlp_norms=("mlp_norm", None, None),
    final_norm="final_norm",
    window=_near,
    embed=with_positions,
    places=rotary_by_type,
    head=_head,
    takes_prefix=False,
)
