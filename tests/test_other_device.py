"""On another device than the processor, everything gives the processor's numbers, and no tensor stays behind.

This runs without an accelerator: `pretended_device` says how, and why not with torch's fake tensors.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known import WORLD, episodes
from pretended_device import NAME, DeviceMismatchError, brought_back, pretend_in_this_thread, pretended_device
from serving import LOVES_DRAMA
from small_adapters import random_state, some_items
from small_recommenders import SETTINGS, TASK, WITH_BRIEF_STACK
from test_conformance import FITS, PROMPT, TEST, TRAIN, VALIDATION, Given, given_world
from torch import Tensor

import metarec.system.devices
from metarec.config import Precision, RunConfig, validated
from metarec.data.task import Task
from metarec.data.task_data import TaskData
from metarec.lm.answer_model import AnswerModel
from metarec.lm.backbone import Backbone
from metarec.lm.cached_forward import CachedForward
from metarec.lm.forward import ItemBatch
from metarec.lm.loading import load_backbone
from metarec.lm.placement import default_placement
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.tokenized import CatalogPrompts
from metarec.meta import inner_loop
from metarec.meta.inner_loop import Loss, initial_meta_state
from metarec.recommender import MetaRecommender
from metarec.registries import ALGORITHMS
from metarec.scorer import Request
from metarec.scorers.serialization import load_scorer, save_scorer
from metarec.serve.engine import Engine
from metarec.serve.records import Feedback
from metarec.serve.store import AdapterStore
from metarec.system.tensors import AdapterState, select_user

ModelDir = Callable[[str], Path]
Prompts = Callable[[str], CatalogPrompts]
SHORT = {**SETTINGS["train"], "steps": 1, "users": 2, "validate_every": 1, "validation_users": 2, "max_query": 4}
BRIEF = {**SETTINGS["meta"], "inner_steps": 2}
# A second step goes on from where the first one came to.
STEPS = 2
WANTED = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.3, 0.2, -1.0, 1.0]])


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device's name, which this machine says it has."""
    monkeypatch.setattr(metarec.system.devices, "devices", lambda: ["cpu", NAME])
    with pretended_device() as name:
        yield name


def to(device: str, tensors: AdapterState) -> AdapterState:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def assert_same(found: Any, expected: Any) -> None:
    """Both are computed by the same operations on the same numbers."""
    torch.testing.assert_close(brought_back(found), expected, rtol=1e-3, atol=5e-5)


def only_there(found: dict[str, Tensor]) -> None:
    assert {tensor.device.type for tensor in found.values()} == {NAME}


# What the checker catches.

MISTAKES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a sum of both": lambda there, here: there + here,
    "a product of both": lambda there, here: here @ there,
    "a row of ours by their index": lambda there, here: here[there.long()],
    "a row of theirs set to ours": lambda there, here: there.index_put_((torch.tensor([0]),), here[:1]),
    "numbers of both": lambda there, here: torch.stack([there.sum(), here.sum()]),
    "a choice of both": lambda there, here: torch.where(there > 0, there, here),
    "their values as NumPy's": lambda there, here: there.numpy(),
    "their values by NumPy": lambda there, here: np.asarray(there),
    "our seed for their draws": lambda there, here: torch.rand(2, device=there.device, generator=torch.Generator()),
    "a float64": lambda there, here: here.double().to(there.device),
    "a float64 made there": lambda there, here: there.double(),
    "a gradient of both": lambda there, here: torch.autograd.grad(Cube.apply(there.requires_grad_()).sum(), there),
}


