"""Names that stand for code: metarec's own, those that installed packages bring, and ``module:attribute``.

Everything that people swap is looked up here, so that adding one is one file and one name. An installed package adds
names by entry points; a script or a command line names an attribute of any importable module. Files that may come from
somebody else, such as a saved recommender, never cause an import: see `Registry.get`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast

from metarec.errors import ConfigError, suggest

T = TypeVar("T")
_ATTRIBUTE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


_ALLOWED: set[str] = set()


def allow(name: str) -> None:
    """Lets files name a ``module:attribute`` in this process.

    Raises:
        ConfigError: The name is not of that form.
    """
    if not _ATTRIBUTE.fullmatch(name):
        raise ConfigError(f"the plugin '{name}' is no module:attribute", "Write e.g. my_package.terms:SEASON")
    _ALLOWED.add(name)


def allowed() -> list[str]:
    """Returns what files may name in this process, for another one that works for it."""
    return sorted(_ALLOWED)


class Registry(Generic[T]):
    """What there is of one kind, by name.

    Args:
        kind: What a name stands for, as error messages call it, e.g. ``loss``.
        group: Entry-point group in which other packages add names, e.g. ``metarec.losses``.
        builtin: metarec's own names; a text ``module:attribute`` is imported when it is first asked for.

    Example:
        >>> LOSSES = Registry("loss", "metarec.losses", {"pairwise": pairwise_logistic})
        >>> LOSSES.get("pairwise")
        >>> LOSSES.get("my_package.losses:focal")
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, T | str]) -> None:
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)
        self._registered: dict[str, T] = {}

    def names(self) -> list[str]:
        """Returns all names but those of the form ``module:attribute``: metarec's own first."""
        known = dict.fromkeys([*self._builtin, *self._registered, *self._entry_points()])
        return [name for name in known if not _ATTRIBUTE.fullmatch(name)]

    def register(self, name: str, value: T) -> None:
        """Adds a name for this process.

        Raises:
            ConfigError: metarec has the name already.
        """
        if name in self._builtin:
            raise ConfigError(f"the {self.kind} '{name}' is metarec's own", "Choose another name")
        self._registered[name] = value

    def check(self, name: str) -> str:
        """Returns the name if it can stand for something; imports nothing.

        Raises:
            ConfigError: The name is not known, nor of the form ``module:attribute``.
        """
        if name not in self.names() and not _ATTRIBUTE.fullmatch(name):
            raise ConfigError(
                f"no {self.kind} is called '{name}'", f"{suggest(name, self.names())} Or name a module:attribute"
            )
        return name

    def get(self, name: str, *, from_file: bool = False) -> T:
        """Returns what a name stands for, importing it where it has not been yet.

        Args:
            name: A known name, or ``module:attribute``.
            from_file: The name was read from a file that may be somebody else's: of ``module:attribute`` names only
                those that this process has asked for, registered or allowed before are returned.

        Raises:
            ConfigError: The name is not known, cannot be imported, or comes from a file and is not allowed.
        """
        if name in self._registered:
            return self._registered[name]
        if name in self._builtin:
            value = self._builtin[name]
            if isinstance(value, str):
                value = self._builtin[name] = cast("T", _attribute(value, self.kind))
            return value
        found = self._entry_points()
        if name in found:
            return cast("T", found[name].load())
        self.check(name)
        if from_file and name not in _ALLOWED:
            raise ConfigError(
                f"the {self.kind} '{name}' is code outside metarec, named by a file",
                f"If you trust it: metarec --plugin {name} ..., or in Python metarec.registry.allow('{name}')",
            )
        self._registered[name] = cast("T", _attribute(name, self.kind))
        return self._registered[name]

    def _entry_points(self) -> dict[str, Any]:
        return {entry.name: entry for entry in entry_points(group=self.group)}


def _attribute(name: str, kind: str) -> Any:
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the {kind} '{name}' cannot be imported: {error}", "Check the name, and that its folder is on PYTHONPATH"
        ) from None
    return found
