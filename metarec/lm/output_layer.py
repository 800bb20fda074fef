"""A user's head as PEFT knows it: a rank-1 update of the model's output layer.

A head's product with the last state moves the answer's log-odds, the difference of two tokens' logits. So does an
update B A of the output layer, where A is the head and B is one half in the positive answer's row and minus one half in
the negative one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarec.lm.adapter_kinds.lora import LORA_A, LORA_B, PEFT_PREFIX
from metarec.lm.answer_model import AnswerModel
from metarec.system.tensors import AdapterState

NO_PLACE = (
    "PEFT has no place for the user's head: that takes LoRA adapters, and a model that answers by the logits of two "
    "words and caps none"
)


@dataclass(frozen=True)
class OutputLayer:
    """Where a head belongs; JSON-able by `vars`.

    Args:
        module: Module path of the output layer.
        words: How many rows it has.
        positive: Token id of the positive answer.
        negative: Token id of the negative answer.
        factor: What a head is multiplied with, so that its product with a state is what it adds to the log-odds.
    """

    module: str
    words: int
    positive: int
    negative: int
    factor: float

    def added_to(
        self, config: Mapping[str, Any], weights: AdapterState, head: Tensor
    ) -> tuple[dict[str, Any], AdapterState]:
        """Returns PEFT's configuration and tensors of low-rank updates with the output layer's beside them.

        Its rank is 1 and its scale 1, whatever those of the others are. B, as long as the vocabulary, is float16, which
        holds it exactly.

        Args:
            config: Without the output layer.
            weights: The tensors, under PEFT's names.
            head: Shape (hidden,).
        """
        a = (head.detach().cpu().float() * self.factor)[None]
        b = torch.zeros(self.words, 1, dtype=torch.float16)
        b[self.positive], b[self.negative] = 0.5, -0.5
        added = {f"{PEFT_PREFIX}{self.module}{name}.weight": part for name, part in ((LORA_A, a), (LORA_B, b))}
        sizes = {"rank_pattern": {self.module: 1}, "alpha_pattern": {self.module: 1}}
        targets = sorted([*config["target_modules"], self.module])
        return {**config, "target_modules": targets, **sizes}, weights | added


def without_output_layer(config: Mapping[str, Any], weights: AdapterState) -> tuple[dict[str, Any], AdapterState]:
    """Returns a PEFT configuration and its tensors as they are without the output layer's update, if there is one."""
    rest = dict(config)
    modules = list(rest.pop("rank_pattern", None) or {})
    rest.pop("alpha_pattern", None)
    if modules:
        rest["target_modules"] = [name for name in rest["target_modules"] if name not in modules]
    ours = tuple(f"{PEFT_PREFIX}{module}." for module in modules)
    return rest, {name: value for name, value in weights.items() if not (ours and name.startswith(ours))}


def output_layer(model: AnswerModel) -> OutputLayer | None:
    """Returns where a head of a model belongs; None where PEFT has no place for it, see `NO_PLACE`."""
    answers, rule = model.prompts.answers, model.backbone.logit_rule
    layer = model.backbone.modules.get_output_embeddings() if answers is not None else None
    if answers is None or rule.cap is not None or model.spec.kind != "lora" or not isinstance(layer, torch.nn.Linear):
        return None
    module = next(name for name, found in model.backbone.modules.named_modules() if found is layer)
    _, length = model.frozen_moments
    return OutputLayer(module, layer.weight.shape[0], *answers, factor=float(1 / (length * rule.scale)))
