"""JSON values as text."""

from __future__ import annotations

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
