"""An encoder's LoRA learned through posteriors: the loss is the kernel's own, its gradient is right, and it learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_recommenders import TASK, known_task

from metarec.config import EncoderTuningConfig, LinearConfig, PosteriorTuningConfig, validated
from metarec.data.episodes import Episode
from metarec.data.task import Task
from metarec.data.task_data import TaskData
from metarec.errors import ConfigError
from metarec.lm.adapters import init_adapter
from metarec.lm.answer_model import open_answer_model
from metarec.lm.loading import load_backbone
from metarec.lm.placement import default_placement
from metarec.lm.tokenized import tokenize_catalog
from metarec.meta.inner_loop import MetaState
from metarec.scorers.collaborative.features import side_by_side
from metarec.scorers.collaborative.linear_kernel import linear_process
from metarec.scorers.language import encoder_tuning
from metarec.scorers.language.encoder_tuning import tuned_text_vectors
from metarec.scorers.language.item_vectors import text_vectors
from metarec.scorers.language.posterior_tuning import FeatureBlocks, Half, PosteriorTuning, two_halves
from metarec.system.tensors import AdapterState

SETTINGS = PosteriorTuningConfig(steps=4, users=4, max_query=8, layers=1, rank=2, validate_every=2, lr=1e-2)
PAIRS = EncoderTuningConfig(steps=2, pairs=8, rank=2, validate_every=2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data() -> TaskData:
    """Two opposite tastes; a text names the genre that they are about."""
    task = validated(Task, {**TASK, "features": {"text": "{{ title }} , {{ genres }}"}}, "test")
    return replace(known_task(), task=task)


@pytest.fixture
def tuning(data: TaskData, model_dir: Callable[[str], Path]) -> PosteriorTuning:
    return made(data, str(model_dir("encoder")))


def made(data: TaskData, encoder: str, dtype: torch.dtype = torch.float64) -> PosteriorTuning:
    backbone = load_backbone(encoder, dtype=dtype)
    prompts = tokenize_catalog(backbone, data.task.item_text, data.interactions.catalog)
    placement = default_placement(
        backbone, prompts, layers=1, targets=("query", "value"), rank=2, alpha=4.0, active_tokens=None
    )
    model = open_answer_model(backbone, prompts, placement)
    start = model.frozen_states(np.arange(len(prompts.tokens))).numpy().astype(np.float64)
    beside = [np.random.default_rng(0).normal(size=(len(start), 3))]
    halves = two_halves(data, side_by_side([*beside, start]), LinearConfig(sweeps=2), 0)
    return PosteriorTuning(data, model, FeatureBlocks.of(beside, start), halves, SETTINGS, 0)


def fresh(tuning: PosteriorTuning) -> MetaState:
    """A LoRA that changes something."""
    spec = tuning.model.spec
    lora = init_adapter(spec, torch.Generator().manual_seed(0), torch.float64)
    noise = torch.Generator().manual_seed(1)
    return MetaState({n: v + 0.1 * torch.randn(v.shape, generator=noise, dtype=v.dtype) for n, v in lora.items()}, {})


def test_before_its_first_step_the_order_is_that_of_the_kernel(tuning: PosteriorTuning) -> None:
    spec = tuning.model.spec
    untrained = init_adapter(spec, torch.Generator().manual_seed(0), torch.float64)
    episodes = tuning.data.evaluated("validation")[0][:3]
    episodes = [replace(one, support=one.support.head(count)) for one, count in zip(episodes, (2, 9, 5), strict=True)]
    half = tuning.halves[0]
    process = linear_process(half.prior, tuning.blocks.design, "kernel")
    scores, real = tuning.scores(half, episodes, untrained)
    for row, kept, one in zip(scores, real, episodes, strict=True):
        expected = process.posterior_mean(one.support, one.query.items)
        found = row[kept].numpy()
        np.testing.assert_allclose(found - found[0], expected - expected[0], atol=1e-4)


def test_without_ratings_the_order_is_that_of_the_mean_weights(tuning: PosteriorTuning) -> None:
    none = replace(tuning, settings=SETTINGS.model_copy(update={"shots": (0,)}))
    gradients = none.gradient_at(fresh(none), 0).gradients
    assert any(value.abs().max() > 0 for value in gradients.values())
    episode, half = tuning.data.evaluated("validation")[0][0], tuning.halves[0]
    scores, _ = tuning.scores(half, [replace(episode, support=episode.support.head(0))], fresh(tuning).init)
    features = tuning.blocks.of_items(episode.query.items, tuning.vectors(episode.query.items, fresh(tuning).init))
    expected = features.numpy() @ half.prior.weights[:-1] + half.prior.items[episode.query.items]
    np.testing.assert_allclose(scores[0].numpy(), expected, atol=1e-6)


def test_items_that_nobody_rated_have_no_effect_of_their_own_in_training_either(tuning: PosteriorTuning) -> None:
    split = tuning.data.task.split.model_copy(update={"by": "item", "unseen": 0.3})
    cold = replace(tuning, data=replace(tuning.data, task=tuning.data.task.model_copy(update={"split": split})))
    assert cold.data.task.split.asks_unrated
    episodes, half = tuning.data.evaluated("validation")[0][:1], tuning.halves[0]
    init = fresh(tuning).init
    gap = tuning.scores(half, episodes, init)[0] - cold.scores(half, episodes, init)[0]
    np.testing.assert_allclose(gap[0].numpy(), half.prior.items[episodes[0].query.items], atol=1e-12)


def test_the_gradient_is_that_of_finite_differences(tuning: PosteriorTuning) -> None:
    meta, step = fresh(tuning), 1e-5
    found = tuning.gradient_at(meta, 3)
    for name in list(meta.init)[:2]:
        moved = []
        for sign in (1, -1):
            shifted = meta.init[name].clone()
            shifted.view(-1)[0] += sign * step
            moved.append(tuning.gradient_at(MetaState({**meta.init, name: shifted}, {}), 3).loss.mean())
        slope = float(found.gradients[f"init/{name}"].view(-1)[0])
        assert slope == pytest.approx(float(moved[0] - moved[1]) / (2 * step), rel=1e-3, abs=1e-8)
        assert slope != 0


def test_users_are_asked_under_what_others_ratings_say(data: TaskData, model_dir: Callable[[str], Path]) -> None:
    one = made(data, str(model_dir("encoder")))
    known, mine = data.interactions, one.halves[0].users
    flipped = np.where(np.isin(known.user, mine), 5.5 - known.rating, known.rating).astype(np.float32)
    other = made(replace(data, interactions=replace(known, rating=flipped)), str(model_dir("encoder")))
    assert np.array_equal(one.halves[0].prior.weights, other.halves[0].prior.weights)
    assert not np.allclose(one.halves[1].prior.weights, other.halves[1].prior.weights)
    assert not set(one.halves[0].users) & set(one.halves[1].users)
    assert set(one.halves[0].users) | set(one.halves[1].users) == set(data.parts["train"])


def test_where_unrated_items_are_queried_training_asks_about_items_that_its_prior_has_not_met(
    data: TaskData, model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = data.task.split.model_copy(update={"by": "item", "unseen": 0.3})
    cold = replace(data, task=data.task.model_copy(update={"split": split}))
    tuning = made(cold, str(model_dir("encoder")))
    for half in tuning.halves:
        assert half.hidden is not None
        assert not half.prior.rated[half.hidden].any()
        assert half.prior.rated[~half.hidden].any()
    assert sum(half.hidden.astype(int) for half in tuning.halves).tolist() == [2] * len(data.interactions.catalog)  # type: ignore[union-attr]
    asked: list[tuple[Half, Episode]] = []
    whole = PosteriorTuning.scores

    def scores(self: PosteriorTuning, half: Half, episodes: Sequence[Episode], init: AdapterState) -> object:
        asked.extend((half, one) for one in episodes)
        return whole(self, half, episodes, init)

    monkeypatch.setattr(PosteriorTuning, "scores", scores)
    for step in range(3):
        tuning.gradient_at(fresh(tuning), step)
    assert len({id(half) for half, _ in asked}) == 3
    for half, one in asked:
        assert half.hidden is not None
        assert half.hidden[one.query.items].all()
        assert not half.hidden[one.support.items].any()


def test_training_helps_users_that_it_did_not_see(tuning: PosteriorTuning) -> None:
    width = tuning.blocks.design.shape[1]
    isotropic = [
        replace(half, prior=replace(half.prior, weights=np.zeros(width), covariance=np.eye(width) * 0.3))
        for half in tuning.halves
    ]
    # Weights of mean 0 order nothing without ratings.
    rated = SETTINGS.model_copy(update={"shots": tuple(count for count in tuning.data.task.shots if count)})
    tuning = replace(tuning, halves=tuple(isotropic), settings=rated)
    lora = init_adapter(tuning.model.spec, torch.Generator().manual_seed(0), torch.float64)
    before = tuning.validate(MetaState(lora, {}))
    for step in range(20):
        gradients = tuning.gradient_at(MetaState(lora, {}), step).gradients
        lora = {name: value - 3.0 * gradients[f"init/{name}"] for name, value in lora.items()}
    assert tuning.validate(MetaState(lora, {})) > before + 0.05


def test_vectors_learned_through_posteriors_differ_and_are_kept(
    data: TaskData, model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = str(model_dir("encoder"))
    settings = PAIRS.model_copy(update={"posterior": SETTINGS})
    values = iter(range(100))
    monkeypatch.setattr(PosteriorTuning, "validate", lambda *_: next(values))  # the last one is the best
    linear = LinearConfig(sweeps=2)
    pairs = tuned_text_vectors(data, encoder, PAIRS, 0)
    beside = [np.random.default_rng(0).normal(size=(len(pairs), 3))]
    tuned = tuned_text_vectors(data, encoder, settings, 0, beside, linear)
    assert np.abs(tuned - pairs).max() > 1e-3
    monkeypatch.setattr(encoder_tuning, "train", lambda *_, **__: pytest.fail("what is kept is not trained again"))
    assert np.array_equal(tuned_text_vectors(data, encoder, settings, 0, beside, linear), tuned)
    with pytest.raises(pytest.fail.Exception):
        tuned_text_vectors(data, encoder, settings, 0, [beside[0] + 1], linear)


def test_the_lora_may_be_learned_through_posteriors_alone(
    data: TaskData, model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, values = str(model_dir("encoder")), iter(range(100))
    monkeypatch.setattr(PosteriorTuning, "validate", lambda *_: next(values))  # the last one is the best
    monkeypatch.setattr(encoder_tuning, "_by_pairs", lambda *_: pytest.fail("pairs are left out"))
    alone = PAIRS.model_copy(update={"steps": 0, "pairs": 1000, "posterior": SETTINGS})
    tuned = tuned_text_vectors(data, encoder, alone, 0, (), LinearConfig(sweeps=2))
    frozen = text_vectors(data.interactions.catalog, data.task.item_text, encoder)
    assert np.abs(tuned - frozen).max() > 1e-3
    with pytest.raises(ConfigError, match="nothing is tuned"):
        tuned_text_vectors(data, encoder, PAIRS.model_copy(update={"steps": 0}), 0)


def test_an_interrupted_tuning_through_posteriors_goes_on_to_the_same_vectors(
    data: TaskData, model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, settings, steps, limit = str(model_dir("encoder")), PAIRS.model_copy(update={"posterior": SETTINGS}), [], 3
    linear, whole = LinearConfig(sweeps=2), PosteriorTuning.gradient_at

    def gradient_at(self: PosteriorTuning, meta: MetaState, step: int) -> object:
        steps.append(step)
        if len(steps) == limit:
            raise KeyboardInterrupt
        return whole(self, meta, step)

    monkeypatch.setattr(PosteriorTuning, "gradient_at", gradient_at)
    with pytest.raises(KeyboardInterrupt):
        tuned_text_vectors(data, encoder, settings, 0, (), linear)
    resumed = tuned_text_vectors(data, encoder, settings, 0, (), linear)
    assert steps == [0, 1, 2, 2, 3]
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path / "other"))
    np.testing.assert_allclose(tuned_text_vectors(data, encoder, settings, 0, (), linear), resumed, atol=1e-6)
