"""What every scorer has to hold, classical or language model, and that it comes back from disk as it was.

A scorer joins by one line in `FITS`, and one in `BANDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from known import (
    CANDIDATES,
    GENRE,
    ITEMS,
    SUPPORT,
    TEST,
    THRESHOLD,
    TRAIN,
    TWIN,
    UNRATED,
    VALIDATION,
    VECTORS,
    WORLD,
    episodes,
    ratings,
)
from small_recommenders import SETTINGS, TASK, WITH_STACK

from metarec.config import RunConfig, validated
from metarec.data.interactions import Interactions, Ratings
from metarec.data.task import Task
from metarec.data.task_data import TaskData
from metarec.errors import ArtifactError, UnknownItemError
from metarec.evaluation.evaluate import evaluate
from metarec.evaluation.report import Report
from metarec.files.artifacts import dump_json, load_json, write_manifest
from metarec.lm.answer_model import AnswerModel
from metarec.lm.backbone import Backbone
from metarec.lm.loading import load_backbone
from metarec.recommender import MetaRecommender
from metarec.scorer import Request, Scorer
from metarec.scorers.collaborative.foldin import fit_als, fit_ease, fit_item_knn, fit_user_knn
from metarec.scorers.collaborative.gp_fitting import fit_gp
from metarec.scorers.collaborative.graph_network import fit_graph_network
from metarec.scorers.collaborative.item_mean import ItemPrior, fit_item_mean
from metarec.scorers.collaborative.linear_kernel import fit_linear_kernel
from metarec.scorers.collaborative.networks import Form, fit_network
from metarec.scorers.collaborative.text import fit_text_logistic, fit_text_ridge, fit_two_tower
from metarec.scorers.collaborative.trivial import Constant, ItemMean, Popularity, Random
from metarec.scorers.language.adapted import MetaScorer
from metarec.scorers.language.expected_rating import expected_rating
from metarec.scorers.language.fine_tuning import FULL, fine_tune
from metarec.scorers.language.finetuned import FineTuned, then_per_user_lora
from metarec.scorers.language.in_context import History, InContext
from metarec.scorers.language.listwise import Listwise
from metarec.scorers.language.trainable_copy import Recipe, Trainable
from metarec.scorers.language.zero_shot import ZeroShot, calibrated_zero_shot
from metarec.scorers.serialization import CLASSES, load_scorer, save_scorer

ModelDir = Callable[[str], Path]
TRAINING = {**SETTINGS["train"], "steps": 60, "validate_every": 60, "lr": 0.03, "score_lr": 0.05, "sharpness": 4.0}  # type: ignore[dict-item]
# So few steps teach a random model nothing; what it can learn is tested in test_finetuned.
TUNING = {"steps": 3, "users": 2, "shots": (0, 4), "warmup": 1, "validate_every": 3, "adapter_weight": 1.0, "lr": 3e-3}
PROMPT = {**TASK["prompt"], "ratings": [" dead", " blue", " good"]}  # type: ignore[dict-item]


@dataclass(frozen=True, eq=False)
class Given:
    """What a scorer may be fitted on."""

    data: Interactions
    prior: ItemPrior
    model_dir: ModelDir
    threshold: float = THRESHOLD
    user_steps: ClassVar[int] = 20

    @cache  # noqa: B019 - one world for the session, and another for what is fitted again
    def recommender(self, members: str = "none", algorithm: str = "fomaml") -> MetaRecommender:
        """Returns a small one, trained on this world's meta-training users."""
        score = WITH_STACK if members == "stack" else {}
        meta = {**SETTINGS["meta"], "algorithm": algorithm}  # type: ignore[dict-item]
        config = validated(RunConfig, {**SETTINGS, "train": TRAINING, "meta": meta, **score}, "test")
        task = validated(Task, TASK | {"prompt": PROMPT}, "test")
        parts = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
        return MetaRecommender.from_pretrained(self.model_dir("llama"), config).fit(TaskData(task, self.data, parts, 0))

    @property
    def backbone(self) -> Backbone:
        """The language model, as it was before anything was fitted."""
        return self.recommender().backbone

    @property
    def history(self) -> History:
        """How it is told what a user rated."""
        return History(self.recommender().fitted.task.template, self.data.catalog, THRESHOLD)

    @cache  # noqa: B019 - see above
    def tuned(self, trainable: Trainable) -> FineTuned:
        """Returns it fine-tuned, for a few steps."""
        return fine_tune(
            self.backbone,
            self.history.template,
            self.data,
            TRAIN,
            self.prior,
            validation=episodes(self.data, VALIDATION),
            threshold=THRESHOLD,
            recipe=Recipe(trainable),
            config=FULL.model_copy(update=TUNING),
        )


