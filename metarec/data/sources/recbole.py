"""RecBole atomic files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from metarec.data.source_options import SourceOptions, options_scale
from metarec.data.sources.assembly import Tables
from metarec.data.sources.delimited import delimited
from metarec.data.sources.files import File, members, need
from metarec.data.sources.layout import Layout
from metarec.data.sources.names import OWN
from metarec.data.sources.shared import malformed
from metarec.errors import DataError, suggest


def recbole(path: Path | None, options: SourceOptions) -> Tables:
    """Reads RecBole atomic files: ``NAME.inter`` and ``NAME.item``, tab separated with typed headers."""
    if path is None or not path.exists():
        raise DataError(f"RecBole directory '{path}' does not exist", "Set 'path' to the folder of the .inter file")
    found = [file for file in members(path) if file.name.endswith(".inter")]
    if len(found) != 1:
        raise DataError(f"'{path}' holds {len(found)} .inter files, not one", "Keep one dataset there")
    ratings = _atomic(
        found[0], {"user_id": "user", "item_id": "item", "rating": "rating", "timestamp": "timestamp"}, options
    )
    items = _atomic(need(path, f"{found[0].name.removesuffix('.inter')}.item"), {"item_id": "item"}, options)
    items = items.rename(columns={"movie_title": "title", "release_year": "year", "class": "genres", "genre": "genres"})
    if "title" not in items:
        raise DataError(
            f"the .item file beside {found[0]} has no title column", "Name one 'movie_title:token_seq' or 'title'"
        )
    layout = Layout(list(map(str, ratings.columns)), {name: name for name in OWN if name in ratings}, {})
    notes = [note for note in layout.notes(found[0], set(OWN) - set(layout.columns)) if note.severity == "warning"]
    return Tables(ratings, items, str(found[0]), options_scale(options), 2, malformed(ratings, items), tuple(notes))


def _atomic(file: File, needed: Mapping[str, str], options: SourceOptions) -> pd.DataFrame:
    frame = delimited(file, {}, separator="\t", quotes=False, bad_rows=options.bad_rows)
    named = frame.rename(columns=lambda column: str(column).split(":")[0])
    named.attrs = frame.attrs
    missing = [column for column in needed if column not in named and column != "timestamp"]
    if missing:
        raise DataError(f"{file} has no column '{missing[0]}'", suggest(missing[0], map(str, named.columns)))
    return named.rename(columns=dict(needed))
