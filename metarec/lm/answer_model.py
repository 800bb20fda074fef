"""Computes every item's answer log-odds under every user's adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from metarec.config import Precision
from metarec.files.artifacts import content_hash
from metarec.lm.adapter_kinds import Adapters, AdapterSpec
from metarec.lm.backbone import Backbone
from metarec.lm.cached_forward import CachedForward
from metarec.lm.forward import Forward, ItemBatch, pool
from metarec.lm.logits import row_products
from metarec.lm.placement import Placement, adapter_spec, check_placement
from metarec.lm.pooling import pooled_tokens
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.tokenized import CatalogPrompts

_LOG = logging.getLogger(__name__)
# An encoder has no answer words of its own: its log-odds are a difference of cosines, sharpened like CLIP's.
ENCODER_SHARPNESS = 20.0
_SAMPLE_ITEMS = 256
# Under this name a model keeps its frozen log-odds, and of which items they are.
_KEPT = "_kept_log_odds"


@dataclass(frozen=True)
class AnswerModel:
    """Gives every item's answer log-odds under every user's adapter.

    Args:
        backbone: The model.
        prompts: The catalog's prompts.
        placement: Where the adapters sit.
        forward: What runs the model.
    """

    backbone: Backbone
    prompts: CatalogPrompts
    placement: Placement
    forward: Forward

    @property
    def identity(self) -> dict[str, str]:
        """Names what its answers depend on, but for precision: the backbone, the prompts and the placement."""
        return {
            "backbone": self.backbone.fingerprint,
            "prompts": self.prompts.digest,
            "placement": content_hash(asdict(self.placement)),
        }

    @property
    def count(self) -> int:
        """How many items there are."""
        return len(self.prompts.tokens)

    @cached_property
    def spec(self) -> AdapterSpec:
        """The adapters it takes."""
        return adapter_spec(self.backbone, self.placement)

    @property
    def invocation_tokens(self) -> tuple[int, ...] | None:
        """Token ids from whose start the adapter is active, or None where it is active everywhere."""
        count = self.placement.active_tokens
        return None if count is None else self.prompts.tokens[0][-count:]

    def read(self, items: np.ndarray) -> None:
        """Reads of some items what no adapter changes, all at once; later uses find it."""
        self.forward.read(items)

    def gather(self, items: Tensor, width: int = 0) -> ItemBatch:
        """Collects what reading some items needs, once for all the steps that read them; see `Forward.gather`."""
        return self.forward.gather(items, width)

    def log_odds(self, item_batch: ItemBatch, state: Mapping[str, Tensor] | None) -> Tensor:
        """Reads items.

        Args:
            item_batch: The items.
            state: Adapters with a user dimension; None reads with the frozen model.

        Returns:
            log p(yes) - log p(no), shape (users, items).
        """
        return self.answer(self.last_states(item_batch, state))

    def last_states(self, item_batch: ItemBatch, state: Mapping[str, Tensor] | None) -> Tensor:
        """Reads items as `log_odds` does; returns the states behind the answers, shape (users, items, hidden)."""
        adapters = None if state is None else Adapters(state, self.spec)
        return self.forward.last_states(item_batch, adapters)

    def features(self, states: Tensor) -> Tensor:
        """Returns states around the sample's frozen mean, so that a frozen item has length one on average."""
        centre, length = self.frozen_moments
        return (states - centre) / length

    @cached_property
    def _sample(self) -> np.ndarray:
        """Items that stand for the catalog: a mean over them needs no reading of all others, shape (items,)."""
        items = len(self.prompts.tokens)
        drawn = np.random.default_rng(0).choice(items, min(items, _SAMPLE_ITEMS), replace=False)
        return np.sort(drawn)

    @cached_property
    def frozen_moments(self) -> tuple[Tensor, Tensor]:
        """A sample's mean frozen state, shape (hidden,), and the root mean square length around it, a scalar."""
        states = self.frozen_states(self._sample)
        centre = states.mean(0)
        return centre, (states - centre).square().sum(1).mean().sqrt()

    @property
    def states(self) -> Tensor:
        """Every item's state under the frozen model, shape (catalog, hidden); reads the whole catalog."""
        return self.frozen_states(np.arange(len(self.prompts.tokens)))

    def frozen_states(self, items: np.ndarray) -> Tensor:
        """Returns the states of some items under the frozen model, shape (items, hidden)."""
        return self.forward.frozen_states(items)

    def frozen_log_odds(self, items: np.ndarray) -> Tensor:
        """Returns the log-odds of items under the frozen model, of the items' shape; each is computed once."""
        asked = np.unique(items)
        kept = self.__dict__.get(_KEPT)
        missing = asked if kept is None else asked[~kept[1][asked]]
        if kept is None or len(missing):
            found = self.answer(self.frozen_states(missing)).detach()
            fresh = (found.new_zeros(self.count), np.zeros(self.count, bool))
            kept = self.__dict__.setdefault(_KEPT, fresh)  # of several threads, all fill the first one's
            kept[0][torch.from_numpy(missing)] = found
            kept[1][missing] = True
        values: Tensor = kept[0][torch.from_numpy(np.asarray(items))]
        return values

    @cached_property
    def frozen_mean(self) -> Tensor:
        """Mean of a sample's log-odds under the frozen model, a scalar."""
        return self.frozen_log_odds(self._sample).mean()

    @cached_property
    def _answer_axis(self) -> tuple[Tensor, Tensor]:
        if self.prompts.answers is None:
            yes, no = (_encode(self.backbone, ids) for ids in self.prompts.answer_texts)
            return (yes - no) * ENCODER_SHARPNESS, yes.new_zeros(())
        return self.backbone.answer_direction(*self.prompts.answers)

    def answer(self, state: Tensor) -> Tensor:
        """Turns states into log p(yes) - log p(no), each the same bits whatever states are beside it.

        Of a classifier it is what `metarec.lm.rating_classes.RatingClasses.answer` makes of its classes.
        """
        if self.backbone.kind == "classifier":
            return self.backbone.class_answer(state)
        if self.prompts.answers is not None and self.backbone.logit_rule.cap is not None:
            yes, no = self.backbone.word_logits(state, self.prompts.answers).unbind(-1)
            return yes - no
        direction, offset = self._answer_axis
        return row_products(state.to(direction.dtype), direction[None])[..., 0] + offset


