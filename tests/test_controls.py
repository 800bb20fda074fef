"""Controls of what text is worth: they find what is there to be found, and nothing once texts are permuted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from small_tasks import BASE

from metarec.bench.methods import METHODS, Method, MethodContext, MethodRow, controls
from metarec.bench.methods.controls import PERMUTED, WITHOUT, asked_without, permuted_data, without, without_block
from metarec.bench.methods.recommenders import with_brought_vectors
from metarec.config import RunConfig, validated
from metarec.data import task_data
from metarec.data.interactions import Catalog, Interactions, Ratings, RatingScale
from metarec.data.side import Side, SideColumns
from metarec.data.task import PromptConfig, Task
from metarec.data.task_data import TaskData, load_task_data
from metarec.errors import ConfigError
from metarec.evaluation.metrics import BASELINE
from metarec.scorer import Request, request
from metarec.scorers.collaborative import projection
from metarec.scorers.collaborative.features import word_vectors
from metarec.scorers.collaborative.linear_kernel import fit_linear_kernel
from metarec.training.task_features import language_model_vectors

SERIES = ("fire emblem", "road racer", "farm story", "dark tower", "star fleet", "deep mine")
USERS, ITEMS, EACH = 240, 300, 40


def series_lovers() -> Interactions:
    """People who like the games of two series; a game's title says which it is of, and a field says it too."""
    generator = np.random.default_rng(0)
    of = np.arange(ITEMS) % len(SERIES)
    loved = np.stack([generator.choice(len(SERIES), 2, replace=False) for _ in range(USERS)])
    item = np.concatenate([generator.choice(ITEMS, EACH, replace=False) for _ in range(USERS)])
    user = np.repeat(np.arange(USERS), EACH)
    liked = (loved[user] == of[item][:, None]).any(1) ^ (generator.random(len(user)) < 0.1)
    fields = {
        "title": tuple(f"{SERIES[series]} {number}" for number, series in enumerate(of)),
        "maker": tuple(f"maker {series}" for series in of),
    }
    catalog = Catalog(tuple(f"g{number}" for number in range(ITEMS)), fields)
    names = tuple(f"u{number}" for number in range(USERS))
    rating = np.where(liked, 5, 1).astype(np.float32)
    return Interactions(names, user, item, rating, None, catalog, RatingScale(1.0, 5.0), {})


@pytest.fixture(scope="module")
def cold() -> TaskData:
    patch = pytest.MonkeyPatch()
    patch.setattr(task_data, "read_source", lambda *_: series_lovers())
    changes = {"split": {"by": "item", "unseen": 0.3, "fractions": [0.6, 0.1, 0.3]}, "shots": [0, 10]}
    data = load_task_data(validated(Task, BASE | changes, "test"), 0)
    patch.undo()
    return data


def auc(data: TaskData, method: str, shots: int, workspace: Path) -> float:
    """Returns the mean AUC of a method's first row on the task's own test episodes."""
    (row,) = METHODS.get(method).rows(MethodContext(data, workspace))
    episodes = data.evaluated("test")[0]
    scores = row.scorer.score([request(episode, shots) for episode in episodes])
    liked = [episode.query.likes(data.task.like_threshold) for episode in episodes]
    return float(
        np.mean([roc_auc_score(one, two) for one, two in zip(liked, scores, strict=True) if 0 < one.mean() < 1])
    )


def test_words_find_the_series_of_games_that_nobody_rated(cold: TaskData, tmp_path: Path) -> None:
    before, after = (auc(cold, "TF-IDF kernel", shots, tmp_path) for shots in (0, 10))
    assert abs(before - 0.5) < 0.1, "to everybody together the series are the same"
    assert after > 0.8


def test_the_text_kernel_without_its_encoder_reads_words_and_fields(cold: TaskData, tmp_path: Path) -> None:
    catalog = cold.interactions.catalog
    titles = tuple(np.random.default_rng(0).choice(["red game", "blue game", "green game"], ITEMS).tolist())
    blind_catalog = replace(catalog, fields={**catalog.fields, "title": titles})
    blind = replace(cold, interactions=replace(cold.interactions, catalog=blind_catalog))
    assert abs(auc(blind, "TF-IDF kernel", 10, tmp_path) - 0.5) < 0.1
    assert auc(blind, "TF-IDF kernel, + fields", 10, tmp_path) > 0.8
    task = cold.task.model_copy(update={"features": cold.task.features.model_copy(update={"fields": ()})})
    bare = replace(cold, task=task)
    assert auc(bare, "TF-IDF kernel, + fields", 10, tmp_path) == auc(bare, "TF-IDF kernel", 10, tmp_path)
    assert auc(without_block(cold, "maker"), "TF-IDF kernel, + fields", 10, tmp_path) > 0.8


