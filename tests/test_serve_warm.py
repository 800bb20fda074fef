"""What the service computes before it answers is read at the next start, unless it is damaged or of something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from serving import LOVES_DRAMA, small_recommender

from metarec.lm.answer_model import AnswerModel
from metarec.recommender import MetaRecommender
from metarec.serve import batching, retrieval
from metarec.serve.engine import Engine
from metarec.serve.records import Feedback
from metarec.serve.store import AdapterStore


@pytest.fixture(scope="session")
def recommender(model_dir: Callable[[str], Path]) -> MetaRecommender:
    return small_recommender(model_dir("llama"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items' gradients were computed, call by call."""
    found: list[int] = []
    for module in (batching, retrieval):
        linearize = module.linearize  # type: ignore[attr-defined]
        monkeypatch.setattr(
            module, "linearize", lambda *given, real=linearize: found.append(len(given[2])) or real(*given)
        )
    return found


def started(recommender: MetaRecommender, folder: Path, linearized_bytes: int = 1 << 20) -> Engine:
    engine = Engine(
        recommender, AdapterStore(folder / "store"), linearized_bytes=linearized_bytes, warm=folder / "warm"
    )
    engine.prepare()
    return engine


def test_a_restart_reads_what_the_first_start_computed(
    recommender: MetaRecommender, tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = started(recommender, tmp_path)
    assert sum(made) >= 40
    first.store.append([Feedback("ann", LOVES_DRAMA)])
    person = first.people(["ann"])["ann"]
    expected = first.recommend(person, 5, explain=True)[1]
    made.clear()
    ran: list[int] = []
    last_states = AnswerModel.last_states
    monkeypatch.setattr(
        AnswerModel, "last_states", lambda self, batch, state: ran.append(1) or last_states(self, batch, state)
    )
    again = started(recommender, tmp_path)
    assert not made
    assert not ran, "the language model runs for nobody before somebody asks"
    np.testing.assert_array_equal(again.prepare().coordinates, first.prepare().coordinates)
    assert again.recommend(again.people(["ann"])["ann"], 5, explain=True)[1] == expected
    again.store.append([Feedback("bob", LOVES_DRAMA)])
    for name, value in again.people(["bob"])["bob"].adapted.state.items():
        assert torch.equal(value, person.adapted.state[name]), name


def test_added_items_are_not_kept_and_are_computed_at_the_next_start(
    recommender: MetaRecommender, tmp_path: Path, made: list[int]
) -> None:
    engine = Engine(recommender, AdapterStore(tmp_path / "store"), linearized_bytes=1 << 20, warm=tmp_path / "warm")
    engine.add_items([("n1", {"title": "night war of love", "genres": "drama"})])
    assert len(engine.prepare()) == 41
    made.clear()
    again = started(recommender, tmp_path)
    assert made == [1]
    assert len(again.prepare()) == 41


@pytest.mark.parametrize("damage", ["a byte", "another setting", "another recommender"])
def test_what_is_damaged_or_of_something_else_is_computed_again(
    damage: str, recommender: MetaRecommender, tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    started(recommender, tmp_path)
    made.clear()
    kept = tmp_path / "warm" / "warm.safetensors"
    if damage == "a byte":
        content = bytearray(kept.read_bytes())
        content[-1] ^= 1
        kept.write_bytes(bytes(content))
    if damage == "another recommender":
        monkeypatch.setattr(MetaRecommender, "digest", property(lambda _: "other"))
    started(recommender, tmp_path, 1 << 19 if damage == "another setting" else 1 << 20)
    assert sum(made) >= 40
    made.clear()
    started(recommender, tmp_path, 1 << 19 if damage == "another setting" else 1 << 20)
    assert not made
