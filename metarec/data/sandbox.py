"""Jinja2 templates that end soon: in bounded time, with bounded text, without reach beyond the values they are given.

A template may choose, loop, join and cut; what could grow without bound is refused when it is read, or stopped when it
is rendered. Knows nothing of items or prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment

from metarec.data.text import MAX_TEXT

_MAX_TEMPLATE = 10_000
_MAX_STEPS = 1_000
# Characters that filters, methods and operators may read and write to render one text.
_MAX_WORK = 10_000_000
_FILTERS = """
abs capitalize count d default first float int last length list lower max min reverse round sort string striptags title
trim truncate unique upper wordcount
""".split()  # noqa: SIM905 - quoted words are harder to read
_METHODS = """
capitalize casefold count endswith find isalnum isalpha isdigit isnumeric isspace lower lstrip partition removeprefix
removesuffix replace rfind rpartition rsplit rstrip split splitlines startswith strip title upper
""".split()  # noqa: SIM905
_REFUSED: Mapping[type[nodes.Node], str] = {
    nodes.Assign: "set",
    nodes.AssignBlock: "set",
    nodes.Block: "block",
    nodes.CallBlock: "call",
    nodes.Extends: "extends",
    nodes.FilterBlock: "filter",
    nodes.FromImport: "import",
    nodes.Import: "import",
    nodes.Include: "include",
    nodes.Macro: "macro",
    nodes.Pow: "**",
}


class TemplateTooLarge(jinja2.TemplateError):
    """A template asks for more text or time than one item's text needs."""


_work: ContextVar[list[int] | None] = ContextVar("work", default=None)


def _spend(characters: int) -> None:
    """Counts work of the text that is being rendered.

    Raises:
        TemplateTooLarge: It is too much.
    """
    if characters > MAX_TEXT:
        raise TemplateTooLarge(f"a text of more than {MAX_TEXT:,} characters")
    spent = _work.get()
    if spent is not None:
        spent[0] += characters + 1
        if spent[0] > _MAX_WORK:
            raise TemplateTooLarge("too much work for one item")


def _size(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    return sum(map(_size, value)) if isinstance(value, list | tuple | set) else 1


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def counted(*arguments: Any, **options: Any) -> Any:
        _spend(sum(_size(argument) for argument in arguments if isinstance(argument, str | list | tuple)))
        return function(*arguments, **options)

    return counted


def _replace(text: object, old: object, new: object, count: int = -1) -> str:
    text, old, new = str(text), str(old), str(new)
    _spend(len(text) + (text.count(old) if count < 0 else count) * len(new))
    return text.replace(old, new, count)


def _join(values: Iterable[object], between: object = "") -> str:
    parts = list(map(str, values))
    _spend(sum(map(len, parts)) + len(parts) * len(str(between)))
    return str(between).join(parts)


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if not -10 <= precision <= 10:
        raise TemplateTooLarge(f"round({precision})")
    rounded: float = FILTERS["round"](value, precision, method)
    return rounded


def _steps(values: Iterable[Any]) -> Iterator[Any]:
    """Gives what a loop goes through, and stops a loop that does not end soon."""
    for step, value in enumerate(values):
        if step >= _MAX_STEPS:
            raise TemplateTooLarge(f"a loop of more than {_MAX_STEPS:,} steps")
        # Loops inside loops multiply their steps.
        _spend(_MAX_WORK // (20 * _MAX_STEPS))
        yield value


class _Bounded(ImmutableSandboxedEnvironment):
    """An environment whose operators and methods cannot blow a text up."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str | list | tuple):
            _spend(_size(left) + _size(right))
        elif not all(isinstance(value, int | float | jinja2.Undefined) for value in (left, right)):
            kinds = f"{type(left).__name__} {operator} {type(right).__name__}"
            raise TemplateTooLarge(f"{kinds} is not arithmetic of numbers")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, /, *arguments: Any, **options: Any) -> Any:
        name, owner = getattr(called, "__name__", ""), getattr(called, "__self__", None)
        if not isinstance(owner, str) or name not in _METHODS:
            raise TemplateTooLarge(f"a call of {name or 'what is no function'}()")
        if name == "replace":
            return _replace(owner, *arguments, **options)
        _spend(len(owner))
        return super().call(context, called, *arguments, **options)


def _environment() -> _Bounded:
    environment = _Bounded(undefined=jinja2.StrictUndefined, autoescape=False)
    environment.globals.clear()
    known: dict[str, Callable[..., Any]] = {name: _counted(FILTERS[name]) for name in _FILTERS}
    environment.filters = {**known, "replace": _replace, "join": _join, "round": _round, "steps": _steps}
    return environment


@dataclass(frozen=True)
class BoundedTemplate:
    """A template that was read by `read_template`."""

    compiled: jinja2.Template

    def render(self, values: Mapping[str, str]) -> str:
        """Returns the text.

        Raises:
            jinja2.TemplateError: A name is unknown, or the text would be too large or take too long.
            ArithmeticError, LookupError, TypeError, ValueError: An operation does not fit its values.
        """
        token = _work.set([0])
        pieces, size = [], 0
        try:
            for piece in self.compiled.generate(**values):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_TEXT:
                    raise TemplateTooLarge(f"a text of more than {MAX_TEXT:,} characters")
        finally:
            _work.reset(token)
        return "".join(pieces)


def read_template(text: str) -> BoundedTemplate:
    """Reads a template.

    Raises:
        jinja2.TemplateError: It does not parse, or it uses what is not bounded: ``**``, ``set``, macros, includes,
            filters and methods that are not among those of this module.
    """
    if len(text) > _MAX_TEMPLATE:
        raise TemplateTooLarge(f"a template of {len(text):,} characters, more than {_MAX_TEMPLATE:,}")
    environment = _environment()
    try:
        tree = environment.parse(text)
        for node in tree.find_all(tuple(_REFUSED)):
            raise TemplateTooLarge(f"'{_REFUSED[type(node)]}' in line {node.lineno}")
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "steps", [], [], None, None, lineno=loop.lineno)
        tree.set_environment(environment)
        return BoundedTemplate(environment.from_string(tree))
    except (RecursionError, SyntaxError):
        raise TemplateTooLarge("brackets or blocks that are nested too deep") from None


def names_in(text: str) -> list[str]:
    """Returns the names that a template reads, in the order of their first places."""
    tree = _environment().parse(text)
    free = meta.find_undeclared_variables(tree)
    return list(dict.fromkeys(node.name for node in tree.find_all(nodes.Name) if node.name in free))
