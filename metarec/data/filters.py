"""Chooses items by an expression over their fields, such as ``year >= 1990 and not "Horror" in genres``.

The expression is parsed here and never evaluated as code. Knows nothing of users or models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from metarec.data.interactions import Catalog, Flags
from metarec.data.item_fields import numbers_in, tokens_in
from metarec.data.titles import folded
from metarec.errors import ConfigError, shown, suggest

MAX_CHARACTERS = 1000
_DEEPEST = 30
_EXAMPLE = "Write e.g. year >= 1990 and \"Comedy\" in genres, or language in ['en', 'fr']"
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[-+]?\d+(?:\.\d+)?(?![\w.]))|(?P<text>\"[^\"]*\"|'[^']*')|(?P<name>[^\W\d][\w.-]*|`[^`]+`)"
    r"|(?P<sign><=|>=|==|!=|<|>|=|\(|\)|\[|\]|,))"
)
_ORDER: dict[str, Callable[[NDArray[np.float64], float], Flags]] = {
    "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal
}  # fmt: skip
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_EQUAL = ("==", "=", "!=")
_WORDS = ("and", "or", "not", "in")


@dataclass(frozen=True)
class _Token:
    """A token: its kind, its text, and the character at which it begins."""

    kind: str
    text: str
    at: int


@dataclass
class ItemFilter:
    """Which items of a catalog an expression, or a list of what to block, chooses.

    Args:
        catalog: The items; numbers and categories of a field are read once, when it is first named.
    """

    catalog: Catalog
    _numbers: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    _tokens: dict[str, list[set[str]]] = field(default_factory=dict)

    def where(self, expression: str) -> Flags:
        """Returns which items an expression is true of, shape (items,).

        An expression compares a field with numbers, dates or texts (``< <= > >= == !=``, also ``1990 <= year < 2000``),
        asks whether a category is among a field's (``"Comedy" in genres``) or whether a field is one of a list
        (``language in ["en", "fr"]``), and joins these by ``and``, ``or``, ``not`` and brackets. Case and accents do
        not matter. An item that lacks a field
        satisfies no comparison with it but ``!=``, ``not in``, and what ``not`` turns round. A field whose name
        is no word is written in backquotes.

        Args:
            expression: At most `MAX_CHARACTERS` long.

        Raises:
            ConfigError: It is not understood, names no field, or compares a field without numbers by size.
        """
        if len(expression) > MAX_CHARACTERS:
            raise ConfigError(f"'where' has {len(expression)} characters", f"Use at most {MAX_CHARACTERS}")
        return _Parser(self, expression).parsed()

    def kept(self, where: str | None, block: Sequence[str]) -> Flags:
        """Returns which items may be recommended, shape (items,): those of `where` that are not `blocked`.

        Raises:
            ConfigError: See `where`; or no item is left.
            UnknownItemError: A blocked item is not there.
        """
        flags = np.ones(len(self.catalog), bool) if where is None else self.where(where)
        flags = flags & ~self.blocked(block)
        if not flags.any():
            raise ConfigError("'where' and 'block' leave no item to recommend", "Ask for less")
        return flags

    def blocked(self, entries: Sequence[str]) -> Flags:
        """Returns which items are blocked, shape (items,).

        Args:
            entries: Items by id or title, or ``FIELD=CATEGORY`` for all that carry a category, as ``genres=Horror``.

        Raises:
            UnknownItemError: There is no such item.
        """
        flags = np.zeros(len(self.catalog), bool)
        for entry in entries:
            name, equals, category = entry.partition("=")
            if equals and name.strip() in self.catalog.fields:
                flags |= self.carries(name.strip(), category)
            else:
                flags[self.catalog.find(entry)] = True
        return flags

    def carries(self, name: str, category: str) -> Flags:
        """Returns which items have a category among a field's, or as the whole field, shape (items,)."""
        wanted = folded(category)
        rows = zip(self.tokens(name), self.catalog.fields[name], strict=True)
        return np.array([wanted in tokens or folded(text) == wanted for tokens, text in rows], bool)

    def tokens(self, name: str) -> list[set[str]]:
        """Returns the categories of every item in a field, without case and accents."""
        if name not in self._tokens:
            found = tokens_in(self.catalog.fields[name])
            self._tokens[name] = [{folded(token) for token in tokens} for tokens in found]
        return self._tokens[name]

    def numbers(self, name: str) -> NDArray[np.float64]:
        """Returns the number of every item in a field, shape (items,); NaN where there is none.

        Raises:
            ConfigError: No item has one.
        """
        if name not in self._numbers:
            self._numbers[name] = numbers_in(self.catalog.fields[name])
        if np.isnan(self._numbers[name]).all():
            raise ConfigError(
                f"'where' compares '{name}' by size, and no item has a number or date there",
                f'Compare with == or in: "..." in {name}',
            )
        return self._numbers[name]


