"""What the commands have in common: options, the configuration, the database, and how results and failures are shown."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from payments.store import StoreBusy

if TYPE_CHECKING:
    from gateway.config import Problem
    from gateway.settings import Settings
    from payments.store import Store, Transaction

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_FILE = Path("farebox.toml")
SERVER_MODULES = {
    "aiohttp",
    "alembic",
    "coincurve",
    "cryptography",
    "orjson",
    "prometheus_client",
    "psycopg",
    "pydantic_settings",
    "sha3",
    "splintr",
    "sqlalchemy",
    "sqlmodel",
    "starlette",
    "structlog",
    "uvicorn",
    "uvloop",
}
"""What the extra `gateway` installs."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="FAREBOX_CONFIG",
        metavar="FILE",
        show_default="farebox.toml if it is there",
        help="The configuration file. FAREBOX_* variables win over it.",
    ),
]

# Into a pipe or a file, tables are as wide as they need, so that every id stands in one piece; rich would fold them.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 10_000)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Failed(Exception):
    """A command could not do its work: what is wrong, and what the user can do."""

    exit_status = 1

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


class WrongUsage(Failed):
    """What was written is not what the command takes, whatever the state of things."""

    exit_status = 2


def reporting(command: Callable[P, None]) -> Callable[P, None]:
    """Let a command's expected failures end it with a sentence and status 1 (2 for wrong usage) instead of a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        as_json = bool(kwargs.get("as_json"))
        status = 1
        try:
            for name, value in kwargs.items():
                require_text(name, value)
            command(*args, **kwargs)
        except Failed as error:
            show_failure(error.what, error.fix, as_json)
            status = error.exit_status
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in SERVER_MODULES:
                raise
            what = f"this command needs the gateway's parts ({error.name} is not installed)"
            show_failure(what, "Run: pip install 'farebox[gateway]'", as_json)
        except (sqlite3.Error, StoreBusy) as error:
            fix = "Check that the disk is not full, the file is writable, and it is a Farebox database"
            show_failure(f"the database cannot be used: {error}", fix, as_json)
        except BrokenPipeError:
            # Who reads the output has enough of it (`| head`): no failure that anybody wants to read of.
            raise
        except OSError as error:
            what = error.strerror or str(error)
            show_failure(
                f"{error.filename}: {what}" if error.filename else what, "Check the path and its permissions", as_json
            )
        else:
            return
        raise typer.Exit(status)

    return run


def require_text(name: str, value: Any) -> None:
    """An argument is text: of bytes that are not UTF-8 Python makes what can neither be stored nor printed.

    Raises:
        WrongUsage: Naming it.
    """
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        raise WrongUsage(f"{name.replace('_', '-')} is not UTF-8 text: {value!a}", "Write it in UTF-8") from None


def show_failure(what: str, fix: str, as_json: bool) -> None:
    """Tell what went wrong: JSON on standard output for programs, two lines on standard error for people."""
    if as_json:
        print_json({"ok": False, "error": {"message": what, "fix": fix}})
        return
    err.print("[bold red]error[/bold red]", end=" ")
    err.print(what, markup=False)
    err.print(f"  → {fix}", markup=False)


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table; the columns named in `right` hold numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def config_file(path: Path | None) -> Path | None:
    """The configuration file to read: what was asked for, or `farebox.toml` if it is here, or none."""
    return path or (DEFAULT_FILE if DEFAULT_FILE.exists() else None)


def load_settings(path: Path | None) -> Settings:
    """Read the configuration.

    Raises:
        Failed: With every mistake in it.
    """
    from gateway import config

    try:
        return config.load(config_file(path), os.environ)
    except config.ConfigError as error:
        count = len(error.problems)
        lines = "".join(f"\n  {problem}" for problem in error.problems)
        what = f"the configuration has {count} mistake{'s' if count > 1 else ''}:{lines}"
        raise Failed(what, "Correct it; `farebox config check` shows this again") from None


def problem_json(problem: Problem) -> dict[str, Any]:
    """A configuration problem for programs."""
    return {"place": problem.place, "what": problem.what, "fix": problem.fix, "warning": problem.warning}


class Database:
    """A gateway's database, for one command."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def write(self, unit: Callable[[Transaction], T]) -> T:
        """Make one atomic change; it is on disk when this returns."""
        return asyncio.run(self.store.write(unit))

    def read(self, query: Callable[[Transaction], T]) -> T:
        """Ask something."""
        return asyncio.run(self.store.read(query))


@contextlib.contextmanager
def open_database(settings: Settings, *, create: bool = False) -> Iterator[Database]:
    """Open the gateway's database; the gateway may be running.

    Args:
        settings: Say where it is.
        create: Make it if it is not there.

    Raises:
        Failed: If it is not there and may not be made, or is newer than this version.
    """
    from payments.migrate import DatabaseUnreachable, SchemaTooNew, upgrade
    from payments.store import Store

    location = settings.database
    if not create and isinstance(location, Path) and not location.exists():
        raise Failed(
            f"there is no database at {location}", "Name the gateway's configuration with --config, or start it once"
        )
    try:
        upgrade(location)
    except SchemaTooNew as error:
        raise Failed(str(error), "Update farebox") from None
    except DatabaseUnreachable as error:
        raise Failed(str(error), "Start the database, and check FAREBOX_DATABASE_URL") from None
    store = Store(location)
    try:
        yield Database(store)
    finally:
        store.close()
