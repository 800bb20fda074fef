"""Item vectors that a frozen model computes from the catalog's text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metarec.data.interactions import Catalog
from metarec.data.templates import MAX_FIELD_CHARACTERS, PromptTemplate, hidden_state_texts
from metarec.lm.answer_model import open_answer_model
from metarec.lm.backbone import Backbone
from metarec.lm.hidden_states import mean_hidden_states
from metarec.lm.loading import load_backbone
from metarec.lm.names import MINILM
from metarec.lm.placement import default_placement
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.tokenized import tokenize_catalog
from metarec.scorers.collaborative.features import state_vectors
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.text import unit_vectors

_AS_IT_IS = PromptTemplate("{{ title }}", "good", "bad")
# Texts that are read at once.
_AT_ONCE = 64


def text_vectors(catalog: Catalog, text: PromptTemplate, encoder: str = MINILM) -> Floats:
    """Returns a sentence encoder's vector of every item; the vectors are cached on disk.

    Args:
        catalog: The items.
        text: What is read of an item, see `metarec.data.task.Task.item_text`.
        encoder: A text encoder's name or directory.

    Returns:
        Shape (items, features).

    Raises:
        BackboneError: The encoder is missing.
        ConfigError: The text does not fit the catalog.
    """
    backbone = load_backbone(encoder)
    prompts = tokenize_catalog(backbone, text, catalog)
    placement = default_placement(backbone, prompts, layers=1, targets=None, rank=1, alpha=1.0, active_tokens=None)
    return open_answer_model(backbone, prompts, placement).states.numpy().astype(np.float64)


def unkept_text_vectors(texts: Sequence[str], backbone: Backbone) -> Floats:
    """Returns a sentence encoder's vector of each text, shape (texts, features); leaves nothing on disk."""
    catalog = Catalog(tuple(map(str, range(len(texts)))), {"title": tuple(texts)})
    prompts = tokenize_catalog(backbone, _AS_IT_IS, catalog)
    placement = default_placement(backbone, prompts, layers=1, targets=None, rank=1, alpha=1.0, active_tokens=None)
    forward = ReferenceForward(backbone, prompts, placement)
    blocks = np.array_split(np.arange(len(texts)), max(1, -(-len(texts) // _AT_ONCE)))
    return np.concatenate([forward.frozen_states(block).float().cpu().numpy() for block in blocks]).astype(np.float64)


def hidden_state_vectors(
    backbone: Backbone, catalog: Catalog, sentences: Sequence[str], characters: int = MAX_FIELD_CHARACTERS
) -> Floats:
    """Returns features of a causal language model's hidden states of every item, shape (items, features).

    Args:
        backbone: The model.
        catalog: The items.
        sentences: Templates of the texts that the model reads, see `metarec.data.templates.hidden_state_texts`.
        characters: How many characters of a field are read at most.

    Raises:
        ConfigError: A sentence does not fit the catalog.
    """
    texts = [hidden_state_texts(catalog, sentence, backbone.special_tokens, characters) for sentence in sentences]
    vectors = [unit_vectors(state_vectors(mean_hidden_states(backbone, some))) for some in texts]
    return np.concatenate(vectors, 1)