class Cube(torch.autograd.Function):
    """A cube whose gradient multiplies by a tensor that was left behind."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value**3

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.ones(3)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_tensor_that_stays_behind_is_noticed(mistake: str, device: str) -> None:
    with pytest.raises((DeviceMismatchError, RuntimeError), match=r"on the processor|\.numpy\(\)|generator|no float64"):
        MISTAKES[mistake](torch.zeros(3).to(device), torch.zeros(3))


def test_what_an_accelerator_allows_is_allowed(device: str) -> None:
    there, here = torch.arange(3.0).to(device), torch.arange(3.0)
    assert [part.device.type for part in (there, there * 2, torch.zeros_like(there), there[:1])] == [device] * 4
    assert_same(there + torch.tensor(1.0), here + 1)
    assert_same(there[torch.tensor([2, 0])], here[[2, 0]])
    assert_same(torch.tensor([1.0, 2.0], device=device), torch.tensor([1.0, 2.0]))
    there[:2] = here[:2] + 5
    assert (there.tolist(), float(there[0]), bool((there > 1).all())) == ([5.0, 6.0, 2.0], 5.0, True)
    assert there.cpu().numpy().tolist() == [5.0, 6.0, 2.0]
    leaf = there.detach().requires_grad_()
    (slope,) = torch.autograd.grad((leaf**3).sum(), leaf, create_graph=True)
    assert_same(torch.autograd.grad(slope.sum(), leaf)[0], torch.tensor([30.0, 36.0, 12.0]))


def replaced(owner: Any, name: str, text: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes a function's source."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert text in source, f"{name} has no '{text}' any more"
    scope: dict[str, Any] = {}
    changed = compile("from __future__ import annotations\n" + source.replace(text, by), name, "exec")
    exec(changed, inspect.unwrap(function).__globals__, scope)
    monkeypatch.setattr(owner, name, scope[name])


# Where a tensor is moved, or made on the device, what stands there without that, and a model that passes there.
FORGOTTEN: dict[str, tuple[Any, str, str, str, int | None]] = {
    "states": (
        CachedForward,
        "_gather_tail",
        "to_device(active.padded(codes)[0], device)",
        "active.padded(codes)[0]",
        2,
    ),
    "keys and values": (CachedForward, "_gather_tail", "(to_device(part, device) for", "(part for", 2),
    "places": (CachedForward, "_gather_tail", "torch.arange(width, device=device)", "torch.arange(width)", 2),
    "packed states": (CachedForward, "_gather_packed", "hidden = to_device(flat, device)", "hidden = flat", None),
    "frozen states": (CachedForward, "frozen_states", ", self.backbone.device)", ", 'cpu')", 2),
    "rows of the cache": (CachedForward, "_states_of", ".cpu()", "", 2),
    "tokens": (CachedForward, "_read_block", ", device=self.backbone.device)", ")", 2),
    "divergence": (inner_loop, "adapt", ", device=next(iter(start.values())).device)", ")", 2),
}


@pytest.mark.parametrize("moved", FORGOTTEN)
def test_a_move_that_is_taken_out_of_the_source_is_noticed(
    moved: str,
    model_dir: ModelDir,
    prompts: Prompts,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    *change, active = FORGOTTEN[moved]
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path))  # so that it is filled
    monkeypatch.setattr("metarec.meta.algorithms.adapt", lambda *given, **named: inner_loop.adapt(*given, **named))
    model = answer_model(model_dir("llama"), prompts("llama"), device, active)
    replaced(*change, monkeypatch)
    with pytest.raises((RuntimeError, AssertionError)):
        only_there(meta_gradient(model, device, "fomaml"))


# The language model.


@cache
def loaded(path: Path, device: str, dtype: torch.dtype) -> Backbone:
    return load_backbone(str(path), device=device, dtype=dtype)


def answer_model(
    path: Path, prompts: CatalogPrompts, device: str, active: int | None, kind: str = "lora", precision: str = "float32"
) -> AnswerModel:
    model = loaded(path, device, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    virtual = {"virtual_tokens": 2} if kind == "prefix" else {}
    placed = default_placement(
        model, prompts, layers=2, targets=None, rank=2, alpha=4.0, active_tokens=active, kind=kind, **virtual
    )
    block_dtype = torch.bfloat16 if precision == "mixed" else None
    kept: Precision = "int8" if precision == "int8" else "float32"
    return AnswerModel(model, prompts, placed, CachedForward(model, prompts, placed, block_dtype, kept))


def meta_gradient(model: AnswerModel, device: str, algorithm: str) -> dict[str, Tensor]:
    """Returns log-odds of frozen and adapted model, and the meta-gradient of two users."""
    fresh = to(device, select_user(random_state(model.spec, 1), 0))
    meta = initial_meta_state(fresh, fresh, 0.05, steps=STEPS if algorithm == "maml++" else 1)
    items, wanted = some_items(2, 4), WANTED.to(device)
    support, query = model.gather(items), model.gather(items.flip(0))

    def loss(batch: ItemBatch) -> Loss:
        return lambda state: (model.log_odds(batch, state) - wanted).square().mean(1)

    found = ALGORITHMS.get(algorithm)(meta, loss(support), loss(query), 2, STEPS)
    state = to(device, random_state(model.spec, 2))
    return {
        "frozen": model.log_odds(support, None),
        "adapted": model.log_odds(support, state).detach(),
        "frozen states": model.frozen_states(np.arange(5)),
        "loss": found.loss,
        **found.gradients,
    }


CASES = [
    ("llama", 2, "lora", "float32"),
    ("llama", 2, "lora", "int8"),
    ("llama", None, "lora", "mixed"),
    ("llama", 2, "bias", "bfloat16"),
    ("llama", None, "prefix", "float32"),
    ("llama", 2, "prefix", "mixed"),
    ("gpt2", None, "lora", "bfloat16"),
    ("gemma3", 2, "lora", "float32"),
    ("bert", None, "lora", "mixed"),
    ("encoder", None, "lora", "float32"),
    ("modernbert-encoder", None, "bias", "bfloat16"),
]


@pytest.mark.parametrize(("family", "active", "kind", "precision"), CASES)
def test_a_language_model_answers_and_learns_as_on_the_processor(
    family: str, active: int | None, kind: str, precision: str, model_dir: ModelDir, prompts: Prompts, device: str
) -> None:
    here, there = (
        meta_gradient(answer_model(model_dir(family), prompts(family), where, active, kind, precision), where, "maml")
        for where in ("cpu", device)
    )
    only_there(there)
    assert all(tensor.abs().max() > 0 for tensor in here.values())
    assert_same(there, here)


@pytest.mark.parametrize("family", ["llama", "bert", "encoder"])
def test_a_whole_model_answers_and_learns_as_on_the_processor(
    family: str, model_dir: ModelDir, prompts: Prompts, device: str
) -> None:
    found = []
    for where in ("cpu", device):
        model = answer_model(model_dir(family), prompts(family), where, None)
        whole = ReferenceForward(model.backbone, model.prompts, model.placement)
        found.append(meta_gradient(replace(model, forward=whole), where, "fomaml"))
    assert_same(found[1], found[0])


GRADIENT_STEPS = [name for name in ALGORITHMS.names() if name not in ("maml", "ridge", "prototypes", "dkt")]


@pytest.mark.parametrize("algorithm", GRADIENT_STEPS)
def test_every_algorithms_meta_gradient_is_the_processors(
    algorithm: str, model_dir: ModelDir, prompts: Prompts, device: str
) -> None:
    here, there = (
        meta_gradient(answer_model(model_dir("llama"), prompts("llama"), where, 2), where, algorithm)
        for where in ("cpu", device)
    )
    assert_same(there, here)


@pytest.mark.parametrize("active", [2, None])
def test_rows_go_to_cuda_from_pinned_memory_and_elsewhere_nothing_is_pinned(
    active: int | None, model_dir: ModelDir, prompts: Prompts, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is taken for CUDA; it shares the processor's memory, so pinning is nothing but counted."""
    model = answer_model(model_dir("llama"), prompts("llama"), device, active)
    expected = model.gather(some_items()).inputs
    pinned: list[int] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor.numel()) or tensor)
    model.gather(some_items())
    assert not pinned
    monkeypatch.setattr("metarec.system.tensors._COPIES_FROM_PINNED", {device})
    moves: list[bool] = []
    move = Tensor.to

    def moving(tensor: Tensor, *where: Any, **how: Any) -> Tensor:
        moves.append(how.get("non_blocking", False))
        return move(tensor, *where, **how)

    monkeypatch.setattr(Tensor, "to", moving)
    found = model.gather(some_items()).inputs
    assert moves.count(True) >= len(pinned) == 4
    monkeypatch.undo()
    assert_same(found[0], brought_back(expected[0]))


