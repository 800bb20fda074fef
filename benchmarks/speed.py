"""One meta-step, against learn2learn's MAML over a peft model: same model, same users, same gradients.

The baseline is what people write today: a peft model inside learn2learn's MAML, cloned for every user, one user after
another; it computes the last position's logits alone. Beside it stands its best effort, which multiplies only the two
answer words' rows of the vocabulary. All sides' meta-gradients are compared before anything is timed; then rounds of
all sides alternate in one process. On a CPU everything runs on one thread and is measured in CPU seconds, so that
other programs disturb little. Ours is timed with its caches in place; what they cost stands beside it.
Adapting users, last, takes all cores and wall-clock time.

    python benchmarks/speed.py

writes ``benchmarks/results/speed.json``; where there is a GPU, also ``speed-cuda.json``, the same table there. Needs
learn2learn: ``make learn2learn``.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from metarec.config import RunConfig
from metarec.data.interactions import Catalog
from metarec.data.sources import read_source
from metarec.data.task_files import load_task
from metarec.files.artifacts import dump_json, load_json, write_json
from metarec.lm.adapter_kinds.lora import LORA_A
from metarec.lm.adapters import init_adapter
from metarec.lm.answer_model import AnswerModel, open_answer_model
from metarec.lm.backbone import Backbone
from metarec.lm.cached_forward import CachedForward
from metarec.lm.loading import load_backbone
from metarec.lm.peft_files import save_adapter
from metarec.lm.placement import Placement, default_placement
from metarec.lm.tokenized import CatalogPrompts, tokenize_catalog
from metarec.meta.algorithms import maml
from metarec.meta.inner_loop import adapt, initial_meta_state
from metarec.meta.learn2learn import load_module
from metarec.scorers.language.adapted import USERS_AT_ONCE
from metarec.scorers.language.score import initial_state
from metarec.system.tensors import AdapterState
from metarec.training.fitting import score_terms

_RESULTS = Path(__file__).parent / "results"
RESULTS = {"cpu": _RESULTS / "speed.json", "cuda": _RESULTS / "speed-cuda.json"}
USERS, SUPPORT, QUERY, STEPS, RANK, ALPHA, RATE = 8, 10, 10, 3, 8, 16.0, 0.05
ITEMS = 160


@dataclass(frozen=True)
class Case:
    """One row of the table, with the ratio that is aimed for."""

    name: str
    layers: int
    active_tokens: int | None
    second_order: bool
    bar: float


CASES = (
    Case("first order, top 4 layers, plain LoRA", 4, None, False, 25),
    Case("first order, top 4 layers, activated LoRA", 4, 1, False, 100),
    Case("first order, all 30 layers, activated LoRA", 30, 1, False, 15),
    Case("second order, top 4 layers, activated LoRA", 4, 1, True, 40),
)
EFFICIENCY_BARS = {"float32": 0.6, "mixed": 0.3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=("all", "adapting"), default="all", help="adapting: only that, anew")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(dump_json(adapting()))
        return
    if arguments.part == "all":
        torch.set_num_threads(1)
        for device in RESULTS if torch.cuda.is_available() else ("cpu",):
            write_json(RESULTS[device], meta_steps(device, arguments.rounds))
    result = load_json(RESULTS["cpu"]) | {"adapting": adapting_alone()}
    print(result["adapting"])
    write_json(RESULTS["cpu"], result)


def meta_steps(device: str, rounds: int) -> dict[str, Any]:
    """Measures the table on a device."""
    backbone = load_backbone("smollm2-135m-instruct", device=device)
    prompts = small_prompts(backbone)
    return {
        "command": f"python benchmarks/speed.py --rounds {rounds}",
        "commit": commit(),
        "setting": {"users": USERS, "support": SUPPORT, "query": QUERY, "inner_steps": STEPS, "rank": RANK},
        "measured": "CPU seconds of one thread" if device == "cpu" else "wall-clock seconds",
        "hardware": {"machine": platform.machine(), "device": device, "cpu": cpu_flags()},
        "meta_steps": [compare(case, backbone, prompts, rounds) for case in CASES],
    }


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def cpu_flags() -> list[str]:
    """Returns which matrix units the CPU has: they decide what low precision is worth."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    return [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in text]


