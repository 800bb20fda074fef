"""Reads the text that came with a rating: a head, trained on reviews with ratings, predicts the rating.

The prediction is a second reading of what a person thought, beside the rating, or the only one where there is none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from metarec.data.interactions import Codes, Interactions, Values
from metarec.data.side import Texts
from metarec.scorers.collaborative.item_mean import fit_item_mean
from metarec.scorers.collaborative.residuals import Floats, training_residuals
from metarec.system.threads import one_thread

_LOG = logging.getLogger(__name__)
_WIDTH = 2**16
_PENALTIES = (0.1, 0.3, 1.0, 3.0)
# Shares of the review in a rating's reading that are tried, beside none.
_SHARES = (0.25, 0.5, 0.75)
_FEWEST = 50
_STANDARD_ERRORS = 2.0
_FACTORS = 8
_FACTOR_PENALTY = 5.0
_WORD = re.compile(r"\w+")
# Scripts without spaces between words are read sign by sign.
_SIGN = re.compile("([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")


@dataclass(frozen=True)
class ReviewHead:
    """A linear head over the words and pairs of words of a review.

    Args:
        weights: Weight of each hashed word or pair, in ratings, shape (2^16,).
        intercept: The rating of a text without words.
        low: The lowest rating.
        high: The highest rating.
        share: Share of the review in the reading of a rating that came with one.
    """

    weights: Values
    intercept: float
    low: float
    high: float
    share: float = 0.0

    def ratings(self, reviews: Sequence[str] | Texts) -> Values:
        """Predicts the rating of each review, shape (reviews,)."""
        found = np.asarray(_hashed(reviews) @ self.weights.astype(np.float64)) + self.intercept
        return np.clip(found, self.low, self.high).astype(np.float32)

    def readings(self, ratings: Values, reviews: Texts | None) -> Values:
        """Returns ratings, each with its share of what the review says where there is one, shape (ratings,)."""
        if reviews is None or not self.share or not len(ratings):
            return ratings
        said = np.array([bool(str(review).strip()) for review in reviews], bool)
        found = ratings.copy()
        if said.any():
            found[said] += self.share * (self.ratings(reviews[said]) - ratings[said])
        return found


def _terms(text: str) -> Iterator[str]:
    """Yields the words of a text and the pairs of neighbours: 'not good' is a term of its own."""
    words = _WORD.findall(_SIGN.sub(r" \1 ", str(text).casefold()))
    yield from words
    yield from map(" ".join, pairwise(words))


def _hashed(reviews: Sequence[str] | Texts) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(n_features=_WIDTH, analyzer=_terms, alternate_sign=False, norm="l2")
    return vectorizer.transform([str(review) for review in reviews])


@one_thread()
def with_reviews(interactions: Interactions, users: Codes, seed: int) -> tuple[ReviewHead | None, Interactions]:
    """Trains the head, and returns it with the data whose ratings are readings of rating and review.

    Args:
        interactions: The dataset; without reviews, or where they tell no rating, it is returned as it is.
        users: The meta-training users; only their reviews are used.
        seed: Seed of the halves of users that the head is tested on.
    """
    reviews = interactions.side.reviews
    if reviews is None:
        return None, interactions
    own = np.isin(interactions.user, users)
    said = np.array([bool(review.strip()) for review in reviews], bool)
    rows = np.flatnonzero(own & said)
    if len(rows) < _FEWEST:
        _LOG.warning("%d reviews of meta-training users are too few to learn from: they are not read", len(rows))
        return None, interactions
    half = np.random.default_rng([seed, 4]).permutation(len(interactions.users)) % 2
    words, rating = _hashed(reviews), interactions.rating.astype(np.float64)
    low, high = interactions.scale.low, interactions.scale.high
    out_of_fold = interactions.rating.copy()
    errors = {}
    for penalty in _PENALTIES:
        predicted = rating.copy()
        for part in (0, 1):
            learned = rows[half[interactions.user[rows]] != part]
            asked = said & (half[interactions.user] == part)
            if len(learned) and asked.any():
                predicted[asked] = _ridge(words[learned], rating[learned], penalty).predict(words[asked])
        errors[penalty] = predicted
    best = min(_PENALTIES, key=lambda one: float(((errors[one] - rating)[rows] ** 2).mean()))
    out_of_fold[said] = np.clip(errors[best][said], low, high)
    explained = 1 - float(((out_of_fold - rating)[rows] ** 2).mean()) / max(float(rating[rows].var()), 1e-12)
    if explained <= 0:
        _LOG.warning("reviews tell nothing of ratings: they are not read")
        return None, interactions
    model = _ridge(words[rows], rating[rows], best)
    head = ReviewHead(model.coef_.astype(np.float32), float(model.intercept_), low, high)
    share = _share(interactions, users, out_of_fold)
    _LOG.info("reviews explain %.2f of the variance of ratings; their share in a reading is %.2f", explained, share)
    readings = interactions.rating + share * (out_of_fold - interactions.rating)
    return replace(head, share=share), replace(interactions, rating=readings.astype(np.float32))


def _ridge(words: Any, rating: Floats, penalty: float) -> Any:
    from sklearn.linear_model import Ridge

    return Ridge(penalty, solver="sparse_cg").fit(words, rating)


def _share(interactions: Interactions, users: Codes, second: Values) -> float:
    """Returns the share of reviews at which half of a user's readings predict the other half's ratings best."""
    from scipy.sparse.linalg import svds

    residuals = training_residuals(interactions, users, fit_item_mean(interactions, users)).centred(1.0)
    matrix = residuals.matrix().tocsc()
    width = min(_FACTORS, min(matrix.shape) - 1)
    if width < 1:
        return 0.0
    _, _, factors = svds(matrix, k=width, v0=np.ones(min(matrix.shape)))
    items = factors.T * np.sqrt(matrix.shape[1])
    own = np.isin(interactions.user, users)
    scale = float(interactions.rating[own].std())
    moved = (second - interactions.rating)[own].astype(np.float64) / scale
    order = np.argsort(residuals.user, kind="stable")
    bounds = np.searchsorted(residuals.user[order], np.arange(residuals.shape[0] + 1))
    shares = np.array([0.0, *_SHARES])
    errors = []
    for start, end in pairwise(bounds.tolist()):
        rows = order[start:end]
        shown, asked = rows[::2], rows[1::2]
        if not len(asked):
            continue
        known = items[residuals.item[shown]]
        readings = residuals.value[shown, None] + shares * (moved[shown, None] - moved[shown].mean())
        tastes = np.linalg.solve(known.T @ known + _FACTOR_PENALTY * np.eye(width), known.T @ readings)
        left = residuals.value[asked, None] - items[residuals.item[asked]] @ tastes
        errors.append((left**2).mean(0))
    gains = np.array(errors)[:, :1] - np.array(errors)
    best = int(gains.mean(0).argmax())
    significant = gains[:, best].mean() > _STANDARD_ERRORS * gains[:, best].std() / np.sqrt(len(gains))
    return float(shares[best]) if significant else 0.0
