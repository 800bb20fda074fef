"""A graph network over users, items and friends, whose items also read what their texts say.

Users are joined to items that they like, and to friends. Embeddings spread along the edges; an item's starts from one
of its own plus a linear map of its features, so that the graph and the language model's vectors are one embedding. A
new user's embedding is what arrives from liked items and friends: no user is trained for. It needs the package
torch-geometric, ``pip install 'metarec[graph]'``.

Source: He et al. 2020, "LightGCN", eq. 3 and 8; social edges as in Wu et al. 2019, "DiffNet", section 4.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metarec.data.episodes import Episode, training_batch
from metarec.data.interactions import Codes, Interactions, Ratings
from metarec.errors import ConfigError
from metarec.evaluation.evaluate import validation_auc
from metarec.scorer import Request, ScoreArray, score_each
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.side_readers import Friends, friends_of
from metarec.system.progress import progress

_BATCH = 64
_VALIDATE_EVERY = 25
_SHARPNESS = 2.0
_SHOTS = (0, 5, 10, 20)
_MAX_QUERY, _MIN_QUERY = 20, 5


@dataclass(frozen=True)
class GraphNetwork:
    """A fitted graph network; its score is added to the item prior.

    Args:
        prior: The item prior.
        layers: Embeddings of items after each round of spreading, shape (rounds + 1, items, width).
        degree: Number of each item's edges, shape (items,).
        friends: What reads friends' embeddings, of width (rounds + 1) times width.
        threshold: See `Ratings.likes`.
        name: How the method is called in tables.
    """

    prior: ItemPrior
    layers: Floats
    degree: Floats
    friends: Friends
    threshold: float
    name: str = "graph network"

    @property
    def bytes_per_user(self) -> int:
        """The user's embedding in float32."""
        return 4 * int(self.layers.shape[2])

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_each(requests, len(self.degree), self._values)

    def _values(self, request: Request) -> ScoreArray:
        user = self._user(request.support)
        scores: ScoreArray = self.prior.values(request.candidates) + self.layers.mean(0)[request.candidates] @ user
        return scores

    def _user(self, support: Ratings) -> Floats:
        """Returns the embedding of a user: what arrives from liked items and friends, shape (width,)."""
        liked = support.items[support.likes(self.threshold)]
        side = support.side
        count = len(liked) + (0 if side is None else len(side.friends))
        if not count:
            return np.zeros(self.layers.shape[2])
        weights = 1 / np.sqrt(count * np.maximum(self.degree[liked], 1))
        arrived = np.einsum("i,lid->ld", weights, self.layers[:-1, liked])
        if side is not None and side.friends:
            # `Friends` gives the mean; spreading divides their sum by the root of the count.
            share = len(side.friends) / np.sqrt(count)
            arrived = arrived + share * self.friends.read([side])[0].reshape(self.layers.shape[0], -1)[:-1]
        found: Floats = arrived.sum(0) / len(self.layers)
        return found


