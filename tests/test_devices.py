"""Devices: what was saved on one loads on another, and a device that is not there ends with one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran
from serving import LOVES_DRAMA, small_recommender

from metarec.config import RunConfig
from metarec.errors import ConfigError
from metarec.lm.loading import load_backbone
from metarec.recommender import MetaRecommender
from metarec.recommending.recommender_files import write_recommender
from metarec.system.devices import check_device, devices


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)


@pytest.fixture(scope="module")
def from_cuda(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose settings say that it was trained on CUDA."""
    recommender = small_recommender(model_dir("llama"))
    run = tmp_path_factory.mktemp("cuda")
    write_recommender(run / "model", recommender.fitted, recommender.config.model_copy(update={"device": "cuda"}))
    (run / "feedback.csv").write_text("user,item,rating\nann,m1,5\nann,m2,1\n")
    return run


def verbs(run: Path) -> dict[str, list[object]]:
    """Returns every verb that loads a run."""
    bulk = ["--users", run / "feedback.csv", "--store", run / "store"]
    return {
        "evaluate": ["evaluate", run],
        "adapt": ["adapt", run, "--rating", "m1=5"],
        "adapt many": ["adapt", run, *bulk],
        "recommend": ["recommend", run],
        "recommend from a store": ["recommend", run, "--store", run / "store", "--user", "ann"],
        "serve": ["serve", "--checkpoint", run],
    }


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("verb", verbs(Path()))
def test_a_run_from_an_absent_device_ends_with_one_line(
    verb: str, from_cuda: Path, metarec: Callable[..., Ran]
) -> None:
    ran = metarec(*verbs(from_cuda)[verb])
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert "recommender.json: there is no device 'cuda': this machine has cpu. Add --device cpu" in ran.err


@pytest.mark.usefixtures("no_accelerator")
def test_a_run_from_another_device_answers_as_it_did_there(
    from_cuda: Path, model_dir: Callable[[str], Path], metarec: Callable[..., Ran]
) -> None:
    there = small_recommender(model_dir("llama"))
    rated = [option for item, rating in LOVES_DRAMA for option in ("--rating", f"{item}={rating}")]
    ran = metarec("recommend", from_cuda, *rated, "-k", 3, "--json", "--device", "cpu")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out) == [vars(entry) for entry in there.adapt(LOVES_DRAMA).recommend(3)]
    adapted = metarec(*verbs(from_cuda)["adapt many"], "--device", "cpu", "--json")
    assert json.loads(adapted.out)["users"] == 1
    stored = metarec(*verbs(from_cuda)["recommend from a store"], "--device", "cpu", "-k", 3, "--json")
    assert len(json.loads(stored.out)["items"]) == 3


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("verb", ["train", "quickstart"])
@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:7", "meta"])
def test_training_on_an_absent_device_is_refused_before_data_are_read(
    verb: str, device: str, metarec: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(MetaRecommender, "task_data", lambda *_: pytest.fail("data were read"))
    for given in (["--set", f"device={device}"], ["--device", device]):
        ran = metarec(verb, "--runs", tmp_path, *given)
        assert (ran.status, ran.err.count("\n")) == (2, 1)
        assert f"there is no device '{device}'" in ran.err


@pytest.mark.usefixtures("no_accelerator")
def test_a_benchmark_on_an_absent_device_measures_nothing(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    ran = metarec("bench", "--method", "zero-shot prompt", "--device", "gpu", "--out", tmp_path / "bench")
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert "there is no device 'gpu'" in ran.err
    assert not (tmp_path / "bench").exists()


@pytest.mark.usefixtures("no_accelerator")
def test_python_names_the_devices_that_are_there(model_dir: Callable[[str], Path], from_cuda: Path) -> None:
    message = re.escape("there is no device 'gpu': this machine has cpu. Add --device cpu, or device='cpu' in Python")
    with pytest.raises(ConfigError, match=message):
        MetaRecommender.from_pretrained(model_dir("llama"), device="gpu")
    with pytest.raises(ConfigError, match=message):
        MetaRecommender.from_pretrained(from_cuda / "model", device="gpu")
    with pytest.raises(ConfigError, match=message):
        MetaRecommender.from_pretrained(model_dir("llama"), RunConfig(score=("item mean",)), device="gpu")
    with pytest.raises(ConfigError, match=message):
        load_backbone(str(model_dir("llama")), device="gpu")


def test_python_refuses_a_precision_that_is_none(model_dir: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="'dtype' is 'half'"):
        MetaRecommender.from_pretrained(model_dir("llama"), dtype="half")  # type: ignore[arg-type]


def test_every_accelerator_is_listed(monkeypatch: pytest.MonkeyPatch, no_accelerator: None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices() == ["cpu", "cuda:0", "cuda:1"]
    assert [check_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    with pytest.raises(ConfigError, match="no device 'cuda:2': this machine has cpu, cuda:0, cuda:1"):
        check_device("cuda:2")


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize(
    ("module", "names", "taken"),
    [(torch.xpu, ["xpu:0"], "xpu"), (torch.backends.mps, ["mps"], "mps")],
    ids=["xpu", "mps"],
)
def test_doctor_names_intels_and_apples_accelerators_and_they_are_taken(
    module: object, names: list[str], taken: str, metarec: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device(taken))
    assert devices() == ["cpu", *names]
    assert check_device(taken) == taken
    found = {entry["what"]: entry["found"] for entry in json.loads(metarec("doctor", "--json").out)["checks"]}
    assert found["accelerator"].startswith(f"{names[0]} (--device {names[0]};")


@pytest.mark.usefixtures("no_accelerator")
def test_an_accelerator_that_metarec_does_not_use_is_refused_and_doctor_says_so(
    metarec: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("hpu"))
    found = {entry["what"]: entry["found"] for entry in json.loads(metarec("doctor", "--json").out)["checks"]}
    assert found["accelerator"] == "none; 'hpu' is not used: metarec knows CUDA (and ROCm), XPU and MPS"
    with pytest.raises(ConfigError, match="there is no device 'hpu': this machine has cpu"):
        check_device("hpu")


@pytest.mark.usefixtures("no_accelerator")
def test_doctor_says_that_there_is_no_accelerator(metarec: Callable[..., Ran]) -> None:
    assert "none; the CPU is enough" in metarec("doctor").out
