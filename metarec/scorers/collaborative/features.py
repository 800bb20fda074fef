"""Item features from catalog fields and text vectors, for the methods that read more than ratings.

Genres, authors and year are read from catalog fields of these names; a catalog without them gives fewer blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from metarec.data.interactions import Catalog
from metarec.scorers.collaborative.item_mean import ItemPrior, predict_unrated, smooth_by_text
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.text import unit_vectors

_COMPONENTS = 128
_NARROW = 48
_LANDMARKS = 1000
# Width of the kernel that `kernel_features` approximates.
_LANDMARK_KERNEL_GAMMA = 0.3
_MIN_ITEMS = 5
_TOKEN_FIELDS = ("genres", "authors")
_YEAR = re.compile(r"-?\d{1,4}")


def state_vectors(states: Tensor) -> Floats:
    """Returns principal components of the scaled states of every item, shape (items, features).

    Args:
        states: A language model's states, shape (items, hidden).
    """
    from sklearn.preprocessing import StandardScaler

    unit = unit_vectors(StandardScaler().fit_transform(states.cpu().numpy()).astype(np.float64))
    return principal_components(unit, _COMPONENTS)


def unrated_features(read: Mapping[str, Floats], fields: Mapping[str, Floats]) -> Features:
    """Returns the features of items for tasks that query unrated items.

    Text and fields are scaled to length one each; features of a Gaussian kernel over both together are added.

    Args:
        read: Vectors of the items' text by the name of the model that read it, each of shape (items, features).
        fields: The blocks of `item_features`.
    """
    together = [np.concatenate(list(fields.values()), 1)] if fields else []
    unit = np.concatenate([unit_vectors(block) for block in (*read.values(), *together)], 1)
    kernel = kernel_features(unit)
    return Features({**read, **fields, "kernel": principal_components(kernel, _NARROW)}, kernel, unit)


def kernel_features(vectors: Floats) -> Floats:
    """Returns features whose inner products are a Gaussian kernel of the items' vectors.

    A linear method over them is a kernel method over the vectors: the effect of a genre may depend on the year.

    Args:
        vectors: Shape (items, width).

    Returns:
        Shape (items, landmarks); the landmarks are items drawn by a fixed seed, at most a thousand.

    Source: Williams and Seeger 2001, "Using the Nyström method to speed up kernel machines".
    """
    from sklearn.kernel_approximation import Nystroem

    landmarks = min(_LANDMARKS, len(vectors))
    nystroem = Nystroem(kernel="rbf", gamma=_LANDMARK_KERNEL_GAMMA, n_components=landmarks, random_state=0)
    features: Floats = nystroem.fit_transform(vectors)
    return features


def principal_components(features: Floats, components: int) -> Floats:
    """Returns the first principal components of features, shape (items, components) or fewer."""
    from sklearn.decomposition import PCA

    narrow: Floats = PCA(min(components, *features.shape), random_state=0).fit_transform(features)
    return narrow


def item_features(catalog: Catalog) -> dict[str, Floats]:
    """Returns one block of features per known field that the catalog has.

    Genres and authors become indicators, if at least five items carry them; the year becomes smooth steps between
    quantiles of the catalog's years.

    Args:
        catalog: The items.

    Returns:
        Field name to an array of shape (items, features).
    """
    blocks = {}
    for field in _TOKEN_FIELDS:
        if field in catalog.fields:
            blocks[field] = _indicators(catalog.fields[field])
    if "year" in catalog.fields:
        blocks["year"] = _steps(catalog.fields["year"])
    return {field: block for field, block in blocks.items() if block.shape[1]}


def _indicators(column: tuple[str, ...]) -> Floats:
    """Returns a 0/1 column per token; tokens end at commas and bars, or at spaces if there are none, as in RecBole."""
    pattern = r"[,|]" if any(mark in value for value in column for mark in ",|") else r"\s"
    tokens = [{token.strip() for token in re.split(pattern, value)} - {""} for value in column]
    count = Counter(token for row in tokens for token in row)
    place = {token: at for at, token in enumerate(sorted(token for token in count if count[token] >= _MIN_ITEMS))}
    block = np.zeros((len(column), len(place)))
    for code, row in enumerate(tokens):
        block[code, [place[token] for token in row if token in place]] = 1.0
    return block


def _steps(column: tuple[str, ...]) -> Floats:
    """Returns ramps from -1 to 1 around seven quantiles of the year; items without a year get the median."""
    found = [_YEAR.search(value) for value in column]
    year = np.array([float(match.group()) if match else np.nan for match in found])
    if np.isnan(year).all():
        return np.zeros((len(column), 0))
    year = np.where(np.isnan(year), np.nanmedian(year), year)
    knots = np.unique(np.quantile(year, np.linspace(0.05, 0.95, 7)))
    width = max((knots[-1] - knots[0]) / 4, 1.0)
    steps: Floats = np.clip((year[:, None] - knots) / width, -1, 1)
    return steps


@dataclass(frozen=True)
class Features:
    """The features of all items.

    Args:
        blocks: Features for the Gaussian processes, each of shape (items, width).
        text: Vectors for the ridge regression, shape (items, features).
        unrated: A vector of each item's text and fields, shape (items, features), from which the means of unrated items
            are predicted; None where no unrated items are queried.
    """

    blocks: Mapping[str, Floats]
    text: Floats
    unrated: Floats | None = None

    def smoothed(self, prior: ItemPrior, seed: int) -> ItemPrior:
        """Returns item means shrunk towards their prediction from the features."""
        smooth = smooth_by_text(prior, self.text, seed)
        return smooth if self.unrated is None else predict_unrated(smooth, self.unrated)
