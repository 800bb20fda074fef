"""Datasets of reviews: Amazon, Steam and Yelp."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from metarec.data.source_options import SourceOptions
from metarec.data.sources.assembly import Tables, first_filled
from metarec.data.sources.files import members, need
from metarec.data.sources.json_lines import first_object, json_lines, objects
from metarec.data.sources.shared import CLICKS, STARS, malformed
from metarec.data.sources.texts import as_text
from metarec.errors import DataError


def amazon(path: Path | None, options: SourceOptions) -> Tables:
    """Reads Amazon reviews with their metadata, one category in a folder, JSON lines, gzipped or not.

    Files of 2018 have ``asin, overall``, of 2023 ``parent_asin, rating``.
    """
    meta = need(path, "meta_*.jsonl", "meta_*.json")
    reviews = next(
        (file for file in members(path) if file.name.split(".")[0] == meta.name.split(".")[0].removeprefix("meta_")),
        None,
    )
    reviews = reviews or next((file for file in members(path) if file.name != meta.name and ".json" in file.name), None)
    if reviews is None:
        raise DataError(f"'{path}' holds no reviews beside {meta}", "Put the review file there too")
    first = first_object(reviews)
    new = "parent_asin" in first
    columns = (
        ("user_id", "parent_asin", "rating", "timestamp")
        if new
        else ("reviewerID", "asin", "overall", "unixReviewTime")
    )
    ratings = json_lines(
        reviews, dict(zip(columns, ("user", "item", "rating", "timestamp"), strict=True)), bad_rows=options.bad_rows
    )
    fields = {"parent_asin" if new else "asin": "item", "title": "title", "store" if new else "brand": "brand"}
    category = "categories" if new else "category"
    items = json_lines(meta, {**fields, category: "genres"}, bad_rows=options.bad_rows)
    return Tables(ratings, first_filled(items), str(reviews), STARS, 1, malformed(ratings, items))


def steam(path: Path | None, options: SourceOptions) -> Tables:
    """Reads Steam as UCSD ships it: reviews that recommend (1) or not (0), lines of Python literals, and the games."""
    file = need(path, "australian_user_reviews.json")
    people = list(objects(file, literals=True, quarantine=options.bad_rows == "quarantine"))
    rows = [
        (as_text(person.get("user_id")), as_text(review.get("item_id")), review.get("recommend"))
        for _, person in people
        if person
        for review in person.get("reviews") or ()
        if isinstance(review, dict)
    ]
    games = json_lines(
        need(path, "steam_games.json"),
        {"id": "item", "app_name": "title", "genres": "genres", "release_date": "released"},
        literals=True,
        bad_rows=options.bad_rows,
    )
    games = first_filled(games[games["item"] != ""])
    games["year"] = games["released"].str.extract(r"((?:19|20)\d\d)")[0].fillna("")
    frame = pd.DataFrame(rows, columns=["user", "item", "rating"])
    frame["rating"] = [int(value) if isinstance(value, bool) else "" for value in frame["rating"]]
    frame.attrs["malformed"] = [number for number, person in people if person is None]
    return Tables(frame, games.drop(columns="released"), str(file), CLICKS, 1, malformed(frame, games))


def yelp(path: Path | None, options: SourceOptions) -> Tables:
    """Reads the Yelp open dataset: reviews with stars, and businesses."""
    file = need(path, "yelp_academic_dataset_review.json", "review.json")
    ratings = json_lines(
        file,
        {"user_id": "user", "business_id": "item", "stars": "rating", "date": "timestamp"},
        bad_rows=options.bad_rows,
    )
    places = json_lines(
        need(path, "yelp_academic_dataset_business.json", "business.json"),
        {"business_id": "item", "name": "title", "categories": "genres", "city": "city"},
        bad_rows=options.bad_rows,
    )
    return Tables(ratings, places, str(file), STARS, 1, malformed(ratings, places))
