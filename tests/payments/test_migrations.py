"""The schema: what the migrations make is what the models say, however often and however many at once."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlmodel import SQLModel

import payments.tables
from payments import migrate

MIGRATIONS = Path(migrate.__file__).with_name("migrations")


def constraints(connection: sqlite3.Connection) -> dict[str, str]:
    rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name <> 'alembic_version'")
    return {name: " ".join(sorted(sql.replace(",", " ").replace(chr(34), "").split())) for name, sql in rows}


def test_migrated_schema_is_the_models_schema(tmp_path: Path) -> None:
    assert payments.tables.LedgerAccount.__tablename__ == "ledger_account"
    migrate.upgrade(tmp_path / "migrated.db")
    engine = create_engine(f"sqlite:///{tmp_path / 'migrated.db'}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, SQLModel.metadata) == []
    engine.dispose()


def test_migrated_constraints_are_the_models_constraints(tmp_path: Path) -> None:
    # Alembic's comparison does not see CHECK constraints, and the ledger's safety rests on them.
    migrate.upgrade(tmp_path / "migrated.db")
    engine = create_engine(f"sqlite:///{tmp_path / 'models.db'}")
    SQLModel.metadata.create_all(engine)
    engine.dispose()
    migrated, models = sqlite3.connect(tmp_path / "migrated.db"), sqlite3.connect(tmp_path / "models.db")
    assert constraints(migrated) == constraints(models)
    migrated.close()
    models.close()


def test_current_revision_is_the_newest_one() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [migrate.HEAD]


def test_current_schema_is_recognised_without_loading_alembic(tmp_path: Path) -> None:
    path = tmp_path / "farebox.db"
    migrate.upgrade(path)
    script = (
        "import sys; from pathlib import Path; from payments import migrate; migrate.upgrade(Path(sys.argv[1]));"
        " sys.exit('alembic' in sys.modules or 'sqlalchemy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)


def test_two_starts_at_once_make_one_schema(tmp_path: Path) -> None:
    path = tmp_path / "data" / "farebox.db"
    script = "import sys; from pathlib import Path; from payments import migrate; migrate.upgrade(Path(sys.argv[1]))"
    starts = [subprocess.Popen([sys.executable, "-c", script, str(path)]) for _ in range(3)]
    assert [start.wait(timeout=60) for start in starts] == [0, 0, 0]
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(migrate.HEAD,)]
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_schema_of_a_newer_farebox_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "farebox.db"
    migrate.upgrade(path)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    with pytest.raises(migrate.SchemaTooNew, match="newer Farebox"):
        migrate.upgrade(path)
    assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)
    connection.close()
