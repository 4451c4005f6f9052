"""`farebox ledger export`: the books as CSV or JSON lines, for accountants and their programs."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from gateway.commands.shared import (
    ConfigOption,
    Failed,
    JsonOption,
    WrongUsage,
    load_settings,
    open_database,
    reporting,
)

if TYPE_CHECKING:
    from gateway.commands.shared import Database
    from payments.ledger.export import Selection
    from payments.store import Transaction

FOREVER_MS = 2**53
Write = Callable[[tuple[str, ...]], object]


class Format(StrEnum):
    """How the rows are written."""

    CSV = "csv"
    JSONL = "jsonl"


@reporting
def export(
    account: Annotated[str | None, typer.Argument(help="Such as revenue@eip155:8453/USDC; without it, all.")] = None,
    since: Annotated[
        str | None, typer.Option("--from", metavar="DATE", help="The first day (UTC), 2026-01-31.")
    ] = None,
    until: Annotated[str | None, typer.Option("--to", metavar="DATE", help="The last day (UTC), included.")] = None,
    form: Annotated[Format, typer.Option("--format", help="How the rows are written.")] = Format.CSV,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file; without it, standard output.")] = None,
    unposted: Annotated[
        bool, typer.Option("--all", help="Also what is held, and holds that were freed; both move nothing.")
    ] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every transfer of the books, oldest first. The gateway may be running. With --json, as with --format jsonl.

    Amounts are dollars; in accounts of a chain's own coin (gas) they are that coin's units.
    """
    from payments.ledger import export as exporting

    begin, end = _day(since, "--from"), _day(until, "--to")
    if begin is not None and end is not None and begin > end:
        raise WrongUsage(f"--from {begin} is after --to {end}", "Exchange them")
    lines = as_json or form is Format.JSONL
    with open_database(load_settings(config)) as database:
        selection = exporting.Selection(
            from_ms=_milliseconds(begin, 0),
            to_ms=_milliseconds(None if end is None else end + timedelta(days=1), FOREVER_MS),
            account=None if account is None else database.read(lambda tx: find_account(tx, account)),
            unposted=unposted,
        )
        with _destination(output) as target:
            write = (_json_writer if lines else _csv_writer)(target, exporting.COLUMNS)
            _write_all(database, selection, write)


def find_account(tx: Transaction, name: str) -> str:
    """The id of the account that a person means; an address may be spelled in upper case.

    Raises:
        Failed: There is none.
    """
    rows = tx.execute("SELECT id FROM ledger_account WHERE LOWER(id) = ?", (name.lower(),)).fetchall()
    ids = [str(row[0]) for row in rows]
    if name not in ids and len(ids) != 1:
        raise Failed(f"there is no account {name!r}", "`farebox ledger statement` lists all accounts")
    return name if name in ids else ids[0]


def _write_all(database: Database, selection: Selection, write: Write) -> None:
    from payments.ledger import export as exporting

    after: exporting.Position | None = exporting.first(selection)
    while after is not None:
        at = after
        rows, after = database.read(lambda tx, at=at: exporting.page(tx, selection, at))  # type: ignore[misc]
        for row in rows:
            write(row)


def _csv_writer(target: IO[str], columns: tuple[str, ...]) -> Write:
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(columns)
    return writer.writerow


def _json_writer(target: IO[str], columns: tuple[str, ...]) -> Write:
    def write(row: tuple[str, ...]) -> None:
        target.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")

    return write


def _destination(output: Path | None) -> contextlib.AbstractContextManager[IO[str]]:
    if output is None:
        return contextlib.nullcontext(sys.stdout)
    return output.open("w", encoding="utf-8", newline="")


def _day(text: str | None, option: str) -> date | None:
    if text is None:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise WrongUsage(f"{option} {text!r} is not a day", "Write it as 2026-01-31") from None


def _milliseconds(day: date | None, default: int) -> int:
    if day is None:
        return default
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() * 1000)
