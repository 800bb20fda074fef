"""What small networks over item features compute from a support: MeLU, a neural process, and amortised learners.

Each is pure functions over parameters with a user dimension. All but MeLU read the support in one pass and ignore its
order; what they add to the item prior does not depend on padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from metarec.system.tensors import AdapterState

Form = Literal["melu", "neural process", "set transformer", "hypernetwork"]
# Pseudo-ratings that shrink the encoding of a support to 0.
_ENCODING_DAMPING = 5.0
_HEADS = 4


@dataclass(frozen=True)
class ItemRows:
    """Some users' items: features (users, items, features); the rest (users, items)."""

    features: Tensor
    prior: Tensor
    target: Tensor
    liked: Tensor
    real: Tensor

    @property
    def rated(self) -> Tensor:
        """Features and residual of each rating, and their products, shape (users, items, 2 features + 1)."""
        residual = (self.target - self.prior)[..., None]
        return torch.cat([self.features, residual, residual * self.features], -1)


@dataclass(frozen=True)
class NetworkForm:
    """One network.

    Args:
        name: How the method is called in tables.
        shapes: Maps the numbers of features and of hidden units to (out, in) of each layer.
        predict: Maps parameters, support and query to what is added to the query's prior, shape (users, items).
        numbers: Maps the numbers of features, of hidden units and of ratings to how many numbers a user keeps.
        last: Layers that start small, so that the score before training is nearly the prior.
        adapted: Layers that the inner loop moves; none where the support is read in one pass.
    """

    name: str
    shapes: Callable[[int, int], dict[str, tuple[int, int]]]
    predict: Callable[[AdapterState, ItemRows, ItemRows], Tensor]
    numbers: Callable[[int, int, int], int]
    last: tuple[str, ...] = ("answer",)
    adapted: tuple[str, ...] = ()


def linear(state: AdapterState, name: str, values: Tensor) -> Tensor:
    """Applies every user's layer of a name."""
    applied: Tensor = values @ state[f"{name}.weight"].mT + state[f"{name}.bias"][:, None]
    return applied


def _answer(state: AdapterState, hidden: Tensor) -> Tensor:
    answer: Tensor = linear(state, "answer", functional.relu(linear(state, "decide", hidden)))[..., 0]
    return answer


def _melu(state: AdapterState, support: ItemRows, query: ItemRows) -> Tensor:
    return _answer(state, functional.relu(linear(state, "item", query.features)))


def _encode(state: AdapterState, support: ItemRows) -> Tensor:
    """Returns the shrunk mean of the encoded ratings of each support, shape (users, hidden)."""
    encoded = linear(state, "encode2", functional.relu(linear(state, "encode", support.rated)))
    # Damped, so that the result also tells the number of ratings: with few of them it is near zero.
    total = (encoded * support.real[..., None]).sum(1)
    return total / (support.real.sum(1, keepdim=True) + _ENCODING_DAMPING)


def _neural_process(state: AdapterState, support: ItemRows, query: ItemRows) -> Tensor:
    hidden = functional.relu(linear(state, "item", query.features))
    encoded = _encode(state, support)
    return _answer(state, torch.cat([hidden, encoded[:, None].expand(-1, hidden.shape[1], -1)], -1))


def _hypernetwork(state: AdapterState, support: ItemRows, query: ItemRows) -> Tensor:
    """Adds the product of a read-out, which the support's encoding emits, with the item's hidden state and features.

    The read-out changes the output layer by rank 1.
    """
    hidden = torch.cat([functional.relu(linear(state, "item", query.features)), query.features], -1)
    readout = linear(state, "emit", _encode(state, support)[:, None])
    return ((linear(state, "answer", torch.ones_like(hidden[:, :1, :1])) + readout) * hidden).sum(-1)


def _attend(state: AdapterState, name: str, asking: Tensor, asked: Tensor, real: Tensor) -> Tensor:
    """Returns what each token gathers from others by attention of several heads, shape (users, asking, hidden).

    A token may attend to nothing as well, as to a key and a value of 0: with few ratings little is gathered, and with
    none nothing.

    Args:
        state: The parameters.
        name: The block's name.
        asking: Tokens that attend, shape (users, asking, hidden).
        asked: Tokens that are attended to, shape (users, asked, hidden).
        real: Which of these are no padding, shape (users, asked).
    """

    def heads(values: Tensor) -> Tensor:
        split: Tensor = values.unflatten(-1, (_HEADS, -1)).transpose(1, 2)
        return split

    queries = heads(linear(state, f"{name}.ask", asking))
    keys, values = (heads(linear(state, f"{name}.{part}", asked)) for part in ("key", "value"))
    match = queries @ keys.mT / math.sqrt(queries.shape[-1])
    match = match.masked_fill(~real[:, None, None], -math.inf)
    weights = torch.cat([match, match.new_zeros(*match.shape[:-1], 1)], -1).softmax(-1)[..., :-1]
    return (weights @ values).transpose(1, 2).flatten(2)


def _set_transformer(state: AdapterState, support: ItemRows, query: ItemRows) -> Tensor:
    """Attends from the ratings to each other, then from the query's items to the ratings."""
    ratings = linear(state, "encode", support.rated)
    ratings = ratings + _attend(state, "self", ratings, ratings, support.real)
    ratings = ratings + functional.relu(linear(state, "encode2", ratings))
    items = functional.relu(linear(state, "item", query.features))
    gathered = _attend(state, "cross", items, ratings, support.real)
    return _answer(state, torch.cat([items, gathered], -1))


def _two_layers(features: int, hidden: int) -> dict[str, tuple[int, int]]:
    return {"item": (hidden, features), "decide": (hidden, hidden), "answer": (1, hidden)}


def _encoder(features: int, hidden: int) -> dict[str, tuple[int, int]]:
    return {"encode": (hidden, 2 * features + 1), "encode2": (hidden, hidden)}


def _attention(features: int, hidden: int) -> dict[str, tuple[int, int]]:
    blocks = {f"{name}.{part}": (hidden, hidden) for name in ("self", "cross") for part in ("ask", "key", "value")}
    return {**_two_layers(features, hidden), **_encoder(features, hidden), **blocks, "decide": (hidden, 2 * hidden)}


FORMS: dict[Form, NetworkForm] = {
    "melu": NetworkForm(
        "MeLU",
        _two_layers,
        _melu,
        lambda features, hidden, ratings: hidden * hidden + 2 * hidden + 1,
        adapted=("decide", "answer"),
    ),
    "neural process": NetworkForm(
        "neural process",
        lambda features, hidden: {
            **_two_layers(features, hidden),
            **_encoder(features, hidden),
            "decide": (hidden, 2 * hidden),
        },
        _neural_process,
        lambda features, hidden, ratings: hidden,
    ),
    "set transformer": NetworkForm(
        "set transformer", _attention, _set_transformer, lambda features, hidden, ratings: 2 * hidden * ratings
    ),
    "hypernetwork": NetworkForm(
        "hypernetwork",
        lambda features, hidden: {
            "item": (hidden, features),
            **_encoder(features, hidden),
            "emit": (hidden + features, hidden),
            "answer": (hidden + features, 1),
        },
        _hypernetwork,
        lambda features, hidden, ratings: hidden + features,
        last=("emit", "answer"),
    ),
}
