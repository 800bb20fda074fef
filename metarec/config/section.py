"""What all groups of settings have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from metarec.errors import ConfigError
from metarec.registry import Registry


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)


def checked(registry: Registry[Any], name: str) -> str:
    """Returns a name that a registry has, for validators.

    Raises:
        ValueError: It has not.
    """
    try:
        return registry.check(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None
