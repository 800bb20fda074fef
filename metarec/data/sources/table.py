"""Tables of your own: CSV, TSV, JSON lines and Parquet with named columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from metarec.data.source_options import OF_TIME, ItemsTable, SourceOptions, options_scale
from metarec.data.sources.arrow import arrow_columns, parquet_table
from metarec.data.sources.assembly import Note, Tables, first_filled
from metarec.data.sources.columns import blanks, coded, numbers, text_column
from metarec.data.sources.delimited import delimited, header, header_cure
from metarec.data.sources.files import File, find, need
from metarec.data.sources.json_lines import json_lines, keys_of
from metarec.data.sources.layout import Layout, theirs_to_ours
from metarec.data.sources.names import OWN, recognise
from metarec.data.sources.shared import malformed
from metarec.data.sources.texts import list_as_text
from metarec.errors import DataError, suggest


def table(path: Path | None, options: SourceOptions) -> Tables:
    """Reads a CSV, TSV, JSON lines or Parquet with named columns; items stand beside the ratings or in their rows.

    Columns that the options do not name are recognised by their usual names; what was recognised and what was left is
    in the notes of the tables.
    """
    bare = path is not None and path.is_file() and path.suffix != ".zip"
    ratings_file = File(path) if bare and path else need(path, options.ratings or "ratings.*")
    items_file = _items_file(path.parent if bare and path else path, bare, options)
    names = column_names(ratings_file, options, options.header)
    layout = layout_of_ratings(ratings_file, names, options, inside=items_file is None)
    ratings = read_table(ratings_file, theirs_to_ours(layout.columns, ratings_file), options, options.header)
    beside = None if items_file is None else _beside(items_file, layout.columns["item"], options)
    first = 2 if _kind(ratings_file) in ("csv", "tsv", "txt", "dat") and options.header is None else 1
    return _assembled(ratings, layout, str(ratings_file), options, first, beside)


def frame_tables(frame: pd.DataFrame, options: SourceOptions, items: pd.DataFrame | None = None) -> Tables:
    """Reads DataFrames as `table` reads files.

    Args:
        frame: The ratings.
        options: Which columns stand for what.
        items: The items; None where they stand in the rows of the ratings.

    Raises:
        DataError: A column is missing, or stands there twice.
    """
    where = "the DataFrame"
    layout = layout_of_ratings(where, _names_of(frame, where), options, inside=items is None)
    ratings = _columns_of(frame, layout, where)
    if items is None:
        return _assembled(ratings, layout, where, options, 1, None)
    where_items = "the items' DataFrame"
    if items.index.name is not None:
        items = items.reset_index()
    found = _layout_of_items(where_items, _names_of(items, where_items), layout.columns["item"], options)
    beside = _columns_of(items, found, where_items), found.notes(where_items, {"title"} - set(found.columns))
    return _assembled(ratings, layout, where, options, 1, beside)


def _names_of(frame: pd.DataFrame, where: str) -> list[str]:
    names = [str(name) for name in frame.columns]
    _refuse_repeated(where, names)
    return names


def _columns_of(frame: pd.DataFrame, layout: Layout, where: str) -> pd.DataFrame:
    columns = {str(name): _arrow_column(column) for name, column in frame.items()}
    return arrow_columns(pa.table(columns), theirs_to_ours(layout.columns, where), where)


def _arrow_column(column: pd.Series) -> pa.Array:
    """Returns a column as Arrow holds it; whole floats, as of ids beside missing ones, are integers."""
    if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 == 0).all() and (column.abs() < 2**53).any():
        column = column.astype("Int64")
    try:
        return pa.Array.from_pandas(column)
    except (pa.ArrowException, TypeError):
        return pa.array([None if value is None or value != value else str(value) for value in column], pa.string())


def _assembled(
    ratings: pd.DataFrame,
    layout: Layout,
    where: str,
    options: SourceOptions,
    first: int,
    beside: tuple[pd.DataFrame, list[Note]] | None,
) -> Tables:
    """Makes tables of the ratings' rows; items stand in them where there are none beside."""
    notes = layout.notes(where, {*OWN, *(() if beside else ("title",))} - set(layout.columns))
    notes += _empty_cells(ratings, layout, where)
    if "item" not in ratings:
        ratings = ratings.assign(item=titles_as_ids(ratings))
        cure = "Name the column of ids, if there is one: --column item=THEIRS"
        said = f"{where} has no ids of items: their titles stand for them"
        notes.append(Note("no-item-column", "note", said, cure, ()))
    if "rating" not in ratings and options.columns.get("rating") != "":
        cure = "Map one with 'columns' (--column rating=THEIRS) if people rated"
        notes.append(Note("no-rating-column", "note", f"{where} has no ratings: every row counts as 1", cure, ()))
    if "rating" not in ratings:
        ratings = ratings.assign(rating=1.0)
    items, more = beside or _inside(ratings.drop(columns=list(options.of_rows), errors="ignore"))
    for name in items.columns.drop(["item", "title"], errors="ignore"):
        items[name] = _lists_as_text(items[name])
    frame = ratings[[name for name in (*OWN, *options.of_rows) if name in ratings]]
    frame.attrs = ratings.attrs
    dropped = malformed(ratings, *(() if beside is None else (items,)))
    return Tables(frame, items, where, options_scale(options), first, dropped, (*notes, *more))


