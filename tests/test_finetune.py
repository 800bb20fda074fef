"""`metarec finetune`: every kind of model becomes a run like any other, and each of its aids does something."""

from __future__ import annotations

import copy
import itertools
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TEMPLATES, Ran, known_interactions
from small_recommenders import known_task

from metarec.config import AugmentConfig, FineTuneConfig, RunConfig
from metarec.data.augmentation import check_augmentation, varied
from metarec.data.interactions import Ratings
from metarec.errors import BackboneError, ConfigError
from metarec.lm.backbone import Backbone
from metarec.lm.loading import load_backbone, load_classifier, save_backbone
from metarec.lm.masked_head import masked_from_encoder
from metarec.lm.rating_classes import RatingClasses
from metarec.lm.whole_texts import read_texts, text_log_odds
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import MetaState
from metarec.recommender import MetaRecommender
from metarec.recommending.finetuning import fine_tune_settings, fine_tuned_recommender
from metarec.registries import LOSSES
from metarec.scorer import Request
from metarec.scorers.collaborative.item_mean import fit_item_mean
from metarec.scorers.language import fine_tuning
from metarec.scorers.language.fine_tuning import fine_tune
from metarec.scorers.language.finetuned import FineTuned
from metarec.scorers.language.in_context import History, InContext
from metarec.scorers.language.rank_allocation import distance_from_orthogonal
from metarec.scorers.language.trainable_copy import Recipe, trainable_copy
from metarec.serve import retrieval
from metarec.serve.engine import Engine
from metarec.serve.records import Feedback
from metarec.serve.store import AdapterStore

Dirs = Callable[[str], Path]
WORLD = known_interactions()
SUPPORT = Ratings(np.array([0, 1, 2, 3]), np.array([5.0, 4.5, 2.0, 1.5], np.float32))
CLASSES = RatingClasses.even(5, 1.0, 5.0, 3.5)
SHORT = {
    "steps": 4,
    "users": 2,
    "shots": [0, 2],
    "warmup": 1,
    "validate_every": 2,
    "lr": 0.01,
    "adapter_weight": 1.0,
    "history": 4,
}


def task_for(kind: str) -> object:
    data = known_task()
    template = TEMPLATES[kind]
    prompt = data.task.prompt.model_copy(
        update={"text": template.text, "positive": template.positive, "negative": template.negative}
    )
    return replace(data, task=data.task.model_copy(update={"prompt": prompt, "shots": (0, 4)}))


def finetuned(path: Path, family: Path, kind: str, **settings: object) -> MetaRecommender:
    config = RunConfig(
        backbone=str(family),
        score=("item mean", "history"),
        collaborative={"features": ("fields",)},  # type: ignore[arg-type]
    )
    tuning = fine_tune_settings({**SHORT, **settings})
    return fine_tuned_recommender(task_for(kind), tuning, config, str(path / "backbone"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "kind", "settings"),
    [
        ("llama", "causal", {}),
        ("bert", "masked", {"trainable": "all"}),
        ("encoder", "encoder", {}),
        ("bert", "encoder", {"classes": 5, "class_loss": 1.0}),
        ("roberta-classifier", "encoder", {"classes": 3, "trainable": "all"}),
        ("llama-classifier", "encoder", {"classes": 2}),
    ],
)
def test_every_kind_of_model_becomes_a_recommender_that_is_saved_and_loaded(
    family: str, kind: str, settings: dict[str, object], model_dir: Dirs, tmp_path: Path
) -> None:
    made = finetuned(tmp_path, model_dir(family), kind, **settings)
    assert made.fitted.training["steps"] == 4
    assert not made.fitted.reads_items, "no item is read without a history"
    made.save_pretrained(tmp_path / "model")
    loaded = MetaRecommender.from_pretrained(tmp_path)
    mine = [("m0", 5.0), ("m1", 4.5), ("m2", 1.0)]
    first, second = made.adapt(mine), loaded.adapt(mine)
    assert first.score(["m4", "m7", "m30"]) == pytest.approx(second.score(["m4", "m7", "m30"]), abs=1e-5)
    assert len(second.recommend(3)) == 3
    other = loaded.adapt([("m0", 1.0), ("m1", 1.0), ("m2", 5.0)])
    assert other.score(["m4", "m7"]) != pytest.approx(second.score(["m4", "m7"]), abs=1e-6), "the history is read"


