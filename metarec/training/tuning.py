"""Hyper-parameter search with Optuna: settings are tried on meta-training users and chosen by validation users.

Test users are taken out of the data before the first trial, their ratings with them, so that no trial can see one.

Source: Akiba et al. 2019, "Optuna"; trials are drawn by its TPE sampler and pruned by the median rule.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from metarec.config import RunConfig, override, validated
from metarec.errors import ConfigError, shown
from metarec.meta.tracking import TrackedRun, tracked
from metarec.training.fitting import needs_model, open_backbone, prepare
from metarec.training.meta_training import meta_train, training_identity
from metarec.training.task_features import for_task

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData
    from metarec.lm.backbone import Backbone

_RANGE = re.compile(r"(log:)?([-+.\deE]+)\.\.([-+.\deE]+)")
# What a model is opened by.
_OPENS = ("backbone", "backbone_precision", "dtype", "device")
# Trials before any is pruned: the median of fewer says little.
_UNPRUNED = 4


@dataclass(frozen=True)
class Parameter:
    """A setting that is searched over.

    Args:
        key: Its dotted key.
        choices: The values to choose from; none where it is a range.
        low: The range's lower end.
        high: Its upper end.
        log: Whether orders of magnitude are drawn evenly.
        whole: Whether its values are whole numbers.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    @classmethod
    def read(cls, text: str) -> Parameter:
        """Reads ``KEY=LOW..HIGH``, ``KEY=log:LOW..HIGH`` or ``KEY=VALUE,VALUE,...``.

        Raises:
            ConfigError: It is none of these.
        """
        key, equals, values = text.partition("=")
        found = _RANGE.fullmatch(values.strip())
        if not equals or not values.strip():
            raise ConfigError(
                f"--param {shown(text)} names no values", "Write KEY=LOW..HIGH, KEY=log:LOW..HIGH or KEY=VALUE,VALUE"
            )
        if found is None:
            try:
                return cls(key.strip(), tuple(yaml.safe_load(f"[{values}]")))
            except yaml.YAMLError:
                raise ConfigError(f"--param {shown(text)}: the values are not YAML", "Quote them") from None
        try:
            low, high = float(found[2]), float(found[3])
        except ValueError:
            raise ConfigError(f"--param {shown(text)} is no range of numbers", "Write KEY=LOW..HIGH") from None
        if not low < high or (found[1] and low <= 0):
            raise ConfigError(f"--param {shown(text)} is no range", "Write the lower number first, above 0 for log:")
        whole = all(re.fullmatch(r"[-+]?\d+", part) for part in found.groups()[1:])
        return cls(key.strip(), (), low, high, bool(found[1]), whole)

    @property
    def probes(self) -> tuple[Any, ...]:
        """Values that must fit before any is tried: all choices, or a range's ends and a number between them."""
        if self.choices:
            return self.choices
        return (
            (int(self.low), int(self.high))
            if self.whole
            else (self.low, self.high, self.low + (self.high - self.low) / 3.7)
        )

    def draw(self, trial: Any) -> Any:
        """Returns the value that a trial of Optuna proposes."""
        if self.choices:
            named = {str(value): value for value in self.choices}
            return named[trial.suggest_categorical(self.key, [*named])]
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Args:
        settings: The best trial's values by dotted key.
        value: Its validation users' AUC.
        trials: One entry per trial: its number, state, values and the AUC, None where it was pruned or failed.
    """

    settings: Mapping[str, Any]
    value: float
    trials: tuple[Mapping[str, Any], ...]


def without_test_users(data: TaskData) -> TaskData:
    """Returns a task's data without its test users: nobody is tested, and none of their ratings is left."""
    gone = np.setdiff1d(data.parts["test"], np.concatenate([data.parts["train"], data.parts["validation"]]))
    parts = {**data.parts, "test": data.parts["test"][:0]}
    kept = [
        None if whole is None else whole.subset(~np.isin(whole.user, gone))
        for whole in (data.interactions, data.held_out)
    ]
    assert kept[0] is not None
    return replace(data, parts=parts, interactions=kept[0], held_out=kept[1])


