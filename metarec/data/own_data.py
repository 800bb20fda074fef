"""A task for a table of one's own: from a DataFrame or a table file to data, label rule, episodes and a prompt.

What nobody states is read off the data: which columns describe items, how many ratings users have, what a like is.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from metarec.config import validated
from metarec.data.interactions import Catalog, Interactions
from metarec.data.item_fields import field_kind
from metarec.data.source_options import SourceOptions, is_table
from metarec.data.sources import dropped_before, read_source, read_tables
from metarec.data.sources.assembly import NOT_RATED, Note, Tables, assemble_tables
from metarec.data.sources.columns import scale_without_zero, text_column
from metarec.data.sources.files import File
from metarec.data.sources.names import OWN
from metarec.data.sources.table import column_names, frame_tables, guess_separator, layout_of_ratings, read_table
from metarec.data.task import Task
from metarec.data.task_data import IN_MEMORY, TaskData, load_task_data
from metarec.errors import ConfigError, DataError, suggest

_LOG = logging.getLogger(__name__)
_SHOTS, _FEW_SHOTS = (5, 10, 20), (1, 2, 3)
# Ratings to ask about; the least where users have few.
_MIN_QUERY, _LEAST_QUERY = 5, 2
# Below this many users, more of them validate and test.
_FEW_USERS = 500
_MOST_DROPPED = 0.05
_MOST_FIELDS = 6
# A column describes items where so many rows agree with the item's first one.
_AGREE = 0.95
_FEWEST_ROWS = 10
_UNNAMED_FIELDS = ("year", "genres", "authors")


def own_task(data: pd.DataFrame | Path, choices: Mapping[str, Any], *, where: str = "fit") -> tuple[Task, Interactions]:
    """Builds a task from a table.

    Args:
        data: Ratings with their items' titles and fields, as a DataFrame or a CSV, TSV, JSON lines or Parquet file.
        choices: What the caller states: a source's options (`columns`, `scale`, `separator`, ...), columns by our name
            (``title="name"``), and keys of a task (`shots`, `label`, `prompt`, ...). Of a DataFrame, `items` may be
            one of its own.
        where: Who asks, for errors.

    Returns:
        The task, and its data without labels.

    Raises:
        ConfigError: A choice is not known.
        DataError: A column is missing, or more than 5% of the rows cannot be read.
    """
    choices, items = _without_items(data, choices, where)
    for name, value in choices.items():
        if isinstance(value, pd.DataFrame):
            raise ConfigError(f"{where}: '{name}' is a DataFrame", "Write it to a file, and name the file")
    options, keys = _options_and_keys(choices, where)
    stated = "bad_rows" in options.model_fields_set
    options = options.model_copy(update={"bad_rows": options.bad_rows if stated else "quarantine"})
    if isinstance(data, Path):
        data = data.absolute()
        if not data.exists():
            raise ConfigError(f"the table '{data}' does not exist", "Check the path")
        if "separator" not in options.model_fields_set and data.is_file():
            options = options.model_copy(update={"separator": guess_separator(data, options.encoding)})
    if items is None:
        options = with_item_fields(data, options)
    interactions = read_own(data, options, items)
    if options.scale is None and (stars := scale_without_zero(interactions.rating)):
        low, high = (f"{end:g}" for end in stars)
        raise DataError(
            f"{int((interactions.rating == 0).sum())} of {len(interactions)} ratings are 0 beside {low} to {high}: "
            "in many exports 0 means 'not rated'",
            f"State the scale: scale=({low}, {high}) (--scale {low},{high}) leaves them out, scale=(0, {high}) "
            f"(--scale 0,{high}) counts them as ratings",
        )
    unasked = {"repeated rating", NOT_RATED, *(dropped_before(data) if isinstance(data, Path) else ())}
    dropped = sum(count for reason, count in interactions.dropped.items() if reason not in unasked)
    if dropped or NOT_RATED in interactions.dropped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in interactions.dropped.items())
        if not stated and dropped > _MOST_DROPPED * (dropped + len(interactions)):
            raise DataError(
                f"{dropped} of {dropped + len(interactions)} rows cannot be read ({reasons})",
                "Run: metarec data check; bad_rows='quarantine' (--bad-rows quarantine) leaves them out all the same",
            )
        _LOG.warning("rows left out: %s", reasons)
    values = {**_defaults(data, interactions, options), **keys}
    if isinstance(values["prompt"], str):
        values["prompt"] = {**default_prompt(()), "text": values["prompt"]}
    return validated(Task, values, where), interactions


def load_own(data: pd.DataFrame | Path, choices: Mapping[str, Any], seed: int) -> TaskData:
    """Builds a task from a table, and splits its data; see `own_task`."""
    task, interactions = own_task(data, choices)
    return load_task_data(task, seed, interactions)


def reload_own(data: pd.DataFrame | str | Path, task: Task, seed: int, items: pd.DataFrame | None = None) -> TaskData:
    """Reads a table for a task that was built from one; items of a table of their own are given again."""
    read = data if isinstance(data, pd.DataFrame) else Path(data)
    return load_task_data(task, seed, read_own(read, task.dataset.options, items))


def read_own(data: pd.DataFrame | Path, options: SourceOptions, items: pd.DataFrame | None = None) -> Interactions:
    """Reads a table with a source's options; see `own_task`."""
    if isinstance(data, Path):
        return read_source("table", data, options)
    tables = frame_tables(data, options, items)
    for note in tables.notes:
        _LOG.warning("%s", note)
    return assemble_tables(tables, quarantine=options.bad_rows == "quarantine", of_rows=options.of_rows)


