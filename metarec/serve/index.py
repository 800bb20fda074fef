"""The store's index: one database connection for all threads, its tables, and errors that repeat no values."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from metarec.errors import StoreError
from metarec.serve.database import FROM_SCHEMA_1, TABLES, Postgres, Sqlite

SCHEMA_VERSION = "2"
INDEX_FILE = "index.sqlite"
_STORE, _SECRET, _UNPLACED = "store", "secret", "unplaced"


class Index:
    """Runs statements for one thread at a time; opening it creates the tables that are not there.

    Args:
        location: A directory, or ``postgresql://...``.

    Raises:
        StoreError: It cannot be opened, or has another schema.
    """

    def __init__(self, location: str | Path) -> None:
        self._lock = threading.RLock()
        remote = is_remote(location)
        self.location = "postgresql" if remote else str(location)
        self._database: Sqlite | Postgres
        with self.locked():
            self._database = Postgres(str(location)) if remote else Sqlite(Path(location) / INDEX_FILE)
            with self.transaction():
                self.alone("metarec schema")
                self.execute(TABLES[0])
                found = self.fact("schema_version")
                if found not in (None, "1", SCHEMA_VERSION):
                    raise StoreError(
                        f"the store has schema version {found}, this metarec reads {SCHEMA_VERSION}",
                        "Use the one that made it",
                    )
                before, after = FROM_SCHEMA_1 if found == "1" else ((), ())
                tables = [table.format(serial=self._database.serial) for table in TABLES]
                for statement in (
                    *before,
                    *tables,
                    *after,
                    *(self._database.set_up if found != SCHEMA_VERSION else ()),
                ):
                    self.execute(statement)
                self.state("schema_version", SCHEMA_VERSION)
                if found == "1":
                    self.state(_UNPLACED, "1")
                self.store = self.fact(_STORE) or uuid.uuid4().hex
                self.secret = self.fact(_SECRET) or secrets.token_hex(32)
                self.state(_STORE, self.store)
                self.state(_SECRET, self.secret)

    def place_adapters(self, place: str) -> None:
        """Gives adapters of schema 1, whose directory nobody noted, to the one that opens the store first."""
        if self.fact(_UNPLACED) == "1":
            self.execute("UPDATE adapters SET place = ? WHERE place = ''", (place,))
            self.state(_UNPLACED, "0")

    def alone(self, what: str) -> None:
        """Makes other servers that say the same wait until this transaction has ended."""
        self.execute(self._database.alone, (what,))

    def fact(self, name: str) -> str | None:
        """Returns a fact about the store, or None."""
        rows = self.execute("SELECT value FROM facts WHERE name = ?", (name,))
        return str(rows[0][0]) if rows else None

    def facts_named(self, beginning: str) -> dict[str, str]:
        """Returns facts whose names begin so, by name."""
        rows = self.execute(
            "SELECT name, value FROM facts WHERE substr(name, 1, ?) = ? ORDER BY name", (len(beginning), beginning)
        )
        return {str(name): str(value) for name, value in rows}

    def state(self, name: str, value: str) -> None:
        """Writes a fact about the store."""
        self.execute(
            "INSERT INTO facts (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (name, value),
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the index for one thread, and turns the database's errors into ones that repeat no values.

        Raises:
            StoreError: The database failed.
        """
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise StoreError(f"the index of '{self.location}' fails: {error}", "Check its disk") from error
            except Exception as error:
                if type(error).__module__.partition(".")[0] != "psycopg":
                    raise
                raise StoreError(f"the PostgreSQL store fails ({type(error).__name__})", "Check the server") from None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Makes the statements inside take effect together or not at all."""
        with self.locked(), self._database.transaction():
            yield

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """Runs one statement and returns its rows."""
        with self.locked():
            return self._database.execute(sql, values)

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Runs one statement for every row of values."""
        with self.locked():
            self._database.execute_many(sql, rows)

    def rewrite(self) -> None:
        """Removes deleted rows from the database's files, which takes longer the larger they are."""
        with self.locked():
            self._database.rewrite()

    def forget(self) -> None:
        """Frees what the connection keeps in memory of earlier statements; not inside a transaction."""
        with self.locked():
            self._database.forget()

    def close(self) -> None:
        """Closes the connection."""
        with self._lock:
            self._database.close()


def is_remote(location: str | Path) -> bool:
    """Says whether a store's location is a PostgreSQL database."""
    return str(location).startswith(("postgresql://", "postgres://"))
