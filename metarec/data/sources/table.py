"""Tables of your own: CSV, TSV, JSON lines and Parquet with named columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from metarec.data.sources.arrow import arrow_columns
from metarec.data.sources.assembly import Tables
from metarec.data.sources.delimited import delimited
from metarec.data.sources.files import File, find, need
from metarec.data.sources.json_lines import first_object, json_lines
from metarec.data.sources.options import SourceOptions, options_scale
from metarec.data.sources.shared import has, malformed
from metarec.errors import DataError


def table(path: Path | None, options: SourceOptions) -> Tables:
    """Reads a CSV, TSV, JSON lines or Parquet with named columns; items stand beside the ratings or in their rows."""
    columns = {**{name: name for name in ("user", "item", "rating")}, **options.columns}
    ratings_file = (
        File(path)
        if path is not None and path.is_file() and path.suffix != ".zip"
        else need(path, options.ratings or "ratings.*")
    )
    own = [name for name in ("user", "item", "rating", "timestamp") if name in columns]
    fields = [name for name in columns if name not in own]
    inside = options.items is None and find_items(path) is None
    wanted = {columns[name]: name for name in (*own, *(fields if inside else ()))}
    optional = [columns["rating"]] if "rating" not in options.columns else []
    ratings = read_table(ratings_file, wanted, options, optional)
    if "rating" not in ratings:
        ratings = ratings.assign(rating=1.0)
    if inside:
        has(ratings, ("title",), ratings_file)
        items = ratings[["item", *fields]].drop_duplicates("item")
    else:
        items_file = need(path, options.items) if options.items else need(path, "items.*")
        items = read_table(items_file, {columns[name]: name for name in ("item", *fields)} if fields else {}, options)
        items = items.rename(columns={columns["item"]: "item"})
    frame = ratings[[*(name for name in ("user", "item", "rating", "timestamp") if name in ratings)]]
    first = 2 if ratings_file.name.split(".")[-1] in ("csv", "tsv", "gz") else 1
    return Tables(frame, items, str(ratings_file), options_scale(options), first, malformed(ratings, items))


def find_items(path: Path | None) -> File | None:
    """Returns the item file that lies beside the ratings of a generic table, if there is one."""
    return None if path is None or (path.is_file() and path.suffix != ".zip") else find(path, "items.*", needed=False)


def read_table(
    file: File, wanted: Mapping[str, str], options: SourceOptions, optional: Iterable[str] = ()
) -> pd.DataFrame:
    """Reads columns of a CSV, TSV, JSON lines or Parquet file, told apart by its name.

    Raises:
        DataError: The kind is none of these, or the file is not what its name says.
    """
    kind = file.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if kind in ("jsonl", "json", "ndjson"):
        if not wanted:
            first = first_object(file)
            wanted = {key: key for key in first}
        return json_lines(file, wanted, bad_rows=options.bad_rows)
    if kind == "parquet":
        with file.open() as stream:
            try:
                held = pq.read_table(pa.BufferReader(stream.read()))
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file} is not Parquet: {error}", "Check the file") from None
        return arrow_columns(held, wanted or {name: name for name in held.column_names}, str(file), list(optional))
    if kind not in ("csv", "tsv", "txt", "dat"):
        raise DataError(f"{file} is of no kind that is read", "Give a .csv, .tsv, .jsonl or .parquet file")
    separator = "\t" if kind == "tsv" and options.separator == "," else options.separator
    return delimited(
        file,
        wanted,
        separator=separator,
        encoding=options.encoding,
        line_breaks=options.line_breaks,
        optional=list(optional),
        bad_rows=options.bad_rows,
    )
