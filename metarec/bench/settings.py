"""Settings of a benchmark's cells: dotted keys of `RunConfig`, checked, without those that are the default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metarec.config import RunConfig, flattened, validated
from metarec.errors import ConfigError

# A cell has these already.
_OF_THE_CELL = ("task", "seed")


def run_config(settings: Mapping[str, Any], where: str) -> RunConfig:
    """Returns the defaults with some settings changed.

    Args:
        settings: Values by dotted key, e.g. ``{"train.steps": 20}``.
        where: The file or command line they came from, for error messages.

    Raises:
        ConfigError: A key is unknown (with the closest known one) or a value does not fit.
    """
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        section = nested
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{where}: '{key}' goes through '{parent}', which is no section", "Check the key")
        section[last] = value
    return validated(RunConfig, nested, where)


def canonical(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns settings as JSON values by dotted key, sorted, without those that are the default anyway.

    So the same settings are the same cell, however they are written.

    Args:
        settings: As `flattened` takes them.
        where: The file or command line they came from, for error messages.

    Raises:
        ConfigError: A key is unknown, is the cell's own (task or seed), or a value does not fit.
    """
    flat = flattened(settings)
    for key in _OF_THE_CELL:
        if key in flat:
            raise ConfigError(f"{where}: '{key}' is no setting of a benchmark", f"A plan's part names its own {key}s")
    given, default = (
        flattened(config.model_dump(mode="json")) for config in (run_config(flat, where), run_config({}, where))
    )
    return {key: given[key] for key in sorted(flat) if key not in default or given[key] != default[key]}


def label(settings: Mapping[str, Any]) -> str:
    """Returns what is written behind a method's name: nothing, or e.g. `` [backbone=minilm-l6-v2]``."""
    return f" [{', '.join(f'{key}={value}' for key, value in settings.items())}]" if settings else ""
