"""RoBERTa and its multilingual kin: BERT's blocks; positions are counted from behind the padding token's.

Sources: Liu et al. 2019, "RoBERTa"; Conneau et al. 2020, "Unsupervised Cross-lingual Representation Learning at Scale".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from metarec.lm.families.bert import BERT


def lm_head(model: Any, hidden: Tensor) -> Tensor:
    """Returns what the vocabulary head multiplies: a dense layer, GELU and LayerNorm."""
    states: Tensor = model.lm_head.layer_norm(functional.gelu(model.lm_head.dense(hidden)))
    return states


ROBERTA = replace(BERT, model_types=("roberta", "xlm-roberta", "camembert"), head=lm_head)
