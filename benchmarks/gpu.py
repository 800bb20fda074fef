"""An accelerator against the processor: the same numbers, how fast it is, and a small run from fitting to adapting.

    python benchmarks/gpu.py

takes the accelerator that is there, less than eight minutes, and writes ``benchmarks/results/gpu.json``:

- ``parity``: log-odds, meta-gradients and adapted states of the accelerator against the processor's; each side reads
  the model itself. Their relative differences have to be within `TOLERANCES`.
- ``speed``: many users adapted and meta-trained at once, against one user at a time over the same cache, and against
  one user at a time through the whole transformers model; medians of seconds (on a CPU, of its own seconds).
- ``run``: fit, evaluate and adapt.

What is done stands in the file, and is not done again by the next call on the same device and commit; ``--fresh``
starts anew. Status 1: numbers differ, or time was up before everything was done. ``--device cpu --small`` runs all of
it on a tiny random model.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import speed
import torch
from speed import ITEMS, QUERY, RATE, STEPS, SUPPORT, clock, flat, squared_error
from torch import Tensor

from metarec.config import RunConfig, override, validated
from metarec.data.interactions import Catalog
from metarec.data.templates import PromptTemplate
from metarec.files.artifacts import load_json, write_json
from metarec.lm.adapter_kinds.lora import LORA_A
from metarec.lm.adapters import init_adapter
from metarec.lm.answer_model import AnswerModel
from metarec.lm.backbone import Backbone
from metarec.lm.cached_forward import CachedForward
from metarec.lm.loading import load_backbone
from metarec.lm.placement import default_placement
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.tokenized import CatalogPrompts, tokenize_catalog
from metarec.meta.algorithms import maml
from metarec.meta.inner_loop import MetaState, adapt, initial_meta_state
from metarec.presets import with_preset
from metarec.recommender import MetaRecommender
from metarec.system.doctor import environment
from metarec.system.tensors import AdapterState

RESULT = Path(__file__).parent / "results" / "gpu.json"
# Largest norm of the difference over the processor's norm. Mixed: bfloat16 blocks, which round on either side.
TOLERANCES = {"float32": {"scores": 1e-4, "gradients": 1e-3, "states": 1e-3}}
TOLERANCES["mixed"] = {"scores": 3e-2, "gradients": 1e-1, "states": 3e-2}
PLACEMENTS: dict[str, int | None] = {"activated LoRA": 1, "plain LoRA": None}
USERS = (1, 8, 64, 256)
WORDS = "night day love war star road man woman king dead blue red city river house game dream".split()  # noqa: SIM905
PROMPT = {"text": "is this a good movie ? {{ title }} , {{ genres }} answer :", "positive": " Yes", "negative": " No"}
SMALL = ("train.steps=2", "train.validate_every=2", "train.users=4", "score=[item mean, adapter]", "adapter.layers=1")


@dataclass(frozen=True)
class World:
    """What is measured: a model, and a task on which to fit it.

    Args:
        device: The accelerator.
        model: Name or directory of the backbone.
        small: The model is tiny and random.
        folder: For files of this process.
    """

    device: str
    model: str
    small: bool
    folder: Path

    @property
    def users(self) -> tuple[int, ...]:
        """How many users are adapted at once."""
        return USERS[:2] if self.small else USERS

    def prompts(self, backbone: Backbone) -> CatalogPrompts:
        """Returns the prompts of `ITEMS` items."""
        if not self.small:
            return speed.small_prompts(backbone)
        frame = made_up_ratings().drop_duplicates("item")
        fields = {name: tuple(frame[name]) for name in ("title", "genres")}
        return tokenize_catalog(backbone, PromptTemplate(*PROMPT.values()), Catalog(tuple(frame["item"]), fields))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is not done yet; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: the accelerator that torch finds")
    parser.add_argument("--small", action="store_true", help="a tiny random model and made-up ratings")
    parser.add_argument("--minutes", type=float, default=7.5, help="nothing is begun after so many")
    parser.add_argument("--fresh", action="store_true", help="do what is done again")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    found = torch.accelerator.current_accelerator(check_available=True)
    device = given.device or (None if found is None else found.type)
    if device is None:
        print("torch finds no accelerator here: use --device cpu --small to try the script", file=sys.stderr)
        return 2
    until = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "model") if given.small else "smollm2-135m-instruct"
        return measure(World(device, model, given.small, Path(folder)), given.out, given.fresh, until)


def measure(world: World, out: Path, fresh: bool, until: float) -> int:
    """Measures part by part and writes each as it is done; returns the exit status."""
    identity = {"device": name_of(world.device), "small": world.small, "commit": commit()}
    kept = load_json(out) if out.exists() and not fresh else {}
    if {key: kept.get(key) for key in identity} != identity:
        kept = {}
    result = {"command": "python benchmarks/gpu.py", **identity, "tolerances": TOLERANCES, **environment()}
    result["parts"] = kept.get("parts", {})
    parts = every_part(world)
    for number, (name, part) in enumerate(parts.items(), start=1):
        if name in result["parts"]:
            print(f"{number}/{len(parts)} {name}: done before", flush=True)
            continue
        if time.monotonic() > until:
            print(f"{number}/{len(parts)} {name}: time is up; call again to go on", flush=True)
            return 1
        started = time.perf_counter()
        result["parts"][name] = part()
        write_json(out, result)
        print(
            f"{number}/{len(parts)} {name}, {time.perf_counter() - started:.0f} s: {result['parts'][name]}", flush=True
        )
    wrong = [name for name, found in result["parts"].items() if not found.get("within_tolerance", True)]
    if wrong:
        print(f"{', '.join(wrong)}: numbers differ from the processor's", file=sys.stderr)
    return 1 if wrong else 0


def every_part(world: World) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns what there is to do, by name, in order."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    for precision in TOLERANCES:
        for placed in PLACEMENTS:
            parts[f"parity, {placed}, {precision}"] = lambda p=precision, q=placed: parity(world, q, p)  # type: ignore[misc]
    for users in world.users:
        parts[f"speed, {users} users"] = lambda users=users: speed_of(world, users)  # type: ignore[misc]
    parts["run"] = lambda: small_run(world)
    return parts


def name_of(device: str) -> str:
    """Returns an accelerator's own name where torch knows it."""
    kind = torch.device(device).type
    if kind in ("cuda", "xpu"):
        return str(getattr(torch, kind).get_device_name(device))
    return device


