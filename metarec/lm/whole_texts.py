"""Reads whole texts with models that see in both directions: masked LMs, text encoders and classifiers of ratings.

Nothing is shared between texts: what comes before an item changes with what comes after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metarec.errors import BackboneError
from metarec.lm.answer_model import ENCODER_SHARPNESS
from metarec.lm.backbone import Backbone
from metarec.lm.forward import pool
from metarec.lm.pooling import pooled_tokens

_TEXTS_AT_ONCE = 16


def read_texts(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """Returns the states that answers are read from, differentiable, shape (texts, hidden).

    Args:
        backbone: A masked LM, an encoder or a classifier.
        texts: The texts; those of a masked LM have one blank each.

    Raises:
        BackboneError: A text is longer than the model reads, or has no blank.
    """
    tokens = backbone.tokenize(texts) if texts else []
    longest, limit = max(map(len, tokens), default=0), backbone.max_tokens
    if limit is not None and longest > limit:
        raise BackboneError(
            f"a prompt has {longest} tokens, '{backbone.name}' reads {limit}", "Shorten the prompt or its history"
        )
    order = sorted(range(len(tokens)), key=lambda place: len(tokens[place]))
    states: dict[int, Tensor] = {}
    for start in range(0, len(order), _TEXTS_AT_ONCE):
        block = order[start : start + _TEXTS_AT_ONCE]
        read = _read_block(backbone, [tokens[place] for place in block])
        states |= dict(zip(block, read, strict=True))
    if not states:
        return torch.zeros(0, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
    return torch.stack([states[place] for place in range(len(tokens))])


def _read_block(backbone: Backbone, rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    padding = getattr(backbone.modules.config, "pad_token_id", None) or 0
    tokens = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], device=backbone.device)
    lengths = torch.tensor([len(row) for row in rows], device=backbone.device)
    mask = torch.arange(width, device=backbone.device) < lengths[:, None]
    inputs = {"input_ids": tokens, "attention_mask": mask.long()}
    if backbone.kind == "encoder":
        return pool(
            backbone.model.base_model(**inputs).last_hidden_state, pooled_tokens(mask[:, None], backbone.pooling)
        )[:, 0]
    hidden = backbone.before_any_head(inputs)
    if hidden.ndim == 2:
        return hidden
    every = torch.arange(len(rows), device=backbone.device)
    if backbone.kind == "classifier":
        return hidden[every, lengths - 1]
    blanks = tokens == backbone.tokenizer.mask_token_id
    if not blanks.any(1).all():
        raise BackboneError(f"a prompt leaves '{backbone.name}' no blank", "Put {{ mask }} where the answer goes")
    return hidden[every, blanks.int().argmax(1)]


def text_log_odds(backbone: Backbone, texts: Sequence[str], positive: str, negative: str) -> Tensor:
    """Returns the log-odds of the positive answer to each text, differentiable, shape (texts,).

    Args:
        backbone: A masked LM, an encoder or a classifier.
        texts: See `read_texts`.
        positive: The answer of a like: a word of a masked LM's blank, or a text that an encoder compares with; a
            classifier has classes instead.
        negative: The other answer.
    """
    states = read_texts(backbone, texts)
    if backbone.kind == "classifier":
        return backbone.class_answer(states)
    if backbone.kind == "encoder":
        yes, no = read_texts(backbone, [positive, negative])
        odds: Tensor = states @ (yes - no) * ENCODER_SHARPNESS
        return odds
    words = [backbone.answer_token("", word) for word in (positive, negative)]
    logits = backbone.word_logits(states, words)
    return logits[:, 0] - logits[:, 1]
