"""MPNet: BERT's blocks, whose attention also adds a learned number for how far apart two tokens are.

Source: Song et al. 2020, "MPNet"; the distance's buckets are those of Raffel et al. 2020, "T5", section 2.1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from metarec.lm.blocks import Places
from metarec.lm.families.bert import BERT
from metarec.lm.families.roberta import lm_head


def _distances(base: Any, positions: Tensor) -> list[Places]:
    # Keys minus queries, as transformers counts.
    buckets = base.encoder.relative_position_bucket(positions[:, None, :] - positions[:, :, None])
    bias: Tensor = base.encoder.relative_attention_bias(buckets).permute(0, 3, 1, 2)
    return [bias] * base.config.num_hidden_layers


MPNET = replace(
    BERT,
    model_types=("mpnet",),
    attention="attention.attn",
    qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    out="attention.attn.o",
    attention_norms=(None, None, "attention.LayerNorm"),
    places=_distances,
    head=lm_head,
)