def small_prompts(backbone: Backbone) -> CatalogPrompts:
    """The default task's prompts of the most rated movies."""
    data = read_source("embedded-movielens")
    top = np.argsort(-np.bincount(data.item, minlength=len(data.catalog)), kind="stable")[:ITEMS]
    fields = {name: tuple(column[code] for code in top) for name, column in data.catalog.fields.items()}
    catalog = Catalog(tuple(data.catalog.ids[code] for code in top), fields)
    return tokenize_catalog(backbone, load_task("movielens/user-cold").template, catalog)


def compare(case: Case, backbone: Backbone, prompts: CatalogPrompts, rounds: int) -> dict[str, Any]:
    placed = Placement(case.layers, ("q_proj", "v_proj"), RANK, ALPHA, case.active_tokens)
    cache, answer_model = build_cache(backbone, prompts, placed)
    mixed = replace(answer_model, forward=CachedForward(backbone, prompts, placed, torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    adapter = init_adapter(answer_model.spec, generator)
    adapter = {name: value if name.endswith(LORA_A) else value + 0.02 for name, value in adapter.items()}
    adapter = {name: value.to(backbone.device) for name, value in adapter.items()}
    meta = initial_meta_state(adapter, adapter, RATE)
    items = torch.randint(0, ITEMS, (USERS, SUPPORT + QUERY), generator=generator)
    targets = torch.randn(USERS, SUPPORT + QUERY, generator=generator).to(backbone.device)

    def ours(read: AnswerModel) -> AdapterState:
        parts = (slice(None, SUPPORT), slice(SUPPORT, None))
        losses = [squared_error(read, items[:, part], targets[:, part]) for part in parts]
        found = maml(meta, losses[0], losses[1], USERS, STEPS, second_order=case.second_order)
        return {name: found.gradients[f"init/{name}"] for name in adapter}

    usual, best = (
        Baseline(backbone, answer_model, adapter, case.second_order, best_effort=best) for best in (False, True)
    )
    sides: dict[str, Callable[[], AdapterState]] = {
        "learn2learn": lambda: usual.meta_step(items, targets),
        "learn2learn, two-row head": lambda: best.meta_step(items, targets),
        "float32": lambda: ours(answer_model),
        "mixed": lambda: ours(mixed),
    }
    reference = flat(sides["learn2learn"]())
    differences = {name: float((flat(side()) - reference).norm() / reference.norm()) for name, side in sides.items()}
    assert max(differences["float32"], differences["learn2learn, two-row head"]) < 1e-4, (case.name, differences)
    with FlopCounterMode(display=False) as counter:
        sides["float32"]()
    times: dict[str, list[float]] = {name: [] for name in sides}
    rates: dict[str, list[float]] = {"float32": [], "mixed": []}
    for _ in range(rounds):
        for name, side in sides.items():
            for _ in range(3 if name in rates else 1):
                times[name].append(clock(side, backbone.device))
            if name in rates:
                rates[name].append(gemm_rate(torch.float32 if name == "float32" else torch.bfloat16, backbone.device))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    efficiency = {
        name: counter.get_total_flops() / seconds[name] / 1e9 / statistics.median(rates[name]) for name in rates
    }
    fastest = min(seconds["float32"], seconds["mixed"])
    saved = seconds["learn2learn"] - fastest
    row = {
        "name": case.name,
        "seconds": seconds,
        "all_seconds": times,
        "ratio": {name: seconds["learn2learn"] / seconds[name] for name in seconds},
        "ratio_to_best_effort": seconds["learn2learn, two-row head"] / fastest,
        "bar": case.bar,
        "gradient_difference": differences,
        "gemm_gflops": rates,
        "matmul_efficiency": efficiency,
        "efficiency_bars": EFFICIENCY_BARS,
        "cache": cache,
        "users_that_pay_for_a_thousand_items": cache["seconds_per_item"] * 1000 * USERS / saved,
    }
    print(f"{case.name} (bar {case.bar:.0f}x)")
    for name in sides:
        line = f"  {name:26s}{seconds[name]:8.3f} s {row['ratio'][name]:5.0f}x, gradients {differences[name]:.0e}"
        print(line + (f", {efficiency[name]:.0%} of GEMM" if name in efficiency else ""))
    print(
        f"  caching takes {cache['seconds_per_item'] * 1e3:.0f} ms and {cache['bytes_per_item']:,.0f} bytes an item; "
        f"a thousand items pay after {row['users_that_pay_for_a_thousand_items']:.0f} users",
        flush=True,
    )
    return row


def build_cache(backbone: Backbone, prompts: CatalogPrompts, placed: Placement) -> tuple[dict[str, float], AnswerModel]:
    """Builds the cache from nothing and returns what it cost, and a reader over it."""
    forward = CachedForward(backbone, prompts, placed)
    shutil.rmtree(forward.path, ignore_errors=True)
    seconds = clock(lambda: forward.frozen_states(np.arange(ITEMS)), backbone.device)
    size = sum(file.stat().st_size for file in forward.path.iterdir())
    return {"seconds_per_item": seconds / ITEMS, "bytes_per_item": size / ITEMS}, AnswerModel(
        backbone, prompts, placed, forward
    )


def flat(gradients: AdapterState) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def squared_error(answer_model: AnswerModel, items: Tensor, targets: Tensor) -> Callable[[AdapterState], Tensor]:
    item_batch = answer_model.gather(items)
    return lambda state: (answer_model.log_odds(item_batch, state) - targets).square().mean(1)


class Baseline:
    """learn2learn's MAML over a peft model; its best effort has a vocabulary of the two answer words."""

    def __init__(
        self,
        backbone: Backbone,
        answer_model: AnswerModel,
        adapter: AdapterState,
        second_order: bool,
        best_effort: bool,
    ) -> None:
        from peft import LoraConfig, get_peft_model

        tokens = answer_model.invocation_tokens
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=sorted(answer_model.spec.shapes),
            task_type="CAUSAL_LM",
            alora_invocation_tokens=None if tokens is None else list(tokens),
        )
        model = copy.deepcopy(backbone.model)
        self.answers = answer_model.prompts.answers
        if best_effort:
            head = torch.nn.Linear(backbone.hidden_size, 2, bias=False, device=backbone.device)
            head.weight = torch.nn.Parameter(model.lm_head.weight[list(self.answers)].detach(), requires_grad=False)
            model.lm_head, self.answers = head, (0, 1)
        self.model = get_peft_model(model, config)
        self.parameters = {
            name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        assert self.parameters.keys() == adapter.keys()
        with torch.no_grad():
            for name, value in adapter.items():
                self.parameters[name].copy_(value)
        library = load_module("learn2learn.algorithms.maml")
        self.learner = library.MAML(self.model, lr=RATE, first_order=not second_order, allow_nograd=True)
        self.prompts = answer_model.prompts.tokens
        self.pad = backbone.tokenizer.pad_token_id

    def meta_step(self, items: Tensor, targets: Tensor) -> AdapterState:
        """Returns the meta-gradient of all users."""
        for parameter in self.parameters.values():
            parameter.grad = None
        for user in range(len(items)):
            clone = self.learner.clone()
            for _ in range(STEPS):
                clone.adapt(self.loss(clone, items[user, :SUPPORT], targets[user, :SUPPORT]))
            (self.loss(clone, items[user, SUPPORT:], targets[user, SUPPORT:]) / len(items)).backward()
        return {name: parameter.grad for name, parameter in self.parameters.items()}

    def loss(self, model: Any, items: Tensor, targets: Tensor) -> Tensor:
        """Returns one user's mean squared error of the answer's log-odds."""
        rows = [self.prompts[item] for item in items.tolist()]
        width = max(map(len, rows))
        tokens = torch.tensor([[self.pad] * (width - len(row)) + list(row) for row in rows], device=targets.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=targets.device)
        # The number of tokens before the prompt does not matter to rotary positions, so padding goes to the left.
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]
        yes, no = self.answers
        return (logits[:, yes] - logits[:, no] - targets).square().mean()


def adapting_alone() -> dict[str, Any]:
    """Adapts in a process of its own, so that its peak memory is its own."""
    done = subprocess.run([sys.executable, __file__, "--child"], capture_output=True, text=True, check=True)
    return {"commit": commit(), **json.loads(done.stdout)}


def adapting() -> dict[str, Any]:
    """Adapts one user, and a thousand, to ten ratings on all cores, in wall-clock time; and weighs a default user."""
    backbone = load_backbone("smollm2-135m-instruct")
    prompts = small_prompts(backbone)
    placed = Placement(4, ("q_proj", "v_proj"), RANK, ALPHA, 1)
    answer_model = AnswerModel(backbone, prompts, placed, CachedForward(backbone, prompts, placed))
    adapter = init_adapter(answer_model.spec, torch.Generator().manual_seed(0))
    meta = initial_meta_state(adapter, adapter, RATE)
    answer_model.forward.frozen_states(np.arange(ITEMS))

    def run(users: int) -> None:
        generator = torch.Generator().manual_seed(1)
        items = torch.randint(0, ITEMS, (users, SUPPORT), generator=generator)
        targets = torch.randn(users, SUPPORT, generator=generator)
        for block in torch.arange(users).split(USERS_AT_ONCE):
            adapt(meta, squared_error(answer_model, items[block], targets[block]), len(block), STEPS)

    def seconds(users: int) -> float:
        started = time.perf_counter()
        run(users)
        return time.perf_counter() - started

    run(1)
    return {
        "threads": torch.get_num_threads(),
        "one_user_seconds": statistics.median(seconds(1) for _ in range(15)),
        "seconds_by_users": {str(users): seconds(users) for users in (250, 500, 1000)},
        "peak_memory_bytes": peak_memory(),
        "default_adapter": default_adapter_bytes(backbone, prompts),
    }


def peak_memory() -> int:
    """Returns this process's own peak; what getrusage gives may be that of the process it was forked from."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def default_adapter_bytes(backbone: Backbone, prompts: CatalogPrompts) -> dict[str, Any]:
    """Saves a user of the default configuration with ten ratings, and counts."""
    config = RunConfig()
    settings = config.adapter.model_dump(exclude={"storage"})
    answer_model = open_answer_model(backbone, prompts, default_placement(backbone, prompts, **settings))
    weights = initial_state(score_terms(config), answer_model, inner_lr=0.3, adapter_weight=1.0, seed=0).init
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "user"
        save_adapter(
            path,
            weights,
            answer_model.spec,
            base_model=backbone.location,
            task_type=backbone.task_type,
            user={"ratings": [["some id", 5.0]] * SUPPORT},
            invocation_tokens=answer_model.invocation_tokens,
            dtype=getattr(torch, config.adapter.storage),
        )
        files = {file.name: file.stat().st_size for file in path.iterdir()}
    return {"bytes_on_disk": sum(files.values()), "files": files}


def gemm_rate(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> float:
    """Returns this machine's own rate on a matrix product of the model's largest shape, in GFLOP/s."""
    rows, inner, columns = 2048, 1536, 576
    left, right = (torch.randn(size, inner, dtype=dtype, device=device) for size in (rows, columns))
    times = [clock(lambda: torch.nn.functional.linear(left, right), device) for _ in range(10)]
    return 2 * rows * inner * columns / statistics.median(times) / 1e9


def clock(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Returns CPU seconds of one thread, or on an accelerator seconds until it is done."""
    if torch.device(device).type == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.accelerator.synchronize(device)
    started = time.perf_counter()
    work()
    torch.accelerator.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
