"""The tuned encoder: it learns what users like together, from meta-training users and seen items alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_recommenders import TASK, known_task

from metarec import MetaRecommender
from metarec.config import EncoderTuningConfig, RunConfig, validated
from metarec.data.interactions import Codes
from metarec.data.task import FeaturesConfig, Task
from metarec.data.task_data import TaskData
from metarec.errors import ConfigError, DataError
from metarec.lm.loading import load_backbone
from metarec.lm.tokenized import tokenize_catalog
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import MetaState
from metarec.presets import with_preset
from metarec.scorers.collaborative.liked_pairs import LikedPairs, liked_items
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.language import encoder_tuning
from metarec.scorers.language.encoder_tuning import tuned_text_vectors
from metarec.scorers.language.item_vectors import text_vectors
from metarec.scorers.language.trainable_copy import Recipe, trainable_copy

SETTINGS = EncoderTuningConfig(steps=6, pairs=8, rank=4, validate_every=3, lr=1e-2)
LEARNING = SETTINGS.model_copy(update={"steps": 60, "pairs": 32, "validate_every": 20})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data() -> TaskData:
    """Two opposite tastes; a text names the genre that they are about."""
    task = validated(Task, {**TASK, "features": {"text": "{{ title }} , {{ genres }}"}}, "test")
    return replace(known_task(), task=task)


def kinship(vectors: Floats, items: Codes) -> float:
    """Returns how much nearer items of one taste are than those of the two, as a cosine."""
    unit = vectors[items] / np.linalg.norm(vectors[items], axis=1, keepdims=True)
    same = (items % 4 < 2)[:, None] == (items % 4 < 2)
    cosine = unit @ unit.T
    return float(cosine[same & ~np.eye(len(items), dtype=bool)].mean() - cosine[~same].mean())


def test_items_that_the_same_people_like_come_near_also_those_that_nobody_rated(
    data: TaskData, model_dir: Callable[[str], Path], cache: Path
) -> None:
    known = data.interactions
    hidden = np.arange(len(known.catalog)) % 5 == 0
    task = data.task.model_copy(update={"features": FeaturesConfig(text="{{ genres }}")})
    cold = replace(data, task=task, interactions=known.subset(~hidden[known.item]))
    encoder = str(model_dir("encoder"))
    frozen = text_vectors(known.catalog, task.item_text, encoder)
    tuned = tuned_text_vectors(cold, encoder, LEARNING, 0)
    for items in (np.flatnonzero(~hidden), np.flatnonzero(hidden)):
        assert kinship(tuned, items) > kinship(frozen, items) + 0.3


def test_an_encoder_before_its_first_step_is_the_frozen_one(
    data: TaskData, model_dir: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_tuning._Tuning, "validate", lambda *_: 0.0)  # the first of equals is the best
    encoder = str(model_dir("encoder"))
    frozen = text_vectors(data.interactions.catalog, data.task.item_text, encoder)
    assert tuned_text_vectors(data, encoder, SETTINGS, 0) == pytest.approx(frozen, abs=1e-5)


def test_only_meta_training_users_move_the_encoder(data: TaskData, model_dir: Callable[[str], Path]) -> None:
    known = data.interactions
    others = ~np.isin(known.user, data.parts["train"])
    flipped = replace(known, rating=np.where(others, 6.5 - known.rating, known.rating).astype(np.float32))
    found = []
    for some in (known, flipped):
        tuning = made_tuning(replace(data, interactions=some), str(model_dir("encoder")))
        start = MetaState({name: leaf.detach().clone() for name, leaf in tuning.student.parameters.items()}, {})
        found.append(tuning.gradient_at(start, 0).gradients)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def made_tuning(data: TaskData, encoder: str) -> encoder_tuning._Tuning:
    backbone = load_backbone(encoder)
    prompts = tokenize_catalog(backbone, data.task.item_text, data.interactions.catalog)
    student = trainable_copy(backbone, Recipe("lora", 4, 8.0, ("query", "value")))
    pairs = LikedPairs(liked_items(data), len(prompts.tokens), SETTINGS.temperature, SETTINGS.frequency)
    return encoder_tuning._Tuning(student, prompts, pairs, data, SETTINGS, 0)


def test_a_user_who_likes_anothers_partner_is_not_told_that_it_is_wrong(
    data: TaskData, model_dir: Callable[[str], Path]
) -> None:
    """With two people of one taste who like the same items, no pair has a wrong answer, so nothing is learned."""
    tuning = made_tuning(data, str(model_dir("encoder")))
    tuning = replace(tuning, pairs=replace(tuning.pairs, likes=[np.arange(6)] * SETTINGS.pairs))
    start = MetaState({name: leaf.detach().clone() for name, leaf in tuning.student.parameters.items()}, {})
    assert tuning.gradient_at(start, 0).loss.abs().max() == 0


def test_an_interrupted_tuning_goes_on_to_the_same_vectors_and_is_read_afterwards(
    data: TaskData, model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, steps, limit = str(model_dir("encoder")), [], 99
    whole = encoder_tuning._Tuning.gradient_at

    def gradient_at(self: encoder_tuning._Tuning, meta: MetaState, step: int) -> MetaGradient:
        steps.append(step)
        if len(steps) > limit:
            raise KeyboardInterrupt
        return whole(self, meta, step)

    monkeypatch.setattr(encoder_tuning._Tuning, "gradient_at", gradient_at)
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path / "one"))
    expected = tuned_text_vectors(data, encoder, SETTINGS, 0)
    assert steps == list(range(6))
    assert np.array_equal(tuned_text_vectors(data, encoder, SETTINGS, 0), expected)
    assert len(steps) == 6
    assert not list(tmp_path.rglob("*.checkpoint"))
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path / "other"))
    steps, limit = [], 4
    with pytest.raises(KeyboardInterrupt):
        tuned_text_vectors(data, encoder, SETTINGS, 0)
    steps, limit = [], 99
    assert tuned_text_vectors(data, encoder, SETTINGS, 0) == pytest.approx(expected, abs=1e-6)
    assert steps == [3, 4, 5]


def test_what_cannot_be_tuned_is_refused(data: TaskData, model_dir: Callable[[str], Path], cache: Path) -> None:
    with pytest.raises(ConfigError, match="is a causal model"):
        tuned_text_vectors(data, str(model_dir("llama")), SETTINGS, 0)
    with pytest.raises(DataError, match=r"36 meta-training users like two items.*collaborative\.tuning\.pairs"):
        tuned_text_vectors(data, str(model_dir("encoder")), SETTINGS.model_copy(update={"pairs": 64}), 0)


def test_the_preset_fits_evaluates_saves_and_serves_without_its_encoder(
    data: TaskData, model_dir: Callable[[str], Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {
        "collaborative": {"encoder": str(model_dir("encoder")), "tuning": LEARNING.model_dump(), "stack": {"folds": 2}},
        "train": {"steps": 2, "validate_every": 2},
    }
    recommender = MetaRecommender(None, validated(RunConfig, with_preset("text", changed), "test")).fit(data)
    report = recommender.evaluate(data)
    assert report.values("metarec, adapted", 10).mean() > report.values("item mean", 10).mean() + 0.2
    rated = [("m0", 5.0), ("m2", 1.0), ("m5", 5.0), ("m7", 1.5)]
    before = recommender.adapt(rated).recommend(5)
    recommender.save_pretrained(tmp_path / "saved")

    def refused(*_: object) -> None:
        raise AssertionError("a saved recommender keeps what it needs of the encoder")

    monkeypatch.setattr(encoder_tuning, "tuned_text_vectors", refused)
    monkeypatch.setattr(encoder_tuning, "load_backbone", refused)
    loaded = MetaRecommender.from_pretrained(tmp_path / "saved")
    assert loaded.adapt(rated).recommend(5) == before
