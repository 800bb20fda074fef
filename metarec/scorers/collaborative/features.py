"""Item features from catalog fields: what an item is, as numbers, for the methods that read more than ratings.

Knows the usual field names; a catalog without them simply gives fewer blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA
from sklearn.kernel_approximation import Nystroem
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from metarec.data.interactions import Catalog
from metarec.scorers.collaborative.item_mean import ItemPrior, predict_unrated, smooth_by_text
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.text import unit_vectors

_COMPONENTS = 128
_NARROW = 48
_LANDMARKS = 1000
_GAMMA = 0.3
_MIN_ITEMS = 5
_TOKEN_FIELDS = ("genres", "authors")
_YEAR = re.compile(r"-?\d{1,4}")


def state_vectors(states: Tensor) -> Floats:
    """Returns principal components of what a language model's states say of every item, shape (items, features).

    Args:
        states: Shape (items, hidden).
    """
    unit = unit_vectors(StandardScaler().fit_transform(states.cpu().numpy()).astype(np.float64))
    return principal_components(unit, _COMPONENTS)


def unrated_features(read: Mapping[str, Floats], fields: Mapping[str, Floats]) -> Features:
    """Returns what methods read of items where they are asked about ones that nobody rated.

    Text and fields together, each of length one, as they are and as a Gaussian kernel sees them.

    Args:
        read: Vectors of the items' text by who read it, each of shape (items, features).
        fields: What `item_features` gives.
    """
    together = [np.concatenate(list(fields.values()), 1)] if fields else []
    unit = np.concatenate([unit_vectors(block) for block in (*read.values(), *together)], 1)
    kernel = kernel_features(unit)
    return Features({**read, **fields, "kernel": principal_components(kernel, _NARROW)}, kernel, unit)


def kernel_features(vectors: Floats) -> Floats:
    """Returns features whose inner products are a Gaussian kernel of the items' vectors.

    A linear method over them is a kernel method over the vectors: what a genre says may depend on the year.

    Args:
        vectors: Shape (items, width).

    Returns:
        Shape (items, landmarks), landmarks being items drawn by a fixed seed, a thousand at most.

    Source: Williams and Seeger 2001, "Using the Nyström method to speed up kernel machines".
    """
    landmarks = min(_LANDMARKS, len(vectors))
    nystroem = Nystroem(kernel="rbf", gamma=_GAMMA, n_components=landmarks, random_state=0)
    features: Floats = nystroem.fit_transform(vectors)
    return features


def principal_components(features: Floats, components: int) -> Floats:
    """Returns the first principal components of features, shape (items, components) or fewer."""
    narrow: Floats = PCA(min(components, *features.shape), random_state=0).fit_transform(features)
    return narrow


def item_features(catalog: Catalog) -> dict[str, Floats]:
    """Returns one block of features per known field that the catalog has.

    Genres and authors become indicators, for those that at least five items carry; the year becomes smooth steps
    between the catalog's own quantiles.

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
    """Splits at commas and bars; a column without any is split at spaces, as RecBole writes lists."""
    pattern = r"[,|]" if any(mark in value for value in column for mark in ",|") else r"\s"
    tokens = [{token.strip() for token in re.split(pattern, value)} - {""} for value in column]
    count = Counter(token for row in tokens for token in row)
    place = {token: at for at, token in enumerate(sorted(token for token in count if count[token] >= _MIN_ITEMS))}
    block = np.zeros((len(column), len(place)))
    for code, row in enumerate(tokens):
        block[code, [place[token] for token in row if token in place]] = 1.0
    return block


def _steps(column: tuple[str, ...]) -> Floats:
    """Ramps from -1 to 1 around seven quantiles of the year; items without a year get the median."""
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
    """What is known of items beside ratings.

    Args:
        blocks: Features for the Gaussian processes, each of shape (items, width).
        text: Vectors for the ridge regression, shape (items, features).
        unrated: Where asked items are ones that nobody rated, a vector of each item's text and fields, shape (items,
            features): their means are predicted from these. None elsewhere.
    """

    blocks: Mapping[str, Floats]
    text: Floats
    unrated: Floats | None = None

    def smoothed(self, prior: ItemPrior, seed: int) -> ItemPrior:
        """Returns item means shrunk towards what the features say."""
        smooth = smooth_by_text(prior, self.text, seed)
        return smooth if self.unrated is None else predict_unrated(smooth, self.unrated)