def commit() -> str:
    """Returns the commit, or that there is none: a copy without its repository is measured too."""
    try:
        return speed.commit()
    except (OSError, subprocess.CalledProcessError):
        return "not in a repository"


def answer_model(world: World, device: str, placed: str, precision: str = "float32") -> AnswerModel:
    """Opens the model on a device, with nothing of it cached."""
    backbone = load_backbone(world.model, device=device)
    prompts = world.prompts(backbone)
    layers = min(4, backbone.model.config.num_hidden_layers - 1)
    placement = default_placement(
        backbone, prompts, layers=layers, targets=None, rank=8, alpha=16.0, active_tokens=PLACEMENTS[placed]
    )
    block_dtype = torch.bfloat16 if precision == "mixed" else None
    forward = CachedForward(backbone, prompts, placement, block_dtype)
    shutil.rmtree(forward.path, ignore_errors=True)
    return AnswerModel(backbone, prompts, placement, forward)


def meta_state(model: AnswerModel) -> MetaState:
    """Returns an initialization that moves log-odds, the same on every device."""
    fresh = init_adapter(model.spec, torch.Generator().manual_seed(0))
    moved = {name: value if name.endswith(LORA_A) else value + 0.02 for name, value in fresh.items()}
    init = {name: value.to(model.backbone.device) for name, value in moved.items()}
    return initial_meta_state(init, init, RATE)


def drawn(model: AnswerModel, users: int) -> tuple[Tensor, Tensor]:
    """Returns items, shape (users, support and query), and what is wanted of them, on the model's device."""
    generator = torch.Generator().manual_seed(1)
    items = torch.randint(0, len(model.prompts.tokens), (users, SUPPORT + QUERY), generator=generator)
    return items, torch.randn(users, SUPPORT + QUERY, generator=generator).to(model.backbone.device)


def parity(world: World, placed: str, precision: str) -> dict[str, Any]:
    """Compares log-odds, the second-order meta-gradient and adapted states of a device with the processor's."""
    sides = [numbers(answer_model(world, device, placed, precision)) for device in ("cpu", world.device)]
    here, there = sides
    differences = {name: float((there[name] - value).norm() / value.norm()) for name, value in here.items()}
    allowed = TOLERANCES[precision]
    return {"differences": differences, "within_tolerance": all(differences[name] <= allowed[name] for name in allowed)}


def numbers(model: AnswerModel) -> dict[str, Tensor]:
    """Returns what is compared, each as one vector on the processor."""
    users = 4
    items, wanted = drawn(model, users)
    meta = meta_state(model)
    support, query = losses(model, items, wanted)
    gradients = maml(meta, support, query, users, STEPS).gradients
    adapted = adapt(meta, support, users, STEPS).state
    scores = model.log_odds(model.gather(items), adapted).detach()
    moved = {name: value - meta.init[name] for name, value in adapted.items()}
    found = {"scores": scores.flatten(), "gradients": flat(gradients), "states": flat(moved)}
    return {name: value.cpu().double() for name, value in found.items()}


