"""Tokenizes a catalog's prompts and the answer words, each of which is a single token at the prompt's end."""

from __future__ import annotations

import hashlib
import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from statistics import median
from typing import overload

import numpy as np

from metarec.data.interactions import Catalog
from metarec.data.templates import PromptTemplate
from metarec.errors import ConfigError
from metarec.files.artifacts import dump_json
from metarec.lm.backbone import Backbone

_LOG = logging.getLogger(__name__)


class TokenRows(Sequence[tuple[int, ...]]):
    """Token ids of many texts in one array; a row is a tuple when it is asked for.

    Args:
        flat: The rows, one behind the other.
        starts: Where each begins, and where the last one ends, shape (rows + 1,).
    """

    def __init__(self, flat: np.ndarray, starts: np.ndarray) -> None:
        self.flat = flat
        self.starts = starts

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> TokenRows:
        """Returns rows that are lists or tuples."""
        starts = np.cumsum([0, *map(len, rows)])
        return cls(np.fromiter(chain.from_iterable(rows), np.int32, int(starts[-1])), starts)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of every row, shape (rows,)."""
        lengths: np.ndarray = np.diff(self.starts)
        return lengths

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, row: int) -> tuple[int, ...]: ...

    @overload
    def __getitem__(self, row: slice) -> list[tuple[int, ...]]: ...

    def __getitem__(self, row: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(row, slice):
            return [self[at] for at in range(*row.indices(len(self)))]
        at = operator.index(row)
        if not -len(self) <= at < len(self):
            raise IndexError(f"row {at} of {len(self)}")
        at %= len(self)
        return tuple(self.flat[self.starts[at] : self.starts[at + 1]].tolist())


class ItemTexts(Sequence[str]):
    """Items' prompts as texts, each rendered when it is asked for.

    Args:
        backbone: The model that reads them.
        template: The prompt.
        catalog: The items.
    """

    def __init__(self, backbone: Backbone, template: PromptTemplate, catalog: Catalog) -> None:
        self._backbone = backbone
        self._template = template
        self._catalog = catalog

    def __len__(self) -> int:
        return len(self._catalog)

    @overload
    def __getitem__(self, code: int) -> str: ...

    @overload
    def __getitem__(self, code: slice) -> list[str]: ...

    def __getitem__(self, code: int | slice) -> str | list[str]:
        if isinstance(code, slice):
            return [self[at] for at in range(*code.indices(len(self)))]
        if not -len(self) <= code < len(self):
            raise IndexError(f"item {code} of {len(self)}")
        backbone = self._backbone
        mask = backbone.tokenizer.mask_token if backbone.kind == "masked" else ""
        return self._template.render(self._catalog, int(code) % len(self), backbone.special_tokens, mask)


@dataclass(frozen=True)
class CatalogPrompts:
    """Every item's prompt as token ids, and what all prompts share.

    Args:
        texts: Prompt per item.
        tokens: Token ids per item.
        prefix: How many leading tokens all prompts have in common.
        suffix: How many trailing tokens all prompts have in common, beyond the prefix.
        answers: Token ids of the yes and the no word; None for encoders.
        mask_token: Token id of the blank to fill in; None where the answer follows the prompt.
        answer_texts: The two texts an encoder compares items with.
        known_digest: `digest`, where it was computed before.
    """

    texts: Sequence[str]
    tokens: TokenRows
    prefix: int
    suffix: int
    answers: tuple[int, int] | None
    mask_token: int | None
    answer_texts: tuple[tuple[int, ...], tuple[int, ...]]
    known_digest: str | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of every prompt, shape (items,)."""
        return self.tokens.lengths

    @cached_property
    def digest(self) -> str:
        """Names the prompts by their content."""
        if self.known_digest is not None:
            return self.known_digest
        # The JSON of `content_hash`, which is slow to write where there are many short lists.
        rows = ",\n".join(["    [\n      " + ",\n      ".join(map(str, ids)) + "\n    ]" for ids in self.tokens])
        others = dump_json([self.answers, self.answer_texts])
        return hashlib.sha256(f"[\n  [\n{rows}\n  ],{others[1:]}".encode()).hexdigest()[:16]


