"""Reads what users write about themselves by a sentence encoder: two towers, the user's text and the item's.

The effects of side information multiply these vectors with items' features, text vectors among them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from metarec.data.side import Texts
from metarec.lm.backbone import Backbone
from metarec.lm.loading import load_backbone
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.side_readers import Reader, by_value, reader_of, side_kind
from metarec.scorers.language.item_vectors import unkept_text_vectors

_COMPONENTS = 32


@dataclass(frozen=True)
class EncodedText:
    """Principal components of a sentence encoder's vectors of texts; nothing of a text is left on disk.

    Args:
        encoder: The encoder's name or directory.
        mean: Mean vector of the texts that it was fitted on, shape (features,).
        components: Directions, scaled so that the components of a text have a mean squared length of one, shape
            (features, width).
    """

    encoder: str
    mean: Floats
    components: Floats

    def read(self, texts: Texts) -> Floats:
        """See `Reader.read`."""
        width = self.components.shape[1]
        return by_value(texts, width, lambda some: (_vectors(self.encoder, some) - self.mean) @ self.components)


@cache
def _backbone(encoder: str) -> Backbone:
    return load_backbone(encoder)


# Vectors of the texts that were read last: an evaluation asks for a user's again and again.
_RECENT: OrderedDict[tuple[str, str], Floats] = OrderedDict()
_MOST_RECENT = 16_384


def _vectors(encoder: str, texts: list[str]) -> Floats:
    """Returns the encoder's vector of each text, shape (texts, features); each different one is read once."""
    known = {text: _RECENT.get((encoder, text)) for text in texts}
    unread = [text for text, vector in known.items() if vector is None]
    fresh = dict(zip(unread, unkept_text_vectors(unread, _backbone(encoder)), strict=True)) if unread else {}
    found = np.stack([vector if (vector := known[text]) is not None else fresh[text] for text in texts])
    _RECENT.update({(encoder, text): vector for text, vector in fresh.items()})
    while len(_RECENT) > _MOST_RECENT:
        _RECENT.popitem(last=False)
    return found


def encoded_reader(encoder: str) -> Callable[[str, Texts], Reader | str]:
    """Returns a function as `reader_of` that has texts read by a sentence encoder."""
    return partial(_reader_of, encoder)


def _reader_of(encoder: str, name: str, texts: Texts) -> Reader | str:
    filled = [str(text) for text in texts if str(text).strip()]
    if side_kind(name, filled) != "text":
        return reader_of(name, texts)
    vectors = _vectors(encoder, filled)
    mean = vectors.mean(0)
    _, lengths, directions = np.linalg.svd(vectors - mean, full_matrices=False)
    kept = directions[:_COMPONENTS].T
    size = np.sqrt(max(float((lengths[:_COMPONENTS] ** 2).sum()) / len(filled), 1e-12))
    return EncodedText(encoder, mean, kept / size)
