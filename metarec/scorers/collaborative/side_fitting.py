"""Fits what side information adds to ratings, for new users and without each fold of the meta-training users.

The matrix P of `metarec.scorers.collaborative.side_effects` is learned by ridge regression of what item means and user
biases leave of ratings; `metarec.scorers.collaborative.side_regression` says what is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from metarec.data.interactions import Codes, Interactions
from metarec.data.side import Texts
from metarec.scorers.collaborative.features import Features, principal_components
from metarec.scorers.collaborative.item_mean import fit_item_mean
from metarec.scorers.collaborative.residuals import Floats, Residuals, training_residuals
from metarec.scorers.collaborative.review_head import with_reviews
from metarec.scorers.collaborative.side_effects import FRIENDS, SideEffects
from metarec.scorers.collaborative.side_readers import Reader, reader_of
from metarec.scorers.collaborative.side_regression import SideRegression, read_blocks
from metarec.scorers.collaborative.stack import fold_order
from metarec.scorers.collaborative.two_towers import TowerData, Towers, TowerText, fit_towers
from metarec.system.progress import progress
from metarec.system.threads import one_thread

_LOG = logging.getLogger(__name__)
_FACTORS = 16
_COMPONENTS = 16
_TEXT_COMPONENTS = 64
_BIAS_DAMPING = 3.0
_TASTE_DAMPING = 5.0


@dataclass(frozen=True)
class FittedSide:
    """What `fit_side` fits.

    Args:
        whole: The effects, for new users.
        folds: Fitted without each fold of the meta-training users.
        fold: The fold of each meta-training user, by user id.
        interactions: The data whose ratings lack the effects; a meta-training user's by the fit without them.
    """

    whole: SideEffects
    folds: tuple[SideEffects, ...]
    fold: Mapping[str, int]
    interactions: Interactions


@dataclass(frozen=True)
class _Known:
    """What is known of the items, and which ratings are likes.

    Args:
        content: Principal components of all that is known of items, shape (items, width).
        text: More of those of their texts, for towers, of mean squared length one, shape (items, width).
        liked: Shape (rows,).
    """

    content: Floats
    text: Floats
    liked: np.ndarray


def _known(features: Features, liked: np.ndarray, towers: bool = True) -> _Known:
    text = features.text if towers else features.text[:, :0]
    text = principal_components(text, _TEXT_COMPONENTS) if text.shape[1] else text
    text = text / np.sqrt(max(float((text**2).sum(1).mean()), 1e-12))
    return _Known(principal_components(features.linear, _COMPONENTS), text, liked)


def fit_effects(
    interactions: Interactions,
    users: Codes,
    features: Features,
    *,
    threshold: float,
    seed: int,
    text_reader: Callable[[str, Texts], Reader | str] = reader_of,
) -> SideEffects:
    """Fits the effects of side information on all of some users alone, reviews unread; see `fit_side`."""
    known = _known(features, interactions.likes(threshold))
    return _fit(interactions, users, known, seed, text_reader)[0]


def fit_side(
    interactions: Interactions,
    users: Codes,
    features: Features,
    *,
    threshold: float,
    folds: int,
    seed: int,
    text_reader: Callable[[str, Texts], Reader | str] = reader_of,
    towers: bool = True,
) -> FittedSide:
    """Fits the effects of side information on all meta-training users and without each fold of them.

    Args:
        interactions: The dataset, with side information.
        users: The meta-training users; only their ratings are used.
        features: Features of all items.
        threshold: Ratings from here on are likes, see `Ratings.likes`.
        folds: Number of folds.
        seed: Seed of the folds.
        text_reader: Returns what reads a field, given its name and values.
        towers: Whether towers may read texts about users beside the regression.
    """
    order = fold_order(len(users), folds, seed)
    liked = interactions.likes(threshold)
    reviews, interactions = with_reviews(interactions, users, seed)
    known = _known(features, liked, towers)
    with progress("fitting the effects of side information", folds + 1, after=2.0) as advance:
        whole = _fit(interactions, users, known, seed, text_reader)
        advance(1)
        kept = whole[1]
        parts = []
        for fold in range(folds):
            parts.append(_fit(interactions, users[order != fold], known, seed, text_reader, kept)[0])
            advance(fold + 2)
    fold_of = {interactions.users[code]: int(fold) for code, fold in zip(users, order, strict=True)}
    scale = fit_item_mean(interactions, users).scale
    part_of = np.full(len(interactions.users), -1, np.int64)
    part_of[users] = order
    rating = interactions.rating.copy()
    for number, part in [(-1, whole[0]), *enumerate(parts)]:
        rows = np.flatnonzero(part_of[interactions.user] == number)
        rating[rows] -= scale * part.of_rows(interactions, rows)
    bare = replace(interactions, rating=rating, liked=liked)
    folded = tuple(replace(part, reviews=reviews) for part in parts)
    return FittedSide(replace(whole[0], reviews=reviews), folded, fold_of, bare)


@dataclass(frozen=True)
class _Chosen:
    """Which blocks are read, and how.

    Args:
        scales: Scales of the blocks that are read by ridge regression.
        towers: Fields whose texts are read by towers.
        replaced: Scales of those of them that ridge regression reads where towers find nothing.
    """

    scales: Mapping[str, float]
    towers: tuple[str, ...]
    replaced: Mapping[str, float]


@one_thread()
def _fit(
    interactions: Interactions,
    users: Codes,
    known: _Known,
    seed: int,
    text_reader: Callable[[str, Texts], Reader | str],
    kept: _Chosen | None = None,
) -> tuple[SideEffects, _Chosen]:
    """Returns the effects, and what was chosen; choices that are given are not made again."""
    own = np.isin(interactions.user, users)
    residuals = training_residuals(interactions, users, fit_item_mean(interactions, users)).centred(_BIAS_DAMPING)
    factors, tastes = _factors(residuals)
    items = _standardized(np.concatenate([known.content, factors], 1))
    side = interactions.side
    blocks = read_blocks(interactions, users, own, tastes, text_reader)
    problem = SideRegression(residuals, items, blocks)
    worth: dict[str, tuple[float, float]] = {}
    scales = {} if kept is None else {name: at for name, at in kept.scales.items() if name in blocks.features}
    if kept is None:
        for sentence in blocks.unread:
            _LOG.warning("%s", sentence)
        for name, (scale, gain) in problem.choose(seed).items():
            scales[name], worth[name] = scale, gain
    texts = {
        name: TowerData(blocks.features[name], known.text, residuals, known.liked[own])
        for name in blocks.texts
        if known.text.shape[1] and (kept is None or name in kept.towers)
    }
    replaced = {} if kept is None else dict(kept.replaced)
    if kept is None:
        by_ridge = scales
        scales, gains = problem.choose_towers(by_ridge, texts, seed)
        replaced = {name: scale for name, scale in by_ridge.items() if name not in scales}
        texts, worth = {name: texts[name] for name in gains}, {**worth, **gains}
    effects = problem.solve(scales, None)
    left, everybody = residuals.value - problem.predicted(effects), np.ones(len(users), bool)
    towers = {name: fit_towers(data, everybody, left, seed) for name, data in texts.items()}
    if lost := {name: scale for name, scale in replaced.items() if towers.get(name) is None}:
        effects = problem.solve({**scales, **lost}, None)
    found = SideEffects(
        about={name: reader for name, reader in blocks.about.items() if name in effects},
        moments={name: reader for name, reader in blocks.moments.items() if name in effects},
        friends=blocks.friends if FRIENDS in effects else None,
        items=items,
        effects=effects,
        worth=worth,
    )
    for name, fitted in towers.items():
        if fitted is not None:
            found = _with_towers(found, name, blocks.about[name], fitted)
    known_of_users = (*side.about, *([FRIENDS] if side.friends else []))
    found = replace(
        found,
        unread=tuple(name for name in known_of_users if name not in found.effects),
        unread_moments=tuple(name for name in side.moments if name not in found.effects),
    )
    return found, _Chosen(scales, tuple(texts), replaced)


def _with_towers(found: SideEffects, name: str, reader: Reader, towers: Towers) -> SideEffects:
    """Returns effects to which a product of towers is added: more numbers of the text, times more of each item."""
    width, own = found.items.shape[1], towers.items.shape[1]
    wider = {other: np.pad(effect, ((0, 0), (0, own))) for other, effect in found.effects.items()}
    by_ridge = wider.get(name, np.zeros((len(towers.users), width + own)))
    by_towers = np.concatenate([np.zeros((own, width)), np.eye(own)], 1)
    return replace(
        found,
        about={**found.about, name: TowerText(reader, towers.users, towers.mean)},
        items=np.concatenate([found.items, towers.items], 1),
        effects={**wider, name: np.concatenate([by_ridge, by_towers])},
    )


def _factors(residuals: Residuals) -> tuple[Floats, Floats]:
    """Returns factors of items, shape (items, factors), and tastes of users along them, shape (users, factors)."""
    from scipy.sparse.linalg import svds

    matrix = residuals.matrix().tocsc()
    width = min(_FACTORS, min(matrix.shape) - 1)
    if width < 1:
        return np.zeros((matrix.shape[1], 0)), np.zeros((matrix.shape[0], 0))
    _, _, items = svds(matrix, k=width, v0=np.ones(min(matrix.shape)))
    count = np.bincount(residuals.user, minlength=matrix.shape[0])
    factors: Floats = items.T * np.sqrt(matrix.shape[1])
    tastes: Floats = np.asarray(matrix @ factors) / (count + _TASTE_DAMPING)[:, None]
    return factors, tastes


def _standardized(features: Floats) -> Floats:
    """Returns features of mean square one behind a constant."""
    spread = np.sqrt(np.maximum((features**2).mean(0), 1e-12))
    return np.concatenate([np.ones((len(features), 1)), features / spread], 1)
