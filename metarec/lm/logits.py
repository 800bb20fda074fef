"""What some models do to their vocabulary head's products before they call them logits: they scale them, or cap them.

Sources: soft caps, Gemma Team 2024, "Gemma 2", section 2; scaling, Granite Team 2024, "Granite 3.0 Language Models".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Model types (those that begin so) to the factor on the products.
_SCALES: dict[str, Callable[[Any], float]] = {
    "granite": lambda config: 1 / getattr(config, "logits_scaling", 1.0),
    "minicpm3": lambda config: 1 / config.logits_scaling,
    "cohere": lambda config: getattr(config, "logit_scale", 1.0),
    "falcon_h1": lambda config: config.lm_head_multiplier,
}
# Settings that hold the cap: Gemma's, RecurrentGemma's, xLSTM's.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LogitRule:
    """Turns products x of states and vocabulary vectors into logits ``scale x``, or ``cap tanh(scale x / cap)``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """Returns the logits."""
        scaled = products if self.scale == 1.0 else self.scale * products
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)


def row_products(states: Tensor, vectors: Tensor) -> Tensor:
    """Multiplies states by a few vectors; a state's products are the same bits whatever states lie beside it.

    A matrix product rounds a row differently with the number of rows.

    Args:
        states: Shape (..., width).
        vectors: Shape (vectors, width).

    Returns:
        Shape (..., vectors).
    """
    return torch.stack([(states * vector).sum(-1) for vector in vectors], -1)


def logit_rule(config: Any) -> LogitRule:
    """Returns what a causal model of a configuration does to its vocabulary head's products."""
    scale = next((rule(config) for kind, rule in _SCALES.items() if config.model_type.startswith(kind)), 1.0)
    caps = (getattr(config, name, None) for name in _CAPS)
    return LogitRule(float(scale), next((float(cap) for cap in caps if cap), None))
