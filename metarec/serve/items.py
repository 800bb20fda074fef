"""Adds items to a fitted recommender after training.

Other items keep their scores to the last bit. A new item is read by the same model through the same prompt; its mean is
predicted from its text, as for every item without ratings.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from metarec.data.interactions import Catalog
from metarec.errors import ConfigError, suggest
from metarec.lm.answer_model import AnswerModel, open_answer_model
from metarec.lm.cached_forward import CachedForward
from metarec.lm.forward import ItemBatch
from metarec.lm.tokenized import CatalogPrompts, tokenize_catalog
from metarec.recommender import MetaRecommender
from metarec.scorers.collaborative.item_mean import extend_by_text
from metarec.scorers.term import AddedItems
from metarec.training.fitting import Fitted


@dataclass(frozen=True)
class Segment:
    """Items added together: the code of the first, and an answer model of their own."""

    start: int
    answer_model: AnswerModel

    def __len__(self) -> int:
        return len(self.answer_model.prompts.tokens)


@dataclass(frozen=True)
class ExtendedAnswerModel(AnswerModel):
    """An answer model of a catalog and of the items that were added to it.

    Args:
        base: Answers for the items that were trained with.
        segments: Answer for the others, in the order of their codes.
    """

    base: AnswerModel
    segments: tuple[Segment, ...]

    @property
    def count(self) -> int:
        """See `AnswerModel.count`."""
        return len(self.base.prompts.tokens) + sum(map(len, self.segments))

    def read(self, items: np.ndarray) -> None:
        """See `AnswerModel.read`."""
        self.base.read(items[items < len(self.base.prompts.tokens)])
        for segment in self.segments:
            inside = (items >= segment.start) & (items < segment.start + len(segment))
            segment.answer_model.read(items[inside] - segment.start)

    def gather(self, items: Tensor, width: int = 0) -> ItemBatch:
        """See `AnswerModel.gather`."""
        filler = shortest if width else longest
        known = len(self.base.prompts.tokens)
        parts = []
        for segment in self.segments:
            inside = (items >= segment.start) & (items < segment.start + len(segment))
            if inside.any():
                # Items of other segments become one of this, so that shapes do not depend on them.
                local = torch.where(inside, items - segment.start, filler(segment.answer_model))
                parts.append((segment.answer_model, segment.answer_model.gather(local, width), inside))
        base = self.base.gather(torch.where(items < known, items, filler(self.base)), width)
        return ItemBatch(items, (base, parts))

    def last_states(self, item_batch: ItemBatch, state: Mapping[str, Tensor] | None) -> Tensor:
        """See `AnswerModel.last_states`."""
        base, parts = item_batch.inputs
        values = self.base.last_states(base, state)
        for answer_model, own, inside in parts:
            values = torch.where(inside.to(values.device)[..., None], answer_model.last_states(own, state), values)
        return values

    def frozen_states(self, items: np.ndarray) -> Tensor:
        """See `AnswerModel.frozen_states`."""
        known = len(self.base.prompts.tokens)
        states = self.base.frozen_states(items[items < known])
        found = states.new_zeros(len(items), states.shape[1])
        found[torch.from_numpy(items < known)] = states
        for segment in self.segments:
            inside = (items >= segment.start) & (items < segment.start + len(segment))
            found[torch.from_numpy(inside)] = segment.answer_model.frozen_states(items[inside] - segment.start)
        return found

    @property
    def states(self) -> Tensor:
        """See `AnswerModel.states`."""
        return self.frozen_states(np.arange(self.count))

    @cached_property
    def frozen_mean(self) -> Tensor:
        """See `AnswerModel.frozen_mean`; log-odds are relative to the mean of the trained catalog."""
        return self.base.frozen_mean

    @cached_property
    def frozen_moments(self) -> tuple[Tensor, Tensor]:
        """See `AnswerModel.frozen_moments`; features are relative to the mean of the trained catalog."""
        return self.base.frozen_moments


def longest(answer_model: AnswerModel) -> int:
    """Returns the code of the item with the longest prompt."""
    return int(answer_model.prompts.lengths.argmax())


def shortest(answer_model: AnswerModel) -> int:
    """Returns the code of the item with the shortest prompt."""
    return int(answer_model.prompts.lengths.argmin())


def prompt_lengths(answer_model: AnswerModel) -> np.ndarray:
    """Returns how many tokens every item's prompt has, those of added items among them, shape (items,)."""
    if not isinstance(answer_model, ExtendedAnswerModel):
        return answer_model.prompts.lengths
    parts = (answer_model.base, *(segment.answer_model for segment in answer_model.segments))
    return np.concatenate([part.prompts.lengths for part in parts])


