"""One meta-step, against learn2learn's MAML over a peft model: same model, same users, same gradients.

The baseline is what people write today: a peft model inside learn2learn's MAML, cloned for every user, one user after
another; it reads only the last position's logits. Both sides' meta-gradients are compared before anything is timed,
then rounds of both alternate in one process. Ours is timed with its caches in place; what they cost stands beside it.

    python benchmarks/speed.py

writes ``benchmarks/results/speed.json``. Needs learn2learn: ``make learn2learn``.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarec.artifacts import dump_json, write_json
from metarec.backbone import Backbone, load_backbone
from metarec.interactions import Catalog
from metarec.learn2learn import load_module
from metarec.lora import LORA_A, AdapterState, init_adapter
from metarec.meta import MetaGradient, adapt, initial_meta_state, maml
from metarec.prompts import CatalogPrompts, tokenize_catalog
from metarec.reader import Reader
from metarec.scorers.adapted import USERS_AT_ONCE
from metarec.sources import read_source
from metarec.task import load_task
from metarec.trunk import CachedTrunk, Placement

ROOT = Path(__file__).parent
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--adapting-only", action="store_true", help="only adapt users, and print that as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.adapting_only:
        print(dump_json(adapting()))
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    backbone = load_backbone("smollm2-135m-instruct")
    prompts = small_prompts(backbone)
    rows = []
    for case in CASES:
        rows.append(compare(case, backbone, prompts, arguments.rounds))
        print(
            "{name}: {ours:.3f} s against {theirs:.1f} s, {ratio:.0f}x (bar {bar:.0f}x), "
            "gradients differ by {difference:.1e}".format(**rows[-1]),
            flush=True,
        )
    result = {
        "command": f"python benchmarks/speed.py --rounds {arguments.rounds} --threads {arguments.threads}",
        "commit": commit,
        "setting": {"users": USERS, "support": SUPPORT, "query": QUERY, "inner_steps": STEPS, "rank": RANK},
        "gemm_gflops": gemm_rate(),
        "meta_steps": rows,
        "adapting": adapting_alone(arguments.threads),
        "hardware": {"machine": platform.machine(), "threads": arguments.threads},
    }
    write_json(ROOT / "results" / "speed.json", result)
    print(result["adapting"], "GEMM", result["gemm_gflops"], "GFLOP/s")


def small_prompts(backbone: Backbone) -> CatalogPrompts:
    """The default task's prompts of the most rated movies."""
    data = read_source("embedded-movielens")
    top = np.argsort(-np.bincount(data.item, minlength=len(data.catalog)), kind="stable")[:ITEMS]
    fields = {name: tuple(column[code] for code in top) for name, column in data.catalog.fields.items()}
    catalog = Catalog(tuple(data.catalog.ids[code] for code in top), fields)
    return tokenize_catalog(backbone, load_task("movielens/user-cold").template, catalog)


def compare(case: Case, backbone: Backbone, prompts: CatalogPrompts, rounds: int) -> dict[str, Any]:
    placed = Placement(case.layers, ("q_proj", "v_proj"), RANK, ALPHA, case.active_tokens)
    trunk = CachedTrunk(backbone, prompts, placed)
    started = time.perf_counter()
    trunk.frozen_states()
    cache_seconds = time.perf_counter() - started
    reader = Reader(backbone, prompts, placed, trunk)
    generator = torch.Generator().manual_seed(0)
    adapter = init_adapter(reader.spec, generator)
    adapter = {name: value if name.endswith(LORA_A) else value + 0.02 for name, value in adapter.items()}
    meta = initial_meta_state(adapter, adapter, RATE)
    items = torch.randint(0, ITEMS, (USERS, SUPPORT + QUERY), generator=generator)
    targets = torch.randn(USERS, SUPPORT + QUERY, generator=generator)

    def ours() -> MetaGradient:
        parts = (slice(None, SUPPORT), slice(SUPPORT, None))
        losses = [squared_error(reader, items[:, part], targets[:, part]) for part in parts]
        return maml(meta, losses[0], losses[1], USERS, STEPS, second_order=case.second_order)

    baseline = Baseline(backbone, reader, adapter, case.second_order)

    def theirs() -> AdapterState:
        return baseline.meta_step(items, targets)

    found, expected = ours().gradients, theirs()
    flat, reference = (
        torch.cat([part[name].flatten() for name in expected])
        for part in ({name: found[f"init/{name}"] for name in expected}, expected)
    )
    difference = float((flat - reference).norm() / reference.norm())
    assert difference < 1e-2, (case.name, difference)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        times["theirs"].append(clock(theirs))
        times["ours"] += [clock(ours) for _ in range(3)]
    seconds = {side: statistics.median(values) for side, values in times.items()}
    saved = seconds["theirs"] - seconds["ours"]
    return {
        "name": case.name,
        **seconds,
        "ratio": seconds["theirs"] / seconds["ours"],
        "bar": case.bar,
        "difference": difference,
        "all_seconds": times,
        "cache_seconds": cache_seconds,
        "meta_steps_that_pay_for_the_cache": cache_seconds / saved,
    }


