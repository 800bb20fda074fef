"""SQLite and PostgreSQL behind one interface: statements, transactions, and the tables of a store."""

from __future__ import annotations

import contextlib
import sqlite3
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from metarec.errors import ConfigError, StoreError

_BUSY_SECONDS = 10.0
_PERSONAL = (
    "requests",
    "read_ratings",
    "beside_ratings",
    "latest",
    "feedback",
    "user_facts",
    "friends",
    "adapters",
    "users",
)
TABLES = (
    "CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS users (id {serial}, name TEXT NOT NULL UNIQUE, key TEXT NOT NULL UNIQUE,"
    " created DOUBLE PRECISION NOT NULL)",
    "CREATE TABLE IF NOT EXISTS feedback (user_id BIGINT NOT NULL REFERENCES users (id) ON DELETE CASCADE,"
    " version BIGINT NOT NULL, item TEXT NOT NULL, rating DOUBLE PRECISION NOT NULL, at DOUBLE PRECISION NOT NULL,"
    " PRIMARY KEY (user_id, version))",
    # The version of each item's last rating: what a user is adapted to is read from here, however long the log is.
    "CREATE TABLE IF NOT EXISTS latest (user_id BIGINT NOT NULL REFERENCES users (id) ON DELETE CASCADE,"
    " item TEXT NOT NULL, version BIGINT NOT NULL, PRIMARY KEY (user_id, item))",
    "CREATE INDEX IF NOT EXISTS latest_by_version ON latest (user_id, version)",
    # Written by those ratings alone with which something came.
    "CREATE TABLE IF NOT EXISTS beside_ratings (user_id BIGINT NOT NULL REFERENCES users (id) ON DELETE CASCADE,"
    " version BIGINT NOT NULL, context TEXT NOT NULL, review TEXT NOT NULL, PRIMARY KEY (user_id, version))",
    # Ratings that nobody gave: what a review without one was read as.
    "CREATE TABLE IF NOT EXISTS read_ratings (user_id BIGINT NOT NULL REFERENCES users (id) ON DELETE CASCADE,"
    " version BIGINT NOT NULL, PRIMARY KEY (user_id, version))",
    "CREATE TABLE IF NOT EXISTS user_facts (user_id BIGINT PRIMARY KEY REFERENCES users (id) ON DELETE CASCADE,"
    " version BIGINT NOT NULL, about TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS friends (user_id BIGINT NOT NULL REFERENCES users (id) ON DELETE CASCADE,"
    " friend TEXT NOT NULL, PRIMARY KEY (user_id, friend))",
    "CREATE INDEX IF NOT EXISTS friends_by_friend ON friends (friend)",
    "CREATE TABLE IF NOT EXISTS requests (user_id BIGINT NOT NULL REFERENCES users (id) ON DELETE CASCADE,"
    " idempotency_key TEXT NOT NULL, digest TEXT NOT NULL, version BIGINT NOT NULL,"
    " PRIMARY KEY (user_id, idempotency_key))",
    "CREATE TABLE IF NOT EXISTS adapters (user_id BIGINT NOT NULL REFERENCES users (id) ON DELETE CASCADE,"
    " version BIGINT NOT NULL, place TEXT NOT NULL, recommender TEXT NOT NULL, manifest TEXT NOT NULL,"
    " bytes BIGINT NOT NULL, created DOUBLE PRECISION NOT NULL, PRIMARY KEY (user_id, version, place))",
    # Of a user with this key adapters of versions below the given one must go; all where it is null: the user is gone.
    "CREATE TABLE IF NOT EXISTS erasures (number {serial}, key TEXT NOT NULL, below BIGINT,"
    " created DOUBLE PRECISION NOT NULL)",
    "CREATE INDEX IF NOT EXISTS erasures_by_key ON erasures (key)",
    "CREATE TABLE IF NOT EXISTS items (ordinal {serial}, id TEXT NOT NULL UNIQUE, fields TEXT NOT NULL,"
    " created DOUBLE PRECISION NOT NULL)",
    "CREATE TABLE IF NOT EXISTS removed_items (id TEXT PRIMARY KEY, created DOUBLE PRECISION NOT NULL)",
)
# From schema 1, whose adapters did not say in which directory they are: '' is the one that opens the store next.
FROM_SCHEMA_1 = (
    ("ALTER TABLE adapters RENAME TO adapters_1",),
    (
        "INSERT INTO adapters (user_id, version, place, recommender, manifest, bytes, created)"
        " SELECT user_id, version, '', recommender, manifest, bytes, created FROM adapters_1",
        "DROP TABLE adapters_1",
        "INSERT INTO latest (user_id, item, version)"
        " SELECT user_id, item, MAX(version) FROM feedback GROUP BY user_id, item",
    ),
)