class _Parser:
    """Reads an expression from left to right, and computes what it says of all items on the way."""

    def __init__(self, items: ItemFilter, expression: str) -> None:
        self._items = items
        self._expression = expression
        self._tokens = list(self._split())
        self._place = 0
        self._depth = 0

    def _split(self) -> list[_Token]:
        found, at, end = [], 0, len(self._expression.rstrip())
        while at < end:
            match = _TOKEN.match(self._expression, at)
            if match is None or match.lastgroup is None:
                raise self._error(at)
            found.append(_Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
            at = match.end()
        return [*found, _Token("end", "", end)]

    def _error(self, at: int) -> ConfigError:
        rest = self._expression[at:].strip()
        place = f"at {shown(rest[:20])}" if rest else "where it ends"
        return ConfigError(f"'where' {shown(self._expression)} is not understood {place}", _EXAMPLE)

    @property
    def _next(self) -> _Token:
        return self._tokens[self._place]

    def _take(self, *texts: str) -> bool:
        """Steps over the next token if it is one of some signs or words."""
        token = self._next
        if token.kind not in ("sign", "name") or token.text.lower() not in texts:
            return False
        self._place += 1
        return True

    def _need(self, text: str) -> None:
        if not self._take(text):
            raise self._error(self._next.at)

    def parsed(self) -> Flags:
        flags = self._any()
        if self._next.kind != "end":
            raise self._error(self._next.at)
        return flags

    def _any(self) -> Flags:
        flags = self._all()
        while self._take("or"):
            flags = flags | self._all()
        return flags

    def _all(self) -> Flags:
        flags = self._one()
        while self._take("and"):
            flags = flags & self._one()
        return flags

    def _one(self) -> Flags:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ConfigError(f"'where' is nested more than {_DEEPEST} deep", "Write it flatter")
        if self._take("not"):
            flags = ~self._one()
        elif self._take("("):
            flags = self._any()
            self._need(")")
        else:
            flags = self._comparison()
        self._depth -= 1
        return flags

    def _comparison(self) -> Flags:
        left = self._operand()
        negated = self._take("not")
        if negated or (self._next.text.lower() == "in" and self._next.kind == "name"):
            self._need("in")
            among = self._among(left)
            return ~among if negated else among
        flags: Flags | None = None
        while self._next.text in (*_ORDER, *_EQUAL) and self._next.kind == "sign":
            sign = self._next
            self._place += 1
            right = self._operand()
            one = self._compared(left, sign, right)
            flags, left = one if flags is None else flags & one, right
        if flags is None:
            raise self._error(self._next.at)
        return flags

    def _operand(self) -> _Token:
        token = self._next
        if token.kind not in ("number", "text", "name") or token.text.lower() in _WORDS:
            raise self._error(token.at)
        self._place += 1
        return token

    def _field(self, token: _Token) -> str:
        name = token.text.strip("`")
        fields = self._items.catalog.fields
        if name not in fields:
            known = suggest(name, fields)
            raise ConfigError(
                f"'where' names '{name}', which is no field of an item",
                f"{known}{'' if known.endswith(('.', '?')) else '.'} Texts are written in quotes: '{name}'",
            )
        return name

    def _compared(self, left: _Token, sign: _Token, right: _Token) -> Flags:
        if (left.kind == "name") == (right.kind == "name"):
            raise ConfigError(
                f"'where' compares '{left.text}' with '{right.text}'", "Compare a field with a number or a quoted text"
            )
        token, value = (left, right) if left.kind == "name" else (right, left)
        name = self._field(token)
        if sign.text in _EQUAL:
            same = self._equals(name, value)
            return ~same if sign.text == "!=" else same
        comparison = sign.text if token is left else _TURNED[sign.text]
        number = numbers_in([_text(value)])[0]
        if np.isnan(number):
            raise ConfigError(f"'where' compares '{name}' with {value.text}, no number or date", _EXAMPLE)
        return np.asarray(_ORDER[comparison](self._items.numbers(name), number), bool)

    def _equals(self, name: str, value: _Token) -> Flags:
        text = folded(_text(value))
        same = np.array([folded(own) == text for own in self._items.catalog.fields[name]], bool)
        if value.kind == "number":
            same |= numbers_in(self._items.catalog.fields[name]) == float(value.text)
        return same

    def _among(self, left: _Token) -> Flags:
        if left.kind != "name":
            return self._items.carries(self._field(self._operand_name()), _text(left))
        name = self._field(left)
        self._need("[")
        flags = np.zeros(len(self._items.catalog), bool)
        while not self._take("]"):
            value = self._operand()
            if value.kind == "name":
                raise ConfigError(f"'where' lists {value.text} without quotes", f"Write '{value.text}'")
            flags |= self._equals(name, value) | self._items.carries(name, _text(value))
            if not self._take(",") and self._next.text != "]":
                raise self._error(self._next.at)
        return flags

    def _operand_name(self) -> _Token:
        token = self._operand()
        if token.kind != "name":
            raise self._error(token.at)
        return token


def _text(token: _Token) -> str:
    return token.text[1:-1] if token.kind == "text" else token.text
