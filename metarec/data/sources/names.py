"""Recognises columns by the names that people usually give them.

Names are compared without case, accents, spaces, punctuation and what stands in brackets: ``Kunden-Nr`` and
``Sterne (1-5)`` are read as ``kundennr`` and ``sterne``. Knows names only, nothing of what a column holds.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

OWN = ("user", "item", "rating", "timestamp")
_USUAL: dict[str, str] = {
    "user": "user userid users uid username customer customerid customernumber customerno customernr client "
    "clientid member memberid reader readerid reviewer reviewerid visitor visitorid person personid "
    "account accountid profile profileid buyer buyerid kunde kunden kundennr kundennummer kundenid "
    "nutzer nutzerid benutzer benutzerid mitglied kaufer kaeufer utilisateur usuario utente",
    "item": "item itemid items iid product productid productcode sku parentasin asin isbn isbn13 ean gtin "
    "article articleid articlenumber artikel artikelnr artikelnummer artikelid produkt produktid "
    "produktnr movieid filmid bookid animeid gameid appid songid trackid artistid businessid recipeid "
    "courseid newsid hotelid beerid movie film book buch anime game song track artist business recipe "
    "course",
    "rating": "rating ratings userrating myrating ratingvalue starrating bookrating reviewrating overall star stars "
    "score sterne bewertung wertung punkte note nota puntuacion liked like "
    "recommended recommend isrecommended votedup",
    "timestamp": "timestamp ts unixreviewtime unixtime time date datetime ratingtimestamp ratingtime ratingdate "
    "ratedat reviewedat orderedat purchasedat boughtat watchedat playedat visitedat clickedat viewedat "
    "listenedat reviewtime reviewdate eventtime createdat created createdate purchasedate purchasetime "
    "orderdate ordertime updatedat dateadded datum zeit zeitpunkt zeitstempel uhrzeit kaufdatum bestelldatum "
    "bewertungsdatum fecha when readat",
    "title": "title titel itemtitle itemname producttitle productname movietitle moviename filmtitle filmtitel "
    "booktitle bookname buchtitel gametitle gamename appname songtitle trackname artistname artikelname "
    "artikelbezeichnung produktname produkttitel bezeichnung name titre titulo",
}
USUAL = {ours: tuple(text.split()) for ours, text in _USUAL.items()}


def plain_name(name: str) -> str:
    """Returns a column's name without case, accents, punctuation and what stands in brackets."""
    bare = re.sub(r"[(\[][^)\]]*[)\]]", "", name) if not re.fullmatch(r"\s*[(\[].*", name) else name
    decomposed = unicodedata.normalize("NFKD", bare.casefold())
    return "".join(char for char in decomposed if char.isalnum())


def recognise(names: Sequence[str], wanted: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """Finds columns by usual names.

    Args:
        names: The file's columns.
        wanted: What is looked for, e.g. ``user``; its own name comes first, usual names in order.
        taken: Columns that stand for something else already.

    Returns:
        What was found: our name to the file's.
    """
    left = [name for name in names if name not in set(taken)]
    found: dict[str, str] = {}
    for ours in wanted:
        for usual in (ours, *USUAL.get(ours, ())):
            match = next((name for name in left if name == usual or plain_name(name) == usual), None)
            if match is not None:
                found[ours] = match
                left.remove(match)
                break
        else:
            ids = [name for name in left if plain_name(name).endswith("id") and plain_name(name) not in USUAL["user"]]
            if ours == "item" and len(ids) == 1:
                found[ours] = ids[0]
                left.remove(ids[0])
    return found


def nearest(name: str, missing: Iterable[str]) -> str | None:
    """Returns which of the missing columns a name was probably meant for, if any: ``raiting`` for ``rating``."""
    plain = plain_name(name)
    likeness = {
        ours: max(difflib.SequenceMatcher(None, plain, usual).ratio() for usual in USUAL.get(ours, (ours,)))
        for ours in missing
        if len(plain) >= 4
    }
    best = max(likeness, key=lambda ours: likeness[ours], default=None)
    return best if best is not None and likeness[best] >= 0.8 else None


def twice(mapping: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns the columns that stand for more than one thing, with what they stand for."""
    ours: dict[str, list[str]] = {}
    for name, theirs in mapping.items():
        ours.setdefault(theirs, []).append(name)
    return {theirs: names for theirs, names in ours.items() if len(names) > 1}
