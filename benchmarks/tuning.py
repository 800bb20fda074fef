"""Chooses the plain baselines' hyper-parameters on validation users of the default task.

    python benchmarks/tuning.py                      # two split seeds; benchmarks/results/tuning.json
    python benchmarks/tuning.py --methods ALS EASE
    python benchmarks/tuning.py --methods "joint LoRA" "full fine-tuning"                         # hours
    python benchmarks/tuning.py --methods "joint LoRA, longer" "full fine-tuning, longer"         # hours
    python benchmarks/tuning.py --methods "in-context prompt" "in-context, listwise"
    python benchmarks/tuning.py --methods "zero-shot prompt"    # wordings; half an hour
    python benchmarks/tuning.py --methods "metarec, no stack, Reptile" "metarec, no stack, prefix"    # hours

A plan whose rows have other settings than the default has winners of its own: `--plan benchmarks/plans/finetune.yaml`
tries a grid by the settings of the first part of the plan that names the method, on the part's tasks.

What counts is the gain in AUC over the item mean, averaged over K > 0 and seeds. Where a language model reads every
user's history, it is the gain at one K of a few users of the first split. A validation user of one split is a
test user of another, as in any repeated split. The winners are the defaults of the `fit_*` functions.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metarec.bench.methods import METHODS, MethodContext
from metarec.bench.plan import read_plan
from metarec.bench.settings import canonical
from metarec.config import flattened
from metarec.data.task import PromptConfig
from metarec.data.task_data import load_task_data
from metarec.data.task_files import load_task
from metarec.errors import ConfigError
from metarec.evaluation.evaluate import evaluate
from metarec.evaluation.metrics import BASELINE
from metarec.files.artifacts import content_hash, load_json, write_json
from metarec.scorer import Scorer
from metarec.system.progress import progress

RESULT = Path(__file__).parent / "results" / "tuning.json"
TASK = "movielens/user-cold"
_MOVIE = "{{ title }}{% if year %} ({{ year }}){% endif %}{% if genres %}, {{ genres }}{% endif %}"
GRIDS: dict[str, Mapping[str, tuple[Any, ...]]] = {
    "text ridge, no prior": {"penalty": (0.1, 0.3, 1.0), "user_bias_damping": (0.0, 2.0)},
    "text logistic, no prior": {"penalty": (0.03, 0.3, 3.0)},
    "user-kNN": {"neighbours": (50, 200, 800), "shrinkage": (20.0, 60.0), "strength": (1.0, 3.0, 10.0)},
    "item-kNN": {"shrinkage": (30.0, 100.0, 300.0), "strength": (0.3, 1.0, 3.0)},
    "EASE": {"penalty": (30.0, 100.0, 300.0), "min_ratings": (5, 10, 20)},
    "ALS": {
        "factors": (8, 16),
        "item_penalty": (10.0, 30.0),
        "user_penalty": (1.0, 3.0, 10.0),
        "penalty_per_rating": (0.0, 0.02, 0.03),
    },
    "text logistic": {"penalty": (1.0, 3.0, 10.0, 30.0)},
    "text ridge": {"penalty": (1.0, 3.0, 10.0), "user_bias_damping": (0.0, 2.0)},
    "MeLU": {"lr": (1e-3, 3e-3), "inner_lr": (0.03, 0.1)},
    "neural process": {"lr": (1e-3, 3e-3), "weight_decay": (0.1, 1.0)},
    "per-user LoRA": {"inner_lr": (0.1, 0.3, 1.0), "steps": (3, 10)},
    "GP": {"factors": (16, 32), "noise": (0.5, 0.7), "selection_effect": (2.0, 4.0)},
}
READERS: dict[str, Mapping[str, tuple[Any, ...]]] = {
    "joint LoRA": {"lr": (1.5e-4, 5e-4, 2e-3)},
    "full fine-tuning": {"lr": (5e-6, 2e-5, 6e-5)},
    "in-context prompt": {"limit": (4, 8, 16)},
    "in-context, listwise": {"limit": (4, 8, 16)},
    "joint LoRA, longer": {"longer": (1, 4)},
    "full fine-tuning, longer": {"longer": (1, 4)},
    "metarec, no stack, Reptile": {"train.lr": (1e-3, 1e-1, 1.0), "meta.inner_lr": (0.3, 3.0)},
    "metarec, no stack, prefix": {"meta.inner_lr": (0.3, 3.0, 30.0), "adapter.virtual_tokens": (2, 8)},
}
# Of a prompt, what it says: the text, the word for a like, and the word against; the first is the tasks' own.
WORDINGS: dict[str, tuple[str, str, str]] = {
    "taste": ("", " Yes", " No"),
    "good or bad": (f"{_MOVIE}\nIs this a good movie?\nAnswer:", " Yes", " No"),
    "viewers": (f"{_MOVIE}\nDo most viewers like this movie?\nAnswer:", " Yes", " No"),
    "review": (f"Review of the movie {_MOVIE}.\nThis movie is", " great", " terrible"),
    "stars": (f"A critic's rating of the movie {_MOVIE}, from 1 to 5 stars: ", "5", "1"),
    "sentiment": (f"Movie: {_MOVIE}\nWhat people say of it is", " positive", " negative"),
}
PROMPTS: dict[str, Mapping[str, tuple[Any, ...]]] = {"zero-shot prompt": {"wording": tuple(WORDINGS)}}
ALL = {**GRIDS, **READERS, **PROMPTS}
_READ_USERS, _READ_SHOTS = 16, (10,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="how many split seeds, from 0")
    parser.add_argument("--methods", nargs="*", default=list(GRIDS), choices=list(ALL), help="only these")
    parser.add_argument("--task", default=TASK)
    parser.add_argument("--plan", type=Path, help="the settings of its first part that names a method and the task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    contexts = [
        MethodContext(load_task_data(load_task(arguments.task), seed), Path("runs") / "tuning" / str(seed))
        for seed in range(arguments.seeds)
    ]
    settings = {method: settings_in(arguments.plan, method, arguments.task) for method in arguments.methods}
    grids = {method: ALL[method] for method in arguments.methods}
    tried = {
        method: [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        for method, grid in grids.items()
    }
    splits = {method: contexts[:1] if method in READERS else contexts for method in tried}
    done, total = 0, sum(len(options) * len(splits[method]) for method, options in tried.items())
    with progress("tuning", total) as advance:
        for method, options in tried.items():
            gains = np.zeros((len(splits[method]), len(options)))
            for (row, context), (column, chosen) in itertools.product(enumerate(splits[method]), enumerate(options)):
                # A training that was stopped goes on, and each has a place of its own.
                where = context.workspace / content_hash([arguments.task, settings[method], method, chosen])[:16]
                place = {"workspace": where} if method in READERS else {}
                own = replace(context, settings=settings[method], **place)
                scorer = fitted(method, own, **chosen)
                gains[row, column] = gain(own, scorer, few=method in READERS and not settings[method])
                done += 1
                advance(done, method)
            facts = {"seeds": len(splits[method])}
            if arguments.plan:
                facts |= {"task": arguments.task, "settings": settings[method]}
            keep(method, options, gains.mean(0), facts)


def settings_in(plan: Path | None, method: str, task: str) -> Mapping[str, Any]:
    """Returns the settings of the first part of a plan that names a method and a task; without a plan none."""
    if plan is None:
        return {}
    read = read_plan(plan)
    for part in read.parts:
        if method in part.methods and task in part.tasks:
            return canonical({**flattened(read.settings), **flattened(part.settings)}, str(plan))
    raise ConfigError(f"no part of '{plan}' measures '{method}' on '{task}'", "Name another plan")


def fitted(method: str, context: MethodContext, *, wording: str | None = None, **options: Any) -> Scorer:
    """Returns a method fitted with other options than its own, or on a task with another prompt."""
    if wording is not None and WORDINGS[wording][0]:
        text, positive, negative = WORDINGS[wording]
        prompt = PromptConfig(text=text, positive=positive, negative=negative)
        task = context.data.task.model_copy(update={"prompt": prompt})
        context = replace(context, data=replace(context.data, task=task))
    # "joint LoRA, longer" is a grid of the method before the comma.
    asked = METHODS.get(method if method in METHODS.names() else method.partition(", longer")[0])
    return asked.fit(context, **{**asked.options, **options})[0].scorer


def gain(context: MethodContext, scorer: Scorer, *, few: bool) -> float:
    """Returns the gain over the item mean on validation users, averaged over K > 0; or of few users at one K."""
    baseline = METHODS.get(BASELINE).rows(context)[0].scorer
    liked = [episode.query.likes(context.threshold) for episode in context.validation]
    both = [episode for episode, likes in zip(context.validation, liked, strict=True) if 0 < likes.sum() < len(likes)]
    shots = _READ_SHOTS if few else [count for count in context.data.task.shots if count]
    report = evaluate(
        [baseline, scorer],
        both[:_READ_USERS] if few else context.validation,
        shots,
        context.interactions.catalog,
        threshold=context.threshold,
        seed=context.seed,
        baseline=BASELINE,
        left_out={},
    )
    return float(np.mean([report.paired(scorer.name, count, BASELINE, count).mean() for count in shots]))


def keep(method: str, options: list[dict[str, Any]], gains: np.ndarray, facts: Mapping[str, Any]) -> None:
    """Adds a method to the result file; what other methods got stays, and the same method's on another task."""
    before = load_json(RESULT)["methods"] if RESULT.exists() else {}
    name = f"{method} on {facts['task']}" if "task" in facts else method
    found = {
        "best": options[int(gains.argmax())],
        **facts,
        "tried": [{"options": option, "gain": float(value)} for option, value in zip(options, gains, strict=True)],
    }
    command = "python benchmarks/tuning.py --methods METHOD --seeds SEEDS"
    write_json(RESULT, {"command": command, "task": TASK, "methods": {**before, name: found}})
    print(f"{method}: {found['best']}  {gains.max():+.4f}  (worst {gains.min():+.4f})", flush=True)


if __name__ == "__main__":
    main()