def test_fields_find_it_without_reading_a_title(cold: TaskData, tmp_path: Path) -> None:
    assert auc(cold, "fields kernel", 10, tmp_path) > 0.8


@pytest.mark.parametrize("method", ["TF-IDF kernel", "fields kernel"])
def test_nothing_is_found_once_titles_are_permuted(method: str, cold: TaskData, tmp_path: Path) -> None:
    assert abs(auc(cold, f"{method}{PERMUTED}", 10, tmp_path) - 0.5) < 0.06


def test_a_fields_kernel_without_fields_knows_no_item_that_nobody_rated(cold: TaskData, tmp_path: Path) -> None:
    task = cold.task.model_copy(update={"features": cold.task.features.model_copy(update={"fields": ()})})
    bare = TaskData(task, cold.interactions, cold.parts, cold.seed, cold.held_out, cold.seen)
    assert auc(bare, "fields kernel", 10, tmp_path) == 0.5


def test_permuted_titles_move_with_their_fields_and_leave_ratings_and_split_alone(cold: TaskData) -> None:
    moved = permuted_data(cold)
    assert moved.held_out is not None
    fields, were = moved.held_out.catalog.fields, cold.interactions.catalog.fields
    assert moved.interactions.catalog is moved.held_out.catalog
    assert sorted(fields["title"]) == sorted(were["title"])
    assert sum(one == two for one, two in zip(fields["title"], were["title"], strict=True)) < ITEMS / 20
    assert set(zip(fields["title"], fields["maker"], strict=True)) == set(
        zip(were["title"], were["maker"], strict=True)
    )
    assert moved.interactions.item is cold.interactions.item
    assert moved.hashes["split"] == cold.hashes["split"]
    assert moved.hashes["data"] != cold.hashes["data"]


def test_any_methods_name_takes_permuted_titles(cold: TaskData, tmp_path: Path) -> None:
    (row,) = METHODS.get(f"{BASELINE}{PERMUTED}").rows(MethodContext(cold, tmp_path))
    assert row.scorer.name == f"{BASELINE}{PERMUTED}"
    assert METHODS.members(f"GP{PERMUTED}") == [f"GP{PERMUTED}"]
    assert METHODS.get(f"metarec{PERMUTED}").reads("backbone")
    assert METHODS.code(f"GP{PERMUTED}") is None
    with pytest.raises(ConfigError, match="'GQ'"):
        METHODS.get(f"GQ{PERMUTED}")


def test_a_linear_kernel_learns_how_weights_vary_together() -> None:
    generator = np.random.default_rng(1)
    truth, noise = np.array([[1.0, 0.8], [0.8, 1.0]]), 0.3
    features = generator.normal(size=(200, 2))
    weights = generator.multivariate_normal(np.array([0.5, 0.0]), truth, 600)
    item = np.concatenate([generator.choice(200, 30, replace=False) for _ in range(600)])
    user = np.repeat(np.arange(600), 30)
    value = (features[item] * weights[user]).sum(1) + generator.normal(scale=np.sqrt(noise), size=len(item))
    catalog = Catalog(tuple(map(str, range(200))), {"title": tuple(map(str, range(200)))})
    data = Interactions(
        *(tuple(map(str, range(600))), user, item, value.astype(np.float32), None, catalog, RatingScale(-9.0, 9.0), {})
    )
    how = {"damping": 0.0, "item_damping": 1e9, "shrinkage": 0.0}
    process = fit_linear_kernel(data, np.arange(600), features, name="x", sweeps=20, **how)
    kernel, wanted = process.loadings @ process.loadings.T * process.scale**2, features @ truth @ features.T
    assert np.corrcoef(kernel.ravel(), wanted.ravel())[0, 1] > 0.99
    assert np.abs(kernel - wanted).mean() < 0.1 * np.abs(wanted).mean()
    assert process.noise[0] * process.scale**2 == pytest.approx(noise, rel=0.1)
    assert np.abs(process.mean * process.scale + process.mean_rating - features[:, 0] * 0.5).max() < 0.3
    # A support along one weight moves the other one, as they vary together.
    support = Ratings(np.arange(8), np.full(8, 2.0, np.float32))
    gram = features @ truth @ features.T
    mean = features @ np.array([0.5, 0.0])
    dense = mean + gram[:, :8] @ np.linalg.solve(gram[:8, :8] + noise * np.eye(8), 2.0 - mean[:8])
    scored = process.posterior_mean(support, np.arange(200)) * process.scale + process.mean_rating
    assert np.corrcoef(scored, dense)[0, 1] > 0.98