# Recommenders.

RUNS: dict[str, dict[str, Any]] = {
    "ordinal loss": {"train": {**SHORT, "loss": "ordinal"}},
    "ridge": {"meta": {**BRIEF, "algorithm": "ridge"}},
    "prototypes": {"meta": {**BRIEF, "algorithm": "prototypes"}},
    "steps from the posterior": {"meta": {**BRIEF, "start": "posterior", "inner_lr": 0.01}},
    "mixed, with a stack": {**WITH_BRIEF_STACK, "dtype": "mixed"},
}


def small_task() -> TaskData:
    """A task of two meta-training users and four others, in this world's catalog."""
    task = validated(Task, TASK | {"prompt": PROMPT, "shots": [0, 5]}, "test")
    return TaskData(task, WORLD, {"train": TRAIN, "validation": VALIDATION[:2], "test": TEST[:4]}, 0)


def fit(path: Path, device: str, changed: dict[str, Any]) -> MetaRecommender:
    config = validated(RunConfig, {**SETTINGS, "train": SHORT, "meta": BRIEF, "device": device, **changed}, "test")
    return MetaRecommender.from_pretrained(path, config).fit(small_task())


@pytest.mark.parametrize("run", RUNS)
def test_a_recommender_fits_evaluates_adapts_saves_and_loads_as_on_the_processor(
    run: str, model_dir: ModelDir, tmp_path: Path, device: str
) -> None:
    here, there = (fit(model_dir("llama"), where, RUNS[run]) for where in ("cpu", device))
    assert_same(there.fitted.meta.tensors(), here.fitted.meta.tensors())
    assert repr(there.evaluate(small_task())) == repr(here.evaluate(small_task()))
    users = [recommender.adapt(LOVES_DRAMA) for recommender in (here, there)]
    assert_same(users[1].state, users[0].state)
    items = ["m7", "m8", "unrated"]
    expected = pytest.approx(users[0].score(items), abs=1e-4)
    assert users[1].score(items) == expected
    assert len(users[1].recommend(3, candidates=10)) == len(users[1].explain("m7")) == 3
    there.save_pretrained(tmp_path / "model")
    users[1].save(tmp_path / "user")
    for where in ("cpu", device):
        again = MetaRecommender.from_pretrained(tmp_path / "model", device=where)
        assert next(iter(again.fitted.meta.init.values())).device.type == where
        assert again.load_user(tmp_path / "user").score(items) == expected