def _empty_cells(ratings: pd.DataFrame, layout: Layout, where: str) -> list[Note]:
    """Counts cells without a value, column by column."""
    counts = {str(ours): blanks(ratings[ours]) for ours in ratings.columns}
    found = [
        f"'{layout.columns[ours]}' in {count:,} of {len(ratings):,} rows" for ours, count in counts.items() if count
    ]
    cure = "Fill them in the source; of an item's fields the first filled one is read"
    return [Note("empty-cell", "note", f"columns of {where} with empty cells", cure, tuple(found))] if found else []


def _items_file(folder: Path | None, bare: bool, options: SourceOptions) -> File | None:
    named = options.items.file if isinstance(options.items, ItemsTable) else options.items
    if named:
        return need(folder, named)
    return None if bare else find(folder, "items.*", needed=isinstance(options.items, ItemsTable))


def layout_of_ratings(file: object, names: Sequence[str], options: SourceOptions, *, inside: bool = True) -> Layout:
    """Returns which columns of the ratings stand for what.

    Args:
        file: The file, for errors.
        names: Its columns.
        options: The columns that are named.
        inside: Whether the items stand in the ratings' rows.

    Raises:
        DataError: There is no user or title, or neither an item nor a title.
    """
    of_rows = options.of_rows
    for name in of_rows:
        if name not in (*names, *options.columns, *OF_TIME):
            raise DataError(f"{file} has no column '{name}', which is side information", suggest(name, names))
    given = {
        ours: theirs for ours, theirs in options.columns.items() if theirs and (inside or ours in (*OWN, *of_rows))
    }
    given |= {name: name for name in of_rows if name in names and name not in given}
    sought = [ours for ours in (*OWN, *(["title"] if inside else [])) if ours not in options.columns]
    guessed = recognise(names, sought, given.values())
    columns = {**given, **guessed}
    titled = inside and "title" in columns
    if titled and "item" not in columns:
        theirs_to_ours({**columns, "item": "item"}, file)  # a column of this name may be taken for the title
    for ours in ("user", *([] if titled else ["item"]), *(["title"] if inside else [])):
        if ours not in columns:
            theirs_to_ours({**columns, ours: ours}, file)  # its own column may be taken
            _refuse_missing(file, ours, names, options)
    return Layout(names, columns, {ours: theirs for ours, theirs in guessed.items() if ours != theirs})


def _refuse_missing(file: object, ours: str, names: Sequence[str], options: SourceOptions) -> None:
    if options.header is None and any(np.isfinite(numbers(pd.Series(names, dtype=object)))):
        raise DataError(
            f"{file} has no column '{ours}': its first row is data, {', '.join(map(repr, names[:4]))}",
            "Name its columns in 'header', in their order: --header user,item,rating,timestamp",
        )
    cure = header_cure(ours, names, options.separator).rstrip(".")
    cure += f". Name yours in 'columns' (--column {ours}=THEIRS)"
    if ours == "user" and recognise(names, ["rating"]):
        cure += "; one person's own ratings are adapted to: metarec recommend RUN --ratings FILE"
    if ours == "title" and recognise(names, ["item"]):
        cure += "; where a file of items has it: --items-file FILE"
    raise DataError(f"{file} has no column '{ours}'", cure)


def titles_as_ids(rows: pd.DataFrame) -> pd.Series:
    """Returns titles, with the year where there is one, as ids of items that have no others."""
    title = text_column(rows["title"]).str.strip()
    if "year" not in rows:
        return title
    year = text_column(rows["year"]).str.strip()
    return title.where((year == "") | (title == ""), title + " (" + year + ")")


def _inside(ratings: pd.DataFrame) -> tuple[pd.DataFrame, list[Note]]:
    """Takes the items out of the ratings' rows."""
    rows = ratings[["item", *(name for name in ratings.columns if name not in OWN)]]
    items = first_filled(rows)
    texts = pd.DataFrame({name: text_column(rows[name]).str.strip() for name in ("item", "title")})
    titles = texts[texts["title"] != ""].drop_duplicates()["item"].value_counts()
    several = tuple(map(str, titles.index[titles > 1]))
    cure = "Give every item one title, or its own id; the first one is read"
    note = Note("several-titles", "warning", "items that the ratings' rows give several titles", cure, several, "items")
    return items, [note] if several else []


def _beside(file: File, ratings_item: str, options: SourceOptions) -> tuple[pd.DataFrame, list[Note]]:
    """Reads the item file: the fields that are named, or all of its columns."""
    layout = _layout_of_items(file, column_names(file, options), ratings_item, options)
    items = read_table(file, theirs_to_ours(layout.columns, file), options)
    return items, layout.notes(file, {"title"} - set(layout.columns))


