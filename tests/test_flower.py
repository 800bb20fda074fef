"""Federated meta-training through Flower: what clients send adds up to what the simulation computes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_recommenders import SETTINGS, known_task

from metarec.config import RunConfig, validated
from metarec.data.interactions import Catalog
from metarec.data.task_data import TaskData
from metarec.errors import ConfigError, DataError, TrainingError
from metarec.meta.private import summed
from metarec.recommender import MetaRecommender
from metarec.recommending import flower
from metarec.recommending.flower import Clients, client_app, federated, of_catalog, server_app, share_of
from metarec.training.meta_training import user_deltas

CLIENTS = 3
NO_FLOWER = "Flower is not installed: it does not fit constraints.txt"


def start(path: Path, model: Path, **changed: Any) -> MetaRecommender:
    settings = {
        **SETTINGS,
        "backbone": str(model),
        "score": ["prompt", "adapter"],
        "collaborative": {"features": ["fields"]},
        "train": {**SETTINGS["train"], "steps": 2, "validate_every": 2, "users": 12},
        "private": {"clip": 0.5},
        **changed,
    }
    config = validated(RunConfig, settings, "test")
    recommender = MetaRecommender.from_pretrained(config.backbone, config).prepare(known_task())
    recommender.save_pretrained(path)
    return recommender


def of_client(place: int) -> TaskData:
    data = known_task()
    return replace(data, parts={**data.parts, "train": data.parts["train"][place::CLIENTS]})


def own_data(_: MetaRecommender, node: Mapping[str, Any]) -> TaskData:
    return of_client(int(node["partition-id"]))


class Grid:
    """Clients in this process, asked by Flower's own messages."""

    def __init__(self, app: Any, fails: int | None = None) -> None:
        self.app, self.fails = app, fails

    def get_node_ids(self) -> list[int]:
        return list(range(CLIENTS))

    def send_and_receive(self, messages: Iterable[Any]) -> Iterable[Any]:
        from flwr.app import Error, Message

        for message in messages:
            node = message.metadata.dst_node_id
            context = SimpleNamespace(node_config={"partition-id": node, "num-partitions": CLIENTS}, node_id=node)
            yield Message(Error(1, "disk full"), reply_to=message) if node == self.fails else self.app(message, context)


@pytest.fixture
def in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets messages be made without a server of Flower's."""
    pytest.importorskip("flwr", reason=NO_FLOWER)
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def begun(model_dir: Callable[[str], Path], tmp_path: Path) -> MetaRecommender:
    return start(tmp_path / "start", model_dir("llama"))


def test_the_sum_of_shares_is_the_simulations_for_the_same_users(begun: MetaRecommender) -> None:
    """Without Flower: what each client sends, added up, against one process that has all the users' deltas."""
    shares = [share_of(begun, of_client(place), place) for place in range(CLIENTS)]
    meta, config = begun.fitted.meta, begun.config
    prepared = begun._prepare(known_task())
    together = [
        delta
        for place in range(CLIENTS)
        for delta in user_deltas(of_client(place), prepared, config, meta, 5, 1.0, place)
    ]
    assert len(together) == len(known_task().parts["train"])
    expected = summed(meta, together, config.private.clip)
    sent = [share.sum(meta, 5, 1.0) for share in shares]
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-2
    for name, value in expected.items():
        torch.testing.assert_close(sum(one[name] for one in sent), value, atol=1e-6, rtol=1e-4)
    norms = [torch.cat([value.flatten() for value in one.values()]).norm() for one in sent]
    assert all(norm <= 0.5 * 12 for norm in norms), "a client's users each move it by the bound at most"


def test_only_terms_that_no_users_are_needed_for_are_trained_so(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    begun = start(tmp_path / "start", model_dir("llama"), score=["item mean", "prompt", "adapter"])
    with pytest.raises(ConfigError, match="'item mean', which is fitted on all users' ratings"):
        share_of(begun, of_client(0), 0)


def test_ratings_of_another_catalog_take_the_codes_of_the_start() -> None:
    ratings = known_task().interactions
    order = list(reversed(range(len(ratings.catalog))))[:-1]  # without the first item
    titles = tuple(ratings.catalog.fields["title"][code] for code in order)
    catalog = Catalog(tuple(ratings.catalog.ids[code] for code in order), {"title": titles})
    found = of_catalog(ratings, catalog)
    assert len(found) == int((ratings.item != 0).sum())
    kept = [ratings.catalog.ids[code] for code in ratings.item if code != 0]
    assert [catalog.ids[code] for code in found.item] == kept
    with pytest.raises(DataError, match="no rating is of an item"):
        of_catalog(ratings, Catalog(("other",), {"title": ("other",)}))


def test_without_flower_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flwr", None)
    with pytest.raises(ConfigError, match="environment of its own"):
        client_app("start")
    with pytest.raises(ConfigError, match="environment of its own"):
        server_app("start", "out")


@pytest.mark.usefixtures("in_a_run")
def test_a_step_over_flower_is_the_sum_of_what_clients_have(begun: MetaRecommender, tmp_path: Path) -> None:
    clients = Clients(Grid(client_app(tmp_path / "start", own_data)), CLIENTS)
    assert clients.users() == len(known_task().parts["train"])
    meta = begun.fitted.meta
    shares = [share_of(begun, of_client(place), place) for place in range(CLIENTS)]
    expected = [share.sum(meta, 1, 0.5) for share in shares]
    for name, value in clients.sum(meta, 1, 0.5).items():
        torch.testing.assert_close(value, sum(one[name] for one in expected))


@pytest.mark.usefixtures("in_a_run")
def test_a_training_over_flower_learns_states_its_epsilon_and_goes_on(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = itertools.count()
    monkeypatch.setattr(flower, "validation_auc_of", lambda *_: float(next(counter)))
    begun = start(tmp_path / "start", model_dir("llama"), private={"clip": 0.5, "noise": 1.0})
    clients = Clients(Grid(client_app(tmp_path / "start", own_data)), CLIENTS)
    found = federated(begun, clients, known_task(), tmp_path / "out")
    assert found.fitted.training["best_step"] == 2
    assert found.fitted.training["privacy"]["epsilon"] > 0
    moved = found.fitted.meta.tensors()
    assert any(not torch.equal(value, moved[name]) for name, value in begun.fitted.meta.tensors().items())
    again = federated(begun, clients, known_task(), tmp_path / "out")
    assert all(torch.equal(value, moved[name]) for name, value in again.fitted.meta.tensors().items())
    found.save_pretrained(tmp_path / "out")
    assert MetaRecommender.from_pretrained(tmp_path / "out").adapt([]).recommend(3)
    with pytest.raises(TrainingError, match="1 of 3 clients failed: disk full"):
        Clients(Grid(client_app(tmp_path / "start", own_data), fails=1), CLIENTS).sum(begun.fitted.meta, 0, 1.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's and Flower's
def test_flowers_own_simulation_runs_it(
    begun: MetaRecommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of their own, which Ray starts."""
    simulation = pytest.importorskip("flwr.simulation", reason=NO_FLOWER)
    pytest.importorskip("ray", reason="Flower's simulation runs on Ray")
    server = server_app(tmp_path / "start", tmp_path / "out", clients=CLIENTS, data=known_task())
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    few = {"init_args": {"num_cpus": 1, "include_dashboard": False}, "client_resources": {"num_cpus": 1}}
    simulation.run_simulation(server, client_app(tmp_path / "start", own_data), CLIENTS, backend_config=few)
    assert MetaRecommender.from_pretrained(tmp_path / "out").fitted.training["steps"] == 2
