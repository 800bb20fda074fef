"""Fine-tuned baselines learn what is there to learn, leave the caller's model alone, and come back from disk."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEMPLATES, known_interactions
from small_recommenders import known_task
from torch import Tensor

from metarec.bench.methods import METHODS, MethodContext
from metarec.config import TrainConfig
from metarec.data.episodes import Episode, evaluation_episodes
from metarec.data.interactions import Ratings
from metarec.errors import ArtifactError, BackboneError, ConfigError, UnknownItemError
from metarec.evaluation.evaluate import evaluate
from metarec.lm.backbone import Backbone
from metarec.lm.cached_forward import CachedForward
from metarec.lm.reference_forward import ReferenceForward
from metarec.meta.losses import pairwise_logistic
from metarec.scorer import Request, Scorer
from metarec.scorers.collaborative.item_mean import fit_item_mean
from metarec.scorers.language import fine_tuning, finetuned
from metarec.scorers.language.fine_tuning import FULL, _loss, fine_tune
from metarec.scorers.language.finetuned import NAMES, FineTuned, then_per_user_lora
from metarec.scorers.language.in_context import History, InContext
from metarec.scorers.language.trainable_copy import Recipe, trainable_copy
from metarec.scorers.serialization import load_scorer, save_scorer
from metarec.training import fitting

Backbones = Callable[..., Backbone]
TEMPLATE = TEMPLATES["causal"]
WORLD = known_interactions()
# One of the two tastes: everybody likes the same genres, and a prior that knows nothing leaves them to the text.
ALIKE = WORLD.subset(WORLD.user % 2 == 0)
TRAIN, TEST = np.arange(0, 40, 2), np.arange(40, 60, 2)
PRIOR = fit_item_mean(WORLD, np.arange(40))
FLAT = replace(PRIOR, total=np.zeros_like(PRIOR.total))
QUICK = FULL.model_copy(
    update={"steps": 20, "users": 4, "shots": (0, 2), "warmup": 3, "validate_every": 10, "adapter_weight": 1.0}
)
RATES = {"lora": 1e-2, "all": 3e-3}
CANDIDATES = np.array([4, 9, 14, 20, 21, 33, 38], np.int64)
SUPPORT = Ratings(np.array([0, 1, 2, 3]), np.array([5.0, 4.5, 2.0, 1.5], np.float32))
REQUESTS = [Request("a", SUPPORT, CANDIDATES), Request("b", Ratings.empty(), np.arange(40))]


def episodes(users: np.ndarray) -> list[Episode]:
    return evaluation_episodes(WORLD, users, max_support=8, max_query=14, min_query=5, order="random", seed=0)[0]


def tune(model: Backbone, trainable: str, config: TrainConfig = QUICK, **settings: object) -> FineTuned:
    return fine_tune(
        model,
        TEMPLATE,
        ALIKE,
        TRAIN,
        FLAT,
        validation=episodes(TEST),
        threshold=3.5,
        recipe=Recipe(trainable),  # type: ignore[arg-type]
        config=config.model_copy(update={"lr": RATES[trainable]}),
        **settings,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def tuned(backbone: Backbones) -> Callable[[str], FineTuned]:
    found: dict[str, FineTuned] = {}

    def get(trainable: str) -> FineTuned:
        if trainable not in found:
            found[trainable] = tune(backbone("llama"), trainable)
        return found[trainable]

    return get


def auc(scorer: Scorer, shots: int = 2) -> float:
    report = evaluate(
        [scorer],
        episodes(TEST),
        [shots],
        WORLD.catalog,
        threshold=3.5,
        seed=0,
        baseline=scorer.name,
        left_out={},
    )
    return float(report.values(scorer.name, shots).mean())


both = pytest.mark.parametrize("trainable", ["lora", "all"])


@both
def test_training_lowers_the_loss_and_beats_the_untrained_model(
    trainable: str, tuned: Callable[[str], FineTuned], backbone: Backbones
) -> None:
    scorer = tuned(trainable)
    history = scorer.training["history"]
    assert history[-1]["query_loss"] < history[1]["query_loss"]
    untrained = InContext(backbone("llama"), scorer.context.history)
    assert auc(scorer) > auc(untrained) + 0.1
    assert scorer.training["best_validation_auc"] == max(entry["validation_auc"] for entry in history)


@both
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_callers_model_stays_bit_for_bit_what_it_was(
    trainable: str, family: str, backbone: Backbones, tmp_path: Path
) -> None:
    model = backbone(family)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    scorer = tune(model, trainable, QUICK.model_copy(update={"steps": 2, "validate_every": 1}))
    scorer.score(REQUESTS)
    save_scorer(tmp_path / "tuned", scorer)
    load_scorer(tmp_path / "tuned", backbone=model).score(REQUESTS)
    after = model.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def changed(tuned: Backbone, base: Backbone) -> set[str]:
    frozen = base.model.state_dict()
    return {name for name, value in tuned.model.state_dict().items() if not torch.equal(value, frozen[name])}


def test_a_lora_moves_queries_and_values_alone_and_everything_else_is_shared(
    tuned: Callable[[str], FineTuned], backbone: Backbones
) -> None:
    scorer, base = tuned("lora"), backbone("llama")
    model = scorer.context.backbone
    assert {name.split(".")[-2] for name in changed(model, base)} == {"q_proj", "v_proj"}
    assert model.model.model.layers[0].mlp.up_proj.weight is base.model.model.layers[0].mlp.up_proj.weight
    # Rank 8 on (16 -> 16) and (16 -> 8) in each of three blocks, and the weight.
    assert scorer.parameters == 3 * 8 * (16 + 16 + 16 + 8) + 1


def test_a_lora_is_added_without_a_warning(backbone: Backbones) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainable_copy(backbone("llama"), Recipe("lora"))
    assert not told


def test_full_fine_tuning_moves_every_parameter(tuned: Callable[[str], FineTuned], backbone: Backbones) -> None:
    scorer, base = tuned("all"), backbone("llama")
    assert changed(scorer.context.backbone, base) == set(base.model.state_dict())
    assert scorer.parameters == sum(value.numel() for value in base.model.parameters()) + 1


@both
def test_the_merged_model_scores_as_the_best_validated_one(trainable: str, tuned: Callable[[str], FineTuned]) -> None:
    """The validation value was measured with the LoRA beside the weights, the scorer has it inside them."""
    scorer = tuned(trainable)
    asked = [replace(episode, query=episode.query.head(16)) for episode in episodes(TEST)]
    report = evaluate([scorer], asked, [2], WORLD.catalog, threshold=3.5, seed=0, baseline=scorer.name, left_out={})
    assert report.values(scorer.name, 2).mean() == pytest.approx(scorer.training["best_validation_auc"], abs=2e-3)


@both
def test_the_score_is_the_prior_and_the_weighted_log_odds(trainable: str, tuned: Callable[[str], FineTuned]) -> None:
    scorer = replace(tuned(trainable), prior=PRIOR)
    (scores,) = scorer.score(REQUESTS[:1])
    (odds,) = scorer.context.score(REQUESTS[:1])
    np.testing.assert_allclose(scores, PRIOR.values(CANDIDATES) + scorer.weight * odds.numpy(), rtol=1e-5)
    assert scorer.name == NAMES[scorer.recipe.trainable]
    assert scorer.bytes_per_user == 0
    assert scorer.tokens_read(REQUESTS[0]) == scorer.context.tokens_read(REQUESTS[0])
    assert scorer.prompt_text(REQUESTS[0], 4).endswith("answer :")
    with pytest.raises(UnknownItemError, match="candidate item code 40"):
        scorer.score([Request("a", SUPPORT, np.array([40]))])


@both
def test_what_was_saved_scores_the_same(
    trainable: str, tuned: Callable[[str], FineTuned], backbone: Backbones, tmp_path: Path
) -> None:
    scorer = tuned(trainable)
    save_scorer(tmp_path / "tuned", scorer)
    loaded = load_scorer(tmp_path / "tuned", backbone=backbone("llama"))
    assert isinstance(loaded, FineTuned)
    for one, other in zip(scorer.score(REQUESTS), loaded.score(REQUESTS), strict=True):
        assert torch.equal(one, other)
    assert loaded.context.backbone.fingerprint == scorer.context.backbone.fingerprint
    assert (loaded.parameters, loaded.training, loaded.recipe) == (scorer.parameters, scorer.training, scorer.recipe)


def same(first: FineTuned, second: FineTuned) -> bool:
    return first.weight == second.weight and all(
        torch.equal(value, second.trained[name]) for name, value in first.trained.items()
    )


SHORT = QUICK.model_copy(update={"steps": 4, "validate_every": 2, "users": 2})


@both
def test_the_same_seed_gives_the_same_model_and_another_one_another(trainable: str, backbone: Backbones) -> None:
    model = backbone("llama")
    first = tune(model, trainable, SHORT)
    torch.manual_seed(99)
    assert same(first, tune(model, trainable, SHORT))
    assert not same(first, tune(model, trainable, SHORT, seed=1))


@both
def test_an_interrupted_training_resumed_ends_with_the_same_model(
    trainable: str, backbone: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metarec.scorers.language import fine_tuning

    model = backbone("llama")
    whole = tune(model, trainable, SHORT)
    calls = iter(range(100))

    def interrupted(*arguments: object, **settings: object) -> object:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments, **settings)  # type: ignore[arg-type]

    draw = fine_tuning.training_batch
    monkeypatch.setattr(fine_tuning, "training_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(model, trainable, SHORT, checkpoint=tmp_path / "run")
    monkeypatch.setattr(fine_tuning, "training_batch", draw)
    assert same(whole, tune(model, trainable, SHORT, checkpoint=tmp_path / "run", resume=True))
    with pytest.raises(ArtifactError, match="another run"):
        tune(model, trainable, SHORT, checkpoint=tmp_path / "run", resume=True, seed=1)


def test_gradients_through_a_history_read_once_are_those_of_every_prompt_read_whole(backbone: Backbones) -> None:
    """In float64: what the loss of an episode says about every parameter, against plain passes of the whole prompts."""
    model = copy.deepcopy(backbone("llama", torch.float64).model).requires_grad_(True)
    student = replace(backbone("llama", torch.float64), modules=model)
    context = InContext(student, History(TEMPLATE, ALIKE.catalog, 3.5))
    query = Ratings(np.array([4, 9, 14, 20]), np.array([5.0, 4.5, 2.0, 1.5], np.float32))
    episode = Episode("u0", SUPPORT, query)
    weight = torch.tensor(0.7, dtype=torch.float64)

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters())))

    found = gradients(_loss(context, PRIOR, weight, episode, 2.0))
    request = Request("u0", SUPPORT, query.items)
    yes, no = (student.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
    odds = []
    for code in query.items:
        logits = model(torch.tensor([student.tokenize([context.prompt_text(request, int(code))])[0]])).logits[0, -1]
        odds.append(logits[yes] - logits[no])
    scores = torch.from_numpy(PRIOR.values_without(query)) + weight * torch.stack(odds)
    liked = torch.tensor([[True, True, False, False]])
    expected = gradients(pairwise_logistic(scores[None], liked, torch.ones_like(liked), 2.0)[0])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # attention's softmax is in float32


def test_a_query_of_one_class_teaches_nothing(backbone: Backbones) -> None:
    context = InContext(backbone("llama"), History(TEMPLATE, ALIKE.catalog, 3.5))
    liked = Ratings(np.array([4, 5]), np.array([5.0, 5.0], np.float32))
    loss = _loss(context, PRIOR, torch.tensor(1.0, requires_grad=True), Episode("u0", SUPPORT, liked), 2.0)
    assert float(loss) == 0
    assert not loss.requires_grad


def test_what_cannot_be_trained_is_refused(backbone: Backbones) -> None:
    with pytest.raises(ConfigError, match="no blank"):
        tune(backbone("bert"), "lora")
    with pytest.raises(ConfigError, match="too coarse"):
        tune(backbone("llama", torch.bfloat16), "all")
    settings = {"validation": episodes(TEST), "threshold": 3.5, "recipe": Recipe("lora", targets=("nothing",))}
    with pytest.raises(ConfigError, match="no LoRA fits"):
        fine_tune(backbone("llama"), TEMPLATE, ALIKE, TRAIN, FLAT, **settings)  # type: ignore[arg-type]


def test_a_history_longer_than_the_model_reads_is_refused(backbone: Backbones) -> None:
    model = backbone("llama")
    context = InContext(model, History(TEMPLATE, ALIKE.catalog, 3.5, limit=40))
    model.model.config.max_position_embeddings, before = 64, model.model.config.max_position_embeddings
    try:
        with pytest.raises(BackboneError, match="reads 64"):
            context.score([Request("a", Ratings(np.arange(40), np.full(40, 4.0, np.float32)), CANDIDATES)])
    finally:
        model.model.config.max_position_embeddings = before


def test_a_fresh_lora_per_user_starts_at_the_fine_tuned_model_and_helps(tuned: Callable[[str], FineTuned]) -> None:
    """Tested on users of the other taste: the fine-tuned model is wrong about them until it has adapted."""
    scorer = tuned("all")
    before = then_per_user_lora(scorer, layers=2, steps=0)
    (scores,) = before.score(REQUESTS[1:])
    (expected,) = scorer.score(REQUESTS[1:])
    np.testing.assert_allclose(scores - scores.mean(), expected - expected.mean(), atol=1e-4)
    after = then_per_user_lora(scorer, layers=2, steps=5, inner_lr=1.0, shrinkage=0.0)
    assert after.name == "full fine-tuning, then per-user LoRA"
    assert after.bytes_per_user > 0
    others = episodes(np.arange(41, 60, 2))
    report = evaluate(
        [replace(before, name="before"), after],
        others,
        [8],
        WORLD.catalog,
        threshold=3.5,
        seed=0,
        baseline="before",
        left_out={},
    )
    gain, (low, _) = report.difference(after.name, 8, "before", 8)
    assert low > 0, gain


def test_a_per_user_lora_reads_nothing_that_was_kept_of_another_model(
    tuned: Callable[[str], FineTuned], backbone: Backbones
) -> None:
    """Neither of the model before fine-tuning nor of another fine-tuning, on the same prompts in the same cache."""
    base, items = backbone("llama"), np.arange(40)
    opened = [then_per_user_lora(tuned(trainable), layers=2).answer_model for trainable in ("lora", "all")]
    assert opened[0] is not None
    before = replace(opened[0], backbone=base, forward=CachedForward(base, opened[0].prompts, opened[0].placement))
    found = []
    for model in [before, *opened]:
        assert model is not None
        whole = replace(model, forward=ReferenceForward(model.backbone, model.prompts, model.placement))
        found.append(model.frozen_log_odds(items))
        torch.testing.assert_close(found[-1], whole.frozen_log_odds(items), atol=1e-4, rtol=1e-4)
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 0.01


@both
def test_a_benchmark_row_that_was_trained_before_is_loaded_and_scores_the_same(
    trainable: str, backbone: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = MethodContext(known_task(), tmp_path)
    monkeypatch.setattr(fitting, "open_backbone", lambda _: backbone("llama"))
    monkeypatch.setattr(MethodContext, "prior", FLAT)
    monkeypatch.setattr(fine_tuning, "fine_tune", partial(fine_tune, config=SHORT))
    monkeypatch.setattr(finetuned, "then_per_user_lora", partial(then_per_user_lora, layers=1))
    method = METHODS.get(NAMES[trainable])  # type: ignore[index]
    first = method.rows(setting)
    monkeypatch.setattr(fine_tuning, "fine_tune", None)
    second = method.rows(MethodContext(setting.data, tmp_path))
    assert [row.scorer.name for row in second] == [row.scorer.name for row in first]
    assert [row.parameters for row in second] == [row.parameters for row in first]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.scorer.score(REQUESTS)[0], other.scorer.score(REQUESTS)[0])
    assert not (tmp_path / "checkpoint").exists()