def given_world(data: Interactions, model_dir: ModelDir) -> Given:
    return Given(data, fit_item_mean(data, TRAIN), model_dir)


def network(form: Form) -> Callable[[Given], Scorer]:
    def fit(given: Given) -> Scorer:
        settings = {"shots": (5, 10), "steps": 60, "validate_every": 20, "hidden": 16, "lr": 0.01}
        held_out = episodes(given.data, VALIDATION)
        return fit_network(
            form,
            given.data,
            TRAIN,
            given.prior,
            VECTORS,
            validation=held_out,
            threshold=given.threshold,
            **settings,  # type: ignore[arg-type]
        )

    return fit


def expected(given: Given) -> Scorer:
    fitted = given.recommender().fitted
    words = fitted.task.prompt.ratings
    assert words is not None
    return expected_rating(fitted.answer_model, fitted.task.template, fitted.catalog, words, fitted.scale)


FITS: dict[str, Callable[[Given], Scorer]] = {
    "item mean": lambda given: ItemMean(given.prior),
    "popularity": lambda given: Popularity(given.prior),
    "constant": lambda given: Constant(given.data.catalog),
    "random": lambda given: Random(given.data.catalog, seed=0),
    "ALS": lambda given: fit_als(given.data, TRAIN, given.prior, factors=4),
    "EASE": lambda given: fit_ease(given.data, TRAIN, given.prior),
    "item-kNN": lambda given: fit_item_knn(given.data, TRAIN, given.prior),
    "user-kNN": lambda given: fit_user_knn(given.data, TRAIN, given.prior),
    "text ridge": lambda given: fit_text_ridge(given.prior, VECTORS),
    "text ridge, no prior": lambda given: fit_text_ridge(given.prior, VECTORS, offset=False),
    "text logistic": lambda given: fit_text_logistic(
        given.data, TRAIN, given.prior, VECTORS, threshold=given.threshold, penalty=1.0
    ),
    "text logistic, no prior": lambda given: fit_text_logistic(
        given.data, TRAIN, given.prior, VECTORS, threshold=given.threshold, offset=False
    ),
    "two-tower cosine": lambda given: fit_two_tower(VECTORS, threshold=given.threshold),
    "GP": lambda given: fit_gp(given.data, TRAIN, {"text": VECTORS, "genres": GENRE}, factors=4),
    "TF-IDF kernel": lambda given: fit_linear_kernel(given.data, TRAIN, VECTORS, name="TF-IDF kernel"),
    "MeLU": network("melu"),
    "neural process": network("neural process"),
    "set transformer": network("set transformer"),
    "hypernetwork": network("hypernetwork"),
    "graph network": lambda given: fit_graph_network(
        given.data,
        TRAIN,
        given.prior,
        VECTORS,
        validation=episodes(given.data, VALIDATION),
        threshold=given.threshold,
        seed=0,
        steps=50,
    ),
    "zero-shot prompt": lambda given: ZeroShot(given.recommender().fitted.answer_model),
    "zero-shot, calibrated": lambda given: calibrated_zero_shot(
        given.recommender().fitted.answer_model, given.history.template, given.data.catalog
    ),
    "expected rating, prompt": expected,
    "in-context prompt": lambda given: InContext(given.backbone, given.history),
    "in-context, calibrated": lambda given: InContext(
        given.backbone, given.history, calibrated=True, name="in-context, calibrated"
    ),
    # The tiny tokenizer knows no capital letters.
    "in-context, listwise": lambda given: Listwise(given.backbone, given.history, rounds=2, labels=tuple(WORDS[:6])),
    "joint LoRA": lambda given: given.tuned("lora"),
    "full fine-tuning": lambda given: given.tuned("all"),
    "full fine-tuning, then per-user LoRA": lambda given: then_per_user_lora(
        given.tuned("all"), layers=2, steps=given.user_steps, inner_lr=0.4, shrinkage=0.0
    ),
    "metarec, before adaptation": lambda given: given.recommender().scorer(steps=0, name="metarec, before adaptation"),
    "metarec, adapted": lambda given: given.recommender().scorer(),
    "stacked": lambda given: given.recommender("stack").fitted.terms["collaborative"].stack,
    "metarec, adapted, with stack": lambda given: given.recommender("stack").scorer(
        name="metarec, adapted, with stack"
    ),
    "metarec, ridge head": lambda given: given.recommender(algorithm="ridge").scorer(name="metarec, ridge head"),
    "metarec, posterior": lambda given: given.recommender(algorithm="dkt").scorer(name="metarec, posterior"),
}

