"""Everything that can be swapped, by name; nothing is imported before it is asked for.

Another package adds names by entry points of the group in the second argument; see `metarec.registry.Registry`. Dataset
sources are listed in `metarec.data.sources`, benchmark methods in `metarec.bench.methods`.
"""

from __future__ import annotations

from typing import Any

from metarec.registry import Registry

# Parts of the score: `metarec.scorers.term.ScoreTerm`.
TERMS: Registry[Any] = Registry(
    "score term",
    "metarec.terms",
    {
        "item mean": "metarec.scorers.collaborative.terms:ITEM_MEAN",
        "collaborative": "metarec.scorers.collaborative.terms:COLLABORATIVE",
        "side information": "metarec.scorers.collaborative.terms:SIDE",
        "prompt": "metarec.scorers.language.prompt_term:PROMPT",
        "history": "metarec.scorers.language.history_term:HISTORY",
        "kernel mean": "metarec.scorers.language.weight_prior:KERNEL_MEAN",
        "adapter": "metarec.scorers.language.score:ADAPTER",
    },
)

# How meta-parameters are learned: `metarec.meta.algorithms.Algorithm`, or a `metarec.meta.heads.ClosedFormHead`.
ALGORITHMS: Registry[Any] = Registry(
    "meta-algorithm",
    "metarec.algorithms",
    {
        "fomaml": "metarec.meta.algorithms:fomaml",
        "maml": "metarec.meta.algorithms:maml",
        "maml++": "metarec.meta.algorithms:maml_plus_plus",
        "imaml": "metarec.meta.algorithms:imaml",
        "reptile": "metarec.meta.algorithms:reptile",
        "ridge": "metarec.meta.heads:RIDGE",
        "prototypes": "metarec.meta.heads:PROTOTYPES",
        "dkt": "metarec.meta.heads:DKT",
    },
)

# What the outer loop minimizes on the query: `metarec.meta.losses.Loss`.
LOSSES: Registry[Any] = Registry(
    "loss",
    "metarec.losses",
    {
        "pairwise": "metarec.meta.losses:pairwise",
        "bce": "metarec.meta.losses:bce",
        "mse": "metarec.meta.losses:mse",
        "ordinal": "metarec.meta.losses:ordinal",
    },
)

# What of the model a user's adapter changes: `metarec.lm.adapter_kinds.AdapterKind`.
ADAPTER_KINDS: Registry[Any] = Registry(
    "adapter kind",
    "metarec.adapter_kinds",
    {
        "lora": "metarec.lm.adapter_kinds.lora:LORA",
        "bottleneck": "metarec.lm.adapter_kinds.bottleneck:BOTTLENECK",
        "bias": "metarec.lm.adapter_kinds.bias:BIAS",
        "prefix": "metarec.lm.adapter_kinds.prefix:PREFIX",
        "soft-prompt": "metarec.lm.adapter_kinds.soft_prompt:SOFT_PROMPT",
    },
)

# Architectures whose blocks are run without the transformers package: `metarec.lm.families.BackboneFamily`.
FAMILIES: Registry[Any] = Registry(
    "backbone family",
    "metarec.backbone_families",
    {
        "llama": "metarec.lm.families.llama:LLAMA",
        "mistral": "metarec.lm.families.mistral:MISTRAL",
        "qwen2": "metarec.lm.families.qwen:QWEN2",
        "qwen3": "metarec.lm.families.qwen:QWEN3",
        "smollm3": "metarec.lm.families.smollm3:SMOLLM3",
        "olmo2": "metarec.lm.families.olmo2:OLMO2",
        "phi3": "metarec.lm.families.phi3:PHI3",
        "gemma": "metarec.lm.families.gemma:GEMMA",
        "gemma2": "metarec.lm.families.gemma:GEMMA2",
        "gemma3": "metarec.lm.families.gemma:GEMMA3",
        "gpt2": "metarec.lm.families.gpt2:GPT2",
        "gpt-neox": "metarec.lm.families.gpt_neox:GPT_NEOX",
        "bert": "metarec.lm.families.bert:BERT",
        "roberta": "metarec.lm.families.roberta:ROBERTA",
        "distilbert": "metarec.lm.families.distilbert:DISTILBERT",
        "mpnet": "metarec.lm.families.mpnet:MPNET",
        "modernbert": "metarec.lm.families.modernbert:MODERNBERT",
    },
)

# Where the numbers of a training go: `metarec.meta.tracking.OpenTracker`.
TRACKERS: Registry[Any] = Registry(
    "tracker",
    "metarec.trackers",
    {
        "tensorboard": "metarec.meta.trackers:TensorBoard",
        "mlflow": "metarec.meta.trackers:MLflow",
        "trackio": "metarec.meta.trackers:Trackio",
    },
)
