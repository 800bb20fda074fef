"""Tables whose split is given: one file of ratings for each part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from metarec.data.interactions import PART_NAMES, SplitPart
from metarec.data.source_options import SourceOptions
from metarec.data.sources.assembly import PART, Note, Tables, catalog_texts, first_filled
from metarec.data.sources.table import table


def split_tables(path: Path | None, options: SourceOptions, files: Mapping[SplitPart, str]) -> Tables:
    """Reads one file of ratings for each part as one dataset, in which every row says which file it is from.

    Args:
        path: The folder or zip with the files.
        options: As of the source ``table``; `ratings` is not read.
        files: Name of the part (``train``, ``validation``, ``test``) to its file.

    Raises:
        DataError: A file is missing or malformed.
    """
    read = {part: table(path, options.model_copy(update={"ratings": file})) for part, file in files.items()}
    frames = [tables.ratings.assign(**{PART: PART_NAMES.index(part)}) for part, tables in read.items()]
    every_frame_has = set.intersection(*(set(frame.columns) for frame in frames))
    ratings = pd.concat(frames, ignore_index=True)
    if "timestamp" not in every_frame_has:
        ratings = ratings.drop(columns="timestamp", errors="ignore")
    # Line numbers that a reader set aside; the file's name tells those of one file from another's.
    ratings.attrs["malformed"] = [
        f"{tables.where} {number}" for tables in read.values() for number in tables.ratings.attrs.get("malformed", ())
    ]
    items = [catalog_texts(tables) for tables in read.values()]
    beside = all(texts.equals(items[0]) for texts in items)
    notes = dict.fromkeys(note for tables in read.values() for note in tables.notes)
    first = next(iter(read.values()))
    return replace(
        first,
        ratings=ratings,
        items=items[0] if beside else first_filled(pd.concat(items, ignore_index=True).fillna("")),
        where=" and ".join(tables.where for tables in read.values()),
        files=tuple((tables.where, tables.first_row, len(tables.ratings)) for tables in read.values()),
        dropped=dict(sum((Counter(tables.dropped) for tables in read.values()), Counter())),
        notes=(*notes, *_only_in_some(frames, " and ".join(files.values()))),
    )


def _only_in_some(frames: list[pd.DataFrame], where: str) -> list[Note]:
    timed = np.array(["timestamp" in frame for frame in frames])
    if timed.all() or not timed.any():
        return []
    cure = "Give all of them one, or read none: timestamp: '' in 'columns'"
    return [Note("some-timed", "warning", f"only some of {where} have times", cure, ("timestamp",))]
