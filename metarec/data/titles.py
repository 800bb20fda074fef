"""Titles of items: how catalogues write them, how people write them, and which items a text may mean.

Knows nothing of ids, ratings or files.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

_ARTICLES = "the|an?|les?|la|l'|il|el|die|der|das"
_BRACKETS = re.compile(r"\s*\([^()]*\)$")
_LAST_ARTICLE = re.compile(rf"^(.*), ({_ARTICLES})$", re.IGNORECASE)
_FIRST_ARTICLE = re.compile(rf"^(?:{_ARTICLES}) (?=.)")
_YEAR = re.compile(r"^(.*\S)\s*\(((?:18|19|20)\d\d)(?:-(?:(?:19|20)\d\d)?)?\)$", re.DOTALL)
_ANY_YEAR = re.compile(r"(?<!\d)(?:18|19|20)\d\d(?!\d)")
_BRACKETED = re.compile(r"\(([^()]*)\)")
# Where a subtitle begins.
_SUBTITLE = re.compile(r"\s*(?::| [-\u2013\u2014] )")
# Punctuation, signs, separators and control characters; marks that belong to a letter stay.
_BETWEEN_WORDS = "PSZC"
_NO_LETTERS = bytes(code for code in range(128) if not chr(code).isalnum() and chr(code) != "\n")
# How many texts are looked for before all titles are normalised.
_ASKED_FIRST = 8
_ASCII = {code: " " for code in range(128) if not chr(code).isalnum()}

# Of a text that is no title: words that it may mean for each of its own, items that are compared letter by letter, and
# items that a word may be in where a rarer one is known.
_WORDS_TRIED, _COMPARED, _COMMON = 5, 50, 1000
_LIKE_WORD, _LIKE_TITLE = 0.7, 0.5


def read_title(text: str) -> tuple[str, str]:
    """Reads a title as catalogues write it: ``Matrix, The (1999)`` is ``The Matrix`` of ``1999``.

    Args:
        text: The title; a year in brackets at its end is taken off, articles go to the front, in brackets too.

    Returns:
        The title as people say it, and the year or an empty string.
    """
    text = " ".join(text.split())
    match = _YEAR.match(text)
    title, year = match.groups() if match else (text, "")
    first = title.find(" (")
    head, tail = (title, "") if first < 0 else (title[:first], title[first:])
    return article_first(head) + _BRACKETED.sub(lambda inner: f"({article_first(inner[1])})", tail), year


def article_first(title: str) -> str:
    """Returns a title with an article at its end put in front: ``Matrix, The`` as ``The Matrix``."""
    match = _LAST_ARTICLE.match(title)
    if not match:
        return title
    rest, article = match.groups()
    return f"{article}{'' if article.endswith(chr(39)) else ' '}{rest}"


def folded(text: str) -> str:
    """Returns a text without case, accents and repeated spaces."""
    if text.isascii():
        return " ".join(text.lower().split())
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return " ".join("".join(char for char in decomposed if not unicodedata.combining(char)).split())


def words(text: str) -> list[str]:
    """Returns the words of a text, without case, accents and punctuation."""
    plain = folded(text).replace("'", "").replace("\u2019", "").replace("&", " and ")
    if plain.isascii():
        return plain.translate(_ASCII).split()
    kept = (" " if unicodedata.category(char)[0] in _BETWEEN_WORDS else char for char in plain)
    return "".join(kept).split()


def _spoken(title: str) -> str:
    """Returns a title's words in a row; a title without words is folded alone."""
    return " ".join(words(title)) or folded(title)


def _main(title: str) -> str:
    """Returns a title's words without its article and its subtitle."""
    head = _SUBTITLE.split(title, maxsplit=1)[0] or title
    return _FIRST_ARTICLE.sub("", _spoken(article_first(head)))