class Elsewhere(Given):
    """What a scorer may be fitted on, with its language model on the device, and hardly trained."""

    user_steps = 2

    @cache  # noqa: B019 - one for the module
    def recommender(self, members: str = "none", algorithm: str = "fomaml") -> MetaRecommender:
        changed: dict[str, Any] = {"meta": {**BRIEF, "algorithm": algorithm}}
        return fit(self.model_dir("llama"), NAME, changed | (WITH_BRIEF_STACK if members == "stack" else {}))


LANGUAGE = [name for name in FITS if "prompt" in name or "-context" in name or "-shot" in name or "LoRA" in name]


@pytest.fixture(scope="module")
def elsewhere(model_dir: ModelDir) -> Elsewhere:
    known = given_world(WORLD, model_dir)
    return Elsewhere(known.data, known.prior, known.model_dir)


@pytest.mark.parametrize("method", [*LANGUAGE, "full fine-tuning"])
def test_every_scorer_that_reads_a_language_model_works_there_and_comes_back_from_disk(
    method: str, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    scorer = FITS[method](elsewhere)
    requests = [Request(e.user, e.support.head(4), e.query.items[:5]) for e in episodes(WORLD, TEST)[:2]]
    scores = [values.numpy() for values in scorer.score(requests)]
    assert all(np.isfinite(values).all() and np.ptp(values) > 0 for values in scores)
    save_scorer(tmp_path / "scorer", scorer)
    answers, model = (getattr(scorer, name, None) for name in ("answer_model", "backbone"))
    again = load_scorer(tmp_path / "scorer", answer_model=answers, backbone=model or elsewhere.backbone)
    for values, expected in zip(again.score(requests), scores, strict=True):
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-3, atol=5e-5)


def test_the_service_adapts_searches_adds_items_and_explains(
    model_dir: ModelDir, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = partial(ThreadPoolExecutor, initializer=pretend_in_this_thread)
    monkeypatch.setattr("metarec.serve.batching.ThreadPoolExecutor", pool)
    answers = []
    for where in ("cpu", device):
        recommender = fit(model_dir("llama"), where, {})
        engine = Engine(recommender, AdapterStore(tmp_path / where), linearized_bytes=1 << 20, users_at_once=2)
        engine.store.append([Feedback("ann", LOVES_DRAMA)])
        engine.prepare()
        engine.people(["ann"])
        engine.add_items([("n1", {"title": "night war of love", "genres": "drama"})])
        person = engine.people(["ann"])["ann"]
        _, scores = engine.score(person, ["m7", "m8", "n1"])
        _, best = engine.recommend(person, 3, explain=True)
        found = engine.search("night", 3, person)
        answers.append((scores, [entry.item for entry, _ in best], [entry.item for entry in found]))
    assert answers[1][0] == pytest.approx(answers[0][0], abs=1e-4)
    assert answers[1][1:] == answers[0][1:]
