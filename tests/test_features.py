"""What is read of items that nobody rated: a kernel of text and fields, and means that counts do not explain away."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from known import WORLD
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from metarec.config import CollaborativeConfig
from metarec.data.interactions import Interactions
from metarec.scorers.collaborative.features import Features, kernel_features, principal_components, unrated_features
from metarec.scorers.collaborative.gp import GaussianProcess
from metarec.scorers.collaborative.gp_fitting import fit_process
from metarec.scorers.collaborative.item_mean import fit_item_mean, predict_unrated, smooth_by_text
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.stack import fit_members
from metarec.scorers.collaborative.text import TextRidge

USERS = 80


def rated(mean: Floats, raters: np.ndarray, noise: float = 0.5) -> Interactions:
    """A world in which so many users rate each item around its mean; nobody rates the others."""
    generator = np.random.default_rng(0)
    chosen = [generator.choice(USERS, int(count), replace=False) for count in raters]
    item = np.repeat(np.arange(len(mean)), raters.astype(int))
    rating = 3.0 + mean[item] + generator.normal(scale=noise, size=len(item))
    ids = tuple(map(str, range(len(mean))))
    catalog = replace(WORLD.catalog, ids=ids, fields={"title": ids})
    users = tuple(map(str, range(USERS)))
    user = np.concatenate(chosen)
    return replace(
        WORLD, users=users, user=user, item=item, rating=rating.astype(np.float32), timestamp=None, catalog=catalog
    )


def test_inner_products_of_kernel_features_are_the_gaussian_kernel() -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 7))
    squared = ((vectors[:, None] - vectors) ** 2).sum(-1)
    features = kernel_features(vectors)
    np.testing.assert_allclose(features @ features.T, np.exp(-0.3 * squared), atol=1e-6)


def test_what_a_genre_says_may_depend_on_the_year() -> None:
    """Good if it is an old drama or a new comedy: no sum over genre and year knows that of a movie nobody rated."""
    generator = np.random.default_rng(0)
    drama, old = generator.choice([-1.0, 1.0], (2, 400))
    mean = drama * old
    data = rated(mean, np.where(np.arange(400) < 300, 8, 0))
    fields = {"genre": drama[:, None], "year": (old + generator.normal(scale=0.1, size=400))[:, None]}
    unrated = np.arange(300, 400)
    prior = fit_item_mean(data, np.arange(USERS))
    by_sum = smooth_by_text(prior, np.concatenate(list(fields.values()), 1), seed=0)
    features = unrated_features({}, fields)
    by_features = smooth_by_text(prior, features.text, seed=0)
    by_both = features.smoothed(prior, seed=0)
    told = [np.corrcoef(some.values(unrated), mean[unrated])[0, 1] for some in (by_sum, by_features, by_both)]
    assert abs(told[0]) < 0.3
    assert min(told[1:]) > 0.9
    np.testing.assert_array_equal(by_both.centre[:300], by_features.centre[:300])


def test_means_of_unrated_items_are_the_textbooks_regression() -> None:
    """Against scikit-learn's Gaussian process with the same kernel and noise, on means around their own level."""
    generator = np.random.default_rng(0)
    data = rated(generator.normal(size=120), np.where(np.arange(120) < 100, generator.integers(1, 30, 120), 0))
    prior = fit_item_mean(data, np.arange(USERS))
    vectors = generator.normal(size=(120, 4)) / 2
    found = predict_unrated(prior, vectors)
    means, noise = prior.total[:100] / prior.count[:100], 0.5 + prior.strength / prior.count[:100]
    kernel = RBF(np.sqrt(1 / 0.8))
    weight = np.linalg.solve(kernel(vectors[:100]) + np.diag(noise), np.ones(100))
    level = weight @ means / weight.sum()
    model = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None).fit(vectors[:100], means - level)
    np.testing.assert_allclose(found.centre[100:], level + model.predict(vectors[100:]), atol=1e-4)
    np.testing.assert_array_equal(found.centre[:100], prior.centre[:100])


def test_counts_do_not_explain_away_what_text_says_of_items_that_nobody_rated() -> None:
    """Genre makes movies popular and popular movies are good; of one that nobody rated the genre is all there is."""
    generator = np.random.default_rng(0)
    genre = generator.choice([-1.0, 1.0], 400)
    raters = np.exp(2.0 + genre + generator.normal(scale=0.2, size=400)).round().clip(1, USERS)
    mean = 0.5 * (np.log1p(raters) - 2.0)
    unrated = np.arange(300, 400)
    raters[unrated] = 0
    data = rated(mean, raters)
    block = {"genre": genre[:, None]}
    gaps = []
    for features in (Features(block, block["genre"]), Features(block, block["genre"], block["genre"])):
        told = fit_process(data, np.arange(USERS), features, seed=0, factors=2).mean[unrated]
        gaps.append(float(told[genre[unrated] > 0].mean() - told[genre[unrated] < 0].mean()))
    assert gaps[1] > 0.4
    assert gaps[0] < 0.6 * gaps[1]


def test_components_are_no_more_than_there_are() -> None:
    assert principal_components(np.random.default_rng(0).normal(size=(20, 3)), 48).shape == (20, 3)


def test_where_items_are_unrated_the_stack_has_one_process() -> None:
    generator = np.random.default_rng(0)
    data = rated(generator.normal(size=120), np.full(120, 12))
    features = unrated_features({"text": generator.normal(size=(120, 6))}, {})
    users, prior = np.arange(USERS), fit_item_mean(data, np.arange(USERS))
    settings = CollaborativeConfig(members="stack")
    for known, kinds in (
        (features, [GaussianProcess, TextRidge]),
        (replace(features, unrated=None), [GaussianProcess, GaussianProcess, TextRidge]),
    ):
        assert [type(member) for member in fit_members(data, users, prior, known, settings, 0)] == kinds


@pytest.mark.parametrize("cold", [False, True])
def test_a_linear_kernel_alone_reads_every_block_but_the_gaussian_kernels(cold: bool) -> None:
    generator = np.random.default_rng(0)
    data = rated(generator.normal(size=120), np.full(120, 12))
    blocks = {"text": generator.normal(size=(120, 6)), "words": generator.normal(size=(120, 3))}
    features = unrated_features(blocks, {}) if cold else Features(blocks, blocks["text"])
    assert features.linear.shape == (120, 9)
    users = np.arange(USERS)
    settings = CollaborativeConfig(members="linear")
    (process,) = fit_members(data, users, fit_item_mean(data, users), features, settings, 0)
    assert (process.name, process.loadings.shape) == ("linear kernel", (120, 10))  # type: ignore[union-attr]
