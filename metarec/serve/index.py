"""The store's index: one database connection for all threads, its tables, and errors that repeat no values."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from metarec.errors import StoreError
from metarec.serve.database import TABLES, Postgres, Sqlite

SCHEMA_VERSION = "1"
INDEX_FILE = "index.sqlite"


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
                self.execute(self._database.set_up_alone)
                for table in TABLES:
                    self.execute(table.format(serial=self._database.serial))
                self.execute(
                    "INSERT INTO facts (name, value) VALUES ('schema_version', ?) ON CONFLICT (name) DO NOTHING",
                    (SCHEMA_VERSION,),
                )
            found = self.execute("SELECT value FROM facts WHERE name = 'schema_version'")[0][0]
        if found != SCHEMA_VERSION:
            raise StoreError(
                f"the store has schema version {found}, this metarec reads {SCHEMA_VERSION}", "Use the one that made it"
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

    def forget(self) -> None:
        """Removes deleted rows from the database's files."""
        with self.locked():
            self._database.forget()

    def close(self) -> None:
        """Closes the connection."""
        with self._lock:
            self._database.close()


def is_remote(location: str | Path) -> bool:
    """Says whether a store's location is a PostgreSQL database."""
    return str(location).startswith(("postgresql://", "postgres://"))
