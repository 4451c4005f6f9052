"""`farebox receipts`: what became of a request."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from gateway.commands.shared import (
    ConfigOption,
    Failed,
    JsonOption,
    load_settings,
    open_database,
    out,
    print_json,
    reporting,
    table,
)

app = typer.Typer(no_args_is_help=True, help="Look at receipts.")


@app.command()
@reporting
def show(
    receipt_id: Annotated[str, typer.Argument(help="From the header x-farebox-receipt: rcpt_…")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """What one request asked for, which attempts were made, what it cost, and the transaction that paid for it."""
    from payments import receipts

    with open_database(load_settings(config)) as database:
        view = database.read(lambda tx: receipts.get(tx, receipt_id))
    if view is None:
        raise Failed(f"there is no receipt {receipt_id}", "Copy the whole id: rcpt_ and 40 hex digits")
    body = view.as_json()
    if as_json:
        print_json({"ok": True, "receipt": body})
        return
    shown = table("", "")
    shown.show_header = False
    for name, value in body.items():
        if name != "attempts" and value is not None:
            shown.add_row(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    out.print(shown)
    _print_attempts(body.get("attempts"))


def _print_attempts(attempts: Any) -> None:
    if not attempts:
        return
    names = list(dict.fromkeys(name for attempt in attempts for name in attempt))
    shown = table("attempt", *names)
    for number, attempt in enumerate(attempts, 1):
        shown.add_row(str(number), *("" if attempt.get(name) is None else str(attempt[name]) for name in names))
    out.print()
    out.print(shown)
