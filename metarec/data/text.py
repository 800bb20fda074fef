"""Text as people see it: what is markup, hidden or wrongly decoded in it, and how it is made plain.

Knows nothing of tables, items or prompts.
"""

from __future__ import annotations

import html
import re

# Characters of the longest text that an item may have.
MAX_TEXT = 1 << 16
MARKUP = re.compile(r"</?[a-zA-Z][^<>]{0,200}>|&(?:[a-zA-Z]{2,8}|#\d{1,6}|#x[0-9a-fA-F]{1,6});")


CHAT = re.compile(r"<\|[^|<>]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>")


# What UTF-8 looks like when it was read as Latin-1 or Windows-1252.
MOJIBAKE = re.compile(
    "[\u00c2\u00c3\u00d0\u00d1\u00e2][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014"
    "\u2018-\u201e\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122]|\ufffd"
)


# Format characters that nobody sees, by number: a Python version's Unicode tables must not decide which these are.
# Signs that are seen (Arabic number signs) are not among them, nor is what is not assigned yet, such as new emoji.
_INVISIBLE = (
    "\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff0-\ufffb"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
)
_CONTROL = "\x00-\x1f\x7f-\x9f\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000f0000-\U0010ffff"
_HIDDEN = re.compile(f"[{_CONTROL}{_INVISIBLE}]")
# Zero-width joiners make one emoji of several and shape Persian and Indic letters; tags make flags.
_JOINERS = re.compile(
    "(?<=[^\x00-\u02ff\\s])[\u200c\u200d](?=[^\x00-\u02ff\\s])"
    "|(?<=\U0001f3f4)[\U000e0030-\U000e0039\U000e0061-\U000e007a]{2,6}\U000e007f"
)
# They stand inside words and mark no gap.
_SOFT = re.compile("(?<=\\w)[\u00ad\u200b\u2060\ufeff]+(?=\\w)")


def visible(text: str) -> str:
    """Returns a text with spaces for what nobody sees; joined emoji and words of joined letters stay whole."""
    if text.isascii() and text.isprintable():
        return text
    text = _SOFT.sub("", text)
    kept: list[str] = []
    end = 0
    for joiner in _JOINERS.finditer(text):
        kept += [_HIDDEN.sub(" ", text[end : joiner.start()]), joiner[0]]
        end = joiner.end()
    return "".join([*kept, _HIDDEN.sub(" ", text[end:])])


def has_hidden(text: str) -> bool:
    """Says whether a text holds characters that nobody sees: control, bidirectional or invisible ones."""
    return not (text.isascii() and text.isprintable()) and visible(text) != text


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
    return " ".join(visible(text).split())
