"""How objects show themselves in a notebook: small HTML tables, escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def facts_table(title: str, facts: Mapping[str, object]) -> str:
    """Returns facts as an HTML table, a row for each.

    Args:
        title: The table's caption.
        facts: What each is called, and what it is.
    """
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"