# AUC at K = 10 where two opposite tastes hide behind items that all have the same mean: (least, most).
BANDS = {
    "item mean": (0.40, 0.65),
    "popularity": (0.40, 0.60),
    "constant": (0.5, 0.5),
    "random": (0.40, 0.60),
    "ALS": (0.95, 1.0),
    "EASE": (0.95, 1.0),
    "item-kNN": (0.95, 1.0),
    "user-kNN": (0.95, 1.0),
    "text ridge": (0.90, 1.0),
    "text ridge, no prior": (0.90, 1.0),
    "text logistic": (0.90, 1.0),
    "text logistic, no prior": (0.90, 1.0),
    "two-tower cosine": (0.90, 1.0),
    "GP": (0.90, 1.0),
    "TF-IDF kernel": (0.90, 1.0),
    "MeLU": (0.80, 1.0),
    "neural process": (0.80, 1.0),
    "set transformer": (0.80, 1.0),
    "hypernetwork": (0.80, 1.0),
    "graph network": (0.80, 1.0),
    "zero-shot prompt": (0.35, 0.65),
    "zero-shot, calibrated": (0.35, 0.65),
    "expected rating, prompt": (0.35, 0.65),
    "in-context prompt": (0.2, 0.8),
    "in-context, calibrated": (0.2, 0.8),
    "in-context, listwise": (0.2, 0.8),
    "joint LoRA": (0.2, 0.8),
    "full fine-tuning": (0.2, 0.8),
    "full fine-tuning, then per-user LoRA": (0.45, 0.80),
    "metarec, before adaptation": (0.35, 0.65),
    "metarec, adapted": (0.80, 1.0),
    "stacked": (0.90, 1.0),
    "metarec, adapted, with stack": (0.90, 1.0),
    "metarec, ridge head": (0.75, 1.0),
    "metarec, posterior": (0.85, 1.0),
}
IMPERSONAL = {
    "item mean",
    "popularity",
    "constant",
    "random",
    "zero-shot prompt",
    "zero-shot, calibrated",
    "expected rating, prompt",
    "metarec, before adaptation",
}
# A random model hears a history, but has never learned what one says.
CLUELESS = {"in-context prompt", "in-context, calibrated", "in-context, listwise", "joint LoRA", "full fine-tuning"}

# Learns a little, too little of too weak a model for an interval on a dozen users; that is tested in test_finetuned.
WEAK = {"full fine-tuning, then per-user LoRA"}


@pytest.fixture(scope="session")
def known(model_dir: ModelDir) -> Given:
    return given_world(WORLD, model_dir)


