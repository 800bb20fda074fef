"""Item features from catalog fields and text vectors, for the methods that read more than ratings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from metarec.data.interactions import Catalog
from metarec.data.item_fields import MIN_ITEMS, FieldKind, choose_fields, numbers_in, tokens_in
from metarec.scorers.collaborative.item_mean import ItemPrior, predict_unrated, smooth_by_text
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.text import unit_vectors
from metarec.system.threads import one_thread

_COMPONENTS = 128
_WORD_COMPONENTS = 256
_NARROW = 48
# Name of the block of features that is learned from what users like together, and of the blocks it stands for.
PROJECTION = "projection"
_PROJECTED = ("text", "tuned text", "lm")
# Name of the block of features of a Gaussian kernel.
_KERNEL = "kernel"
_LEAST_LENGTH = 1e-12
_LANDMARKS = 1000
# Width of the kernel that `kernel_features` approximates.
_LANDMARK_KERNEL_GAMMA = 0.3
_MAX_CATEGORIES = 1000
# Words and pairs of words that fewer texts have say nothing about other items.
_FEWEST_TEXTS = 2
_WORD = re.compile(r"\w+")
_YEAR = re.compile(r"-?\d{1,4}")


def state_vectors(states: Tensor) -> Floats:
    """Returns principal components of the scaled states of every item, shape (items, features).

    Args:
        states: A language model's states, shape (items, hidden).
    """
    from sklearn.preprocessing import StandardScaler

    unit = unit_vectors(StandardScaler().fit_transform(states.cpu().numpy()).astype(np.float64))
    return principal_components(unit, _COMPONENTS)


def word_vectors(texts: Sequence[str], components: int = _WORD_COMPONENTS) -> Floats:
    """Returns latent semantic vectors of texts by their words alone, shape (texts, components) or fewer.

    Args:
        texts: One text per item; where no word is in two of them, the vectors have no width.
        components: Width of the vectors at most.

    Source: Deerwester et al. 1990, "Indexing by latent semantic analysis", of TF-IDF weights.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    common = Counter(word for text in texts for word in set(_WORD.findall(text.lower())))
    if max(common.values(), default=0) < _FEWEST_TEXTS:
        return np.zeros((len(texts), 0))
    words = TfidfVectorizer(sublinear_tf=True, token_pattern=_WORD.pattern, ngram_range=(1, 2), min_df=_FEWEST_TEXTS)
    weights = words.fit_transform(texts)
    vectors: Floats = TruncatedSVD(min(components, *weights.shape), random_state=0).fit_transform(weights)
    return vectors


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
    return Features({**read, **fields, _KERNEL: principal_components(kernel, _NARROW)}, kernel, unit)


def side_by_side(blocks: Sequence[Floats]) -> Floats:
    """Returns blocks of features as one, each centred and of mean squared length one, shape (items, width)."""
    centred = [np.asarray(block, np.float64) - block.mean(0) for block in blocks if block.shape[1]]
    lengths = [np.sqrt(max((block**2).sum(1).mean(), _LEAST_LENGTH)) for block in centred]
    return np.concatenate([block / length for block, length in zip(centred, lengths, strict=True)], 1)


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


@one_thread()
def principal_components(features: Floats, components: int) -> Floats:
    """Returns the first principal components of features, shape (items, components) or fewer.

    Features that are the same for all items have one component, which is 0.
    """
    from sklearn.decomposition import PCA

    if np.ptp(features, axis=0).max() == 0:
        return np.zeros((len(features), 1))
    narrow: Floats = PCA(min(components, *features.shape), random_state=0).fit_transform(features)
    return narrow


@one_thread()
def all_components(block: Floats) -> Floats:
    """Returns all principal components of a block, the first ones first, shape (items, width)."""
    wide = np.asarray(block, np.float64)
    left, values, _ = np.linalg.svd(wide - wide.mean(0), full_matrices=False)
    components: Floats = left * values
    return components


def item_features(catalog: Catalog, fields: Mapping[str, FieldKind] | None = None) -> dict[str, Floats]:
    """Returns one block of features per field.

    Categories become indicators, if at least five items carry them; numbers become smooth steps between quantiles of
    the catalog's.

    Args:
        catalog: The items.
        fields: The fields to read, with their kinds; None takes those of `metarec.data.item_fields.choose_fields`.

    Returns:
        Field name to an array of shape (items, features).
    """
    blocks = {}
    for name, kind in (choose_fields(catalog).read if fields is None else fields).items():
        column = catalog.fields[name]
        if kind == "category":
            blocks[name] = _indicators(column)
        elif name == "year":
            found = [_YEAR.search(value) for value in column]
            years = np.array([float(match.group()) if match else np.nan for match in found])
            blocks[name] = _steps(years, least_width=1.0)
        else:
            blocks[name] = _steps(numbers_in(column))
    return {name: block for name, block in blocks.items() if block.shape[1]}


def _indicators(column: tuple[str, ...]) -> Floats:
    """Returns a 0/1 column per category; of very many, those that most items carry."""
    tokens = tokens_in(column)
    count = Counter(token for row in tokens for token in sorted(row))
    kept = sorted(token for token, number in count.most_common(_MAX_CATEGORIES) if number >= MIN_ITEMS)
    place = {token: at for at, token in enumerate(kept)}
    block = np.zeros((len(column), len(place)))
    for code, row in enumerate(tokens):
        block[code, [place[token] for token in row if token in place]] = 1.0
    return block


def _steps(numbers: Floats, least_width: float = 0.0) -> Floats:
    """Returns ramps from -1 to 1 around seven quantiles of numbers; items without a number get the median."""
    if np.isnan(numbers).all():
        return np.zeros((len(numbers), 0))
    numbers = np.where(np.isnan(numbers), np.nanmedian(numbers), numbers)
    knots = np.unique(np.quantile(numbers, np.linspace(0.05, 0.95, 7)))
    width = max((knots[-1] - knots[0]) / 4, least_width) or 1.0
    steps: Floats = np.clip((numbers[:, None] - knots) / width, -1, 1)
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

    @cached_property
    def principal(self) -> Mapping[str, Floats]:
        """All principal components of every block, each of shape (items, width); the fits of all folds share them."""
        return {name: all_components(block) for name, block in self.blocks.items()}

    @cached_property
    def linear(self) -> Floats:
        """Blocks side by side, for the linear kernel, shape (items, width).

        The Gaussian kernel's is left out, and vectors of texts are where a projection stands for them.
        """
        left_out = {_KERNEL, *(_PROJECTED if PROJECTION in self.blocks else ())}
        return side_by_side([block for name, block in self.blocks.items() if name not in left_out])

    def smoothed(self, prior: ItemPrior, seed: int) -> ItemPrior:
        """Returns item means shrunk towards their prediction from the features."""
        smooth = smooth_by_text(prior, self.text, seed)
        return smooth if self.unrated is None else predict_unrated(smooth, self.unrated)
