"""The settings of a recommender small enough to fit in a test, and the task of two opposite tastes to fit it on."""

from __future__ import annotations

from typing import Any

from conftest import known_interactions

from metarec.config import validated
from metarec.data.episodes import split_users
from metarec.data.task import Task
from metarec.data.task_data import TaskData

SETTINGS: dict[str, Any] = {
    "score": ["item mean", "prompt", "adapter"],
    "collaborative": {"features": ["fields", "lm"]},
    "adapter": {"layers": 2, "rank": 2, "alpha": 4.0},
    "meta": {"inner_steps": 3, "inner_lr": 0.3, "shrinkage": 1.0},
    "train": {
        "steps": 40,
        "users": 8,
        "shots": [5, 10],
        "max_query": 10,
        "validate_every": 20,
        "lr": 0.01,
        "warmup": 20,
    },
}
# Longer and with stronger steps: what any language model needs to learn the task, from any start and on any arithmetic.
STRONG: dict[str, Any] = {
    "train": {**SETTINGS["train"], "steps": 80, "patience": 20, "lr": 0.03, "score_lr": 0.05, "sharpness": 4.0},
    "meta": {**SETTINGS["meta"], "inner_lr": None, "inner_steps": 5},
}
ALL_TERMS = ["item mean", "collaborative", "prompt", "adapter"]
# Few folds and kernel steps: what more of them is worth is test_stack's and test_kernel_learning's matter.
WITH_STACK: dict[str, Any] = {
    "score": ALL_TERMS,
    "collaborative": {"features": ["fields", "lm"], "kernel": {"steps": 20}, "stack": {"folds": 2}},
}
# All of a stack, each part for a moment: enough where it is not looked at how well it predicts.
WITH_BRIEF_STACK: dict[str, Any] = {
    "score": ALL_TERMS,
    "collaborative": {
        "features": ["fields", "lm"],
        "kernel": {"steps": 2},
        "gp": {"sweeps": 1, "factors": 2},
        "stack": {"folds": 2, "narrow_sweeps": 1, "pairs": 4},
    },
}
WITH_PROCESS: dict[str, Any] = {
    "score": ALL_TERMS,
    "collaborative": {"features": ["fields", "lm"], "members": "gp"},
}
# What takes a second: nothing of a language model, and hardly any training.
NO_MODEL: dict[str, Any] = {
    "score": ["item mean"],
    "collaborative": {"features": ["fields"], "members": "none"},
    "train": {**SETTINGS["train"], "steps": 2, "validate_every": 2},
}
TASK: dict[str, Any] = {
    "name": "test/known",
    "version": 1,
    "description": "Two opposite tastes.",
    "licence": "none",
    "dataset": {"source": "embedded-movielens"},
    "split": {"fractions": [0.6, 0.2, 0.2]},
    "shots": [0, 5, 10],
    "query": {"max": 14, "min": 5},
    "like_threshold": 3.5,
    "prompt": {
        "text": "is this a good movie ? {{ title }} , {{ genres }} answer :",
        "positive": " Yes",
        "negative": " No",
    },
}


def known_task(seed: int = 0) -> TaskData:
    data = known_interactions()
    task = validated(Task, TASK, "test")
    return TaskData(task, data, split_users(data, task.split.fractions, seed), seed)