class Sqlite:
    """The index in one file, shared by all threads and safe beside other processes."""

    serial = "INTEGER PRIMARY KEY AUTOINCREMENT"
    # Locks one kind of change against other servers; in SQLite every transaction does so by itself.
    alone = "SELECT ?"
    # Run once, when the tables are new.
    set_up: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)  # the directory may be open to others; SQLite gives its log the same mode
        self._connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        # A store that nobody closes does not leave it to the collector, which Python 3.13 warns of.
        weakref.finalize(self, self._connection.close)
        self._use_write_ahead_log()
        for pragma in ("synchronous=FULL", "secure_delete=ON", "foreign_keys=ON"):
            self._connection.execute(f"PRAGMA {pragma}")

    def _use_write_ahead_log(self) -> None:
        """Switches the log's mode; SQLite does not wait for another server that is switching it at the same moment."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while not self._switched(last_try=time.monotonic() > deadline):
            time.sleep(0.05)

    def _switched(self, *, last_try: bool) -> bool:
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if last_try or "locked" not in str(error):
                raise
            return False
        return True

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """Runs one statement and returns its rows."""
        return self._connection.execute(sql, values).fetchall()

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Runs one statement for every row of values."""
        self._connection.executemany(sql, rows)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Makes the statements inside take effect together or not at all."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def rewrite(self) -> None:
        """Writes the file anew without deleted rows, and empties the write-ahead log.

        `secure_delete` alone does not do: a page that SQLite rebalances keeps copies of rows that it passed on.

        Raises:
            StoreError: Another process keeps the log open.
        """
        self._connection.execute("VACUUM")
        deadline = time.monotonic() + _BUSY_SECONDS
        while self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > deadline:
                raise StoreError("another process keeps the index's log open", "Erase again when it has finished")
            time.sleep(0.05)

    def forget(self) -> None:
        """Frees the pages that the connection keeps in memory."""
        self._connection.execute("PRAGMA shrink_memory")

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()


class Postgres:
    """The index in a PostgreSQL database, for several servers."""

    serial = "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY"
    # CREATE TABLE IF NOT EXISTS fails for one of two that find no table at the same moment.
    alone = "SELECT pg_advisory_xact_lock(hashtext(?))"
    # The planner's statistics would keep ids of users who are erased.
    set_up = (
        "ALTER TABLE users ALTER COLUMN name SET STATISTICS 0",
        "ALTER TABLE requests ALTER COLUMN idempotency_key SET STATISTICS 0",
        "ALTER TABLE friends ALTER COLUMN friend SET STATISTICS 0",
        "ALTER TABLE user_facts ALTER COLUMN about SET STATISTICS 0",
        "ALTER TABLE beside_ratings ALTER COLUMN review SET STATISTICS 0",
    )

    def __init__(self, url: str) -> None:
        try:
            import psycopg
        except ImportError:
            raise ConfigError("a PostgreSQL store needs psycopg", "Run: pip install 'metarec[postgres]'") from None
        self._psycopg = psycopg
        self._url = url
        self._connection = self._connect()

    def _connect(self) -> Any:
        try:
            return self._psycopg.connect(self._url, autocommit=True)
        except self._psycopg.OperationalError as error:
            # The message of a failed connection may repeat the URL's password.
            raise StoreError(
                f"the PostgreSQL store does not answer ({type(error).__name__})", "Check --store"
            ) from None

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """Runs one statement and returns its rows."""
        cursor = self._open().execute(sql.replace("?", "%s"), values)
        return cursor.fetchall() if cursor.description else []

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Runs one statement for every row of values."""
        with self._open().cursor() as cursor:
            cursor.executemany(sql.replace("?", "%s"), rows)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Makes the statements inside take effect together or not at all."""
        with self._open().transaction():
            yield

    def _open(self) -> Any:
        if self._connection.closed or self._connection.broken:
            self._connection = self._connect()
        return self._connection

    def rewrite(self) -> None:
        """Writes the tables of users anew without deleted rows; empties the server's log where the role may."""
        for table in _PERSONAL:
            self._open().execute(f"VACUUM FULL {table}")
        try:
            for statement in ("SELECT pg_switch_wal()", "CHECKPOINT"):
                self._open().execute(statement)
        except self._psycopg.errors.InsufficientPrivilege:
            return

    def forget(self) -> None:
        """Frees the connection's buffers, which keep parts of earlier statements; the next statement opens another."""
        self._connection.close()

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()