def test_a_run_that_was_moved_finds_its_model(model_dir: Dirs, tmp_path: Path) -> None:
    made = finetuned(tmp_path / "old", model_dir("llama"), "causal")
    made.save_pretrained(tmp_path / "old" / "model")
    (tmp_path / "old").rename(tmp_path / "new")
    loaded = MetaRecommender.from_pretrained(tmp_path / "new")
    assert loaded.config.backbone == str(tmp_path / "new" / "backbone")
    assert loaded.adapt([("m0", 5.0)]).score(["m4"]) == pytest.approx(made.adapt([("m0", 5.0)]).score(["m4"]), abs=1e-5)


def test_a_lora_per_user_on_top_reads_no_history_and_moves_with_the_ratings(model_dir: Dirs, tmp_path: Path) -> None:
    made = finetuned(tmp_path, model_dir("llama"), "causal", per_user=True)
    assert list(made.config.score) == ["item mean", "prompt", "adapter"]
    one, other = (made.adapt([("m0", value), ("m2", 6.0 - value)]) for value in (5.0, 1.0))
    assert one.score(["m4", "m7"]) != pytest.approx(other.score(["m4", "m7"]), abs=1e-6)
    assert made.adapted_model is not None


def test_the_verb_leaves_a_run_that_every_other_verb_takes(
    model_dir: Dirs, metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    file = tmp_path / "task.yaml"
    rows = zip(WORLD.user, WORLD.item, WORLD.rating, strict=True)
    table = tmp_path / "data"
    table.mkdir()
    inter = [f"{WORLD.users[user]}\t{WORLD.catalog.ids[item]}\t{rating:g}" for user, item, rating in rows]
    items = [f"{row['id']}\t{row['title']}\t{row['genres']}" for row in map(WORLD.catalog.row, range(40))]
    (table / "known.inter").write_text("\n".join(["user_id:token\titem_id:token\trating:float", *inter]))
    (table / "known.item").write_text("\n".join(["item_id:token\tmovie_title:token_seq\tgenre:token_seq", *items]))
    template = TEMPLATES["causal"]
    file.write_text(
        yaml.safe_dump(
            {
                "name": "mine/known",
                "version": 1,
                "description": "Two opposite tastes.",
                "licence": "none",
                "dataset": {"source": "recbole", "path": "data"},
                "split": {"fractions": [0.8, 0.1, 0.1]},
                "shots": [0, 2],
                "like_threshold": 3.5,
                "prompt": {"text": template.text, "positive": template.positive, "negative": template.negative},
            }
        )
    )
    sets = [f"{key}={value}" for key, value in SHORT.items()]
    common = [
        file,
        "--runs",
        tmp_path,
        "--backbone",
        model_dir("llama"),
        *[part for one in sets for part in ("--set", one)],
    ]
    made = metarec("finetune", *common, "--json", "--resume")
    assert made.status == 0, made.err
    assert f"no checkpoint in '{tmp_path / 'tuned'}': training starts at step 0" in made.err
    kept_nothing = json.loads(made.out)["best_step"] == 0
    assert ("nothing of the training is kept" in made.err) == kept_nothing
    assert json.loads(made.out)["steps"] == 4
    run = tmp_path / "tuned"
    assert yaml.safe_load((run / "finetune.yaml").read_text())["trainable"] == "lora"
    again = metarec("finetune", *common)
    assert again.status == 2
    assert "holds a model already" in again.err
    evaluated = metarec("evaluate", run, "--json")
    assert evaluated.status == 0, evaluated.err
    assert {"item mean", "zero-shot prompt", "metarec, adapted"} <= {
        row["method"] for row in json.loads(evaluated.out)["rows"]
    }
    ranked = metarec("recommend", run, "--rating", "m1=5", "-k", 2, "--json")
    assert len(json.loads(ranked.out)) == 2
    lost = metarec("finetune", *common[:3], "--backbone", run / "backbone", "--fresh")
    assert (lost.status, "would delete" in lost.err) == (2, True), lost.err
    assert (run / "backbone").is_dir()
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    for wrong, said in (
        ("targets=[nowhere]", "no LoRA fits"),
        ("class_loss=1", "a causal model, without classes"),
        ("augment.rewrites=mine", "items have no such field"),
        ("shots=[500]", "ratings"),
    ):
        kept = metarec("finetune", *common, "--fresh", "--set", wrong)
        assert (kept.status, said in kept.err) == (2, True), (wrong, kept.err)
        assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before, wrong
    refused = metarec("finetune", *common, "--name", "other", "--set", "trainabel=all")
    assert "trainabel" in refused.err
    assert refused.status == 2


def test_the_service_reads_the_history_of_few_items_and_knows_items_added_later(
    model_dir: Dirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = finetuned(tmp_path, model_dir("llama"), "causal")
    monkeypatch.setattr(retrieval, "CANDIDATES", 33)
    engine = Engine(made, AdapterStore(tmp_path / "store"))
    engine.store.append([Feedback("ann", (("m0", 5.0), ("m1", 4.5), ("m2", 1.0)))])
    person = engine.people(["ann"])["ann"]
    ids = [f"m{code}" for code in range(40)]
    expected = made.adapt([("m0", 5.0), ("m1", 4.5), ("m2", 1.0)]).score(ids)
    assert engine.score(person, ids)[1] == pytest.approx(expected, abs=1e-4)
    assert len(engine.retrieve(person, 3)) == 33
    assert engine.add_items([("n1", {"title": "night war of love", "genres": "drama"})]) == 1
    assert np.isfinite(engine.score(engine.people(["ann"])["ann"], ["n1"])[1]).all()


# Classes.


def test_classes_answer_with_the_log_odds_of_their_likes_or_the_expected_rating() -> None:
    shares = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])
    assert CLASSES.ratings == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert float(CLASSES.answer(shares.log())) == pytest.approx(np.log(0.4 / 0.6), abs=1e-6)
    means = RatingClasses.even(5, 1.0, 5.0, float("nan"))
    assert float(means.answer(shares.log())) == pytest.approx(0.1 + 0.4 + 0.9 + 0.6 + 1.25, abs=1e-5)
    assert CLASSES.nearest([1.0, 3.4, 4.6]).tolist() == [0, 2, 4]