def losses(model: AnswerModel, items: Tensor, wanted: Tensor) -> list[Callable[[AdapterState], Tensor]]:
    """Returns the loss on the support and on the query."""
    parts = (slice(None, SUPPORT), slice(SUPPORT, None))
    return [squared_error(model, items[:, part], wanted[:, part]) for part in parts]


def speed_of(world: World, users: int) -> dict[str, Any]:
    """Times adapting and a meta-step for some users at once, and one after another."""
    model = answer_model(world, world.device, "activated LoRA")
    whole = replace(model, forward=ReferenceForward(model.backbone, model.prompts, model.placement))
    items, wanted = drawn(model, users)
    meta = meta_state(model)
    model.frozen_states(np.arange(len(model.prompts.tokens)))  # so that the cache is filled

    def adapting(read: AnswerModel, rows: Tensor) -> None:
        adapt(meta, losses(read, items[rows], wanted[rows])[0], len(rows), STEPS)

    def meta_step(read: AnswerModel, rows: Tensor) -> None:
        maml(meta, *losses(read, items[rows], wanted[rows]), len(rows), STEPS)

    everybody = torch.arange(users)
    found: dict[str, Any] = {}
    for name, work in (("adapting", adapting), ("meta_step", meta_step)):
        some = everybody[:8]
        batched = seconds(lambda: work(model, everybody), world.device)  # noqa: B023
        alone = seconds(lambda: [work(model, user) for user in some.split(1)], world.device) / len(some) * users  # noqa: B023
        usual = seconds(lambda: work(whole, everybody[:1]), world.device) * users  # noqa: B023
        times = {"batched": batched, "one_at_a_time": alone, "whole_model_one_at_a_time": usual}
        found[name] = {"seconds": times, "ratio": {side: value / batched for side, value in times.items()}}
    return {**found, "timed_one_after_another": len(everybody[:8]), "timed_through_the_whole_model": 1}


def seconds(work: Callable[[], object], device: str) -> float:
    """Returns the median of three, after one that warms up."""
    work()
    return statistics.median(clock(work, device) for _ in range(3))


def small_run(world: World) -> dict[str, Any]:
    """Fits, evaluates and adapts, with wall-clock seconds."""
    settings = SMALL if world.small else ("train.steps=20", "train.validate_every=20")
    values = override(with_preset("quick", {"backbone": world.model, "device": world.device}), settings)
    config = validated(RunConfig, values, "benchmarks/gpu.py")
    recommender = MetaRecommender.from_pretrained(world.model, config)
    started = [time.perf_counter()]
    if world.small:
        recommender.fit(made_up_ratings(), prompt=PROMPT, shots=[0, 5], label="rating >= 3.5")
    else:
        recommender.fit()
    started.append(time.perf_counter())
    report = recommender.evaluate()
    started.append(time.perf_counter())
    catalog = recommender.fitted.catalog
    user = recommender.adapt([(catalog.ids[code], 4.0 if code % 2 else 2.0) for code in range(SUPPORT)])
    started.append(time.perf_counter())
    assert np.isfinite(user.score(list(catalog.ids[:ITEMS]))).all()
    spent = dict(zip(("fit", "evaluate", "adapt"), np.diff(started).tolist(), strict=True))
    auc = {f"{cell.method}, K = {cell.shots}": cell.means["auc"] for cell in report.cells()}
    return {"seconds": spent, "auc": auc}


def made_up_ratings(users: int = 60, items: int = 40) -> pd.DataFrame:
    """Returns ratings of people of two opposite tastes."""
    generator = np.random.default_rng(0)
    genres = ("drama", "comedy", "action", "horror")
    titles = [f"{' '.join(generator.choice(WORDS, 3))} {WORDS[code % 17]}" for code in range(items)]
    rows = [
        (f"u{user}", f"m{item}", 4.5 if (item % 4 < 2) == (user % 2 == 0) else 2.0, titles[item], genres[item % 4])
        for user in range(users)
        for item in generator.choice(items, 24, replace=False)
    ]
    return pd.DataFrame(rows, columns=["user", "item", "rating", "title", "genres"])


def tiny_model(path: Path) -> str:
    """Writes a random Llama with a tokenizer of words; returns its directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [*WORDS, *"is this a good movie answer drama comedy action horror Yes No : , ?".split()]  # noqa: SIM905
    vocabulary = {word: code for code, word in enumerate(["<unk>", "<pad>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(path)
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