def _layout_of_items(file: object, names: Sequence[str], ratings_item: str, options: SourceOptions) -> Layout:
    """Returns which columns of the items stand for what: their ids, their title, and fields."""
    stated = options.items.id if isinstance(options.items, ItemsTable) else None
    own = [name for name in (stated, *((ratings_item, "item") if stated is None else ())) if name in names]
    key = own[0] if own else None if stated else recognise(names, ["item"]).get("item")
    if key is None:
        raise DataError(
            f"{file} has no column '{stated or ratings_item}' with the items' ids",
            f"{header_cure(stated or ratings_item, names, options.separator).rstrip('.')}. "
            "Name it: items: {id: COLUMN} (--items-id COLUMN)",
        )
    given = {ours: theirs for ours, theirs in options.columns.items() if theirs and ours not in OWN}
    fields = given or {name: name for name in names if name not in (key, "item") and name}
    guessed = {} if "title" in fields else recognise(names, ["title"], [key, *given.values()])
    fields = {**{ours: theirs for ours, theirs in fields.items() if theirs not in guessed.values()}, **guessed}
    layout = Layout(
        names, {"item": key, **fields}, {ours: theirs for ours, theirs in guessed.items() if ours != theirs}
    )
    return layout if own else replace(layout, guessed={"item": key, **layout.guessed})


def _lists_as_text(column: pd.Series) -> pd.Series:
    """Returns a column with ``["Action", "Drama"]`` written as ``Action, Drama``."""
    texts, codes = coded(column)
    if not any(text.startswith("[") for text in texts):
        return column
    return pd.Series(np.array([list_as_text(text) for text in texts], object)[codes], dtype=object)


def guess_separator(path: Path, encoding: str) -> str:
    """Returns what separates the columns of a delimited file, by its header."""
    if _kind(File(path)) not in ("csv", "txt", "dat"):
        return ","
    return max((",", ";", "\t", "|"), key=lambda mark: len(header(File(path), mark, encoding)))


def column_names(file: File, options: SourceOptions, header_given: Sequence[str] | None = None) -> list[str]:
    """Returns the names of a table's columns.

    Args:
        file: The table.
        options: How it is read.
        header_given: Names of its columns, where its first row is data.

    Raises:
        DataError: The file is empty, or a name stands there twice.
    """
    kind = _kind(file)
    if kind in ("jsonl", "json", "ndjson"):
        names = keys_of(file)
        with file.open() as stream:
            if not names and stream.read(64).lstrip().startswith(b"["):
                raise DataError(f"{file} is one JSON array", "Write one object a line, as jq -c '.[]' does")
    elif kind == "parquet":
        names = list(_parquet(file).column_names)
    elif kind in ("csv", "tsv", "txt", "dat"):
        names = list(header_given or header(file, _separator(kind, options), options.encoding))
    else:
        raise DataError(f"{file} is of no kind that is read", "Give a .csv, .tsv, .jsonl or .parquet file")
    if not any(name.strip() for name in names):
        raise DataError(f"{file} is empty", "Give a file with a header and rows")
    if any("\0" in name for name in names):
        raise DataError(f"{file} holds zero bytes, as UTF-16 without a mark does", "Set 'encoding' to 'utf-16-le'")
    _refuse_repeated(file, names)
    return names


def _refuse_repeated(file: object, names: Sequence[str]) -> None:
    repeated = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if repeated:
        raise DataError(
            f"{file} has the column '{repeated[0]}' {names.count(repeated[0])} times", "Rename or remove one"
        )


def read_table(
    file: File, wanted: Mapping[str, str], options: SourceOptions, header_given: Sequence[str] | None = None
) -> pd.DataFrame:
    """Reads columns of a CSV, TSV, JSON lines or Parquet file, by the ending of its name.

    Args:
        file: The table.
        wanted: Its columns to the names that they get here.
        options: How it is read.
        header_given: Names of its columns, where its first row is data.

    Raises:
        DataError: The kind is none of these, or the file is not what its name says.
    """
    kind = _kind(file)
    if kind in ("jsonl", "json", "ndjson"):
        return json_lines(file, wanted, bad_rows=options.bad_rows)
    if kind == "parquet":
        return arrow_columns(_parquet(file), wanted, str(file))
    return delimited(
        file,
        wanted,
        separator=_separator(kind, options),
        header=header_given,
        encoding=options.encoding,
        line_breaks=options.line_breaks,
        bad_rows=options.bad_rows,
    )


def _kind(file: File) -> str:
    return file.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()


def _separator(kind: str, options: SourceOptions) -> str:
    return "\t" if kind == "tsv" and options.separator == "," else options.separator


def _parquet(file: File) -> pa.Table:
    with file.open() as stream:
        return parquet_table(stream.read(), str(file))