def test_word_vectors_are_close_where_words_are_shared_and_have_no_width_without_any() -> None:
    vectors = word_vectors(["fire emblem 1", "fire emblem 2", "farm story 1", "farm story 3"])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > unit[0] @ unit[2] + 0.2
    assert word_vectors(["", "?"]).shape == (2, 0)


def test_controls_read_no_language_model() -> None:
    for name in METHODS.groups()["control"]:
        assert not METHODS.get(name).reads("backbone")
        assert not METHODS.get(name).reads("collaborative.encoder")


@pytest.mark.parametrize("method", ["GP, no text", "item-kNN, no text"])
def test_rows_without_text_read_no_title(method: str, cold: TaskData, tmp_path: Path) -> None:
    catalog = cold.interactions.catalog
    shuffled = {**catalog.fields, "title": catalog.fields["title"][::-1]}
    retitled = replace(cold, interactions=replace(cold.interactions, catalog=replace(catalog, fields=shuffled)))
    (one,), (other,) = (METHODS.get(method).rows(MethodContext(data, tmp_path)) for data in (cold, retitled))
    assert one.scorer.name == method
    assert not METHODS.get(method).reads("collaborative.encoder")
    requests = [request(episode, 10) for episode in cold.evaluated("test")[0]]
    for first, second in zip(one.scorer.score(requests), other.scorer.score(requests), strict=True):
        assert first.equal(second)


def test_the_process_without_text_reads_fields(cold: TaskData, tmp_path: Path) -> None:
    assert auc(cold, "GP, no text", 10, tmp_path) > 0.7
    bare = without_block(cold, "maker")
    assert abs(auc(bare, "GP, no text", 10, tmp_path) - 0.5) < 0.02


def test_the_projection_reads_hidden_states_beside_the_encoder(
    cold: TaskData, tmp_path: Path, model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path / "cache"))
    prompt = PromptConfig(
        text="{{ title }} answer :", positive=" Yes", negative=" No", hidden_states=("{{ title }} love",)
    )
    told = replace(cold, task=cold.task.model_copy(update={"prompt": prompt}))
    settings = {"backbone": str(model_dir("llama")), "collaborative.encoder": str(model_dir("encoder"))}
    settings |= {"collaborative.projection.steps": 2, "collaborative.projection.pairs": 16, "adapter.layers": 1}
    read: dict[str, int] = {}
    real = projection.projected_features

    def noted(data: TaskData, features: Any, *rest: Any) -> Any:
        read[name] = features.shape[1]
        return real(data, features, *rest)

    monkeypatch.setattr(projection, "projected_features", noted)
    for name in ("projected text kernel", "projected text kernel, + hidden states"):
        context = MethodContext(told, tmp_path, settings=settings)
        (row,) = METHODS.get(name).rows(context)
        assert row.scorer.name == name
        assert METHODS.get(name).reads("backbone") == name.endswith("states")
    states = language_model_vectors(context.answer_model, told)
    without, beside = read.values()
    assert beside == without + states.shape[1]


def test_a_method_without_a_block_reads_nothing_of_it(cold: TaskData, tmp_path: Path) -> None:
    assert auc(cold, f"fields kernel{WITHOUT}maker", 10, tmp_path) == 0.5
    (row,) = METHODS.get(f"fields kernel{WITHOUT}maker").rows(MethodContext(cold, tmp_path))
    assert row.scorer.name == "fields kernel, without maker"
    with pytest.raises(ConfigError, match="has no block 'makr'"):
        METHODS.get(f"GP{WITHOUT}makr").rows(MethodContext(cold, tmp_path))
    with pytest.raises(ConfigError):
        METHODS.get(f"GQ{WITHOUT}maker")


