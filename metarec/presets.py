"""Presets: settings by what a run may cost. A file's settings, options and ``--set`` come on top of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metarec.config import RunConfig, merged, override, validated
from metarec.errors import ConfigError, suggest

# Dotted keys, as in --set; "standard" is the defaults.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"score": ["item mean", "collaborative"], "collaborative.features": ["text", "fields", "vectors"]},
    "quick": {
        "collaborative.features": ["text", "fields", "vectors"],
        "collaborative.kernel.steps": 100,
        "train.steps": 20,
        "train.max_query": 10,
        "train.validate_every": 20,
        "train.validation_users": 24,
    },
    "text": {
        "score": ["item mean", "collaborative"],
        "collaborative.members": "linear",
        "collaborative.features": ["words", "text", "tuned text", "fields", "projection", "vectors"],
        "collaborative.projection.keep": "better",
    },
    "standard": {},
    # For an accelerator: every kind of feature, a larger adapter, and longer training of all that is learned.
    "full": {
        "collaborative.features": ["words", "text", "tuned text", "fields", "vectors", "lm"],
        "collaborative.tuning.pairs": 512,
        "collaborative.tuning.steps": 1000,
        "collaborative.tuning.posterior.steps": 500,
        "adapter.layers": 12,
        "adapter.rank": 8,
        "adapter.alpha": 16,
        "train.steps": 1000,
        "train.users": 32,
    },
}


def preset(name: str, values: Mapping[str, Any] | None = None) -> RunConfig:
    """Returns the settings of a preset, with other values in the place of its own.

    Args:
        name: The preset.
        values: Settings as sections, such as ``{"train": {"steps": 50}}``.

    Raises:
        ConfigError: No preset has that name, a key is unknown or a value does not fit.
    """
    return validated(RunConfig, with_preset(name, values or {}), f"preset('{name}')")


def with_preset(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns raw settings above those of a preset.

    Args:
        name: The preset.
        values: Settings as sections, as a file has them; these win.

    Raises:
        ConfigError: No preset has that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is called '{name}'", suggest(name, PRESETS))
    return merged(override({}, [f"{key}={value}" for key, value in PRESETS[name].items()]), values)