def check_fields(catalog: Catalog, fields: Mapping[str, str]) -> dict[str, str]:
    """Returns an item's fields; those left out are empty.

    Raises:
        ConfigError: The title is missing, or a field is not one of the catalog's.
    """
    unknown = sorted(set(fields) - set(catalog.fields))
    if unknown:
        raise ConfigError(f"the catalog has no field '{unknown[0]}'", suggest(unknown[0], catalog.fields))
    if not fields.get("title", "").strip():
        raise ConfigError("an item has no title", "Give it one")
    return {name: fields.get(name, "") for name in catalog.fields}


def extend(
    trained: MetaRecommender, current: MetaRecommender, items: Sequence[tuple[str, Mapping[str, str]]]
) -> MetaRecommender:
    """Returns a recommender over a catalog with some new items; the scores of the others stay the same.

    Args:
        trained: The recommender without any added item.
        current: The recommender with the items added so far.
        items: Ids and fields that `current` does not have.
    """
    added = [*_added(trained, current), *items]
    known = len(trained.fitted.catalog)
    answer_model = current.fitted.answer_model
    if trained.fitted.answer_model is None:
        return _over(trained, [], added)
    segments = list(answer_model.segments) if isinstance(answer_model, ExtendedAnswerModel) else []
    start = len(current.fitted.catalog)
    # Segments of similar size are merged, so their number, and how often an item is read, grow logarithmically.
    while segments and len(segments[-1]) <= known + len(added) - start:
        start = segments.pop().start
    segments.append(Segment(start, _read(trained, added[start - known :])))
    if isinstance(answer_model, ExtendedAnswerModel):
        for segment in set(answer_model.segments) - set(segments):
            if isinstance(segment.answer_model.forward, CachedForward):
                shutil.rmtree(segment.answer_model.forward.path, ignore_errors=True)
    return _over(trained, segments, added)


def _read(trained: MetaRecommender, items: Sequence[tuple[str, Mapping[str, str]]]) -> AnswerModel:
    base = trained.fitted.answer_model
    assert base is not None
    prompts = tokenize_catalog(trained.backbone, trained.fitted.task.template, _catalog(trained.fitted.catalog, items))
    kept = trained.config.cache
    return open_answer_model(trained.backbone, _as_trained(prompts, base.prompts), base.placement, kept=kept)


def _as_trained(prompts: CatalogPrompts, base: CatalogPrompts) -> CatalogPrompts:
    """Splits prompts into prefix, item and suffix where the trained catalog's are split."""
    tail = base.tokens[0][len(base.tokens[0]) - base.suffix :]
    suffix = base.suffix
    while suffix and any(tokens[-suffix:] != tail[-suffix:] for tokens in prompts.tokens):
        suffix -= 1
    shortest = int(prompts.lengths.min())
    return replace(prompts, prefix=min(prompts.prefix, base.prefix, shortest - max(suffix, 1)), suffix=suffix)


def _catalog(like: Catalog, items: Sequence[tuple[str, Mapping[str, str]]]) -> Catalog:
    fields = {name: tuple(values[name] for _, values in items) for name in like.fields}
    return Catalog(tuple(item for item, _ in items), fields)


def _added(trained: MetaRecommender, current: MetaRecommender) -> list[tuple[str, Mapping[str, str]]]:
    catalog = current.fitted.catalog
    codes = range(len(trained.fitted.catalog), len(catalog))
    return [(catalog.ids[code], {name: column[code] for name, column in catalog.fields.items()}) for code in codes]


def _over(
    trained: MetaRecommender, segments: Sequence[Segment], added: Sequence[tuple[str, Mapping[str, str]]]
) -> MetaRecommender:
    fitted, base = trained.fitted, trained.fitted.answer_model
    new = _catalog(fitted.catalog, added)
    fields = {name: column + new.fields[name] for name, column in fitted.catalog.fields.items()}
    catalog = Catalog(fitted.catalog.ids + new.ids, fields)
    answer_model: ExtendedAnswerModel | None = None
    # Without a language model every new item gets the average mean.
    known, states = np.zeros((len(fitted.catalog), 1)), np.zeros((len(added), 1))
    if base is not None:
        parts = (base.backbone, base.prompts, base.placement, base.forward)
        answer_model = ExtendedAnswerModel(*parts, base, tuple(segments))
        known = base.states.cpu().numpy()
        states = torch.cat([segment.answer_model.states for segment in segments]).cpu().numpy()
    prior = extend_by_text(fitted.prior, known, states)
    extended = AddedItems(catalog, prior, answer_model)
    longer: Fitted = replace(
        fitted,
        catalog=catalog,
        prior=prior,
        terms={name: term.extended(extended) for name, term in fitted.terms.items()},
        answer_model=answer_model,
    )
    return MetaRecommender(None if base is None else base.backbone, trained.config, longer)