def with_item_fields(data: pd.DataFrame | Path, options: SourceOptions) -> SourceOptions:
    """Returns options that also name the columns which describe items, and which nobody named."""
    return options.model_copy(update={"columns": {**options.columns, **_item_fields(data, options)}})


def own_tables(path: Path, options: SourceOptions) -> Tables:
    """Reads a table unchecked, with the item fields that `own_task` takes from it; see `read_tables`."""
    named = with_item_fields(path, options)
    tables = read_tables("table", path, named)
    fields = tuple(f"'{theirs}' as {ours}" for ours, theirs in named.columns.items() if ours not in options.columns)
    if not fields:
        return tables
    cure = "Name others in 'columns' (--column OURS=THEIRS); --column OURS= leaves one out"
    note = Note("item-field", "note", f"columns of {tables.where} that describe items", cure, fields)
    return replace(tables, notes=(*tables.notes, note))


def summary(task: Task, catalog: Catalog) -> list[str]:
    """Says in sentences what a task measures on a catalog."""
    names = ", ".join(name for name in catalog.fields if name != "title")
    return [
        f"item fields: {names or 'the title alone'}",
        f"a like: {task.label}; ratings per new user: {', '.join(map(str, task.shots))}",
        f"prompt: {task.prompt.text!r}",
    ]


def default_prompt(fields: Sequence[str]) -> dict[str, str]:
    """Returns a prompt that names an item's title and fields."""
    line = "{{ title }}"
    for name in fields:
        said = f"{{{{ {name} }}}}" if name in _UNNAMED_FIELDS else f"{name.replace('_', ' ')}: {{{{ {name} }}}}"
        line += f"{{% if {name} %}}, {said}{{% endif %}}"
    blank = "{% if mask %} {{ mask }}{% endif %}"  # a masked language model answers there
    text = f"One customer's taste: does the customer like it?\n{line}\nAnswer:{blank}"
    return {"text": text, "positive": " Yes", "negative": " No"}


def _without_items(
    data: pd.DataFrame | Path, choices: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], pd.DataFrame | None]:
    """Takes a DataFrame of items out of what the caller states."""
    left, items = dict(choices), choices.get("items")
    if isinstance(data, pd.DataFrame) != isinstance(items, pd.DataFrame) and items is not None:
        kinds = ("a DataFrame", "a file") if isinstance(data, pd.DataFrame) else ("a file", "a DataFrame")
        raise ConfigError(
            f"{where}: the ratings are {kinds[0]}, the items {kinds[1]}", "Give two DataFrames, or two files"
        )
    return (left, None) if not isinstance(items, pd.DataFrame) else (left, left.pop("items"))


def _options_and_keys(choices: Mapping[str, Any], where: str) -> tuple[SourceOptions, dict[str, Any]]:
    """Tells options of the source, columns and keys of the task apart."""
    left = dict(choices)
    columns = dict(left.pop("columns", None) or {})
    columns |= {ours: left.pop(ours) for ours in (*OWN, "title") if isinstance(left.get(ours), str)}
    options = {name: left.pop(name) for name in SourceOptions.model_fields if name in left}
    known = [*SourceOptions.model_fields, *OWN, "title", *(name for name in Task.model_fields if name != "dataset")]
    for name in left:
        if name not in known:
            raise ConfigError(f"{where}: '{name}' is unknown", suggest(name, known))
    return validated(SourceOptions, {**options, "columns": columns}, where), left