def tokenize_catalog(backbone: Backbone, template: PromptTemplate, catalog: Catalog) -> CatalogPrompts:
    """Renders and tokenizes every item's prompt.

    What an encoder has no positions for is cut off the text's end, with a warning. A prompt has its answer there, so
    nothing is cut off it.

    Raises:
        ConfigError: A masked LM's template has no ``{{ mask }}``, a prompt is longer than the model reads, or all of
            them are the same tokens.
        BackboneError: An answer word is not one token.
    """
    mask = backbone.tokenizer.mask_token if backbone.kind == "masked" else ""
    special = backbone.special_tokens
    texts = [template.render(catalog, code, special, mask) for code in range(len(catalog))]
    if backbone.kind == "masked" and mask not in texts[0]:
        raise ConfigError(
            f"the prompt leaves '{backbone.name}' no blank to fill in", "Put {{ mask }} where the answer goes"
        )
    tokens: Sequence[tuple[int, ...]] = _within(backbone, backbone.tokenize(texts), catalog, template.where)
    if len(tokens) > 1 and len(set(tokens)) == 1:
        raise ConfigError(
            f"all {len(tokens)} texts of '{template.where}' are the same {len(tokens[0])} tokens to '{backbone.name}'",
            "Choose a model whose tokenizer knows the words, or name a field in the template that tells items apart",
        )
    answers = None
    if backbone.kind not in ("encoder", "classifier"):
        answers = (
            backbone.answer_token(texts[0], template.positive),
            backbone.answer_token(texts[0], template.negative),
        )
    shortest = min(map(len, tokens))
    prefix = min(common_start(tokens), shortest - 1)
    suffix = min(common_start([ids[::-1] for ids in tokens]), shortest - prefix)
    yes_text, no_text = backbone.tokenize([template.positive, template.negative])
    return CatalogPrompts(
        texts=tuple(texts),
        tokens=TokenRows.of(tokens),
        prefix=prefix,
        suffix=suffix,
        answers=answers,
        mask_token=backbone.tokenizer.mask_token_id if backbone.kind == "masked" else None,
        answer_texts=(tuple(yes_text), tuple(no_text)),
    )


@dataclass(frozen=True)
class TokenCounts:
    """How long a catalog's prompts are to a model.

    Args:
        longest: Tokens of the longest prompt.
        median: Tokens of the median prompt.
        limit: Tokens that the model has positions for; None where nothing limits them.
        over: Items whose prompts are longer.
    """

    longest: int
    median: float
    limit: int | None
    over: tuple[int, ...]


def count_tokens(backbone: Backbone, template: PromptTemplate, catalog: Catalog) -> TokenCounts:
    """Returns how long every item's prompt is to a model, and which are too long; nothing is refused."""
    mask = backbone.tokenizer.mask_token if backbone.kind == "masked" else ""
    texts = [template.render(catalog, code, backbone.special_tokens, mask) for code in range(len(catalog))]
    lengths = [len(ids) for ids in backbone.tokenize(texts)]
    limit = backbone.max_tokens
    over = () if limit is None else tuple(code for code, length in enumerate(lengths) if length > limit)
    return TokenCounts(max(lengths), median(lengths), limit, over)


def _within(
    backbone: Backbone, tokens: Sequence[Sequence[int]], catalog: Catalog, where: str
) -> tuple[tuple[int, ...], ...]:
    limit = backbone.max_tokens
    longest = max(range(len(tokens)), key=lambda code: len(tokens[code]))
    if limit is None or len(tokens[longest]) <= limit:
        return tuple(map(tuple, tokens))
    count = sum(len(ids) > limit for ids in tokens)
    said = (
        f"{count} of {len(tokens)} texts of '{where}' are longer than the {limit} tokens that '{backbone.name}' reads "
        f"(item '{catalog.ids[longest]}' has {len(tokens[longest])})"
    )
    if backbone.kind not in ("encoder", "classifier"):
        raise ConfigError(said, "Cut a field in the template, such as {{ text[:200] }}, or choose another model")
    _LOG.warning("%s: their ends are cut off", said)
    return tuple((*ids[: limit - 1], ids[-1]) if len(ids) > limit else tuple(ids) for ids in tokens)


def common_start(sequences: Sequence[tuple[int, ...]]) -> int:
    """Returns how many leading numbers all sequences have in common."""
    # The least and the greatest sequence differ wherever any two do.
    least, greatest = min(sequences), max(sequences)
    differ = (place for place, (a, b) in enumerate(zip(least, greatest, strict=False)) if a != b)
    return next(differ, min(len(least), len(greatest)))