def test_every_block_can_be_left_out_by_its_name(cold: TaskData) -> None:
    named = np.array(["x"] * USERS, object)
    rows = np.array(["y"] * len(cold.interactions), object)
    side = SideColumns({"age": named}, (("u1",),) * USERS, {"hour": rows})
    vectors = {"cover": np.zeros((ITEMS, 2), np.float32)}
    told = replace(cold, interactions=replace(cold.interactions, side=side, item_vectors=vectors))
    assert without_block(told, "cover").interactions.item_vectors == {}
    assert without_block(told, "age").interactions.side.about == {}
    assert without_block(told, "hour").interactions.side.moments == {}
    assert without_block(told, "friends").interactions.side.friends == ()
    assert not without_block(told, "side information").interactions.side
    assert set(without_block(told, "maker").interactions.catalog.fields["maker"]) == {""}
    assert told.interactions.side.about == {"age": named}


def test_vectors_that_the_data_bring_are_read_by_every_kind_of_method(cold: TaskData, tmp_path: Path) -> None:
    """By processes, by networks and by metarec without a language model; noise by none."""
    generator = np.random.default_rng(0)
    series = np.eye(len(SERIES))[np.arange(ITEMS) % len(SERIES)]
    brought = {"cover": series @ generator.normal(size=(len(SERIES), 8)), "noise": generator.normal(size=(ITEMS, 8))}
    vectors = {name: some.astype(np.float32) for name, some in brought.items()}
    told = replace(without_block(cold, "maker"), interactions=replace(cold.interactions, item_vectors=vectors))
    blind = replace(told.interactions.catalog, fields={"title": tuple(f"game {n}" for n in range(ITEMS))})
    told = replace(told, interactions=replace(told.interactions, catalog=blind))
    context = MethodContext(told, tmp_path)
    assert "cover" in context.known.blocks
    assert "noise" not in context.known.blocks
    bare = replace(told, interactions=replace(told.interactions, item_vectors={}))
    assert context.features.shape[1] == MethodContext(bare, tmp_path).features.shape[1] + 8
    assert auc(told, "GP", 10, tmp_path) > 0.7
    plain = validated(RunConfig, {"collaborative": {"features": ["text"]}}, "test")
    assert with_brought_vectors(plain, told).collaborative.features == ("text", "vectors")
    assert with_brought_vectors(plain, cold) == plain


def test_a_method_without_a_block_is_asked_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = {name: np.array(["x", "y"], object) for name in ("hour", "device")}
    side = Side(
        {"age": "30", "town": "Rome"}, ("u1",), rated=moments, asked=moments, reviews=np.array(["a", ""], object)
    )
    support = Ratings(np.array([0, 1]), np.array([1.0, 5.0], np.float32), side=side)
    whole = Request("u0", support, np.array([2, 3]))

    def left(block: str) -> Side | None:
        return asked_without(whole, block).support.side

    assert (left("age").about, left("friends").friends) == ({"town": "Rome"}, ())  # type: ignore[union-attr]
    assert [list(columns) for columns in (left("hour").rated, left("hour").asked)] == [["device"], ["device"]]  # type: ignore[union-attr]
    assert left("side information") is None
    assert left("maker") == side

    def rows(context: Any) -> list[MethodRow]:
        scorer: Any = SimpleNamespace(name="told", bytes_per_user=0, score=lambda requests: requests)
        return [MethodRow(scorer, tokens=lambda one: len(one.support.side.about), prompt=lambda one, _: str(one))]

    monkeypatch.setattr(controls, "without_block", lambda data, block: data)
    context: Any = SimpleNamespace(data=SimpleNamespace(seed=0), workspace=None, train_users=None, settings={})
    (found,) = without(Method(rows, "x", "x"), "age").rows(context)
    assert found.scorer.name == "told, without age"
    asked: Any = found.scorer.score([whole])
    assert asked[0].support.side.about == {"town": "Rome"}
    assert found.tokens(whole) == 1
    assert found.prompt is not None
    assert "30" not in found.prompt(whole, 2)
