"""The weights of stacked predictors, learned from pairs of a liked and a disliked item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metarec.config import StackConfig
from metarec.data.episodes import evaluation_episodes
from metarec.data.interactions import Codes, Flags, Interactions
from metarec.scorer import Request
from metarec.scorers.collaborative.gp import GaussianProcess
from metarec.scorers.collaborative.item_mean import ItemPrior
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.text import TextRidge
from metarec.system.threads import one_thread

Member = GaussianProcess | TextRidge
_SHOTS = (0, 5, 10, 20)
_MAX_QUERY, _MIN_QUERY = 50, 5


@dataclass(frozen=True)
class Fit:
    """Predictors before they are weighted.

    Args:
        prior: The item prior.
        members: The predictors.
        hidden: Items whose ratings were left out of the fit, shape (items,).
    """

    prior: ItemPrior
    members: tuple[Member, ...]
    hidden: Flags


@one_thread()
def fit_weights(
    interactions: Interactions,
    out_of_fold: Sequence[Codes],
    whole: Fit,
    parts: Sequence[Fit],
    settings: StackConfig,
    threshold: float,
    seed: int,
) -> tuple[tuple[int, ...], Floats]:
    """Learns stacking weights on users that the members were not fitted on.

    Args:
        interactions: The dataset.
        out_of_fold: Each fold's users.
        whole: The members fitted on all meta-training users.
        parts: The members fitted without each fold.
        settings: How the weights are fitted.
        threshold: Ratings from here on are likes.
        seed: Seed of the episodes and of the pairs.

    Returns:
        The support sizes that weights are learned for, and the weights, shape (shots, members).
    """
    members = len(whole.members)
    if members <= 1:
        return (0,), np.ones((1, members))
    examples = [
        _examples(interactions, users, part, settings.pairs, threshold, seed)
        for users, part in zip(out_of_fold, parts, strict=True)
    ]
    found = [_weights([pair for part in examples for pair in part[count]], members, settings) for count in _SHOTS[1:]]
    # Without ratings every member predicts an item mean; the first member's is the best one.
    return _SHOTS, np.stack([np.eye(members)[0], *found])


def _examples(
    interactions: Interactions,
    users: Codes,
    part: Fit,
    pairs: int,
    threshold: float,
    seed: int,
) -> dict[int, list[tuple[Floats, Floats]]]:
    """Returns, by K, pairs of a liked and a disliked item of users that the members were not fitted on.

    An entry holds a user's differences between the two items: of the prior, shape (pairs,), and of every member's
    contribution, shape (pairs, members).
    """
    hidden = part.hidden if part.hidden.any() else None
    episodes, _ = evaluation_episodes(
        interactions,
        users,
        max_support=max(_SHOTS),
        max_query=_MAX_QUERY,
        min_query=_MIN_QUERY,
        order="random",
        seed=seed,
        support_from=None if hidden is None else ~hidden,
        query_from=hidden,
        short_supports=True,
    )
    generator = np.random.default_rng(seed)
    found: dict[int, list[tuple[Floats, Floats]]] = {count: [] for count in _SHOTS[1:]}
    for episode in episodes:
        liked = episode.query.likes(threshold)
        if liked.all() or not liked.any():
            continue
        likes, dislikes = (generator.choice(np.flatnonzero(side), pairs) for side in (liked, ~liked))
        base = part.prior.values(episode.query.items).astype(np.float64)
        for count in _SHOTS[1:]:
            requests = [Request("", episode.support.head(count).unlabelled(), episode.query.items)]
            contribution = np.stack([member.score(requests)[0].numpy() - base for member in part.members], 1)
            found[count].append((base[likes] - base[dislikes], contribution[likes] - contribution[dislikes]))
    return found


def _weights(pairs: Sequence[tuple[Floats, Floats]], members: int, settings: StackConfig) -> Floats:
    """Fits stacking weights with an L2 penalty toward their default."""
    start: Floats = np.array([settings.first_weight] + [settings.other_weight] * (members - 1))
    if not pairs:
        return start
    penalty = settings.weight_damping / len(pairs)
    offset = np.concatenate([base for base, _ in pairs])
    contribution = np.concatenate([one for _, one in pairs])

    def objective(weights: Floats) -> tuple[float, Floats]:
        margin = settings.sharpness * (offset + contribution @ weights)
        loss = np.logaddexp(0, -margin).mean() + penalty * ((weights - start) ** 2).sum()
        slope = -settings.sharpness * (contribution / (1 + np.exp(margin))[:, None]).mean(0) + 2 * penalty * (
            weights - start
        )
        return float(loss), slope

    from scipy.optimize import minimize

    found: Floats = np.asarray(minimize(objective, start, jac=True, method="L-BFGS-B").x, np.float64)
    return found