def squared_error(reader: Reader, items: Tensor, targets: Tensor) -> Callable[[AdapterState], Tensor]:
    gathered = reader.gather(items)
    return lambda state: (reader.log_odds(gathered, state) - targets).square().mean(1)


class Baseline:
    """learn2learn's MAML over a peft model."""

    def __init__(self, backbone: Backbone, reader: Reader, adapter: AdapterState, second_order: bool) -> None:
        from peft import LoraConfig, get_peft_model

        tokens = reader.invocation_tokens
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=sorted(reader.spec.shapes),
            task_type="CAUSAL_LM",
            alora_invocation_tokens=None if tokens is None else list(tokens),
        )
        self.model = get_peft_model(copy.deepcopy(backbone.model), config)
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
        self.prompts, self.answers = reader.prompts.tokens, reader.prompts.answers
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
        tokens = torch.tensor([[self.pad] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        # The number of tokens before the prompt does not matter to rotary positions, so padding goes to the left.
        logits = model(input_ids=tokens, attention_mask=mask, logits_to_keep=1, use_cache=False).logits[:, -1]
        yes, no = self.answers
        return (logits[:, yes] - logits[:, no] - targets).square().mean()


def adapting_alone(threads: int) -> dict[str, Any]:
    """Adapts in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--adapting-only", "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def adapting() -> dict[str, Any]:
    """Adapts one user, and a thousand, to ten ratings."""
    backbone = load_backbone("smollm2-135m-instruct")
    prompts = small_prompts(backbone)
    placed = Placement(4, ("q_proj", "v_proj"), RANK, ALPHA, 1)
    reader = Reader(backbone, prompts, placed, CachedTrunk(backbone, prompts, placed))
    adapter = init_adapter(reader.spec, torch.Generator().manual_seed(0))
    meta = initial_meta_state(adapter, adapter, RATE)
    reader.trunk.frozen_states()

    def run(users: int) -> None:
        generator = torch.Generator().manual_seed(1)
        items = torch.randint(0, ITEMS, (users, SUPPORT), generator=generator)
        targets = torch.randn(users, SUPPORT, generator=generator)
        for block in torch.arange(users).split(USERS_AT_ONCE):
            adapt(meta, squared_error(reader, items[block], targets[block]), len(block), STEPS)

    run(1)
    alone = statistics.median(clock(lambda: run(1)) for _ in range(9))
    seconds = {users: clock(lambda count=users: run(count)) for users in (250, 500, 1000)}
    with tempfile.TemporaryDirectory() as folder:
        bytes_on_disk = adapter_bytes(Path(folder) / "user", adapter, reader, backbone)
    return {
        "one_user_seconds": alone,
        "seconds_by_users": {str(users): value for users, value in seconds.items()},
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "adapter_bytes_on_disk": bytes_on_disk,
    }


def adapter_bytes(path: Path, adapter: AdapterState, reader: Reader, backbone: Backbone) -> int:
    from metarec.lora import save_adapter

    save_adapter(path, adapter, reader.spec, base_model=backbone.location, task_type="CAUSAL_LM", user={})
    return sum(file.stat().st_size for file in path.iterdir())


def gemm_rate() -> float:
    """Returns this machine's own float32 rate on a matrix product of the model's largest shape, in GFLOP/s."""
    rows, inner, columns = 2048, 1536, 576
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    seconds = statistics.median(clock(lambda: torch.nn.functional.linear(left, right)) for _ in range(30))
    return 2 * rows * inner * columns / seconds / 1e9


def clock(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
