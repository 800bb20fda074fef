"""Meta-training over time: going on from an old run, forgetting, recency, and the store as a training set."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import forgetting as ways_of_going_on
import numpy as np
import pytest
import stream
import torch
import yaml
from conftest import TEMPLATES, Ran, known_interactions
from small_recommenders import SETTINGS, known_task

from metarec.config import RunConfig, validated
from metarec.data.interactions import Ratings
from metarec.data.source_options import SourceOptions
from metarec.data.sources import read_source
from metarec.data.task_data import TaskData
from metarec.errors import ConfigError, DataError
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import Loss, MetaState, initial_meta_state
from metarec.meta.losses import pairwise
from metarec.recommender import MetaRecommender
from metarec.registries import ALGORITHMS
from metarec.scorer import Request
from metarec.scorers.language.score import LOG_HALF_LIFE, Batch, query_loss, rated_batch, support_loss
from metarec.serve.records import Feedback
from metarec.serve.store import AdapterStore
from metarec.training import meta_training as training
from metarec.training.continual import OldRun, forgetting, pulled, start_from, with_replay
from metarec.training.fitting import Fitted, meta_scorer, open_backbone, prepare
from metarec.training.half_life import chosen, folded, learns_by_gradient, started
from metarec.training.meta_training import meta_train

Dirs = Callable[[str], Path]


def of_one_taste(odd: bool) -> TaskData:
    """The task of those users alone who like the one half of the genres, or the other."""
    data = known_task()
    task = data.task.model_copy(update={"shots": (0, 2)})
    users = {part: codes[codes % 2 == int(odd)] for part, codes in data.parts.items()}
    return replace(data, task=task, parts=users)


def settings(model: Path, **train: Any) -> RunConfig:
    own = {"steps": 24, "validate_every": 24, "shots": [2], "lr": 0.03, "warmup": 2, "users": 4}
    return validated(
        RunConfig,
        SETTINGS
        | {
            "backbone": str(model),
            "score": ["adapter"],
            "collaborative": {"features": ["fields"]},
            "train": {**SETTINGS["train"], **own, **train},
            "meta": {**SETTINGS["meta"], "inner_lr": 0.05, "inner_steps": 1},
        },
        "test",
    )


def trained(data: TaskData, config: RunConfig, path: Path, old: OldRun | None = None) -> Fitted:
    backbone = open_backbone(config)
    prepared = prepare(data, config, backbone)
    if old is not None and config.train.replay:
        old = replace(old, replayed=(of_one_taste(False), prepare(of_one_taste(False), config, backbone)))
    return meta_train(data, prepared, config, {}, path, False, old=old)


@pytest.fixture(scope="module")
def old_run(model_dir: Dirs, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return trained(of_one_taste(False), settings(model_dir("llama")), tmp_path_factory.mktemp("old") / "checkpoint")


def losses(model_dir: Dirs, old: Fitted, path: Path, **train: Any) -> dict[str, dict[str, Any]]:
    config = settings(model_dir("llama"), **train)
    new = trained(of_one_taste(True), config, path / "checkpoint", OldRun(old, "old"))
    found = forgetting(new, of_one_taste(True), old, without_split(old), config, config)
    return {row["users"]: row for row in found}


def without_split(old: Fitted) -> TaskData:
    return of_one_taste(False)


def test_what_goes_on_learns_the_new_taste_and_forgets_the_old_one(
    model_dir: Dirs, old_run: Fitted, tmp_path: Path
) -> None:
    """Two made populations of opposite tastes; replay and a pull to the old run each keep more of the old one."""
    plain = losses(model_dir, old_run, tmp_path / "plain")
    assert plain["new users"]["difference"] > 0.2
    assert plain["old users"]["difference"] < -0.2
    replayed = losses(model_dir, old_run, tmp_path / "replay", replay=0.5)
    assert replayed["old users"]["auc_after"] > plain["old users"]["auc_after"] + 0.1
    pulled_back = losses(model_dir, old_run, tmp_path / "anchor", anchor=100.0)
    assert pulled_back["old users"]["auc_after"] > plain["old users"]["auc_after"] + 0.1


def test_meta_parameters_start_at_the_old_ones_and_others_are_refused(old_run: Fitted) -> None:
    fresh = MetaState.from_tensors({name: torch.zeros_like(value) for name, value in old_run.meta.tensors().items()})
    started = start_from(fresh, old_run.meta).tensors()
    assert all(torch.equal(value, started[name]) for name, value in old_run.meta.tensors().items())
    other = MetaState({**fresh.init, "score.item mean": torch.ones(())}, fresh.log_rate)
    with pytest.raises(ConfigError, match="differ in 1 tensors"):
        start_from(other, old_run.meta)


def test_a_pull_adds_the_gradient_of_the_distance_and_none_adds_nothing() -> None:
    meta = MetaState({"a": torch.tensor([1.0, 3.0])}, {})
    gradient = MetaGradient(torch.ones(2), {"init/a": torch.tensor([0.5, 0.5])}, torch.zeros(2, dtype=torch.bool))
    anchor = {"init/a": torch.tensor([1.0, 1.0])}
    assert pulled(gradient, meta, anchor, 0.0) is gradient
    assert pulled(gradient, meta, anchor, 2.0).gradients["init/a"].tolist() == [0.5, 4.5]


def test_replay_averages_over_all_users_of_a_step() -> None:
    def mean(value: float) -> Callable[[int], MetaGradient]:
        return lambda users: MetaGradient(
            torch.zeros(users), {"init/a": torch.tensor([value])}, torch.zeros(users, dtype=torch.bool)
        )

    found = with_replay(mean(1.0), mean(5.0), 8, 0.25)
    assert len(found.loss) == 8
    assert found.gradients["init/a"].tolist() == [2.0]
    assert with_replay(mean(1.0), mean(5.0), 4, 0.01).gradients["init/a"].tolist() == [2.0]


# Recency.


def test_an_endless_half_life_changes_no_bit_and_a_short_one_hears_the_latest_ratings(
    old_run: Fitted, model_dir: Dirs
) -> None:
    day = 86_400
    support = Ratings(
        np.array([0, 1, 2, 3]), np.array([5.0, 4.5, 2.0, 1.5], np.float32), times=np.array([0, 1, 40, 41]) * day
    )
    config = settings(model_dir("llama"))
    parts = ([support], old_run.terms, old_run.prior, old_run.answer_model, 3.5)
    batch = rated_batch(*parts)
    assert batch.age.tolist() == [[41.0, 40.0, 1.0, 0.0]]
    assert batch.weight(1.0).tolist()[0] == pytest.approx([2**-41, 2**-40, 0.5, 1.0])
    scorers = {
        days: meta_scorer(
            old_run, config.model_copy(update={"meta": config.meta.model_copy(update={"half_life": days})})
        )
        for days in (None, 1e30, 5.0)
    }
    states = {days: scorer.adapt([support]).state for days, scorer in scorers.items()}
    for name, value in states[None].items():
        assert torch.equal(value, states[1e30][name]), name
    assert any(not torch.equal(value, states[5.0][name]) for name, value in states[None].items())


def test_the_weighted_loss_is_that_of_the_recent_ratings_alone_where_the_others_are_ancient(old_run: Fitted) -> None:
    items, values = np.array([0, 1, 2, 3]), np.array([5.0, 4.5, 2.0, 1.5], np.float32)
    ancient = Ratings(items, values, times=np.array([0.0, 0.0, 1e9, 1e9]))
    recent = Ratings(items[2:], values[2:])
    state = {name: value[None] for name, value in old_run.meta.init.items()}
    found = []
    for support, days in ((ancient, 1.0), (recent, None)):
        batch = rated_batch([support], old_run.terms, old_run.prior, old_run.answer_model, 3.5)
        loss = support_loss(batch, old_run.answer_model, shrinkage=1.0, user_bias_damping=1.0, half_life=days)
        found.append(float(loss(state).detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_half_life_is_learned_by_validation_users_and_kept(old_run: Fitted, model_dir: Dirs) -> None:
    config = with_half_life(settings(model_dir("llama")), "learned")
    worth = {None: 0.5, 1460.0: 0.6, 365.0: 0.7, 90.0: 0.7, 30.0: 0.4, 7.0: 0.3, 50.0: 0.7, 51.0: 0.8}

    def value(fitted: Fitted) -> float:
        return worth[fitted.training["half_life"]]

    learned = chosen(old_run, value)
    assert learned.training["half_life"] == 365.0, "the longest of the best"
    assert meta_scorer(learned, config).inner.half_life == 365.0
    assert meta_scorer(old_run, config).inner.half_life is None
    begun = started(old_run, value)
    assert folded(begun).training["half_life"] == pytest.approx(365), "the gradient starts at the best"
    assert folded(begun).meta.tensors().keys() == old_run.meta.tensors().keys()
    for days, kept in ((50.0, 365.0), (51.0, 51.0)):
        by_gradient = replace(old_run, training={**old_run.training, "half_life": days})
        found = chosen(by_gradient, value).training
        assert found["half_life"] == kept, "it has to be better than every fixed value"
        assert found["half_lives"][f"by gradient {days:.1f}"] == worth[days]


def with_half_life(config: RunConfig, days: float | str | None) -> RunConfig:
    return config.model_copy(update={"meta": config.meta.model_copy(update={"half_life": days})})


def drifting(users: int, items: int = 24, days: float = 300.0) -> tuple[Batch, Batch]:
    """Supports and queries of users who like one half of the items, or the other; what they rated long ago is noise.

    Three quarters of a support were rated some three hundred days ago, the rest and the query in the last days.
    """
    generator = torch.Generator().manual_seed(0)

    def batch(old: int) -> Batch:
        shape = users, items
        kind = torch.randn(shape, generator=generator).sign()
        taste = torch.randn(users, 1, generator=generator).sign()
        taste = taste if not tastes else tastes[0]
        tastes.append(taste)
        noise = torch.randn(shape, generator=generator).sign()
        is_old = torch.arange(items).expand(shape) < old
        target = torch.where(is_old, noise, taste * kind).double()
        age = torch.where(is_old, days, 5.0) * torch.rand(shape, generator=generator).clamp(min=0.7)
        real = torch.ones(shape, dtype=torch.bool)
        return Batch(torch.zeros(shape), {"kind": kind.double()}, None, None, target, target > 0, real, age.double())

    tastes: list[torch.Tensor] = []
    return batch(items * 3 // 4), batch(0)


def drift_losses(users: int = 16) -> tuple[MetaState, Loss, Loss]:
    support, query = drifting(users)
    meta = initial_meta_state({"score.kind": torch.zeros((), dtype=torch.float64)}, ["score.kind"], 0.3)
    meta = MetaState({**meta.init, LOG_HALF_LIFE: torch.tensor(1460.0, dtype=torch.float64).log()}, meta.log_rate)
    inner = support_loss(support, None, shrinkage=1.0, user_bias_damping=1.0)
    return meta, inner, query_loss(query, None, pairwise, sharpness=2.0)


@pytest.mark.parametrize("algorithm", ["fomaml", "maml", "maml++", "imaml", "reptile"])
def test_a_half_life_is_learned_by_gradient_where_users_drift(algorithm: str) -> None:
    """Ratings of three hundred days ago are noise: what is learned leaves little of them."""
    meta, inner, outer = drift_losses()
    tensors = {name: value.clone() for name, value in meta.tensors().items()}
    optimizer = torch.optim.Adam([tensors[f"init/{LOG_HALF_LIFE}"]], lr=0.1)
    before = ALGORITHMS.get(algorithm)(meta, inner, outer, 16, 3).loss.mean()
    for _ in range(60):
        found = ALGORITHMS.get(algorithm)(MetaState.from_tensors(tensors), inner, outer, 16, 3)
        for name, value in tensors.items():
            value.grad = found.gradients[name]
        optimizer.step()
    assert float(tensors[f"init/{LOG_HALF_LIFE}"].exp()) < 100, "an old rating counts an eighth"
    assert found.loss.mean() < before


@pytest.mark.parametrize(("algorithm", "steps"), [("maml", 3), ("maml++", 3), ("fomaml", 1)])
def test_the_gradient_of_the_half_life_is_that_of_finite_differences(algorithm: str, steps: int) -> None:
    """Of first-order MAML with one step, too: what it leaves out is how later steps see the first."""
    meta, inner, outer = drift_losses(4)
    meta = MetaState({**meta.init, LOG_HALF_LIFE: torch.tensor(200.0, dtype=torch.float64).log()}, meta.log_rate)

    def value(log_days: torch.Tensor) -> torch.Tensor:
        moved = MetaState({**meta.init, LOG_HALF_LIFE: log_days}, meta.log_rate)
        return ALGORITHMS.get(algorithm)(moved, inner, outer, 4, steps).loss.mean()

    found = ALGORITHMS.get(algorithm)(meta, inner, outer, 4, steps).gradients[f"init/{LOG_HALF_LIFE}"]
    log_days = meta.init[LOG_HALF_LIFE]
    by_differences = (value(log_days + 1e-4) - value(log_days - 1e-4)) / 2e-4
    assert float(found.abs()) > 1e-4
    torch.testing.assert_close(found, by_differences, rtol=1e-5, atol=1e-9)


def test_meta_training_moves_the_half_life_and_leaves_a_number(
    model_dir: Dirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_half_life(settings(model_dir("llama"), steps=4, validate_every=4), "learned")
    monkeypatch.setattr(training, "chosen", lambda fitted, _: fitted)
    counter = itertools.count()
    monkeypatch.setattr(training, "validation_auc_of", lambda *_: float(next(counter)))
    found = trained(of_one_taste(False), config, tmp_path / "checkpoint")
    assert LOG_HALF_LIFE not in found.meta.init, "nothing that reads a run knows of it"
    assert found.training["best_step"] == 4
    assert found.training["half_life"] != pytest.approx(7.0, rel=1e-5), "the last value was the best before it"
    assert meta_scorer(found, config).inner.half_life == found.training["half_life"]
    assert not learns_by_gradient(with_half_life(config, 90.0), found.meta)
    without = config.model_copy(
        update={"meta": config.meta.model_copy(update={"half_life": "learned", "inner_steps": 0})}
    )
    assert not learns_by_gradient(without, found.meta)


def test_ratings_keep_their_times_in_every_order() -> None:
    data = known_interactions()
    rows = data.rows_of_user[3]
    ratings = data.ratings(rows).rows(np.array([5, 2]))
    assert ratings.times is not None
    assert ratings.times.tolist() == data.timestamp[rows[[5, 2]]].tolist()  # type: ignore[index]
    assert ratings.unlabelled().ages.tolist() == ratings.ages.tolist()
    assert Ratings.empty().ages.shape == (0,)


# The stream.


@dataclass(frozen=True)
class Follows:
    """Scores an item by whether the last known rating of its genre half was high."""

    name: str = "follows"
    bytes_per_user: int = 0

    def score(self, requests: Sequence[Request]) -> list[torch.Tensor]:
        return [torch.tensor([self._of(request, item % 4 < 2) for item in request.candidates]) for request in requests]

    def _of(self, request: Request, half: bool) -> float:
        alike = (request.support.items % 4 < 2) == half
        return float(request.support.values[alike][-1]) if alike.any() else 0.0


def test_adapting_anew_follows_a_taste_that_turns_and_what_was_kept_does_not() -> None:
    items = np.arange(40)
    order = np.random.default_rng(0).permutation(items)
    liked = (order % 4 < 2) == (np.arange(40) < 10)  # the taste turns round after the first chunk
    users = [Ratings(order, np.where(liked, 5.0, 1.0).astype(np.float32))]
    found = stream.measured(Follows(), users, 10, 3.5)
    assert found["never"][0].tolist() == [0.5, 0.5, 0.5]
    assert found["once"][0].tolist() == [0.0, 0.0, 0.0]
    assert found["anew"][0].tolist() == [0.0, 1.0, 1.0]
    rows = stream.summary(found)
    assert rows["anew"]["difference"] == pytest.approx(2 / 3)
    data = known_interactions()
    ordered = stream.in_order(data, np.arange(2), 10, 6)
    assert [len(one) for one in ordered] == [20, 20]
    assert ordered[0].times is not None
    assert (np.diff(ordered[0].times) > 0).all()


# The store.


def test_what_a_service_has_collected_becomes_a_data_set(old_run: Fitted, model_dir: Dirs, tmp_path: Path) -> None:
    config = settings(model_dir("llama"))
    MetaRecommender(None, config, old_run).save_pretrained(tmp_path / "run" / "model")
    store = AdapterStore(tmp_path / "run" / "store")
    store.append([Feedback("ann", (("m0", 5.0), ("m1", 1.5))), Feedback("bob", (("m2", 4.0),))])
    store.append([Feedback("ann", (("m0", 4.5),))])
    store.add_items([("n1", {"title": "night war of love", "genres": "drama"})])
    store.append([Feedback("bob", (("n1", 2.0),)), Feedback("eve", (("m3", 3.0),))])
    store.erase("eve")
    store.close()
    data = read_source("store", tmp_path / "run" / "store")
    rated = {
        (data.users[user], data.catalog.ids[item]): float(rating)
        for user, item, rating in zip(data.user, data.item, data.rating, strict=True)
    }
    assert rated == {("ann", "m0"): 4.5, ("ann", "m1"): 1.5, ("bob", "m2"): 4.0, ("bob", "n1"): 2.0}
    assert data.catalog.title(data.catalog.find("n1")) == "night war of love"
    assert len(data.catalog) == 41
    assert (data.scale.low, data.scale.high) == (0.5, 5.0)
    assert data.timestamp is not None
    moved = tmp_path / "elsewhere"
    (tmp_path / "run" / "store").rename(moved)
    with pytest.raises(DataError, match="holds no recommender"):
        read_source("store", moved)
    again = read_source("store", moved, SourceOptions(items=str(tmp_path / "run")))
    assert again.digest == data.digest
    with pytest.raises(DataError, match="holds no store"):
        read_source("store", tmp_path)


# The verb.


def test_train_goes_on_from_a_run_and_prints_what_was_forgotten(
    model_dir: Dirs, metarec: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = TEMPLATES["causal"]
    for name, odd in (("old", 0), ("new", 1)):
        data = known_interactions()
        data = data.subset(data.user % 2 == odd)
        folder = tmp_path / name
        folder.mkdir()
        rows = zip(data.user, data.item, data.rating, strict=True)
        inter = [f"{data.users[user]}\t{data.catalog.ids[item]}\t{rating:g}" for user, item, rating in rows]
        items = [f"{row['id']}\t{row['title']}\t{row['genres']}" for row in map(data.catalog.row, range(40))]
        (folder / "x.inter").write_text("\n".join(["user_id:token\titem_id:token\trating:float", *inter]))
        (folder / "x.item").write_text("\n".join(["item_id:token\tmovie_title:token_seq\tgenre:token_seq", *items]))
        task = {
            "name": f"mine/{name}",
            "version": 1,
            "description": "One taste.",
            "licence": "none",
            "dataset": {"source": "recbole", "path": name},
            "split": {"fractions": [0.6, 0.2, 0.2]},
            "shots": [0, 2],
            "like_threshold": 3.5,
            "prompt": {"text": template.text, "positive": template.positive, "negative": template.negative},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    small = ["--set", "adapter.layers=1", "--set", "train.steps=2", "--set", "train.validate_every=2"]
    small += ["--set", "train.users=2", "--set", "score=[item mean, adapter]"]
    small += ["--set", "collaborative.features=[fields]"]
    common = ["--runs", tmp_path, "--backbone", model_dir("llama")]
    assert metarec("train", tmp_path / "old.yaml", "--name", "old", *common, *small).status == 0
    going_on = ["--from", tmp_path / "old", "--replay", "0.5", "--json"]
    ran = metarec("train", tmp_path / "new.yaml", "--name", "new", *common, *going_on)
    assert ran.status == 0, ran.err
    table = json.loads(ran.out)["forgetting"]
    assert [row["users"] for row in table] == ["old users", "new users"]
    assert [row["task"] for row in table] == ["mine/old", "mine/new"]
    kept = yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())
    assert (kept["train"]["replay"], kept["train"]["steps"]) == (0.5, 2)
    refused = metarec("train", tmp_path / "new.yaml", "--name", "x", *common, "--replay", "0.5")
    assert refused.status == 2
    assert "without --from" in refused.err
    ignored = metarec(
        "train", tmp_path / "new.yaml", "--name", "x", *common, "--from", tmp_path / "old", "--preset", "fast"
    )
    assert (ignored.status, "Leave --preset out" in ignored.err) == (2, True), ignored.err
    lost = metarec("train", tmp_path / "new.yaml", "--name", "old", *common, "--from", tmp_path / "old", "--fresh")
    assert (lost.status, "would delete" in lost.err) == (2, True), lost.err
    assert (tmp_path / "old" / "model").is_dir()
    out = tmp_path / "forgetting.json"
    given = ["--run", tmp_path / "old", "--task", tmp_path / "new.yaml", "--out", out]
    monkeypatch.setattr(sys, "argv", ["forgetting.py", *map(str, given)])
    ways_of_going_on.main()
    ways = json.loads(out.read_text())["ways"]
    assert set(ways) == {"plain", "replay 0.5", "anchor 0.1"}
    for row in table:
        found = ways["replay 0.5"][row["users"]]
        assert (found["task"], found["after"]) == (row["task"], row["auc_after"]), "what the verb says"