def _item_fields(data: pd.DataFrame | Path, options: SourceOptions) -> dict[str, str]:
    """Returns columns that describe items and that nobody named: our name to the table's.

    A column that differs from row to row of one item, such as a review or a price paid, tells what is to be predicted.
    """
    if isinstance(data, Path):
        if not data.is_file() or options.items is not None or not is_table(data):
            return {}
        names = column_names(File(data), options, options.header)
        frame = read_table(File(data), {name: name for name in names if name}, options, options.header)
    else:
        names, frame = [str(name) for name in data.columns], data.rename(columns=str)
    columns = layout_of_ratings(str(data) if isinstance(data, Path) else "the DataFrame", names, options).columns
    item = text_column(frame[columns.get("item", columns["title"])])
    ignored = {theirs for theirs in options.columns.values() if theirs} | set(options.of_rows)
    found: dict[str, str] = {}
    for theirs in names:
        if not theirs or theirs in columns.values() or theirs in ignored:
            continue
        name = _identifier(theirs)
        if name not in (*options.columns, *columns, *found) and _describes_items(text_column(frame[theirs]), item):
            found[name] = theirs
    return found


def _describes_items(column: pd.Series, item: pd.Series) -> bool:
    filled = column.str.strip() != ""
    values, items = column[filled], item[filled]
    repeated = items.duplicated(keep=False)
    values, items = values[repeated], items[repeated]
    if len(values) < _FEWEST_ROWS or values.nunique() < 2:
        return False
    return bool((values == values.groupby(items).transform("first")).mean() >= _AGREE)


def _identifier(name: str) -> str:
    """Returns a column's name as a template can write it."""
    plain = re.sub(r"\W+", "_", unicodedata.normalize("NFC", name).casefold()).strip("_")
    return plain if plain.isidentifier() and plain not in ("id", "mask", *OWN) else f"field_{plain}"


def _told(fields: Sequence[str], catalog: Catalog) -> list[str]:
    """Returns the fields that a prompt names: no ids and constants, and texts before others where there are many."""
    kinds = {name: field_kind(name, catalog.fields[name]) for name in fields}
    telling = [name for name in fields if kinds[name] in ("category", "number", "text")]
    chosen = sorted(telling, key=lambda name: kinds[name] != "text")[:_MOST_FIELDS]
    return [name for name in telling if name in chosen]


def _defaults(data: pd.DataFrame | Path, interactions: Interactions, options: SourceOptions) -> dict[str, Any]:
    """Returns the values of a task that nobody states."""
    stem = data.name.split(".")[0] if isinstance(data, Path) else "dataframe"
    ratings = np.unique(interactions.rating)
    counts = interactions.items_of_user
    typical = float(np.median(counts))  # half of the users have as many
    query = _MIN_QUERY if typical > _MIN_QUERY or typical < 1 + _LEAST_QUERY else _LEAST_QUERY
    shots = [count for count in _SHOTS if typical >= count + query]
    shots = shots or [count for count in _FEW_SHOTS if typical >= count + query]
    fields = [name for name in interactions.catalog.fields if name != "title" and name.isidentifier()]
    fields = _told(fields, interactions.catalog)
    values: dict[str, Any] = {
        "name": f"own/{stem}",
        "version": 1,
        "description": f"Ratings of {stem}.",
        "licence": "not stated",
        "dataset": {
            "source": "table" if isinstance(data, Path) else IN_MEMORY,
            "path": data if isinstance(data, Path) else None,
            "options": options,
        },
        "split": {"fractions": [0.6, 0.2, 0.2] if len(counts) < _FEW_USERS else [0.8, 0.1, 0.1]},
        "shots": [0, *(shots or _SHOTS[:1])],
        "query": {"max": 50, "min": query},
        "label": "rating > user mean",
        "prompt": default_prompt(fields),
    }
    if len(ratings) == 1:
        values |= {"label": "implicit", "negatives": {"per_positive": 1}}
    elif len(ratings) == 2:
        values["label"] = f"rating >= {float(ratings[1]):g}"
    return values
