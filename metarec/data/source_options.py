"""Options of a source: what a task or a command line tells it about files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from metarec.config import Section
from metarec.data.interactions import RatingScale

# Names of table files end so.
TABLE_ENDINGS = (".csv", ".tsv", ".txt", ".dat", ".json", ".jsonl", ".ndjson", ".parquet", ".gz")
# What describes a folder that `metarec.data.sources.write_tables` wrote.
CONVERTED = "dataset.json"
# What timestamps say of a moment, where no column does.
OF_TIME = ("hour", "weekday", "month")
# Options that name side information.
SIDE_OPTIONS = frozenset({"vectors", "item_graph", "users", "friends", "context", "review"})
# Columns of ratings that are never side information.
_OF_RATINGS = ("user", "item", "title", "rating", "timestamp")
BadRows = Literal["error", "quarantine"]


def _unset(value: object) -> bool:
    """Says whether an option is left out, so that tasks without it keep the digest they had before there was one."""
    return not value


def is_table(path: str | Path) -> bool:
    """Says whether a path is named as table files are, or is a folder with a table, or with a converted copy of one."""
    path = Path(path)
    return path.suffix in TABLE_ENDINGS or (path / CONVERTED).is_file() or any(path.glob("ratings.*"))


class ItemsTable(Section):
    """The item file of a table, where its ids stand in a column of another name than the ratings'."""

    file: str | None = Field(None, description="its name; null finds items.*")
    id: str


class SourceOptions(Section):
    """Options of a source; most sources need none."""

    ratings: str | None = Field(None, description="of 'table': the file with the ratings")
    items: str | ItemsTable | None = Field(
        None,
        description="of 'table': the file with the items, or {id: its column of ids}; null: items.*, or the ratings",
    )
    columns: dict[str, str] = Field(
        {},
        description="of 'table': user, item, rating, timestamp, title, other fields to the file's columns; '': none",
    )
    header: tuple[str, ...] | None = Field(
        None, description="of 'table': names of the ratings' columns, where the file's first row is data"
    )
    separator: str = ","
    encoding: str = "utf-8"
    line_breaks: bool = Field(False, description="whether quoted fields may hold line breaks")
    scale: tuple[float, float] | None = Field(None, description="lowest and highest rating; null takes what there is")
    bad_rows: BadRows = Field("error", description="quarantine: leave bad rows out and count them")
    vectors: dict[str, str] = Field(
        {},
        description="names to files (.npz, .npy, .parquet, .safetensors) of items' vectors, as of images",
        exclude_if=_unset,
    )
    item_graph: str | None = Field(
        None, description="file of edges: item, relation, other; other is an item or anything else", exclude_if=_unset
    )
    users: str | None = Field(
        None, description="file of users: user, then their fields; 'about' is a sentence", exclude_if=_unset
    )
    friends: str | None = Field(None, description="file of edges between users: user, friend", exclude_if=_unset)
    context: tuple[str, ...] = Field(
        (),
        description="columns that say in which moment a rating was given; hour, weekday and month are read off "
        "timestamps where there are no such columns",
        exclude_if=_unset,
    )
    review: str | None = Field(None, description="column of the text that came with a rating", exclude_if=_unset)

    @property
    def of_rows(self) -> tuple[str, ...]:
        """Columns of ratings that are side information."""
        return (*self.context, *([self.review] if self.review else []))

    @field_validator("separator")
    @classmethod
    def _separator_separates(cls, separator: str) -> str:
        if separator != "::" and (len(separator) != 1 or separator.isalnum() or separator in '"\r\n'):
            raise ValueError("One sign separates fields, such as ',' ';' '|' or a tab (\\t), or '::'")
        return separator

    @model_validator(mode="after")
    def _side_information_is_no_rating(self) -> SourceOptions:
        for name in self.of_rows:
            if name in _OF_RATINGS:
                raise ValueError(f"'{name}' is no side information: it is what is predicted, or names who and what")
            if self.of_rows.count(name) > 1:
                raise ValueError(f"'{name}' is named twice in 'context' and 'review'")
        return self

    @field_validator("scale")
    @classmethod
    def _scale_ascends(cls, scale: tuple[float, float] | None) -> tuple[float, float] | None:
        if scale and not scale[0] < scale[1]:
            raise ValueError("The lowest rating comes first, then a higher one")
        return scale


def options_scale(options: SourceOptions) -> RatingScale | None:
    """Returns the scale that a task states, if it does."""
    return RatingScale(*options.scale) if options.scale else None
