"""Says how much of what people like a block of item features explains, and whether that is more than nothing.

A block that a user brings along, such as vectors of images, may say nothing. Read as the others are, it would add noise
to every kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from metarec.data.interactions import Codes, Interactions
from metarec.scorers.collaborative.item_mean import fit_item_mean
from metarec.scorers.collaborative.residuals import Floats, training_residuals
from metarec.scorers.collaborative.text import unit_vectors
from metarec.system.threads import one_thread

# Groups of users, of items, and of pairs that the jackknife leaves out in turn.
_GROUPS = 20
# Pairs of ratings that are drawn for each user, and of items in all.
_PAIRS_PER_USER = 100
_ITEM_PAIRS = 100_000
_PAIRS_AT_ONCE = 50_000
_FEWEST_RATINGS = 3
# Standard errors from which on what a block explains is significant.
_STANDARD_ERRORS = 2.5


@dataclass(frozen=True)
class BlockWorth:
    """How much of ratings a block of item features explains, in units of a rating's variance.

    Args:
        taste: Variance of the difference between users that is linear in the block.
        taste_error: Its standard error.
        quality: Variance of items' means that is linear in the block.
        quality_error: Its standard error.
    """

    taste: float
    taste_error: float
    quality: float
    quality_error: float

    @property
    def significant(self) -> bool:
        """Whether the block explains more than nothing."""
        return self.taste > _STANDARD_ERRORS * self.taste_error or self.quality > _STANDARD_ERRORS * self.quality_error


@one_thread()
def block_worth(
    interactions: Interactions, users: Codes, blocks: Mapping[str, Floats], seed: int = 0
) -> dict[str, BlockWorth]:
    """Returns what each of several blocks explains beside the others.

    Products of two residuals of one user are regressed on the cosines of the two items in every block, with
    coefficients that are not negative; for quality, products of two items' means.

    Args:
        interactions: The dataset.
        users: The meta-training users; only their ratings are used.
        blocks: Name to features of items, shape (items, width).
        seed: Seed of the pairs.

    Source: Haseman and Elston 1972, "The investigation of linkage between a quantitative trait and a marker locus": the
    regression of products on relatedness. Standard errors by the jackknife over groups of users and of items, combined
    as in Cameron, Gelbach and Miller 2011, "Robust inference with multiway clustering", eq. 2.8: the same few items
    are in the pairs of all users, so that errors over users alone are too small.
    """
    generator = np.random.default_rng(seed)
    vectors = [unit_vectors(np.asarray(block, np.float64)).astype(np.float32) for block in blocks.values()]
    taste = _shares(vectors, _user_pairs(interactions, users, generator), generator)
    quality = _shares(vectors, _item_pairs(interactions, users, generator), generator)
    return {
        name: BlockWorth(*map(float, (*taste[:, column], *quality[:, column]))) for column, name in enumerate(blocks)
    }


@dataclass(frozen=True)
class _Pairs:
    """Pairs of items with what is regressed on how alike they are.

    Args:
        one: The first item of each, shape (pairs,).
        other: The second, shape (pairs,).
        product: The product of what is known of both, shape (pairs,).
        user: Group of the user whose ratings they are, shape (pairs,); None where pairs are nobody's.
    """

    one: Codes
    other: Codes
    product: Floats
    user: Codes | None


def _user_pairs(interactions: Interactions, users: Codes, generator: np.random.Generator) -> _Pairs:
    """Draws pairs of ratings of one user, with the products of their residuals."""
    residuals = training_residuals(interactions, users, fit_item_mean(interactions, users)).centred(1.0)
    order = np.argsort(residuals.user, kind="stable")
    bounds = np.searchsorted(residuals.user[order], np.arange(residuals.shape[0] + 1))
    first, second, group = [], [], []
    for user, (start, end) in enumerate(pairwise(bounds.tolist())):
        if end - start < _FEWEST_RATINGS:
            continue
        pairs = min(_PAIRS_PER_USER, (end - start) * (end - start - 1) // 2)
        one = generator.integers(start, end, pairs)
        other = start + (one - start + generator.integers(1, end - start, pairs)) % (end - start)
        first.append(order[one])
        second.append(order[other])
        group.append(np.full(pairs, user % _GROUPS))
    none = np.zeros(0, np.int64)
    one, other, groups = (np.concatenate([none, *parts]) for parts in (first, second, group))
    product = residuals.value[one] * residuals.value[other]
    return _Pairs(residuals.item[one], residuals.item[other], product, groups)


def _item_pairs(interactions: Interactions, users: Codes, generator: np.random.Generator) -> _Pairs:
    """Draws pairs of rated items, with the products of their shrunk means."""
    prior = fit_item_mean(interactions, users)
    rated = np.flatnonzero(prior.count > 0)
    mean = prior.total / (prior.count + prior.strength)
    mean = mean - mean[rated].mean()
    pairs = _ITEM_PAIRS if len(rated) > 1 else 0
    place = generator.integers(0, max(len(rated), 1), pairs)
    one = rated[place]
    other = rated[(place + generator.integers(1, max(len(rated), 2), pairs)) % max(len(rated), 1)]
    return _Pairs(one, other, (mean[one] * mean[other]).astype(np.float64), None)


def _shares(vectors: list[np.ndarray], pairs: _Pairs, generator: np.random.Generator) -> Floats:
    """Returns each block's coefficient and its standard error, shape (2, blocks)."""
    blocks, count = len(vectors), len(pairs.one)
    if not count:
        return np.zeros((2, blocks))
    design = np.ones((count, blocks + 1))
    for column, block in enumerate(vectors):
        for start in range(0, count, _PAIRS_AT_ONCE):
            some = slice(start, start + _PAIRS_AT_ONCE)
            design[some, column] = np.einsum("pw,pw->p", block[pairs.one[some]], block[pairs.other[some]])
    item = generator.permutation(len(vectors[0])) % _GROUPS
    one, other = item[pairs.one], item[pairs.other]
    by_items = _jackknife(design, pairs.product, one, np.where(one == other, -1, other))
    variance = by_items
    if pairs.user is not None:
        by_users = _jackknife(design, pairs.product, pairs.user)
        # What both count, and what neither the user nor the item of a rating is behind.
        by_both = _jackknife(design, pairs.product, np.arange(count) % _GROUPS)
        variance = np.maximum(by_users + by_items - by_both, np.maximum(by_users, by_items))
    return np.stack([_nonnegative(design.T @ design, design.T @ pairs.product), np.sqrt(variance)])


