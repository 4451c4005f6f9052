"""Bring a database's schema up to date. A current one costs one small read: Alembic is imported only when there is work."""

from __future__ import annotations

import sqlite3
from pathlib import Path

HEAD = "0007"
"""The newest revision in `payments/migrations/versions`."""
BUSY_TIMEOUT_S = 60


class SchemaTooNew(Exception):
    """The database was written by a newer Farebox than this one."""


def upgrade(path: Path) -> None:
    """Create the SQLite database at `path`, or update its schema. Two processes doing so at once do it one after the other.

    Raises:
        SchemaTooNew: If its revision is unknown here; nothing was changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if _revision(path) == HEAD:
        return
    _run_alembic(path)


def _revision(path: Path) -> str | None:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)
    try:
        known = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if known else None
    finally:
        connection.close()
    return None if row is None else str(row[0])


def _run_alembic(path: Path) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError
    from sqlalchemy import create_engine, event
    from sqlalchemy.pool import NullPool

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool, connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _leave_transactions_to_us(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _lock_before_looking(connection: object) -> None:
        # The write lock comes before the revision is read: of two starts at once the second one waits, and finds it current.
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # type: ignore[attr-defined]

    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as error:
        raise SchemaTooNew(
            f"the database {path} has a schema that this version of Farebox does not know ({error}); use a newer Farebox"
        ) from error
    finally:
        engine.dispose()