@pytest.fixture(scope="module", params=FITS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def scorer(method: str, known: Given) -> Scorer:
    torch.set_num_threads(1)
    return FITS[method](known)


@pytest.fixture(scope="module")
def report(scorer: Scorer, known: Given) -> Report:
    baseline = replace(ItemMean(known.prior), name="baseline")
    return evaluate(
        [baseline, scorer],
        episodes(WORLD, TEST),
        (0, 5, 10),
        WORLD.catalog,
        threshold=THRESHOLD,
        seed=0,
        baseline="baseline",
        left_out={},
    )


def reader_of(scorer: Scorer) -> AnswerModel | None:
    """The language model that a scorer reads, without anything that it has kept of what it read."""
    answer_model: AnswerModel | None = getattr(scorer, "answer_model", None)
    return None if answer_model is None else replace(answer_model, forward=replace(answer_model.forward))  # type: ignore[type-var]


def test_the_suite_covers_the_default_table(known: Given) -> None:
    assert {scorer.name for scorer in known.recommender("stack").scorers()} <= set(FITS)
    assert set(BANDS) == set(FITS)


def test_a_method_is_called_what_the_suite_calls_it_and_keeps_finite_memory(method: str, scorer: Scorer) -> None:
    assert scorer.name == method
    assert isinstance(scorer.bytes_per_user, int)
    assert 0 <= scorer.bytes_per_user < 1e6


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_any_support_and_candidates_get_finite_scores(scorer: Scorer, data: st.DataObject) -> None:
    codes = st.integers(0, ITEMS - 1)
    rated = data.draw(st.dictionaries(codes, st.integers(1, 10), max_size=12))
    asked = np.array(data.draw(st.lists(codes, max_size=12)), np.int64)
    support = ratings(*((code, half / 2) for code, half in rated.items()))
    (scores,) = scorer.score([Request("somebody new", support, asked)])
    assert scores.shape == (len(asked),)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_a_batch_scores_as_one_by_one(scorer: Scorer) -> None:
    requests = [
        Request("a", SUPPORT, CANDIDATES),
        Request("b", Ratings.empty(), CANDIDATES[:3]),
        Request("c", SUPPORT.head(2), np.arange(ITEMS)),
        Request("d", SUPPORT.head(1), np.zeros(0, np.int64)),
    ]
    together = scorer.score(requests)
    assert [len(scores) for scores in together] == [6, 3, ITEMS, 0]
    for request, scores in zip(requests, together, strict=True):
        (alone,) = scorer.score([request])
        # Adapters are kept in half precision: what differs in the last bit may round to the next number there.
        np.testing.assert_allclose(scores, alone, rtol=1e-4, atol=5e-4 if isinstance(scorer, MetaScorer) else 1e-5)
    assert scorer.score([]) == []


def test_nothing_asked_gets_nothing(scorer: Scorer) -> None:
    nothing = np.zeros(0, np.int64)
    asked = [Request("a", SUPPORT, nothing), Request("b", Ratings.empty(), nothing)]
    assert [len(scores) for scores in scorer.score(asked)] == [0, 0]


def test_the_order_of_items_and_of_ratings_does_not_matter(scorer: Scorer) -> None:
    (scores,) = scorer.score([Request("a", SUPPORT, CANDIDATES)])
    backwards = Ratings(SUPPORT.items[::-1].copy(), SUPPORT.values[::-1].copy())
    (turned,) = scorer.score([Request("a", backwards, CANDIDATES[::-1].copy())])
    np.testing.assert_allclose(turned.flip(0), scores, rtol=1e-4, atol=1e-5)


def test_an_item_asked_twice_scores_the_same_twice(scorer: Scorer) -> None:
    (scores,) = scorer.score([Request("a", SUPPORT, np.array([7, 4, 7], np.int64))])
    assert scores[0] == pytest.approx(float(scores[2]), abs=1e-6)


def test_items_that_are_alike_in_everything_score_the_same(method: str, scorer: Scorer) -> None:
    """Two items of one text that nobody ever rated; only a draw by the item's id may tell them apart."""
    support = SUPPORT.head(5)
    (scores,) = scorer.score([Request("a", support, np.array([TWIN, 4, UNRATED], np.int64))])
    assert (float(scores[0]) == pytest.approx(float(scores[2]), abs=1e-6)) == (method != "random")


def test_the_users_name_tells_nothing(method: str, scorer: Scorer) -> None:
    """A new user, a meta-training user and a test user who say the same get the same, but for the random method.

    Each is scored alone: of several users in one batch, processors round the last ones in another way.
    """
    requests = [Request(user, SUPPORT, CANDIDATES) for user in ("nobody", "u0", "u59", "../x", "")]
    first, *others = (scorer.score([request])[0] for request in requests)
    for other in others:
        assert torch.equal(first, other) != (method == "random")


def test_without_ratings_every_user_gets_the_same_ranking(method: str, scorer: Scorer) -> None:
    empty = Ratings.empty()
    first, second = (scorer.score([Request(user, empty, np.arange(ITEMS))])[0] for user in "ab")
    assert torch.equal(first, second) == (method != "random")


def test_only_the_methods_that_should_listen_to_the_user_do(method: str, scorer: Scorer) -> None:
    turned = Ratings(SUPPORT.items, (6 - SUPPORT.values).astype(np.float32))
    first, second = scorer.score([Request("a", support, CANDIDATES) for support in (SUPPORT, turned)])
    assert np.allclose(first, second) == (method in IMPERSONAL)


@pytest.mark.parametrize("code", [-1, ITEMS])
@pytest.mark.parametrize("place", ["candidate", "support"])
def test_an_item_code_outside_the_catalog_is_refused(scorer: Scorer, code: int, place: str) -> None:
    outside = np.array([code], np.int64)
    request = Request("a", SUPPORT, outside)
    if place == "support":
        request = Request("a", Ratings(outside, np.array([4.0], np.float32)), CANDIDATES)
    with pytest.raises(UnknownItemError, match=rf"{place} item code {code} is not one of the {ITEMS}"):
        scorer.score([request])


@pytest.fixture(scope="module")
def turned_world(model_dir: ModelDir) -> Given:
    """The world in which test users say the opposite."""
    theirs = np.isin(WORLD.user, TEST)
    rating = np.where(theirs, 6 - WORLD.rating, WORLD.rating).astype(np.float32)
    return given_world(replace(WORLD, rating=rating), model_dir)


def test_ratings_of_test_users_change_no_score(method: str, scorer: Scorer, turned_world: Given) -> None:
    """Fitted again where test users say the opposite, a method scores exactly the same."""
    again = FITS[method](turned_world)
    request = Request("u59", SUPPORT, CANDIDATES)
    np.testing.assert_array_equal(scorer.score([request])[0], again.score([request])[0])


def test_accuracy_where_the_answer_is_known(method: str, report: Report) -> None:
    low, high = BANDS[method]
    assert low <= report.values(method, 10).mean() <= high


# Methods that are told which ratings are likes; the language model's rows get it from the task's rule.
LABELLED = (
    "text logistic",
    "text logistic, no prior",
    "two-tower cosine",
    "MeLU",
    "neural process",
    "set transformer",
    "hypernetwork",
    "graph network",
)


@pytest.mark.parametrize("labelled", LABELLED)
def test_a_like_may_be_a_rating_above_the_users_own_mean(labelled: str, known: Given) -> None:
    own_mean = replace(known, threshold=float("nan"))
    baseline = replace(ItemMean(known.prior), name="baseline")
    found = FITS[labelled](own_mean)
    measured = evaluate(
        [baseline, found],
        episodes(WORLD, TEST),
        (10,),
        WORLD.catalog,
        threshold=float("nan"),
        seed=0,
        baseline="baseline",
        left_out={},
    )
    low, high = BANDS[labelled]
    assert low <= measured.values(labelled, 10).mean() <= high


def test_ratings_help_the_methods_that_listen(method: str, report: Report) -> None:
    gain, (low, _) = report.difference(method, 10, method, 0)
    if method in IMPERSONAL:
        assert gain == 0
    elif method in CLUELESS:
        assert gain != 0
    else:
        assert (gain if method in WEAK else low) > 0, gain


def test_a_saved_scorer_comes_back_bit_by_bit(scorer: Scorer, known: Given, tmp_path: Path) -> None:
    save_scorer(tmp_path / "scorer", scorer)
    backbone = load_backbone(str(known.model_dir("llama")))
    again = load_scorer(tmp_path / "scorer", answer_model=reader_of(scorer), backbone=backbone)
    assert (type(again), again.name, again.bytes_per_user) == (type(scorer), scorer.name, scorer.bytes_per_user)
    requests = [Request("a", SUPPORT, np.arange(ITEMS)), Request("b", Ratings.empty(), CANDIDATES)]
    for mine, theirs in zip(again.score(requests), scorer.score(requests), strict=True):
        assert torch.equal(mine, theirs)
    save_scorer(tmp_path / "again", again)
    for file in ("scorer.json", "scorer.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "scorer" / file).read_bytes()


@pytest.mark.parametrize("part", ["scorer.json", "scorer.safetensors"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_scorer_is_refused(part: str, damage: str, known: Given, tmp_path: Path) -> None:
    save_scorer(tmp_path / "scorer", FITS["ALS"](known))
    file = tmp_path / "scorer" / part
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content[:-7]) if damage == "truncate" else bytes(content))
    with pytest.raises(ArtifactError, match="missing, truncated or altered"):
        load_scorer(tmp_path / "scorer")


def test_a_scorer_gets_the_language_model_it_was_saved_with_or_none(known: Given, tmp_path: Path) -> None:
    scorer = FITS["zero-shot prompt"](known)
    save_scorer(tmp_path / "scorer", scorer)
    with pytest.raises(ArtifactError, match="reads the language model"):
        load_scorer(tmp_path / "scorer")
    answer_model = reader_of(scorer)
    assert answer_model is not None
    others = {
        "backbone": replace(answer_model, backbone=replace(answer_model.backbone, fingerprint="another")),
        "prompts": replace(answer_model, prompts=replace(answer_model.prompts, answers=(3, 4))),
        "placement": replace(answer_model, placement=replace(answer_model.placement, rank=1)),
    }
    for part, other in others.items():
        with pytest.raises(ArtifactError, match=f"was made with another {part}"):
            load_scorer(tmp_path / "scorer", answer_model=other)


@pytest.mark.parametrize("method", ["in-context prompt", "in-context, listwise", "joint LoRA"])
def test_a_scorer_that_reads_histories_gets_the_backbone_it_was_saved_with_or_none(
    method: str, known: Given, tmp_path: Path
) -> None:
    save_scorer(tmp_path / "scorer", FITS[method](known))
    for answer_model in (None, known.recommender().fitted.answer_model):
        with pytest.raises(ArtifactError, match=r"reads the language model \w+\. Pass it: .*backbone="):
            load_scorer(tmp_path / "scorer", answer_model=answer_model)
    with pytest.raises(ArtifactError, match="was made with another backbone"):
        load_scorer(tmp_path / "scorer", backbone=load_backbone(str(known.model_dir("gpt2"))))
    # The same weights in another precision are the same model; scores are as near as that is.
    load_scorer(tmp_path / "scorer", backbone=load_backbone(str(known.model_dir("llama")), dtype=torch.bfloat16))


def test_a_per_user_lora_is_opened_on_a_fine_tuned_model_that_was_saved_too(known: Given, tmp_path: Path) -> None:
    scorer = FITS["full fine-tuning, then per-user LoRA"](known)
    save_scorer(tmp_path / "tuned", known.tuned("all"))
    save_scorer(tmp_path / "scorer", scorer)
    tuned = load_scorer(tmp_path / "tuned", backbone=known.backbone)
    answer_model = then_per_user_lora(tuned, layers=2).answer_model  # type: ignore[arg-type]
    again = load_scorer(tmp_path / "scorer", answer_model=answer_model)
    request = Request("a", SUPPORT, CANDIDATES)
    assert torch.equal(again.score([request])[0], scorer.score([request])[0])
    with pytest.raises(ArtifactError, match="was made with another backbone"):
        load_scorer(tmp_path / "scorer", answer_model=known.recommender().fitted.answer_model)


def test_a_scorer_with_two_language_models_is_not_saved(known: Given, tmp_path: Path) -> None:
    two = replace(known.tuned("all"), training={"another": load_backbone(str(known.model_dir("llama")))})
    with pytest.raises(ArtifactError, match=r"scorer\.training\.another is a second language model"):
        save_scorer(tmp_path / "scorer", two)


@pytest.mark.parametrize("name", ["Path", "metarec.scorers.collaborative.trivial.Constant", "Ratings"])
def test_a_file_names_no_class_that_is_not_a_scorers(name: str, known: Given, tmp_path: Path) -> None:
    save_scorer(tmp_path / "scorer", FITS["constant"](known))
    document = load_json(tmp_path / "scorer" / "scorer.json")
    document["scorer"]["class"] = name
    (tmp_path / "scorer" / "scorer.json").write_text(dump_json(document))
    write_manifest(tmp_path / "scorer", "scorer")
    with pytest.raises(ArtifactError, match=f"holds a '{name}'"):
        load_scorer(tmp_path / "scorer")


def test_a_scorer_that_cannot_be_saved_says_which_part(known: Given, tmp_path: Path) -> None:
    strange = replace(known.prior, total=np.array(["a"]))
    for scorer, part in ((ItemMean(strange), "scorer.prior.total"), (ItemMean(object()), "scorer.prior")):  # type: ignore[arg-type]
        with pytest.raises(ArtifactError, match=f"{part} is"):
            save_scorer(tmp_path / "scorer", scorer)
    assert not (tmp_path / "scorer").exists()


def test_numbers_that_json_does_not_have_survive(known: Given, tmp_path: Path) -> None:
    tower = replace(FITS["two-tower cosine"](known), threshold=float("nan"))  # type: ignore[type-var]
    save_scorer(tmp_path / "scorer", tower)
    assert np.isnan(load_scorer(tmp_path / "scorer").threshold)  # type: ignore[attr-defined]
    for threshold in (float("inf"), float("-inf"), np.float32(0.1)):
        save_scorer(tmp_path / "scorer", replace(tower, threshold=threshold))
        again = load_scorer(tmp_path / "scorer").threshold  # type: ignore[attr-defined]
        assert (type(again), again) == (type(threshold), threshold)


def test_every_class_that_can_be_saved_is_frozen_and_named_by_itself() -> None:
    for name, cls in CLASSES.items():
        assert cls.__name__ == name
        assert cls.__dataclass_params__.frozen
        assert fields(cls)
