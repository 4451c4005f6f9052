"""`farebox withdrawals`: look at what wallets take out, and decide about what waits for a person."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.commands.shared import (
    ConfigOption,
    Failed,
    JsonOption,
    WrongUsage,
    load_settings,
    open_database,
    out,
    print_json,
    reporting,
    table,
)

if TYPE_CHECKING:
    from pathlib import Path

    from payments.store import Transaction
    from payments.withdrawals import Withdrawal

app = typer.Typer(no_args_is_help=True, help="See what wallets take out; approve or reject what waits for a person.")

STATES = ("review", "approved", "queued", "paid", "failed", "rejected")
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="As `farebox withdrawals list` shows it: wd_…")]


@app.command("list", epilog="Example: [cyan]farebox withdrawals list --state review[/cyan]")
@reporting
def list_(
    state: Annotated[str | None, typer.Option(help=f"Only these: {', '.join(STATES)}.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The newest so many.")] = 50,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Withdrawals, newest first."""
    from payments import withdrawals

    if state not in (None, *STATES):
        raise WrongUsage(f"{state!r} is not a withdrawal's state", f"Take one of: {', '.join(STATES)}")
    wanted = STATES if state is None else (state,)
    with open_database(load_settings(config)) as database:
        found = database.read(lambda tx: withdrawals.listed(tx, wanted, limit))
    if as_json:
        print_json({"ok": True, "withdrawals": [each.as_json() for each in found]})
        return
    if not found:
        out.print("There are none.", markup=False)
        return
    shown = table(
        "id", "created (UTC)", "wallet", "amount, USD", "asset", "state", "transaction", right=("amount, USD",)
    )
    for each in found:
        values = each.as_json()
        shown.add_row(
            each.id,
            values["created"][:19].replace("T", " "),
            each.address,
            values["amount_usd"],
            each.asset,
            each.state if each.reason is None else f"{each.state}: {each.reason}",
            each.transaction_hash or "",
        )
    out.print(shown)


@app.command()
@reporting
def approve(withdrawal: IdArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Let a withdrawal go out; the running gateway sends it."""
    from payments import withdrawals

    _decide(lambda tx: withdrawals.approve(tx, withdrawal), config, as_json)


@app.command()
@reporting
def reject(
    withdrawal: IdArgument,
    reason: Annotated[str, typer.Option(help="What the wallet is told.")] = "rejected by the operator",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Refuse a withdrawal; its money is the wallet's again."""
    from payments import withdrawals

    _decide(lambda tx: withdrawals.reject(tx, withdrawal, reason), config, as_json)


def _decide(unit: Callable[[Transaction], Withdrawal], config: Path | None, as_json: bool) -> None:
    from payments.withdrawals import NotUnderReview, UnknownWithdrawal

    with open_database(load_settings(config)) as database:
        try:
            decided = database.write(unit)
        except (UnknownWithdrawal, NotUnderReview) as error:
            raise Failed(str(error), "`farebox withdrawals list --state review` shows what waits") from None
    if as_json:
        print_json({"ok": True, **decided.as_json()})
    else:
        out.print(
            f"{decided.id} is {decided.state}: {decided.as_json()['amount_usd']} USD to {decided.address}", markup=False
        )
