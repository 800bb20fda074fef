"""Log-odds of items, linearized in the adapter around the meta-learned initialization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from metarec.data.interactions import Codes
from metarec.lm.answer_model import AnswerModel
from metarec.meta.inner_loop import MetaState
from metarec.system.progress import progress
from metarec.system.tensors import AdapterState, expand_users

_ITEMS_AT_ONCE = 64


@dataclass(frozen=True)
class Linearized:
    """Log-odds of some items, linearized in the adapter around the initialization.

    At the initialization the log-odds and their gradient are exact, so the first gradient step needs no language model.

    Args:
        start: The initialization of the adapted tensors, without a user dimension.
        place: Each item's row in `values` and `slopes`, -1 where it has none, up to the last such item, on the CPU.
        values: Log-odds under `start`, shape (rows,).
        slopes: Gradients of the log-odds, the tensors of `start` flattened and concatenated, shape (rows, numbers).
    """

    start: AdapterState
    place: Tensor
    values: Tensor
    slopes: Tensor

    def covers(self, items: Codes) -> bool:
        """Says whether all items have a row."""
        return bool((items < len(self.place)).all()) and bool((self.place[torch.from_numpy(items)] >= 0).all())

    @cached_property
    def _rows(self) -> Tensor:
        """Each item's row where the values are; items without one have another's."""
        return self.place.clamp(min=0).to(self.values.device)

    def log_odds(self, items: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Returns linearized log-odds, shape (users, items); those of items without a row are undefined."""
        rows = self._rows[items.to(self._rows.device).clamp(max=len(self._rows) - 1)]
        moved = torch.cat([(state[name] - value).flatten(1) for name, value in self.start.items()], 1)
        return self.values[rows] + (self.slopes[rows] @ moved.unsqueeze(-1)).squeeze(-1)


def linearize(answer_model: AnswerModel, meta: MetaState, items: Codes) -> Linearized:
    """Computes log-odds and gradients of items at the meta-initialization, once for all users.

    Args:
        answer_model: The language model.
        meta: The meta-parameters; gradients are with respect to the language model's tensors that have an inner rate.
        items: Different item codes.
    """
    adapter = {name: value.detach() for name, value in meta.init.items() if not name.startswith("score.")}
    start = {name: value for name, value in adapter.items() if name in meta.log_rate}
    numbers = sum(value.numel() for value in start.values())
    values = torch.empty(len(items), device=answer_model.backbone.device)
    slopes = values.new_empty(len(items), numbers)
    with progress("reading items at the start", len(items), after=2.0) as advance:
        for begin in range(0, len(items), _ITEMS_AT_ONCE):
            block = torch.from_numpy(items[begin : begin + _ITEMS_AT_ONCE])
            rows = slice(begin, begin + len(block))
            # One item per user, so that the gradient of the sum holds each item's gradient.
            leaves = {name: value.clone().requires_grad_() for name, value in expand_users(start, len(block)).items()}
            with torch.enable_grad():
                state = {**expand_users(adapter, len(block)), **leaves}
                read = answer_model.log_odds(answer_model.gather(block[:, None]), state)[:, 0]
                gradients = torch.autograd.grad(read.sum(), list(leaves.values()))
            values[rows] = read.detach()
            torch.cat([gradient.flatten(1) for gradient in gradients], 1, out=slopes[rows])
            advance(rows.stop)
    place = torch.full((int(items.max(initial=-1)) + 1,), -1)
    place[torch.from_numpy(items)] = torch.arange(len(items))
    return Linearized(start, place, values, slopes)