@pytest.mark.parametrize("family", ["bert", "roberta-classifier", "distilbert", "llama-classifier"])
def test_a_classifier_gives_the_logits_that_transformers_gives(family: str, model_dir: Dirs, tmp_path: Path) -> None:
    model = load_classifier(str(model_dir(family)), CLASSES)
    save_backbone(tmp_path / "model", model)
    reread = load_backbone(str(tmp_path / "model"))
    assert (reread.kind, reread.classes) == ("classifier", CLASSES)
    texts = ["a good movie", "alien heat is a dead movie"]
    for one in (model, reread):
        found = one.class_logits(read_texts(one, texts))
        for text, logits in zip(texts, found, strict=True):
            expected = one.model(torch.tensor([one.tokenize([text])[0]])).logits[0]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_new_layer_of_classes_depends_on_the_seed_alone(model_dir: Dirs) -> None:
    first, again, other = (load_classifier(str(model_dir("bert")), CLASSES, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.output_head().weight, again.output_head().weight)
    assert not torch.equal(first.output_head().weight, other.output_head().weight)
    assert len({first.fingerprint, other.fingerprint}) == 2


def test_a_masked_model_fills_the_blank_of_its_prompt(backbone: Callable[..., Backbone]) -> None:
    model = backbone("bert")
    history = History(TEMPLATES["masked"], WORLD.catalog, 3.5)
    text = InContext(model, history).prompt_text(Request("a", SUPPORT, np.array([4])), 4)
    assert text.count("[MASK]") == 1
    assert "answer : Yes ." in text
    tokens = torch.tensor([model.tokenize([text])[0]])
    logits = model.model(tokens).logits[0, (tokens[0] == model.tokenizer.mask_token_id).int().argmax()]
    yes, no = (model.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
    found = text_log_odds(model, [text], "Yes", "No")
    assert float(found) == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
    with pytest.raises(BackboneError, match="no blank"):
        text_log_odds(model, ["alien"], "Yes", "No")


def test_an_encoder_becomes_a_masked_model_of_the_same_states_with_a_head_that_is_trained(
    backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    encoder = backbone("encoder")
    masked, other = masked_from_encoder(encoder), masked_from_encoder(encoder, seed=1)
    tokens = torch.tensor(encoder.tokenize(["alien , drama answer : [MASK] ."]))
    with torch.no_grad():
        states = [model.model.base_model(tokens).last_hidden_state for model in (encoder, masked)]
    assert torch.equal(*states)
    head = masked.model.get_output_embeddings().weight
    assert torch.equal(head, masked.model.get_input_embeddings().weight), "words' own embeddings"
    assert (masked.kind, len({encoder.fingerprint, masked.fingerprint, other.fingerprint})) == ("masked", 3)
    save_backbone(tmp_path / "masked", masked)
    assert load_backbone(str(tmp_path / "masked")).kind == "masked"
    assert any("transform" in name for name in trainable_copy(masked, Recipe("all")).parameters), "the head learns, too"
    with pytest.raises(BackboneError, match="no encoder"):
        masked_from_encoder(backbone("llama"))


def test_classes_that_cannot_be_are_refused(model_dir: Dirs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without classes"):
        finetuned(tmp_path, model_dir("llama"), "causal", class_loss=1.0)
    with pytest.raises(ConfigError, match="ascend"):
        RatingClasses((2.0, 1.0))


# Aids.


def tune(model: Backbone, checkpoint: Path | None = None, resume: bool = False, **settings: object) -> FineTuned:
    config = fine_tune_settings({**SHORT, **settings})
    prior = fit_item_mean(WORLD, np.arange(40))
    recipe = Recipe(config.trainable, config.rank, config.alpha, config.targets, 0, config.form, config.dropout)
    kind = "causal" if model.kind == "causal" else "encoder"
    return fine_tune(
        model,
        TEMPLATES[kind],
        WORLD,
        np.arange(40),
        prior,
        validation=known_task().evaluated("validation")[0],
        threshold=3.5,
        recipe=recipe,
        config=config,
        limit=4,
        checkpoint=checkpoint,
        resume=resume,
    )


def run_of(model: Backbone, **settings: object) -> fine_tuning._FineTuning:
    """Returns a fine-tuning that has not begun."""
    config = fine_tune_settings({**SHORT, **settings})
    recipe = Recipe("lora", dropout=config.dropout)
    student = trainable_copy(model, recipe)
    context = InContext(student.backbone, History(TEMPLATES["causal"], WORLD.catalog, 3.5, 4))
    users, prior = np.arange(40), fit_item_mean(WORLD, np.arange(40))
    return fine_tuning._FineTuning(model, student, context, WORLD, users, prior, recipe, config, 0)


def gradient(model: Backbone, step: int = 0, **settings: object) -> MetaGradient:
    """Returns the gradient of one step of fine-tuning."""
    run = run_of(model, **settings)
    init = {name: value.detach() + 0.01 for name, value in run.student.parameters.items()}
    return run.gradient_at(MetaState({**init, fine_tuning._WEIGHT: torch.tensor(1.0)}, {}), step)


def same(one: MetaGradient, other: MetaGradient) -> bool:
    return all(torch.equal(value, other.gradients[name]) for name, value in one.gradients.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"fgm": 1.0},
        {"contrastive": 1.0},
        {"label_smoothing": 0.2},
        {"dropout": 0.3},
        {"loss": "bce"},
        {"augment": {"drop_fields": 0.9}},
        {"augment": {"prompts": ["{{ title }} is a good movie ? answer :"]}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_aid_changes_the_gradient_and_the_same_way_again(
    settings: dict[str, object], backbone: Callable[..., Backbone]
) -> None:
    model = backbone("llama")
    found = gradient(model, **settings)
    assert not same(found, gradient(model))
    torch.manual_seed(3)
    assert same(found, gradient(model, **settings))


def test_aids_at_zero_are_the_plain_training_bit_for_bit(backbone: Callable[..., Backbone]) -> None:
    zero = {"fgm": 0.0, "contrastive": 0.0, "label_smoothing": 0.0, "dropout": 0.0, "class_loss": 0.0, "augment": {}}
    assert same(gradient(backbone("llama"), **zero), gradient(backbone("llama")))


def test_contrast_draws_items_together_that_the_same_users_like(backbone: Callable[..., Backbone]) -> None:
    run = run_of(backbone("llama"), contrastive=1.0, temperature=0.2)
    tastes = torch.arange(40) % 4 < 2
    alike = (tastes[:, None] == tastes[None]) & ~torch.eye(40, dtype=torch.bool)

    def apart() -> float:
        with torch.no_grad():
            vectors = torch.nn.functional.normalize(run.context.states(np.arange(40)).float(), dim=-1)
            cosines = vectors @ vectors.T
        return float(cosines[alike].mean() - cosines[tastes[:, None] != tastes[None]].mean())

    before = apart()
    optimizer = torch.optim.Adam(list(run.student.parameters.values()), lr=0.02)
    for step in range(20):
        loss = run._contrastive_loss(step)
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert apart() > before + 0.02


def test_rates_fall_as_the_schedule_says() -> None:
    from metarec.config import TrainConfig
    from metarec.meta.outer_loop import _optimizer

    def rates(name: str) -> list[float]:
        config = TrainConfig(steps=10, warmup=2, schedule=name)  # type: ignore[arg-type]
        factor = _optimizer({"a": torch.zeros(2)}, config)[1]
        return [factor(step) for step in (0, 1, 2, 6, 10)]

    assert rates("linear") == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    assert rates("cosine") == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    assert rates("constant") == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert "schedule" not in TrainConfig().model_dump(mode="json"), "identities are those of before there was a choice"


def test_the_adversarial_step_raises_the_loss(backbone: Callable[..., Backbone]) -> None:
    """Moving the embeddings along the gradient raises the loss more than moving them against it."""
    model = trainable_copy(backbone("llama"), Recipe("lora"))
    embeddings = fine_tuning._Embeddings(model.backbone.model.get_input_embeddings())
    context = InContext(model.backbone, History(TEMPLATES["causal"], WORLD.catalog, 3.5))
    request = Request("a", SUPPORT, np.array([4, 9, 14]))
    with embeddings.recorded(True):
        loss = context.log_odds(request).square().sum()
    steps = embeddings.adversarial_steps(loss, 0.05)
    assert float(torch.stack([step.square().sum() for step in steps]).sum().sqrt()) == pytest.approx(0.05, rel=1e-4)
    moved = []
    for sign in (1, -1):
        with embeddings.moved([sign * step for step in steps]):
            moved.append(float(context.log_odds(request).detach().square().sum()))
    assert moved[0] > float(loss.detach()) > moved[1]


def test_smoothing_is_the_mean_of_both_labels_by_its_share() -> None:
    from metarec.meta.losses import Labels, smoothed

    labels = Labels(torch.tensor([[True, False]]), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool))
    scores = torch.tensor([[0.7, 0.2]])
    bce = LOSSES.get("bce")
    targets = torch.tensor([[0.9, 0.1]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(2 * scores, targets)
    assert float(smoothed(bce, 0.1)(scores, labels, 2.0)) == pytest.approx(float(expected), abs=1e-6)
    assert smoothed(bce, 0.0) is bce


def test_texts_are_varied_as_the_settings_say() -> None:
    catalog = replace(
        WORLD.catalog,
        fields={
            **WORLD.catalog.fields,
            "genres": ("War, Drama, Comedy",) * 40,
            "mine": ("my own words",) * 20 + ("",) * 20,
        },
    )
    generator = np.random.default_rng(0)
    everything = np.arange(40)
    dropped = varied(catalog, everything, AugmentConfig(drop_fields=0.5), generator)
    assert 10 < sum(not text for text in dropped.fields["genres"]) < 30
    assert dropped.fields["title"] == catalog.fields["title"]
    shuffled = varied(catalog, everything, AugmentConfig(shuffle_fields=True), generator)
    assert len(set(shuffled.fields["genres"])) > 3
    assert all(sorted(text.split(", ")) == ["Comedy", "Drama", "War"] for text in shuffled.fields["genres"])
    rewritten = varied(catalog, everything, AugmentConfig(rewrites="mine"), generator)
    assert 4 < sum(title == "my own words" for title in rewritten.fields["title"][:20]) < 16
    assert rewritten.fields["title"][20:] == catalog.fields["title"][20:]
    assert varied(catalog, everything, AugmentConfig(), generator) is catalog


def test_a_step_of_many_users_has_the_mean_of_their_gradients(
    backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accumulated user by user: as if each user were a step of its own and the gradients averaged."""
    one, four = (gradient(backbone("llama"), users=users) for users in (1, 4))
    assert len(four.loss) == 4
    assert float(four.loss[0]) == pytest.approx(float(one.loss[0]), abs=1e-6)
    model, total = backbone("llama"), {}
    draw = fine_tuning.training_batch
    for place in range(4):
        alone = partial(lambda place, *given, **named: draw(*given, **named)[place : place + 1], place)
        monkeypatch.setattr(fine_tuning, "training_batch", alone)
        for name, value in gradient(model, users=4).gradients.items():
            total[name] = total.get(name, 0) + value / 4
    for name, value in four.gradients.items():
        torch.testing.assert_close(value, total[name], atol=1e-6, rtol=1e-4)


def test_a_dora_has_the_lengths_that_peft_gives_it_and_merges(backbone: Callable[..., Backbone]) -> None:
    from peft import LoraConfig, get_peft_model

    model = backbone("llama")
    tuned = tune(model, form="dora", validate_every=4, steps=8, patience=9)
    assert any("magnitude" in name for name in tuned.trained)
    theirs = get_peft_model(
        copy.deepcopy(model.model), LoraConfig(r=8, lora_alpha=16, use_dora=True, task_type="CAUSAL_LM")
    ).eval()
    state = theirs.base_model.model.state_dict()
    for name, value in tuned.trained.items():
        state[name].copy_(value)
    tokens = torch.tensor([model.tokenize(["is this a good movie ? alien answer :"])[0]])
    expected = theirs(input_ids=tokens).logits
    torch.testing.assert_close(tuned.context.backbone.model(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adalora_takes_the_ranks_that_peft_takes_and_merges(
    backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's own loop, by the gradients that ours had: the same numbers, and as many ranks as the budget leaves."""
    from peft import AdaLoraConfig, get_peft_model

    from metarec.meta import outer_loop

    gradients: list[dict[str, torch.Tensor]] = []
    step = outer_loop._step

    def keep(tensors: dict[str, torch.Tensor], gradient: MetaGradient, *rest: object) -> None:
        step(tensors, gradient, *rest)  # type: ignore[arg-type]
        gradients.append({name.removeprefix("init/"): value.grad.clone() for name, value in tensors.items()})  # type: ignore[union-attr]

    monkeypatch.setattr(outer_loop, "_step", keep)
    values = itertools.count()
    monkeypatch.setattr(fine_tuning, "validation_auc", lambda *_: next(values))
    model, fixed = backbone("llama"), {"schedule": "constant", "warmup": 0, "weight_decay": 0.0, "lr": 0.01}
    tuned = tune(model, form="adalora", rank=2, validate_every=8, steps=8, patience=9, **fixed)
    assert tuned.training["best_step"] == 8
    settings = AdaLoraConfig(
        target_r=2, init_r=3, tinit=0, tfinal=2, total_step=8, lora_alpha=16, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = get_peft_model(copy.deepcopy(model.model), settings).eval()
    inner = theirs.base_model.model
    trained = {name: value for name, value in inner.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW([*trained.values()], lr=0.01, weight_decay=0.0)
    for number, gradient in enumerate(gradients, start=1):
        for name, value in trained.items():
            value.grad = gradient[name]
        optimizer.step()
        theirs.base_model.update_and_allocate(number)
    assert sorted(tuned.trained) == sorted(trained)
    for name, value in trained.items():
        torch.testing.assert_close(tuned.trained[name], value.detach(), atol=1e-6, rtol=1e-5)
    ranks = [int((value != 0).sum()) for name, value in tuned.trained.items() if ".lora_E." in name]
    assert sum(ranks) == 2 * len(ranks), "two of three on average"
    tokens = torch.tensor([model.tokenize(["is this a good movie ? alien answer :"])[0]])
    torch.testing.assert_close(
        tuned.context.backbone.model(tokens).logits, theirs(input_ids=tokens).logits, atol=1e-4, rtol=1e-4
    )
    own = {name: value.detach() for name, value in trained.items()}
    with torch.no_grad():
        regular = theirs(input_ids=tokens, labels=tokens).loss - inner(input_ids=tokens, labels=tokens).loss
    assert float(settings.orth_reg_weight * distance_from_orthogonal(own)) == pytest.approx(float(regular), rel=1e-3)


def test_an_interrupted_adalora_ends_with_the_same_weights(
    backbone: Callable[..., Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = itertools.count()
    monkeypatch.setattr(fine_tuning, "validation_auc", lambda *_: next(values))
    model = backbone("llama")
    long = {"form": "adalora", "rank": 2, "steps": 6, "validate_every": 6, "patience": 9}
    whole = tune(model, **long)
    learn = fine_tuning._FineTuning.gradient_at

    def stop(self: object, meta: MetaState, step: int) -> MetaGradient:
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return learn(self, meta, step)  # type: ignore[arg-type]

    monkeypatch.setattr(fine_tuning._FineTuning, "gradient_at", stop)
    with pytest.raises(KeyboardInterrupt):
        tune(model, checkpoint=tmp_path / "run", **long)
    monkeypatch.setattr(fine_tuning._FineTuning, "gradient_at", learn)
    resumed = tune(model, checkpoint=tmp_path / "run", resume=True, **long)
    for name, value in whole.trained.items():
        assert torch.equal(resumed.trained[name], value), name


def test_settings_default_by_what_is_trained() -> None:
    lora, whole = fine_tune_settings({}), fine_tune_settings({"trainable": "all"})
    assert (lora.lr, whole.lr) == (5e-4, 2e-5)
    assert isinstance(whole, FineTuneConfig)
    short = fine_tune_settings({"steps": 4, "max_query": 3})
    assert (short.validate_every, short.warmup, short.min_query) == (4, 4, 3)
    with pytest.raises(ConfigError, match="trainable is all, and form dora"):
        fine_tune_settings({"trainable": "all", "form": "dora"})
    with pytest.raises(ConfigError, match="rewrites"):
        check_augmentation(WORLD.catalog, AugmentConfig(rewrites="genrs"))
