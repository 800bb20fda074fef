"""JSON values as text."""

from __future__ import annotations

import ast
import json
from typing import Any


def as_text(value: Any) -> str:
    """Returns a JSON value as one text: lists joined by commas, null as nothing."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(text for text in map(as_text, value) if text)
    if isinstance(value, bool):
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, dict) else repr(value)


def list_as_text(text: str) -> str:
    """Returns ``["Action", "Drama"]`` as ``Action, Drama``, of objects their names; any other text as it is."""
    if not (text.startswith("[") and text.endswith("]")):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            held = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return as_text([value.get("name", value) if isinstance(value, dict) else value for value in held])
    return text
