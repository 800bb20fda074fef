"""Two towers: what a user writes about themselves, and what is known of an item, in one space where likes lie close.

Both towers are linear maps of frozen vectors, trained so that a user's vector is closer to an item that they like than
to items that other users of the batch like. These are drawn as often as they are liked, so that popularity, which item
means hold already, explains nothing.

Source: van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", eq. 4; both ways and
with a learned temperature as in Radford et al. 2021, "CLIP", figure 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from metarec.data.interactions import Codes
from metarec.data.side import Texts
from metarec.scorers.collaborative.residuals import Floats, Residuals
from metarec.scorers.collaborative.side_readers import Reader

_WIDTH = 32
_BATCH = 128
_STEPS, _CHECK_EVERY, _PATIENCE = 300, 20, 4
_LR, _WEIGHT_DECAY = 0.01, 0.03
_HELD_OUT = 0.25
_FEWEST = 20
# Pseudo-ratings that pull the weight of the towers' product to 0.
_DAMPING = 20.0


@dataclass(frozen=True)
class Towers:
    """A user's tower, and what the item's tower made of each item.

    Args:
        users: The user's projection, shape (width of the text's features, width).
        mean: Mean of the vectors of the users that it was trained on, shape (width,).
        items: Vectors of items, times the weight of the product, shape (items, width).
    """

    users: Floats
    mean: Floats
    items: Floats

    def of(self, features: Floats) -> Floats:
        """Returns vectors of users, whose products with `items` are effects, shape (users, width).

        Args:
            features: What was read of their texts, shape (users, width of it); all 0 where there is none.
        """
        return _vectors(features, self.users, self.mean)


@dataclass(frozen=True)
class TowerText:
    """Reads a text as another reader does, and behind that by a user's tower.

    Args:
        reader: The other reader.
        users: See `Towers`.
        mean: See `Towers`.
    """

    reader: Reader
    users: Floats
    mean: Floats

    def read(self, texts: Texts) -> Floats:
        """See `Reader.read`."""
        features = self.reader.read(texts)
        return np.concatenate([features, _vectors(features, self.users, self.mean)], 1)


def _vectors(features: Floats, users: Floats, mean: Floats) -> Floats:
    found: Floats = _unit(features @ users) - mean
    found[~features.any(1)] = 0.0
    return found


@dataclass(frozen=True)
class TowerData:
    """What towers are trained on.

    Args:
        features: What was read of each user's text, shape (users, width).
        content: What is known of each item, shape (items, width).
        residuals: What item means leave of ratings, by user.
        liked: Which of these ratings are likes, shape (ratings,).
    """

    features: Floats
    content: Floats
    residuals: Residuals
    liked: np.ndarray


def fit_towers(data: TowerData, users: np.ndarray, left: Floats, seed: int) -> Towers | None:
    """Trains towers on the likes of some users; None where they explain nothing of users held out.

    Args:
        data: The data.
        users: Which users are used, shape (users,).
        left: What is left to explain of each rating, shape (ratings,).
        seed: Seed of initialization, batches and of which users are held out.
    """
    generator = np.random.default_rng([seed, 6])
    wrote = np.flatnonzero(users & data.features.any(1))
    if len(wrote) < _FEWEST:
        return None
    held_out = np.zeros(len(data.features), bool)
    held_out[generator.permutation(wrote)[: max(round(_HELD_OUT * len(wrote)), 1)]] = True
    trained = np.isin(np.arange(len(held_out)), wrote) & ~held_out
    maps = _train(data, trained, held_out, generator, seed)
    if maps is None:
        return None
    user_map, item_map = maps
    vectors = _unit(data.features @ user_map)
    found = Towers(user_map, vectors[trained].mean(0), _unit(data.content @ item_map))
    # The weight comes from users whose likes moved no map.
    rows = held_out[data.residuals.user]
    product = (found.of(data.features)[data.residuals.user[rows]] * found.items[data.residuals.item[rows]]).sum(1)
    weight = float(product @ left[rows]) / (float(product @ product) + _DAMPING * float((product**2).mean()) + 1e-12)
    return Towers(user_map, found.mean, weight * found.items) if weight > 0 else None


def _train(
    data: TowerData, trained: np.ndarray, held_out: np.ndarray, generator: np.random.Generator, seed: int
) -> tuple[Floats, Floats] | None:
    """Returns both maps as they were when the loss on held-out users was least; None where it never fell."""
    likes = _likes(data, trained)
    if not len(likes):
        return None
    check = _likes(data, held_out)
    if not len(check):
        return None
    check = check[np.random.default_rng([seed, 7]).permutation(len(check))[: 4 * _BATCH]]
    drawn = torch.Generator().manual_seed(seed)
    users = torch.from_numpy(data.features).float()
    items = torch.from_numpy(np.asarray(data.content)).float()
    maps = [
        (torch.randn(table.shape[1], _WIDTH, generator=drawn) / table.shape[1] ** 0.5).requires_grad_()
        for table in (users, items)
    ]
    sharpness = torch.tensor(np.log(5.0), dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [{"params": maps, "weight_decay": _WEIGHT_DECAY}, {"params": [sharpness], "weight_decay": 0.0}], lr=_LR
    )
    known = _pairs(data)

    def loss(pairs: np.ndarray) -> Tensor:
        user, item = pairs.T
        one, other = (
            functional.normalize(table[rows] @ mapped, dim=1)
            for table, rows, mapped in zip((users, items), (user, item), maps, strict=True)
        )
        logits = sharpness.clamp(max=np.log(100.0)).exp() * one @ other.T
        # What a user likes as well is no negative, in either direction.
        also = torch.from_numpy(known(user, item))
        also.fill_diagonal_(False)
        logits = logits.masked_fill(also, -torch.inf)
        target = torch.arange(len(pairs))
        return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2

    blocks = [block for block in np.array_split(check, -(-len(check) // _BATCH)) if len(block) > 1]
    best, kept, waited = _checked(loss, blocks), None, 0
    for step in range(1, _STEPS + 1):
        optimizer.zero_grad()
        loss(likes[generator.integers(0, len(likes), min(_BATCH, len(likes)))]).backward()
        optimizer.step()
        if step % _CHECK_EVERY:
            continue
        found = _checked(loss, blocks)
        if found < best:
            best, waited = found, 0
            kept = tuple(mapped.detach().numpy().astype(np.float64) for mapped in maps)
        else:
            waited += 1
            if waited >= _PATIENCE:
                break
    return None if kept is None else (kept[0], kept[1])


@torch.no_grad()
def _checked(loss: Callable[[np.ndarray], Tensor], blocks: list[np.ndarray]) -> float:
    return float(np.mean([float(loss(block)) for block in blocks])) if blocks else np.inf


def _likes(data: TowerData, users: np.ndarray) -> Codes:
    """Returns user and item of each like of some users, shape (likes, 2)."""
    rows = users[data.residuals.user] & data.liked
    return np.stack([data.residuals.user[rows], data.residuals.item[rows]], 1)


def _pairs(data: TowerData) -> Callable[[Codes, Codes], np.ndarray]:
    """Returns a function that says of each of some users and each of some items whether the user likes it."""
    from scipy.sparse import csr_array

    rows = data.liked
    shape = (len(data.features), len(data.content))
    ones = np.ones(int(rows.sum()), bool)
    likes = csr_array((ones, (data.residuals.user[rows], data.residuals.item[rows])), shape)
    return lambda users, items: likes[users][:, items].toarray()


def _unit(vectors: Floats) -> Floats:
    found: Floats = vectors / np.sqrt(np.maximum((vectors**2).sum(1, keepdims=True), 1e-12))
    return found
