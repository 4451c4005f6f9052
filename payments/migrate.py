"""Bring a database's schema up to date. A current one costs one small read: Alembic is imported only when there is work."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

from payments.store import is_postgres

if TYPE_CHECKING:
    from sqlalchemy import Engine

HEAD = "0024"
"""The newest revision in `payments/migrations/versions`."""
BUSY_TIMEOUT_S = 60
_SCHEMA_LOCK = 0x66617265626F79


class SchemaTooNew(Exception):
    """The database was written by a newer Farebox than this one."""


class DatabaseUnreachable(Exception):
    """The database server does not answer, or not to us."""


def upgrade(location: Path | str) -> None:
    """Create the schema of the database at `location` (a SQLite file or a ``postgresql://`` URL), or bring it up to date. Two
    processes doing so at once do it one after the other.

    Raises:
        SchemaTooNew: If its revision is unknown here; nothing was changed.
        DatabaseUnreachable: If no PostgreSQL answers at the URL.
    """
    postgres = is_postgres(location)
    if not postgres:
        Path(location).parent.mkdir(parents=True, exist_ok=True)
    revision = _postgres_revision(str(location)) if postgres else _sqlite_revision(Path(location))
    if revision != HEAD:
        _run_alembic(_postgres_engine(str(location)) if postgres else _sqlite_engine(Path(location)))


def without_password(location: Path | str) -> str:
    """The location as it may be shown and logged."""
    return re.sub(r"(//[^:/@]*):[^@]*@", r"\1:…@", re.sub(r"(password=)[^&]*", r"\1…", str(location)))


def _sqlite_revision(path: Path) -> str | None:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)
    try:
        known = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if known else None
    finally:
        connection.close()
    return None if row is None else str(row[0])


def _postgres_revision(url: str) -> str | None:
    import psycopg

    try:
        with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
            known = connection.execute("SELECT to_regclass('alembic_version')").fetchone()
            if known is None or known[0] is None:
                return None
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            return None if row is None else str(row[0])
    except psycopg.OperationalError as error:
        raise DatabaseUnreachable(f"the database {without_password(url)} cannot be used: {error}") from error


def _sqlite_engine(path: Path) -> Engine:
    from sqlalchemy import create_engine, event
    from sqlalchemy.pool import NullPool

    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool, connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _leave_transactions_to_us(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _lock_before_looking(connection: Any) -> None:
        # The write lock comes before the revision is read: of two starts at once the second one waits, and finds it current.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _postgres_engine(url: str) -> Engine:
    import psycopg
    from sqlalchemy import create_engine, event
    from sqlalchemy.pool import NullPool

    # psycopg reads the URL itself: it knows every form that the rest of this program accepts.
    engine = create_engine("postgresql+psycopg://", poolclass=NullPool, creator=lambda: psycopg.connect(url))

    @event.listens_for(engine, "begin")
    def _lock_before_looking(connection: Any) -> None:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_SCHEMA_LOCK})")

    return engine


def _run_alembic(engine: Engine) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as error:
        raise SchemaTooNew(
            f"the database has a schema that this version of Farebox does not know ({error}); use a newer Farebox"
        ) from error
    finally:
        engine.dispose()
