"""Text as people see it: what is markup, hidden or wrongly decoded in it, and how it is made plain.

Knows nothing of tables, items or prompts.
"""

from __future__ import annotations

import html
import re
import unicodedata

MARKUP = re.compile(r"</?[a-zA-Z][^<>]{0,200}>|&(?:[a-zA-Z]{2,8}|#\d{1,6}|#x[0-9a-fA-F]{1,6});")


CHAT = re.compile(r"<\|[^|<>]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>")


# What UTF-8 looks like when it was read as Latin-1 or Windows-1252.
MOJIBAKE = re.compile(
    "[\u00c2\u00c3\u00d0\u00d1\u00e2][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014"
    "\u2018-\u201e\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122]|\ufffd"
)


def has_hidden(text: str) -> bool:
    """Says whether a text holds control, bidirectional or invisible characters."""
    return not text.isprintable() and any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn") for char in text)


def plain_text(text: str) -> str:
    """Mends what can be mended for certain: mojibake that decodes, entities, tags, control and chat characters."""
    if MOJIBAKE.search(text):
        for encoding in ("cp1252", "latin-1"):
            try:
                text = text.encode(encoding).decode("utf-8")
                break
            except UnicodeError:
                continue
    text = html.unescape(MARKUP.sub(lambda found: found[0] if found[0].startswith("&") else " ", text))
    text = MARKUP.sub(" ", CHAT.sub(" ", text))
    visible = "".join(" " if unicodedata.category(char).startswith("C") else char for char in text)
    return " ".join(visible.split())