def _jackknife(design: Floats, product: Floats, *groups: Codes) -> Floats:
    """Returns the variance of each block's coefficient over groups that are left out in turn, shape (blocks,).

    Args:
        design: Cosines and a one for each pair, shape (pairs, blocks + 1).
        product: See `_Pairs`.
        groups: Group of each pair; a pair in several goes with each of them. -1 is none.
    """
    width = design.shape[1]
    grams, sides = np.zeros((_GROUPS, width, width)), np.zeros((_GROUPS, width))
    for group in groups:
        for number in range(_GROUPS):
            mine = design[group == number]
            grams[number] += mine.T @ mine
            sides[number] += mine.T @ product[group == number]
    gram, side = design.T @ design, design.T @ product
    without = np.array([_nonnegative(gram - mine, side - own) for mine, own in zip(grams, sides, strict=True)])
    variance: Floats = ((without - without.mean(0)) ** 2).sum(0) * (_GROUPS - 1) / _GROUPS
    return variance


def _nonnegative(gram: Floats, side: Floats) -> Floats:
    """Solves least squares with an intercept, the last column, and coefficients that are not negative."""
    from scipy.optimize import nnls

    blocks = len(side) - 1
    if gram[-1, -1] <= 0:
        return np.zeros(blocks)
    centred = gram[:blocks, :blocks] - np.outer(gram[-1, :blocks], gram[-1, :blocks]) / gram[-1, -1]
    target = side[:blocks] - gram[-1, :blocks] * side[-1] / gram[-1, -1]
    root = np.linalg.cholesky(centred + np.eye(blocks) * 1e-9 * max(np.trace(centred), 1e-12))
    found: Floats = nnls(root.T, np.linalg.solve(root, target))[0]
    return found
