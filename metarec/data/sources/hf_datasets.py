"""Folders that Hugging Face ``datasets`` saved."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from metarec.data.source_options import ItemsTable, SourceOptions, options_scale
from metarec.data.sources.arrow import arrow_columns, checked
from metarec.data.sources.assembly import Tables, first_filled
from metarec.data.sources.layout import Layout
from metarec.data.sources.names import OWN, recognise
from metarec.errors import DataError


def hf_datasets(path: Path | None, options: SourceOptions) -> Tables:
    """Reads a folder that Hugging Face ``datasets`` saved; one split of it, named by 'ratings', or the only one.

    Items stand in the same rows, or in a folder beside it named by 'items'.
    """
    folder = _arrow_folder(path, options.ratings)
    held = _arrow_table(folder)
    names = held.column_names
    named = options.items.file if isinstance(options.items, ItemsTable) else options.items
    source = held if named is None else _arrow_table(_arrow_folder(path, named))
    given = {ours: theirs for ours, theirs in options.columns.items() if theirs}
    guessed = recognise(names, [ours for ours in (*OWN, "title") if ours not in options.columns], given.values())
    columns = {**{"user": "user", "item": "item", "rating": "rating", "title": "title"}, **guessed, **given}
    own = {columns[name]: name for name in OWN if name in columns}
    ratings = arrow_columns(held, own, f"'{folder}'")
    fields = {theirs: ours for ours, theirs in columns.items() if ours not in OWN}
    key = options.items.id if isinstance(options.items, ItemsTable) else columns["item"]
    items = first_filled(arrow_columns(source, {key: "item", **fields}, f"'{folder}'"))
    layout = Layout(names, columns, {ours: theirs for ours, theirs in guessed.items() if ours != theirs})
    notes = layout.notes(f"'{folder}'", {*OWN, "title"} - set(guessed) - set(given))
    return Tables(ratings, items, f"'{folder}'", options_scale(options), notes=tuple(notes))


def _arrow_folder(path: Path | None, split: str | None) -> Path:
    if path is None or not path.is_dir():
        raise DataError(f"dataset folder '{path}' does not exist", "Set 'path' to what save_to_disk wrote")
    if (path / "state.json").exists():
        return path
    splits = sorted(inner.name for inner in path.iterdir() if (inner / "state.json").exists())
    if split in splits or (split is None and len(splits) == 1):
        return path / (split or splits[0])
    raise DataError(f"'{path}' holds the splits {splits}", "Name one of them in 'ratings'")


def _arrow_table(folder: Path) -> pa.Table:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [Path(entry["filename"]).name for entry in state["_data_files"]]
        # Mapped, a damaged file would be followed wherever it points, and the process would be gone.
        read = [checked(pa.ipc.open_stream((folder / name).read_bytes()).read_all()) for name in names]
        return pa.concat_tables(read)
    except (OSError, ValueError, KeyError, TypeError, MemoryError, pa.ArrowException) as error:
        raise DataError(f"'{folder}' is not a saved dataset: {error}", "Write it again with save_to_disk") from None
