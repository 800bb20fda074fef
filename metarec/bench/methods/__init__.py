"""Every method of a benchmark, by name.

A file here holds the methods of one kind: `trivial`, `foldin`, `controls`, `networks`, `prompts`, `finetuning`,
`recommenders`, `posterior`. To add one, write a function from a `MethodContext` to rows into the file of its kind and
give it a line in that file's table. A method outside metarec is an entry point of the group ``metarec.methods``, or
named as ``module:attribute``; either stands for a `Method`, or for such a function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from metarec.bench.context import Method, MethodContext, MethodRow
from metarec.bench.methods.controls import CONTROLS, KERNELS, PERMUTED, SIDE, WITHOUT, permuted, without
from metarec.bench.methods.finetuning import FINE_TUNED
from metarec.bench.methods.foldin import FOLD_IN
from metarec.bench.methods.networks import NETWORKS
from metarec.bench.methods.posterior import POSTERIOR
from metarec.bench.methods.prompts import PROMPTS
from metarec.bench.methods.recommenders import RECOMMENDERS
from metarec.bench.methods.trivial import TRIVIAL
from metarec.errors import ConfigError, shown, suggest
from metarec.registry import Registry

__all__ = ["METHODS", "Method", "MethodContext", "MethodRow", "Methods"]
_GROUP_OF_FUNCTIONS = "other"


class Methods(Registry[Method]):
    """The registry of methods, with their groups; a plain function becomes a `Method` of the group ``other``.

    A method's name followed by ``, titles permuted`` is that method on a catalog whose texts were permuted; followed by
    ``, without BLOCK``, on data that lack a field, vectors or side information.
    """

    def get(self, name: str, *, from_file: bool = False) -> Method:
        """Returns a method, importing it where it has not been yet.

        Raises:
            ConfigError: The name is not known, cannot be imported, or stands for no method.
        """
        if (derived := self._derived(name)) is not None:
            base, block = derived
            method = self.get(base, from_file=from_file)
            return permuted(method) if block is None else without(method, block)
        try:
            found: Any = super().get(name, from_file=from_file)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"the method '{name}' of an installed package cannot be imported: {error}", "Repair or remove it"
            ) from None
        if isinstance(found, Method):
            return found
        if not callable(found) or isinstance(found, type):
            raise ConfigError(
                f"the method '{name}' is {shown(found)}", "Name a Method, or a function from a MethodContext to rows"
            )
        function: Any = found
        options: dict[str, Any] = {}
        while isinstance(function, partial) and not function.args:
            function, options = function.func, {**function.keywords, **options}
        about = (getattr(function, "__doc__", None) or name).strip().splitlines()[0]
        return Method(function, _GROUP_OF_FUNCTIONS, about, options)

    def _derived(self, name: str) -> tuple[str, str | None] | None:
        """Returns the method that a name is a control of, and the block that it lacks; None: permuted titles."""
        if name in self.names():
            return None
        if name.endswith(PERMUTED):
            return name.removesuffix(PERMUTED), None
        base, found, block = name.rpartition(WITHOUT)
        return (base, block) if found else None

    def is_own(self, name: str) -> bool:
        """Says whether a method is metarec's own."""
        derived = self._derived(name)
        return self.is_own(derived[0]) if derived else name in self._builtin

    def groups(self) -> dict[str, list[str]]:
        """Returns the names of every group's methods, by group."""
        members: dict[str, list[str]] = {}
        for name in self.names():
            members.setdefault(self.get(name).group, []).append(name)
        return members

    def members(self, name: str) -> list[str]:
        """Returns the methods that a name stands for: the method, or all of a group.

        Raises:
            ConfigError: Neither a method nor a group is called so.
        """
        if name in self.names() or ":" in name or self._derived(name) is not None:
            self.get(name)
            return [name]
        groups = self.groups()
        if name not in groups:
            raise ConfigError(
                f"no method or group is called '{name}'",
                f"{suggest(name, [*self.names(), *groups])} Or name a module:attribute",
            )
        return groups[name]

    def reads_side(self, name: str) -> bool:
        """Says whether a method reads what a task brings of users and moments; one from outside may, whatever it is."""
        derived = self._derived(name)
        if derived is not None:
            return derived[1] == SIDE or self.reads_side(derived[0])
        return name not in self._builtin or name in _READ_SIDE

    def code(self, name: str) -> str | None:
        """Returns a digest of the file that an outside method is named in; None for metarec's own.

        So a cell is measured again once that file has changed, with it options that are not in `Method.options`.
        """
        if (derived := self._derived(name)) is not None:
            return self.code(derived[0])
        if name in self._builtin:
            return None
        outside = {entry.name: entry.module for entry in entry_points(group=self.group)}
        module = name.partition(":")[0] if ":" in name else outside.get(name)
        if module is None:
            return None
        file = getattr(import_module(module), "__file__", None)
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


_ALL: Mapping[str, Method] = {
    **TRIVIAL,
    **FOLD_IN,
    **CONTROLS,
    **KERNELS,
    **PROMPTS,
    **FINE_TUNED,
    **NETWORKS,
    **RECOMMENDERS,
    **POSTERIOR,
}
# These read items alone, of the kinds whose others read a user and a moment too.
_READ_SIDE = {*PROMPTS, *FINE_TUNED, *NETWORKS, *RECOMMENDERS, *POSTERIOR} - {"zero-shot prompt", "per-user LoRA"}
METHODS = Methods("method", "metarec.methods", _ALL)
