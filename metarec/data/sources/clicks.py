"""Datasets without ratings: MIND and Last.fm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from metarec.data.source_options import SourceOptions
from metarec.data.sources.assembly import Tables
from metarec.data.sources.delimited import delimited
from metarec.data.sources.files import need
from metarec.data.sources.shared import CLICKS, malformed, seconds


def mind(path: Path | None, options: SourceOptions) -> Tables:
    """Reads MIND news: every headline of an impression is rated 1 if it was clicked and 0 if it was only shown."""
    file = need(path, "behaviors.tsv")
    shape: dict[str, Any] = {"separator": "\t", "quotes": False, "bad_rows": options.bad_rows}
    shown = delimited(file, {}, header=("impression", "user", "time", "history", "shown"), **shape)
    lists = [str(text).split() for text in shown["shown"]]
    count = [len(entries) for entries in lists]
    pairs = [entry.rpartition("-") for entries in lists for entry in entries]
    clock = [seconds(str(text), "%m/%d/%Y %I:%M:%S %p") for text in shown["time"]]
    ratings = pd.DataFrame(
        {
            "user": np.repeat(shown["user"].astype(str).to_numpy(), count),
            "item": [item for item, _, _ in pairs],
            "rating": [click for _, _, click in pairs],
            "timestamp": np.repeat(np.array(clock, np.float64), count),
        }
    )
    ratings.attrs = shown.attrs
    header = ("item", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")
    wanted = {name: name for name in ("item", "title", "category", "subcategory", "abstract")}
    news = delimited(need(path, "news.tsv"), wanted, header=header, **shape)
    return Tables(ratings, news, str(file), CLICKS, 1, malformed(shown, news))


def lastfm(path: Path | None, options: SourceOptions) -> Tables:
    """Reads Last.fm 2K (HetRec 2011): who listened to which artist. Counts are no ratings; every row is a one."""
    file = need(path, "user_artists.dat")
    shape: dict[str, Any] = {"separator": "\t", "quotes": False, "bad_rows": options.bad_rows}
    ratings = delimited(file, {"userID": "user", "artistID": "item"}, **shape).assign(rating=1.0)
    artists = delimited(need(path, "artists.dat"), {"id": "item", "name": "title"}, **shape)
    return Tables(ratings, artists, str(file), CLICKS, 2, malformed(artists))
