"""Reads settings: YAML under command-line overrides, unknown keys refused with a suggestion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from metarec.errors import ConfigError, shown, suggest

_MAX_YAML_BYTES = 256_000
Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a small YAML mapping without anchors, tags or repeated keys.

    Raises:
        ConfigError: The file is missing, too large, not a mapping, or uses what is not needed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}", "Check the path") from None
    if len(text) > _MAX_YAML_BYTES:
        raise ConfigError(f"'{path}' has {len(text):,} characters", f"At most {_MAX_YAML_BYTES:,} are read")
    try:
        content = yaml.load(text, _PlainLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}", "Repair it") from None
    if not isinstance(content, dict):
        raise ConfigError(f"'{path}' is not a mapping of keys to values", "Write 'key: value' lines")
    return content


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases (no alias bombs) and without repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = {str(key) for key in keys if keys.count(key) > 1}
        if repeated:
            raise yaml.YAMLError(f"key {sorted(repeated)[0]!r} is written twice")
        return super().construct_mapping(node, deep)


# What pydantic adds to the place of a value that may be of several types.
_UNION_TAG = re.compile(r"constrained-\w+|literal\[.*\]|float|int|str")


def validated(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Builds a configuration, naming the first thing that is wrong with it.

    Args:
        model: The configuration's type.
        values: Raw values.
        where: The file or command line they came from.

    Raises:
        ConfigError: A key is unknown (with the closest known one) or a value does not fit.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = _path(first)
        name = ".".join(path)
        if first["type"] == "extra_forbidden":
            known = _fields_at(model, path[:-1])
            raise ConfigError(f"{where}: key '{name}' is unknown", suggest(path[-1], known)) from None
        # A value of several types is wrong in one way for each of them.
        said = [one["msg"].removeprefix("Value error, ") for one in error.errors() if _path(one) == path]
        more = [one.removeprefix("Input should be ") for one in dict.fromkeys(said[1:]) if one != said[0]]
        message = ", or ".join([said[0], *more]).replace("a valid tuple", "a list")
        if first["type"] == "value_error" and isinstance(first["input"], Mapping):  # keys that contradict each other
            section = f"'{name}': " if name else ""
            raise ConfigError(f"{where}: {section}{message}", "Change one of the keys") from None
        raise ConfigError(f"{where}: '{name}' is {shown(first['input'])}", message) from None


def _path(error: Any) -> list[str]:
    """Returns the keys that lead to what a validation error is about."""
    return [str(part) for part in error["loc"] if not _UNION_TAG.fullmatch(str(part))]


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def flattened(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns settings by dotted key; sections may be written as mappings or into the keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = value
    return flat


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns raw settings over others, section by section."""
    both = {key for key in over if isinstance(over[key], Mapping) and isinstance(base.get(key), Mapping)}
    return {**base, **over, **{key: merged(base[key], over[key]) for key in both}}


def override(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Applies ``section.key=value`` assignments; values are YAML.

    Raises:
        ConfigError: An assignment has no ``=``, or goes through something that is not a section.
    """
    changed: dict[str, Any] = {**values}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {shown(assignment)} has no '='", "Write --set train.steps=100")
        section = changed
        *parents, key = path.strip().split(".")
        for parent in parents:
            inner = section.get(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {shown(assignment)}: '{parent}' is not a section", "Check the key's path")
            section[parent] = {**inner}
            section = section[parent]
        try:
            section[key] = yaml.load(text, _PlainLoader)  # noqa: S506 - a SafeLoader
        except yaml.YAMLError:
            raise ConfigError(f"--set {shown(assignment)}: the value is not YAML", "Quote it") from None
    return changed