def fit_graph_network(
    interactions: Interactions,
    users: Codes,
    prior: ItemPrior,
    features: Floats,
    *,
    validation: Sequence[Episode],
    threshold: float,
    seed: int,
    width: int = 32,
    rounds: int = 2,
    steps: int = 200,
    lr: float = 0.01,
    weight_decay: float = 1e-3,
) -> GraphNetwork:
    """Trains the embeddings on episodes of meta-training users: from their liked items to pairs of the others.

    Args:
        interactions: The dataset; friends are read where it has any.
        users: The meta-training users; only their ratings are used.
        prior: The item prior.
        features: Features of items, shape (items, features).
        validation: Episodes whose mean AUC chooses the step.
        threshold: See `Ratings.likes`.
        seed: Seed of all random numbers.
        width: Width of embeddings.
        rounds: How often embeddings are spread along the edges.
        steps: Steps of Adam at most.
        lr: Learning rate.
        weight_decay: Weight decay.

    Raises:
        ConfigError: torch-geometric is not installed.
    """
    try:
        with warnings.catch_warnings():
            # It compiles some of its functions when it is imported, in a way that torch calls deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch_geometric.nn import LGConv
    except ImportError:
        raise ConfigError(
            "the graph network needs the package torch-geometric", "pip install 'metarec[graph]'"
        ) from None
    torch.manual_seed(seed)
    graph = _Graph(interactions, users, threshold)
    read = torch.from_numpy(np.asarray(features, np.float32))
    parameters = {
        "users": torch.randn(len(users), width) * 0.01,
        "items": torch.zeros(graph.items, width),  # of items that nobody rated they stay so
        "text": torch.randn(read.shape[1], width) * 0.01,
    }
    learned = {name: value.requires_grad_() for name, value in parameters.items()}
    optimizer = torch.optim.AdamW(list(learned.values()), lr=lr, weight_decay=weight_decay)
    spread = LGConv()

    def layers() -> Tensor:
        state = torch.cat([learned["users"], learned["items"] + read @ learned["text"]])
        states = [state]
        for _ in range(rounds):
            states.append(spread(states[-1], graph.edges))
        return torch.stack(states)

    def scorer(states: Tensor) -> GraphNetwork:
        known = states.detach().numpy().astype(np.float64)
        own = known[:, : len(users)].transpose(1, 0, 2).reshape(len(users), -1)
        named = friends_of([interactions.users[code] for code in np.sort(users)], own)
        return GraphNetwork(prior, known[:, len(users) :], graph.degree, named, threshold)

    best, best_auc = scorer(layers()), -1.0
    shots = [count for count in _SHOTS if count]
    with progress("training the graph network", steps, after=2.0) as advance:
        for step in range(1, steps + 1):
            batch = training_batch(
                interactions,
                users,
                batch_users=_BATCH,
                shots=shots,
                max_query=_MAX_QUERY,
                min_query=_MIN_QUERY,
                seed=seed,
                step=step,
                short_supports=True,
            )
            loss = graph.loss(layers(), batch, prior)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % _VALIDATE_EVERY == 0 or step == steps:
                found = scorer(layers())
                auc = validation_auc(found, validation, shots, threshold) if validation else float(step)
                if auc > best_auc:
                    best, best_auc = found, auc
            advance(step)
    return best


class _Graph:
    """The edges between users, the items that they like, and friends."""

    def __init__(self, interactions: Interactions, users: Codes, threshold: float) -> None:
        self.items, self._threshold = len(interactions.catalog), threshold
        ordered = np.sort(users)
        kept = np.isin(interactions.user, users) & interactions.likes(threshold)
        user, item = np.searchsorted(ordered, interactions.user[kept]), interactions.item[kept] + len(users)
        pairs = [np.stack([user, item]), np.stack([item, user])]
        if interactions.side.friends:
            place = {interactions.users[code]: row for row, code in enumerate(ordered)}
            social = [
                (row, place[friend])
                for row, code in enumerate(ordered)
                for friend in interactions.side.friends[code]
                if friend in place
            ]
            pairs.append(np.array(social, np.int64).reshape(-1, 2).T)
        self.edges = torch.from_numpy(np.concatenate(pairs, 1).astype(np.int64))
        self.degree = np.bincount(interactions.item[kept], minlength=self.items).astype(np.float64)
        self._users = len(users)

    def loss(self, states: Tensor, batch: Sequence[Episode], prior: ItemPrior) -> Tensor:
        """Returns the logistic loss on pairs of a liked and a disliked item of each query."""
        items = states[:, self._users :]
        final, losses = items.mean(0), []
        for episode in batch:
            liked = episode.query.likes(self._threshold)
            if liked.all() or not liked.any():
                continue
            shown = episode.support.items[episode.support.likes(self._threshold)]
            weights = torch.from_numpy(1 / np.sqrt(max(len(shown), 1) * np.maximum(self.degree[shown], 1))).float()
            user = torch.einsum("i,lid->d", weights, items[:-1, shown]) / len(states)
            codes = episode.query.items
            scores = torch.from_numpy(prior.values(codes)) + final[codes] @ user
            margins = scores[liked][:, None] - scores[~liked][None]
            losses.append(torch.nn.functional.softplus(-_SHARPNESS * margins).mean())
        return torch.stack(losses).mean() if losses else states.sum() * 0.0
