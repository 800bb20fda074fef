"""The projection of items' features: it brings items together that the same people like, also those nobody rated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_recommenders import known_task

from metarec import MetaRecommender
from metarec.config import ProjectionConfig, RunConfig, validated
from metarec.data.task_data import TaskData
from metarec.errors import ConfigError, DataError
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import MetaState
from metarec.scorers.collaborative.liked_pairs import LikedPairs, liked_items
from metarec.scorers.collaborative.linear_kernel import fit_linear_kernel
from metarec.scorers.collaborative.projection import (
    Dropout,
    ProjectionLearning,
    first_projection,
    projected_features,
)
from metarec.scorers.collaborative.residuals import Floats
from metarec.training import task_features

SETTINGS = ProjectionConfig(steps=120, pairs=32, width=8, hidden=64, validate_every=120, lr=3e-2, dropout=0.1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def with_hidden(data: TaskData) -> tuple[TaskData, np.ndarray]:
    """Returns data in which nobody rated every fifth item, and which these are."""
    known = data.interactions
    hidden = np.arange(len(known.catalog)) % 5 == 0
    return replace(data, interactions=known.subset(~hidden[known.item])), hidden


def products(items: int) -> Floats:
    """Returns features of which only a product says which of two tastes an item is for: i % 4 < 2."""
    sign = np.where(np.arange(items) // 4 % 2 == 0, 1.0, -1.0)
    taste = np.where(np.arange(items) % 4 < 2, 1.0, -1.0)
    return np.stack([sign, sign * taste], 1) + 0.1 * np.random.default_rng(0).normal(size=(items, 2))


def kinship(vectors: Floats, items: np.ndarray) -> float:
    """Returns how much nearer items of one taste are than those of the two, as a cosine."""
    same = (items % 4 < 2)[:, None] == (items % 4 < 2)
    cosine = vectors[items] @ vectors[items].T
    return float(cosine[same & ~np.eye(len(items), dtype=bool)].mean() - cosine[~same].mean())


def test_what_the_same_people_like_comes_near_also_what_nobody_rated_and_no_linear_map_shows() -> None:
    data, hidden = with_hidden(known_task())
    features = products(len(hidden))
    found = projected_features(data, features, SETTINGS, 0)
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for items in (np.flatnonzero(hidden), np.flatnonzero(~hidden)):
        assert kinship(unit, items) < 0.1
        assert kinship(found, items) > 0.8


def test_a_kernel_over_it_learns_of_items_nobody_rated_what_a_linear_one_cannot() -> None:
    data, _ = with_hidden(known_task())
    features = products(len(data.interactions.catalog))
    before, after = (
        fit_linear_kernel(data.interactions, data.parts["train"], some, name="kernel", unrated=True)
        for some in (features, projected_features(data, features, SETTINGS, 0))
    )
    items = np.flatnonzero(np.arange(len(features)) % 5 == 0)
    same = (items % 4 < 2)[:, None] == (items % 4 < 2)

    def contrast(process: object) -> float:
        loadings = process.loadings[items]  # type: ignore[attr-defined]
        covariance = loadings @ loadings.T
        return float((covariance[same].mean() - covariance[~same].mean()) / np.trace(covariance) * len(items))

    assert contrast(after) > contrast(before) + 0.3


def test_only_meta_training_users_move_it() -> None:
    data = known_task()
    known = data.interactions
    others = ~np.isin(known.user, data.parts["train"])
    flipped = replace(known, rating=np.where(others, 6.5 - known.rating, known.rating).astype(np.float32))
    found = [gradient(replace(data, interactions=some)).gradients for some in (known, flipped)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def learning(data: TaskData) -> ProjectionLearning:
    features = torch.from_numpy(products(len(data.interactions.catalog))).float()
    return ProjectionLearning(features, LikedPairs(liked_items(data), len(features), 0.1, 0.5), data, SETTINGS, 0)


def gradient(data: TaskData) -> MetaGradient:
    return learning(data).gradient_at(MetaState(first_projection(2, SETTINGS, 0), {}), 0)


def test_the_gradient_is_that_of_finite_differences() -> None:
    made = learning(known_task())
    made = replace(made, features=made.features.double(), settings=SETTINGS.model_copy(update={"dropout": 0.0}))
    generator = torch.Generator().manual_seed(1)
    start = {
        name: (value.double() + 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        for name, value in first_projection(2, SETTINGS, 0).items()
    }
    found = made.gradient_at(MetaState(start, {}), 0)
    for name, value in start.items():
        way = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        moved = [
            made.gradient_at(MetaState({**start, name: value + step * way}, {}), 0).loss.mean()
            for step in (1e-5, -1e-5)
        ]
        expected = (moved[0] - moved[1]) / 2e-5
        assert float((found.gradients[f"init/{name}"] * way).sum()) == pytest.approx(float(expected), rel=1e-4)


def test_dropout_leaves_the_mean_as_it_is() -> None:
    dropped = Dropout(0.3, torch.Generator().manual_seed(0))(torch.ones(1000, 100))
    assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.01)


def test_an_interrupted_learning_goes_on_to_the_same_vectors_and_is_read_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, steps, limit = known_task(), [], 10**9
    settings = SETTINGS.model_copy(update={"validate_every": 40})
    features, whole = products(len(data.interactions.catalog)), ProjectionLearning.gradient_at

    def gradient_at(self: ProjectionLearning, meta: MetaState, step: int) -> MetaGradient:
        steps.append(step)
        if len(steps) > limit:
            raise KeyboardInterrupt
        return whole(self, meta, step)

    monkeypatch.setattr(ProjectionLearning, "gradient_at", gradient_at)
    expected = projected_features(data, features, settings, 0)
    assert len(steps) == settings.steps
    assert np.array_equal(projected_features(data, features, settings, 0), expected)
    assert len(steps) == settings.steps
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path / "other"))
    steps, limit = [], 50
    with pytest.raises(KeyboardInterrupt):
        projected_features(data, features, settings, 0)
    steps, limit = [], 10**9
    assert projected_features(data, features, settings, 0) == pytest.approx(expected, abs=1e-6)
    assert len(steps) == settings.steps - 40


def test_too_few_likes_and_nothing_to_read_are_refused() -> None:
    data = known_task()
    alone = replace(data, parts={**data.parts, "train": data.parts["train"][:1]})
    with pytest.raises(DataError, match="1 meta-training users like two items"):
        projected_features(alone, products(len(data.interactions.catalog)), SETTINGS, 0)
    nothing = {"score": ["item mean", "collaborative"], "collaborative": {"features": ["projection"]}}
    with pytest.raises(ConfigError, match="nothing that a projection could read"):
        MetaRecommender(None, validated(RunConfig, nothing, "test")).fit(data)


def test_a_recommender_with_a_projection_saves_loads_and_adapts(tmp_path: Path) -> None:
    data = known_task()
    changed = {
        "score": ["item mean", "collaborative"],
        "collaborative": {
            "members": "linear",
            "features": ["words", "fields", "projection"],
            "projection": SETTINGS.model_dump(),
        },
    }
    recommender = MetaRecommender(None, validated(RunConfig, changed, "test")).fit(data)
    report = recommender.evaluate(data)
    assert report.values("metarec, adapted", 10).mean() > report.values("item mean", 10).mean() + 0.2
    rated = [("m0", 5.0), ("m2", 1.0), ("m5", 5.0), ("m7", 1.5)]
    recommender.save_pretrained(tmp_path / "saved")
    loaded = MetaRecommender.from_pretrained(tmp_path / "saved")
    assert loaded.adapt(rated).recommend(5) == recommender.adapt(rated).recommend(5)


@pytest.mark.parametrize(("taste", "kept"), [(True, True), (False, False)])
def test_a_projection_that_orders_validation_users_items_no_better_is_left_out(
    taste: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = known_task()
    items = len(data.interactions.catalog)
    noise = np.random.default_rng(3).normal(size=(items, 2))
    oracle = np.where(np.arange(items)[:, None] % 4 < 2, [1.0, 0.0], [0.0, 1.0])
    made = oracle if taste else noise
    monkeypatch.setattr(task_features, "projected_features", lambda *_: made)
    # What the projection is said to be learned from: of the two tastes, something when it is noise, nothing otherwise.
    text = noise if taste else oracle
    monkeypatch.setattr(task_features, "text_vectors", lambda *_: text)
    settings = {
        "score": ["item mean", "collaborative"],
        "collaborative": {"members": "linear", "features": ["text", "projection"], "projection": {"keep": "better"}},
    }
    read = task_features.collaborative_features(None, data, validated(RunConfig, settings, "test"))
    assert ("projection" in read.blocks) is kept
    settings["collaborative"]["projection"] = {"keep": "always"}  # type: ignore[index]
    read = task_features.collaborative_features(None, data, validated(RunConfig, settings, "test"))
    assert "projection" in read.blocks
