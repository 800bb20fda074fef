"""Terms of the score: left out by name, added from outside the package, the same in train, evaluate and serve."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_recommenders import ALL_TERMS, SETTINGS, known_task

from metarec import registries
from metarec.config import RunConfig, validated
from metarec.errors import ArtifactError, BackboneError, ConfigError
from metarec.recommender import MetaRecommender
from metarec.serve.engine import Engine
from metarec.serve.store import AdapterStore
from metarec.system.tensors import read_tensors

TOY = '''
"""A score term from outside the package: items with an even code are good."""

from dataclasses import dataclass

import numpy as np

from metarec.scorers.term import CrossFitted, ScoreTerm


@dataclass(frozen=True)
class Even:
    size: int

    def values(self, supports, items):
        return [np.where(codes % 2 == 0, 1.0, -1.0).astype(np.float32) for codes in items]

    def leave_one_out(self, supports):
        return self.values(supports, [support.items for support in supports])

    def extended(self, added):
        return Even(len(added.catalog))


EVEN = ScoreTerm(lambda context: CrossFitted(Even(len(context.interactions.catalog))), start=50.0, classes=(Even,))
'''
SHORT = {"steps": 2, "users": 4, "shots": [5], "warmup": 0, "validate_every": 2}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "toy_terms.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_terms", raising=False)
    yield "toy_terms:EVEN"
    registries.TERMS._registered.pop("toy_terms:EVEN", None)


def small(model_dir: Callable[[str], Path], **changed: Any) -> MetaRecommender:
    config = validated(RunConfig, {**SETTINGS, "train": SHORT, **changed}, "test")
    return MetaRecommender.from_pretrained(model_dir("llama"), config).fit(known_task())


def test_a_term_from_outside_is_seen_in_train_evaluate_adapt_and_serve(
    toy: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    config = validated(RunConfig, {**SETTINGS, "train": SHORT, "score": ["item mean", "adapter", toy]}, "test")
    recommender = MetaRecommender.from_pretrained(model_dir("llama"), config)
    recommender.fit(known_task(), checkpoint=tmp_path / "checkpoint")
    trained = read_tensors(tmp_path / "checkpoint" / "meta.safetensors")[f"init/score.{toy}"]
    assert trained != 50.0, "the outer loop learns its weight"
    even, odd = np.arange(0, 40, 2), np.arange(1, 40, 2)
    person = recommender.adapt([("m1", 5.0), ("m2", 1.0)])
    assert person.scores(even).min() > person.scores(odd).max()
    report = recommender.evaluate(known_task())
    assert set(report.per_user.method) >= {"item mean", "metarec, adapted"}
    engine = Engine(recommender, AdapterStore(tmp_path / "store"))
    _, ranked = engine.recommend(engine.people(["nobody"])["nobody"], 20)
    assert all(int(entry.item.removeprefix("m")) % 2 == 0 for entry, _ in ranked)
    engine.add_items([("n40", {"title": "star city", "genres": "drama"})])
    assert engine.recommender.fitted.terms[toy].size == 41


def test_a_saved_recommender_imports_no_term_that_was_not_asked_for(
    toy: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    recommender = small(model_dir, score=["item mean", "adapter", toy])
    recommender.save_pretrained(tmp_path / "saved")
    again = MetaRecommender.from_pretrained(tmp_path / "saved")
    codes = np.arange(40)
    assert torch.equal(again.adapt([]).scores(codes), recommender.adapt([]).scores(codes))
    registries.TERMS._registered.pop(toy)
    with pytest.raises(ConfigError, match="code outside metarec"):
        MetaRecommender.from_pretrained(tmp_path / "saved")
    registries.TERMS.get(toy)
    assert MetaRecommender.from_pretrained(tmp_path / "saved").digest == recommender.digest


@pytest.mark.parametrize("left_out", ALL_TERMS)
def test_a_term_is_left_out_by_name_and_nowhere_else(left_out: str, model_dir: Callable[[str], Path]) -> None:
    score = [name for name in ALL_TERMS if name != left_out]
    collaborative = {"features": ["fields", "lm"], "members": "gp"}
    recommender = small(model_dir, score=score, collaborative=collaborative)
    fitted = recommender.fitted
    assert set(fitted.terms) == set(score) - {"adapter"}
    weights = {name for name in fitted.meta.init if name.startswith("score.")}
    assert weights == {f"score.{name}" for name in score}
    adapters = [name for name in fitted.meta.init if not name.startswith("score.")]
    assert bool(adapters) == (left_out != "adapter")
    assert recommender.adapt([("m1", 5.0)]).scores(np.arange(40)).isfinite().all()


def test_without_the_item_mean_nothing_of_the_score_knows_it(model_dir: Callable[[str], Path]) -> None:
    collaborative = {"features": ["fields", "lm"], "members": "gp"}
    recommender = small(model_dir, score=["collaborative"], collaborative=collaborative)
    assert np.array_equal(recommender.adapt([]).scores(np.arange(40)).numpy(), np.zeros(40, np.float32))


@dataclass(frozen=True)
class NoModel:
    """Stands in for the loader of language models, and refuses."""

    def __call__(self, *_: object, **__: object) -> None:
        raise BackboneError("a language model was loaded", "It must not be")


WITHOUT_MODEL: dict[str, Any] = {
    "score": ["item mean", "collaborative"],
    "collaborative": {"features": ["fields"], "members": "gp"},
}


def test_a_score_without_language_model_loads_none_anywhere(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metarec.training.fitting.load_backbone", NoModel())
    recommender = small(model_dir, **WITHOUT_MODEL)
    assert recommender.fitted.answer_model is None
    rows = [scorer.name for scorer in recommender.scorers()]
    assert "zero-shot prompt" not in rows
    assert rows[0] == "item mean"
    assert len(recommender.evaluate(known_task()).per_user)
    recommender.save_pretrained(tmp_path / "saved")
    again = MetaRecommender.from_pretrained(tmp_path / "saved")
    person = again.adapt([("m1", 5.0), ("m2", 1.0)])
    person.save(tmp_path / "person")
    assert again.load_user(tmp_path / "person").recommend(5) == person.recommend(5)
    with pytest.raises(BackboneError, match="a language model was loaded"):
        small(model_dir, **{**WITHOUT_MODEL, "collaborative": {"features": ["lm"], "members": "gp"}})


def test_a_score_without_language_model_is_served(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    recommender = small(model_dir, **WITHOUT_MODEL)
    engine = Engine(recommender, AdapterStore(tmp_path / "store"))
    engine.add_items([("n40", {"title": "star city", "genres": "drama"})])
    nobody = engine.people(["nobody"])["nobody"]
    _, ranked = engine.recommend(nobody, 5)
    assert len(ranked) == 5
    title = recommender.fitted.catalog.fields["title"][3]
    assert engine.search(title, 1)[0].title == title


def test_settings_name_terms_and_refuse_what_is_none() -> None:
    with pytest.raises(ConfigError, match=r"no score term is called 'colaborative'.*collaborative"):
        validated(RunConfig, {"score": ["colaborative"]}, "test")
    with pytest.raises(ConfigError, match="names a term twice"):
        validated(RunConfig, {"score": ["prompt", "prompt"]}, "test")
    with pytest.raises(ConfigError, match="no meta-algorithm is called 'mamml'"):
        validated(RunConfig, {"meta": {"algorithm": "mamml"}}, "test")
    with pytest.raises(ConfigError, match="no loss is called 'hinge'"):
        validated(RunConfig, {"train": {"loss": "hinge"}}, "test")


def test_a_head_in_closed_form_needs_an_adapter(model_dir: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="the score has no adapter"):
        small(model_dir, score=["item mean", "prompt"], meta={"algorithm": "ridge"})


@pytest.mark.parametrize("loss", registries.LOSSES.names())
def test_each_loss_trains_a_recommender(loss: str, model_dir: Callable[[str], Path]) -> None:
    recommender = small(model_dir, train={**SHORT, "loss": loss})
    first, *rest = (entry["query_loss"] for entry in recommender.fitted.training["history"])
    assert first is None
    assert np.isfinite(rest).all()


def test_a_recommender_of_another_format_is_refused_with_the_cure(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    from metarec.files.artifacts import dump_json, load_json, write_manifest

    recommender = small(model_dir, score=["item mean", "prompt"])
    recommender.save_pretrained(tmp_path / "saved")
    facts = load_json(tmp_path / "saved" / "recommender.json")
    del facts["format"]
    (tmp_path / "saved" / "recommender.json").write_text(dump_json(facts))
    write_manifest(tmp_path / "saved", "recommender")
    with pytest.raises(ArtifactError, match=r"in format 1 instead of 3.*Train it again"):
        MetaRecommender.from_pretrained(tmp_path / "saved")


def test_every_meta_training_user_is_scored_by_a_fold_without_them(model_dir: Callable[[str], Path]) -> None:
    config = validated(RunConfig, {**SETTINGS, "train": SHORT}, "test")
    recommender = MetaRecommender.from_pretrained(model_dir("llama"), config)
    data = known_task()
    name = data.interactions.users[data.parts["train"][0]]
    theirs = data.interactions.user == data.parts["train"][0]
    turned = np.where(theirs, 5.5 - data.interactions.rating, data.interactions.rating).astype(np.float32)
    other = replace(data, interactions=replace(data.interactions, rating=turned))
    asked = [np.arange(40)]
    first, second = (
        recommender._prepare(given).crossed["item mean"].without(name).values([], asked)[0] for given in (data, other)
    )
    assert np.array_equal(first, second)


def test_the_command_line_loads_a_saved_runs_own_term_only_as_a_plugin(
    toy: str, model_dir: Callable[[str], Path], tmp_path: Path, metarec: Callable[..., Any]
) -> None:
    small(model_dir, score=["item mean", toy]).save_pretrained(tmp_path / "run" / "model")
    registries.TERMS._registered.pop(toy)
    refused = metarec("recommend", tmp_path / "run", "--rating", "m1=5", "-k", "3", "--json")
    assert refused.status == 2
    assert f"metarec --plugin {toy}" in refused.err
    allowed = metarec("--plugin", toy, "recommend", tmp_path / "run", "--rating", "m1=5", "-k", "3", "--json")
    assert allowed.status == 0, allowed.err