def validation_value(
    data: TaskData, config: RunConfig, backbone: Backbone | None, watch: Callable[[float], None]
) -> float:
    """Returns the best AUC of validation users in a meta-training by some settings.

    Args:
        data: The task's data, without test users.
        config: The settings.
        backbone: The language model; None where none is read.
        watch: Called with the value of every validation; what it raises ends the training.
    """
    identity = training_identity(data, for_task(config, data.task), backbone)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "checkpoint"
        fitted = meta_train(data, prepare(data, config, backbone), config, identity, path, False, watch=watch)
    return float(fitted.training["best_validation_auc"])


def tune(
    data: TaskData,
    values: Mapping[str, Any],
    parameters: Sequence[Parameter],
    *,
    trials: int,
    storage: Path,
    prune: bool = True,
    trackers: Sequence[str] = (),
) -> Tuned:
    """Searches for the settings by which validation users' items are ordered best.

    Args:
        data: The task's data; test users are left out.
        values: The settings that are not searched over, as sections.
        parameters: What is searched over.
        trials: How many trials there are in the end, those of before among them.
        storage: SQLite file of the trials; where it is there, the search goes on.
        prune: Ends a trial whose validation is below the median of those before at the same step.
        trackers: Where the numbers of every trial go, as a run of its own; see `metarec.meta.tracking`.

    Raises:
        ConfigError: Optuna is not installed, a setting is unknown, a value does not fit, the file holds the trials of
            another search, or no trial was completed.
    """
    optuna = _optuna()
    if not parameters:
        raise ConfigError("nothing is searched over", "Add --param train.lr=log:0.0001..0.01")
    seen = without_test_users(data)
    start = {one.key: one.probes[0] for one in parameters}
    first = _settings(values, start)
    for one in parameters:
        for value in one.probes[1:]:
            _settings(values, start | {one.key: value})
    backbone = open_backbone(first) if needs_model(for_task(first, data.task)) else None
    storage.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{storage.absolute()}",
        study_name="metarec",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(_UNPRUNED) if prune else optuna.pruners.NopPruner(),
    )
    _refuse_another_search(study, data, values, parameters)
    done = sum(trial.state.is_finished() and trial.state.name != "FAIL" for trial in study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=first.seed + len(study.trials))

    def objective(trial: Any) -> float:
        config = _settings(values, {one.key: one.draw(trial) for one in parameters})
        same = all(getattr(config, key) == getattr(first, key) for key in _OPENS)
        model = backbone if same else open_backbone(config)
        count = 0

        def watch(value: float) -> None:
            nonlocal count
            trial.report(value, count)
            count += 1
            if trial.should_prune():
                raise optuna.TrialPruned

        name = f"{storage.parent.name}-{trial.number}"
        run = TrackedRun(name, storage.parent / f"trial-{trial.number}", dict(trial.params))
        with tracked(trackers, run):
            return validation_value(seen, config, model, watch)

    if trials > done:
        study.optimize(objective, n_trials=trials - done)
    return _tuned(study)


def _settings(values: Mapping[str, Any], chosen: Mapping[str, Any]) -> RunConfig:
    assignments = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}" for key, value in chosen.items()
    ]
    return validated(RunConfig, override(dict(values), assignments), "--param")


def _refuse_another_search(
    study: Any, data: TaskData, values: Mapping[str, Any], parameters: Sequence[Parameter]
) -> None:
    """Refuses to add trials to those of other data, settings or ranges, whose values cannot be compared."""
    fixed = {key: value for key, value in values.items() if key not in ("device", "cache")}
    text = json.dumps([data.interactions.digest, fixed, sorted(map(repr, parameters))], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if study.trials and study.user_attrs.get("search", digest) != digest:
        raise ConfigError("the trials of before searched other data, settings or ranges", "Choose another --name")
    study.set_user_attr("search", digest)


def _tuned(study: Any) -> Tuned:
    rows = tuple(
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "settings": dict(trial.params),
            "validation_auc": trial.value if trial.state.name == "COMPLETE" else None,
        }
        for trial in study.trials
    )
    completed = [row for row in rows if row["validation_auc"] is not None]
    if not completed:
        raise ConfigError("no trial was completed", "Run more trials, or name other values")
    best = max(completed, key=lambda row: (row["validation_auc"], -row["number"]))
    return Tuned(best["settings"], best["validation_auc"], rows)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError("Optuna is not installed", "Run: pip install 'metarec[tune]'") from None
    # A trial that fails ends the search with its error; Optuna would log the traceback before.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
