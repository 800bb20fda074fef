"""Datasets without ratings: MIND, DKN and Last.fm."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from metarec.data.source_options import SourceOptions
from metarec.data.sources.assembly import Tables, first_filled
from metarec.data.sources.columns import numbers
from metarec.data.sources.delimited import delimited
from metarec.data.sources.files import find, need
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


def dkn(path: Path | None, options: SourceOptions) -> Tables:
    """Reads DKN's sample of Bing news: every headline that a user was shown, clicked or not.

    The files are the repository's ``raw_train.txt`` and ``raw_test.txt``, or one ``clicks.csv`` with the columns
    ``user``, ``title``, ``clicked`` and ``entities``. A headline is its own id; one that a user was shown several times
    counts as clicked if it ever was. The people, places and things that it names are the field ``entities``.
    """
    names = ("user", "title", "rating", "entities")
    if table := find(path, "clicks.csv", needed=False):
        files, first = [table], 2
        wanted = dict(zip(("user", "title", "clicked", "entities"), names, strict=True))
        parts = [delimited(table, wanted, bad_rows=options.bad_rows)]
    else:
        later = find(path, "raw_test.txt", needed=False)
        files, first = [need(path, "raw_train.txt"), *([later] if later else [])], 1
        shape: dict[str, Any] = {"separator": "\t", "quotes": False, "bad_rows": options.bad_rows}
        parts = [delimited(file, {}, header=names, **shape) for file in files]
    shown = pd.concat([part.astype(object) for part in parts], ignore_index=True).assign(
        item=lambda rows: rows["title"]
    )
    clicked = numbers(shown["rating"])
    ever = pd.Series(clicked).groupby([shown["user"], shown["item"]]).transform("max")
    ratings = shown[["user", "item"]].assign(rating=shown["rating"].where(~np.isfinite(clicked), ever))
    items = first_filled(shown[["item", "title", "entities"]])
    items["entities"] = [
        ", ".join(entry.partition(":")[2].strip() for entry in str(entries).split(";") if ":" in entry)
        for entries in items["entities"]
    ]
    where = " and then ".join(map(str, files))
    return Tables(ratings, items, where, CLICKS, first, sum(map(Counter, map(malformed, parts)), Counter()))


def lastfm(path: Path | None, options: SourceOptions) -> Tables:
    """Reads Last.fm 2K (HetRec 2011): who listened to which artist. Counts are no ratings; every row is a one."""
    file = need(path, "user_artists.dat")
    shape: dict[str, Any] = {"separator": "\t", "quotes": False, "bad_rows": options.bad_rows}
    ratings = delimited(file, {"userID": "user", "artistID": "item"}, **shape).assign(rating=1.0)
    artists = delimited(need(path, "artists.dat"), {"id": "item", "name": "title"}, **shape)
    return Tables(ratings, artists, str(file), CLICKS, 2, malformed(artists))
