"""Several processes train what one does, hold the same state, resume exactly, and end together."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ran, known_interactions
from made_losses import bent, meta_state
from ranks import together
from small_recommenders import known_task
from torch import Tensor

from metarec.config import TrainConfig
from metarec.errors import ConfigError, RankError, TrainingError
from metarec.evaluation.evaluate import validation_auc
from metarec.meta import distributed
from metarec.meta.algorithms import MetaGradient
from metarec.meta.distributed import ALONE, Ranks, launched, mean_over_ranks
from metarec.meta.inner_loop import MetaState
from metarec.meta.outer_loop import train
from metarec.recommender import MetaRecommender
from metarec.registries import ALGORITHMS
from metarec.scorer import Request
from metarec.system.tensors import read_tensors

CONFIG = TrainConfig(steps=12, validate_every=4, warmup=2, patience=99)
GRADIENTS = ("maml", "fomaml", "maml++", "imaml", "reptile")


def gradient_of(users: Sequence[int], meta: MetaState, step: int, algorithm: str = "maml") -> MetaGradient:
    """Returns the meta-gradient of some of a step's users; user 3 of every third step diverges."""
    targets = torch.randn(9, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    if step % 3 == 2:
        targets[3] = torch.nan
    own = targets[list(users)]
    found: MetaGradient = ALGORITHMS.get(algorithm)(meta, bent(own), bent(own + 0.3), len(users), 2)
    return found


def shared_gradient(ranks: Ranks, meta: MetaState, users: int, step: int, algorithm: str = "maml") -> MetaGradient:
    share = ranks.share(range(users))
    return mean_over_ranks(gradient_of(share, meta, step, algorithm) if share else None, meta, users, ranks)


def as_arrays(gradient: MetaGradient) -> dict[str, np.ndarray]:
    found = {"loss": gradient.loss, "diverged": gradient.diverged, **gradient.gradients}
    return {name: value.numpy().copy() for name, value in found.items()}


def every_gradient(ranks: Ranks) -> dict[tuple[str, int, int], dict[str, np.ndarray]]:
    return {
        (algorithm, users, step): as_arrays(shared_gradient(ranks, meta_state(), users, step, algorithm))
        for algorithm in GRADIENTS
        for users, step in ((1, 0), (2, 1), (5, 2), (9, 3))
    }


@pytest.mark.parametrize("size", [2, 3])
def test_the_meta_gradient_of_several_processes_is_that_of_one(size: int) -> None:
    found = together(size, every_gradient)
    for place, one in every_gradient(ALONE).items():
        assert one["diverged"].sum() == (place[1:] == (5, 2))
        for rank in found:
            np.testing.assert_equal(rank[place], found[0][place], "all ranks hold the same bits")
            for name, value in one.items():
                np.testing.assert_allclose(rank[place][name], value, rtol=1e-12, atol=1e-14, err_msg=f"{place} {name}")


@dataclass(frozen=True)
class Noisy:
    """A scorer with one number for each user and item, that remembers whom it scored."""

    seen: list[str]
    name: str = "noisy"
    bytes_per_user: int = 0

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        self.seen.extend(asked.user for asked in requests)
        return [torch.from_numpy(asked.candidates * (3 + int(asked.user[1:])) % 7).float() / 3 for asked in requests]


def validation(ranks: Ranks) -> dict[str, Any]:
    data = known_task()
    episodes = data.evaluated("validation")[0][:5]
    one_item = [replace(episode, query=episode.query.head(1)) for episode in episodes]
    users, items = Noisy([]), Noisy([])
    return {
        "auc": validation_auc(users, episodes, (5,), data.task.like_threshold, ranks),
        "pooled": validation_auc(items, one_item, (5,), data.task.like_threshold, ranks),
        "seen": (users.seen, items.seen),
    }


def test_processes_share_the_validation_users_and_know_the_same_auc() -> None:
    one, found = validation(ALONE), together(3, validation)
    assert 0 < one["auc"] < 1
    assert 0 < one["pooled"] < 1
    assert {(rank["auc"], rank["pooled"]) for rank in found} == {(one["auc"], one["pooled"])}
    for kind in (0, 1):
        assert [len(rank["seen"][kind]) for rank in found] == [2, 2, 1]
        assert sorted(user for rank in found for user in rank["seen"][kind]) == sorted(one["seen"][kind])


def trained(
    ranks: Ranks, folder: Path, *, resume: bool = False, users: int = 2, at: Any = None, identity: Any = None
) -> dict[str, Any]:
    """Trains with a checkpoint folder of each rank's own, of which only the first rank's should come to be."""

    def gradient_at(meta: MetaState, step: int) -> MetaGradient:
        if at is not None:
            at(ranks, step)
        return shared_gradient(ranks, meta, users, step)

    def validate(meta: MetaState) -> float:
        # Another value on every rank: what counts is the first's.
        return -float(meta.init["w"].square().sum()) + 10 * ranks.rank * (-1) ** len(seen)

    seen: list[int] = []
    result = train(
        meta_state(),
        gradient_at,
        validate,
        CONFIG,
        checkpoint=folder / f"rank{ranks.rank}",
        identity=identity or {"seed": 0},
        resume=resume and ranks.leads,
        ranks=ranks,
    )
    return {
        "best": {name: value.numpy().copy() for name, value in result.best.tensors().items()},
        "facts": (result.best_step, result.best_value, result.steps, result.diverged, result.history),
    }


def test_three_processes_train_what_one_does_on_two_users_a_step_and_resume_exactly(tmp_path: Path) -> None:
    one = trained(ALONE, tmp_path / "one")
    whole = together(3, trained, tmp_path / "whole")
    for rank in whole:
        np.testing.assert_equal(rank, whole[0], "best state and decisions are the first rank's, to the last bit")
        for name, value in one["best"].items():
            np.testing.assert_allclose(rank["best"][name], value, rtol=1e-10)
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["rank0"]
    interrupted = together(3, _interrupted, tmp_path / "part")
    assert [type(error) for error in interrupted] == [KeyboardInterrupt] * 3
    assert json.loads((tmp_path / "part" / "rank0" / "state.json").read_text())["step"] == 6
    shutil.copytree(tmp_path / "part", tmp_path / "fewer")
    np.testing.assert_equal(together(3, _resumed, tmp_path / "part"), whole)
    for rank in together(2, _resumed, tmp_path / "fewer"):
        for name, value in whole[0]["best"].items():
            np.testing.assert_allclose(rank["best"][name], value, rtol=1e-10, err_msg="as on another device")


def _interrupted(ranks: Ranks, folder: Path) -> None:
    """Ctrl-C reaches one process alone, in a step between two checkpoints."""

    def press(ranks: Ranks, step: int) -> None:
        if (ranks.rank, step) == (1, 5):
            os.kill(os.getpid(), signal.SIGINT)

    trained(ranks, folder, at=press)


def _resumed(ranks: Ranks, folder: Path) -> dict[str, Any]:
    return trained(ranks, folder, resume=True)


def test_a_rank_that_fails_ends_the_others_with_its_error(tmp_path: Path) -> None:
    failed = together(3, _failing, tmp_path)
    assert [type(error) for error in failed] == [RankError, ConfigError, RankError]
    for error in (failed[0], failed[2]):
        assert str(error) == "process 1 ended the training: no such thing. Say another"


def _failing(ranks: Ranks, folder: Path) -> None:
    def fail(ranks: Ranks, step: int) -> None:
        if (ranks.rank, step) == (1, 2):
            raise ConfigError("no such thing", "Say another")

    trained(ranks, folder, at=fail)


def test_an_error_of_all_ranks_is_said_by_one() -> None:
    failed = together(2, _all_failing)
    assert sorted(type(error).__name__ for error in failed) == ["ConfigError", "RankError"]


def _all_failing(ranks: Ranks) -> None:
    raise ConfigError("no such thing", "Say another")


def test_a_rank_with_other_data_is_refused(tmp_path: Path) -> None:
    failed = together(2, _strange, tmp_path)
    assert str(failed[1]).startswith("the data of process 1 is 'b', that of process 0 'a'. Start all processes with")
    assert type(failed[0]) is RankError
    assert "the data of process 1 is 'b'" in str(failed[0])


def _strange(ranks: Ranks, folder: Path) -> None:
    trained(ranks, folder, identity={"seed": 0, "data": "ab"[ranks.rank]})


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_others(killed: int, tmp_path: Path) -> None:
    outcome = together(2, _killed, tmp_path, killed)
    assert outcome[killed] is None
    assert type(outcome[1 - killed]) is TrainingError
    said = r"another process of this training has ended: .*\w\. See what it said, .* --resume"
    assert re.match(said, str(outcome[1 - killed]))


def _killed(ranks: Ranks, folder: Path, killed: int) -> None:
    def kill(ranks: Ranks, step: int) -> None:
        if (ranks.rank, step) == (killed, 2):
            os.kill(os.getpid(), signal.SIGKILL)

    trained(ranks, folder, at=kill)


SETTINGS = [
    *("--set", "score=[item mean, adapter]", "--set", "collaborative.features=[fields]", "--set", "adapter.layers=1"),
    *(
        "--set",
        "train.steps=3",
        "--set",
        "train.users=3",
        "--set",
        "train.shots=[5]",
        "--set",
        "train.validate_every=2",
    ),
    *("--set", "train.warmup=1", "--set", "meta.inner_steps=2"),
]


def test_torchrun_trains_the_recommender_that_one_process_does(
    metarec: Callable[..., Ran], model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = known_interactions()
    ids, titles = data.catalog.ids, [data.catalog.row(code)["title"] for code in range(len(data.catalog))]
    rated = zip(data.user, data.item, data.rating, strict=True)
    rows = [f"{data.users[user]},{ids[item]},{rating},{titles[item]}" for user, item, rating in rated]
    (tmp_path / "rated.csv").write_text("\n".join(["user,item,rating,title", *rows]))
    monkeypatch.chdir(tmp_path)
    command = ["train", "rated.csv", "--backbone", str(model_dir("llama")), "--json", *SETTINGS]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "metarec.cli"]
    ran = subprocess.run([*torchrun, *command, "--name", "two"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["steps"] == 3, "one process prints"
    assert len(re.findall("meta-training", ran.stderr)) == 1, "one process shows a bar"
    assert metarec(*command, "--name", "one").status == 0
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    for name, value in read_tensors(one / "checkpoint" / "meta.safetensors").items():
        found = read_tensors(two / "checkpoint" / "meta.safetensors")[name]
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-5, msg=name)
    histories = [json.loads((run / "checkpoint" / "state.json").read_text())["history"] for run in (one, two)]
    np.testing.assert_allclose(np.array(histories[1], float), np.array(histories[0], float), atol=1e-4)
    assert MetaRecommender.from_pretrained(two).fitted.training["steps"] == 3


def test_gpus_that_do_not_fit_the_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "check_device", lambda device: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="3 processes were started here, and this machine has 2 GPUs"):
        distributed._gpus("cuda")
    with pytest.raises(ConfigError, match="3 processes on this machine would share 'cuda:0'"):
        distributed._gpus("cuda:0")


def test_a_process_that_nothing_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        with launched() as ranks:
            assert ranks is ALONE