@torch.no_grad()
def _encode(backbone: Backbone, ids: tuple[int, ...]) -> Tensor:
    tokens = torch.tensor([ids], device=backbone.device)
    hidden: Tensor = backbone.model(input_ids=tokens).last_hidden_state
    return pool(hidden, pooled_tokens(torch.ones_like(tokens)[:, None] > 0, backbone.pooling))[0, 0]


def open_answer_model(
    backbone: Backbone,
    prompts: CatalogPrompts,
    placement: Placement,
    block_dtype: torch.dtype | None = None,
    kept: Precision = "float32",
) -> AnswerModel:
    """Returns the fastest answer model that is exact for the backbone.

    Args:
        backbone: The model.
        prompts: The catalog's prompts.
        placement: Where the adapters sit.
        block_dtype: Precision of the adapted blocks' frozen weights, where its family is known.
        kept: Precision in which a cache keeps frozen keys and values.

    Raises:
        ConfigError: The placement does not fit the model or the prompts.
    """
    check_placement(backbone, prompts, placement)
    why = _why_not_cached(backbone, prompts, placement)
    if why is None:
        forward = CachedForward(backbone, prompts, placement, block_dtype, kept)
        return AnswerModel(backbone, prompts, placement, forward)
    _LOG.warning("the whole model '%s' runs for every item, which is slower: %s", backbone.name, why)
    return AnswerModel(backbone, prompts, placement, ReferenceForward(backbone, prompts, placement))


def _why_not_cached(backbone: Backbone, prompts: CatalogPrompts, placement: Placement) -> str | None:
    """Returns why `CachedForward` would be wrong or impossible for a model, or None where it is exact."""
    if backbone.weights is None:
        return backbone.taken_apart.why_not
    longest, limit = int(prompts.lengths.max()) + placement.virtual_tokens, backbone.weights.limit
    if limit is not None and longest > limit:
        return f"a prompt has {longest} tokens, beyond {limit} its rotary positions depend on the texts beside it"
    return None