class TitleIndex:
    """The titles of a catalog, normalised: by what is written, by what is said, and by single words.

    The first few texts are compared with those titles alone that have their longest word; where more is asked, all are
    normalised once.

    Args:
        titles: One per item.
        years: One per item, an empty string where there is none; None reads years in brackets alone. A date counts as
            its year.
    """

    def __init__(self, titles: Sequence[str], years: Sequence[str] | None = None) -> None:
        self._titles = titles
        self._dates = years
        self._asked = 0

    def _year(self, code: int) -> str:
        found = None if self._dates is None else _ANY_YEAR.search(self._dates[code])
        return found[0] if found else _year_of(self._titles[code])

    @cached_property
    def _forms(self) -> tuple[Mapping[str, list[int]], ...]:
        """What `_forms_of` returns of all items."""
        return self._forms_of(range(len(self._titles)))

    @cached_property
    def _squeezed(self) -> tuple[bytes, NDArray[np.int64], NDArray[np.int64]]:
        """Letters and digits of all titles, a line each; where each line ends; and the titles beyond ASCII."""
        lines = "\n".join(title.replace("\n", " ") for title in self._titles).lower().encode("utf-8", "surrogatepass")
        text = lines.translate(None, _NO_LETTERS)
        symbols = np.frombuffer(text, np.uint8)
        ends = np.flatnonzero(symbols == ord("\n"))
        return text, ends, np.unique(np.searchsorted(ends, np.flatnonzero(symbols >= 128)))

    def _candidates(self, bare: str) -> NDArray[np.int64] | None:
        """Returns the items that a title without its year may name; None where all may be."""
        # In a title, an ampersand may stand for a word, and L' behind it for a word's first letter.
        own = [word.removeprefix("l") for word in _main(bare).split() if word != "and" and word.isalnum()]
        word = max(own, key=len, default="")
        if not word:
            return None
        text, ends, beyond_ascii = self._squeezed
        found = [match.start() for match in re.finditer(re.escape(word.encode()), text)] if word.isascii() else []
        return np.union1d(np.searchsorted(ends, np.array(found, np.int64)), beyond_ascii)

    def _forms_of(self, codes: Iterable[int]) -> tuple[Mapping[str, list[int]], ...]:
        """Returns items by title as it is written, as people say it, and without article and subtitle."""
        codes = list(codes)

        def forms(title: str) -> Iterable[str]:
            bare = _without_brackets(title)
            return {title, article_first(title), article_first(_split_year(title)[0]), article_first(bare)}

        return (
            self._by(codes, lambda title: {folded(title)}),
            self._by(codes, lambda title: {_spoken(form) for form in forms(title)}),
            self._by(codes, lambda title: {_main(_without_brackets(title))}),
        )

    def _by(self, codes: Sequence[int], keys: Callable[[str], Iterable[str]]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for code in codes:
            for key in keys(self._titles[code]):
                if key:
                    found.setdefault(key, []).append(code)
        return found

    def find(self, text: str) -> list[int]:
        """Returns the items that a text names: one, several that share the title, or none.

        A year in brackets has to be the item's; an item that has none is taken where no other is of that year. With a
        year that is the item's, its article and its subtitle may be left out.

        Args:
            text: A title, or ``title (year)``.
        """
        bare, year = _split_year(text)
        self._asked += 1
        codes = self._candidates(bare) if self._asked <= _ASKED_FIRST else None
        written, spoken, main = self._forms if codes is None else self._forms_of(codes.tolist())
        whole = written.get(folded(text)) or spoken.get(_spoken(article_first(text)), [])
        if whole or not year:
            return whole
        named = [written.get(folded(bare), []), spoken.get(_spoken(article_first(bare)), [])]
        dated = [*named, main.get(_main(bare), [])]
        of_year = ([code for code in codes if self._year(code) == year] for codes in dated)
        undated = ([code for code in codes if not self._year(code)] for codes in named)
        return next((codes for codes in (*of_year, *undated) if codes), [])

    @cached_property
    def _words(self) -> tuple[Mapping[str, NDArray[np.int64]], NDArray[np.int64]]:
        """Items by each word of their titles, and how many different words every title has."""
        found: dict[str, list[int]] = {}
        counts = np.zeros(len(self._titles), np.int64)
        for code, title in enumerate(self._titles):
            own = set(words(title))
            counts[code] = len(own)
            for word in own:
                found.setdefault(word, []).append(code)
        return {word: np.array(codes, np.int64) for word, codes in found.items()}, counts

    @cached_property
    def _words_by_letters(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for word in self._words[0]:
            for letters in _letters(word):
                found.setdefault(letters, []).append(word)
        return found

    def shared(self, text: str) -> NDArray[np.float64]:
        """Returns each title's share of common words with a text, from 0 to 1, shape (items,)."""
        items, counts = self._words
        own = set(words(text))
        common = np.zeros(len(self._titles))
        for word in own & items.keys():
            common[items[word]] += 1
        share: NDArray[np.float64] = common / np.maximum(counts + len(own) - common, 1)
        return share

    def nearest(self, text: str, count: int = 3) -> list[int]:
        """Returns the items whose titles are nearest to a text, nearest first; none where nothing is near.

        Args:
            text: What somebody wrote, perhaps misspelt.
            count: How many items at most.
        """
        wanted = words(_split_year(text)[0])
        items = self._words[0]
        found = [(likeness, items[word]) for own in wanted for word, likeness in self._words_like(own).items()]
        found.sort(key=lambda one: len(one[1]))
        telling = [one for place, one in enumerate(found) if place == 0 or len(one[1]) <= _COMMON]
        weights: dict[int, float] = {}
        for likeness, codes in telling:
            # A word weighs more the fewer titles it is in.
            for code in codes[:_COMMON].tolist():
                weights[code] = weights.get(code, 0.0) + likeness * np.log(1 + len(self._titles) / len(codes))
        chosen = sorted(weights, key=lambda code: -weights[code])[:_COMPARED]
        plain = " ".join(wanted)
        likeness_of = {code: _likeness(plain, _spoken(article_first(self._titles[code]))) for code in chosen}
        best = sorted(chosen, key=lambda code: -likeness_of[code])
        return [code for code in best if likeness_of[code] >= _LIKE_TITLE][:count]

    def _words_like(self, word: str) -> dict[str, float]:
        """Returns the titles' words that a word may mean, with their likeness."""
        if word in self._words[0]:
            return {word: 1.0}
        shared: dict[str, int] = {}
        for letters in _letters(word):
            for other in self._words_by_letters.get(letters, ()):
                shared[other] = shared.get(other, 0) + 1
        likely = sorted(shared, key=lambda other: -shared[other] / (len(word) + len(other)))[:_COMPARED]
        matcher = difflib.SequenceMatcher(None, b=word, autojunk=False)
        likeness = {}
        for other in likely:
            matcher.set_seq1(other)
            likeness[other] = matcher.ratio()
        best = sorted(likely, key=lambda other: -likeness[other])[:_WORDS_TRIED]
        return {other: likeness[other] for other in best if likeness[other] >= _LIKE_WORD}


def _split_year(text: str) -> tuple[str, str]:
    match = _YEAR.match(" ".join(text.split()))
    return (match[1], match[2]) if match else (text, "")


def _without_brackets(title: str) -> str:
    return _BRACKETS.sub("", _split_year(title)[0]) or title


def _year_of(title: str) -> str:
    return _split_year(title)[1] if title.endswith(")") else ""


def _letters(word: str) -> set[str]:
    """Returns a word's runs of two letters, its ends marked."""
    marked = f"^{word}$"
    return {marked[place : place + 2] for place in range(len(marked) - 1)}


def _likeness(name: str, known: str) -> float:
    """Compares with the whole and, a little less, with as long a start: people leave subtitles out."""
    matcher = difflib.SequenceMatcher(None, b=name, autojunk=False)
    matcher.set_seq1(known)
    whole = matcher.ratio()
    matcher.set_seq1(known[: len(name)])
    return max(whole, 0.95 * matcher.ratio())
