"""`farebox ledger`: prove that the books balance and match the chain, and read them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.ledger_export import export, find_account
from gateway.commands.shared import (
    ConfigOption,
    Database,
    Failed,
    JsonOption,
    load_settings,
    open_database,
    out,
    print_json,
    reporting,
    table,
)

if TYPE_CHECKING:
    from gateway.settings import Settings
    from payments.reconciliation import Report
    from payments.store import Transaction

app = typer.Typer(no_args_is_help=True, help="Prove that the books balance, and read them.")

app.command(epilog="Example: [cyan]farebox ledger export --from 2026-01-01 --to 2026-01-31 -o january.csv[/cyan]")(
    export
)

ROWS_DEFAULT = 50
UNITS = {"usd": "USD", "native": "coins"}
"""By what `payments.ledger.accounts.unit_of` says."""


@app.command(epilog="Example: [cyan]farebox ledger check --config farebox.toml --json[/cyan]")
@reporting
def check(
    offline: Annotated[bool, typer.Option("--offline", help="Look at the books alone, not at the chains.")] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that the books balance and that every treasury holds on chain what they say. The gateway may be running.

    Books what it finds on chain and knows nothing of: unasked arrivals as unattributed, withdrawals as the owner's.
    """
    settings = load_settings(config)
    with open_database(settings) as database:
        report = _report(settings, database, offline)
    tokens = [
        {
            "asset": token.asset,
            "block_number": token.block_number,
            "on_chain_usd": _usd(token.on_chain),
            "books_usd": _usd(token.books),
            "in_flight_usd": _usd(token.in_flight),
            "booked": [
                {
                    "id": movement.log_id,
                    "counterparty": movement.counterparty,
                    "amount_usd": _usd(movement.amount_nano_usd),
                }
                for movement in token.booked
            ],
        }
        for token in report.tokens
    ]
    findings = list({(f.code, f.subject, f.message): f for f in report.findings}.values())
    if as_json:
        listed = [{"code": f.code, "subject": f.subject, "message": f.message} for f in findings]
        print_json({"ok": not findings, "tokens": tokens, "findings": listed})
    else:
        _print_check(tokens, [f"{f.code} {f.subject}: {f.message}" for f in findings], offline)
    if findings:
        raise typer.Exit(1)


def _print_check(tokens: list[dict[str, Any]], findings: list[str], offline: bool) -> None:
    if tokens:
        shown = table("token", "block", "on chain, USD", "books, USD", right=("block", "on chain, USD", "books, USD"))
        for token in tokens:
            shown.add_row(token["asset"], str(token["block_number"]), token["on_chain_usd"], token["books_usd"])
        out.print(shown)
    for token in tokens:
        for movement in token["booked"]:
            kind = "owner" if movement["amount_usd"].startswith("-") else "unattributed"
            text = f"booked as {kind}: {movement['amount_usd']} USD, {movement['counterparty']} ({movement['id']})"
            out.print(text, markup=False)
    for finding in findings:
        out.print("[bold red]wrong[/bold red]", end=" ")
        out.print(finding, markup=False)
    if not findings:
        agrees = "" if offline or not tokens else " and agree with the chain"
        out.print(f"[green]ok[/green] the books balance{agrees}")


def _report(settings: Settings, database: Database, offline: bool) -> Report:
    from payments.ledger import books
    from payments.reconciliation import Report

    if offline or not settings.networks:
        return Report(findings=database.read(books.check))
    return asyncio.run(_reconcile_all(settings, database))


async def _reconcile_all(settings: Settings, database: Database) -> Report:
    from payments.chain.rpc import Rpc, RpcError, RpcUnavailable
    from payments.deposits import Deposits
    from payments.reconciliation import Report, reconcile

    whole = Report()
    for network, own in zip(settings.resolved_networks(), settings.networks, strict=True):
        rpc = Rpc(own.rpc_urls)
        try:
            pay_to = settings.pay_to_for(network.chain_id)
            deposits = None
            if own.deposit_factory is not None:
                deposits = Deposits(
                    database.store, rpc, network, pay_to, own.deposit_factory, confirmations=own.confirmations
                )
            found = await reconcile(
                database.store, rpc, network, pay_to, confirmations=own.confirmations, deposits=deposits
            )
        except (RpcError, RpcUnavailable) as error:
            fix = "Check rpc_urls (`farebox doctor` looks closer), or use --offline for the books alone"
            raise Failed(f"{network.caip2} cannot be asked: {error}", fix) from None
        finally:
            await rpc.aclose()
        whole.tokens.extend(found.tokens)
        whole.findings.extend(found.findings)
    return whole


@app.command(epilog="Example: [cyan]farebox ledger statement pool:default@USD[/cyan]")
@reporting
def statement(
    account: Annotated[
        str | None, typer.Argument(help="Such as pool:default@USD; without it, all accounts and their balances.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The newest so many transfers.")] = ROWS_DEFAULT,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """All accounts with their balances, or one account's transfers, newest first.

    Amounts are dollars; what is paid for gas is in the chain's own coin (with --json, `…_native` instead of `…_usd`).
    """
    from payments.ledger.accounts import unit_of

    with open_database(load_settings(config)) as database:
        if account is None:
            accounts = database.read(_accounts)
            rows = []
        else:
            account = id = database.read(lambda tx, named=account: find_account(tx, named))  # type: ignore[misc]
            accounts = [entry for entry in database.read(_accounts) if entry["account"] == id]
            rows = database.read(lambda tx: _transfers(tx, id, limit))
    if as_json:
        print_json(
            {"ok": True, "accounts": accounts} if account is None else {"ok": True, **accounts[0], "transfers": rows}
        )
        return
    if account is None:
        shown = table("account", "balance", "held", "in", right=("balance", "held"))
        for entry in accounts:
            unit = unit_of(entry["account"])
            shown.add_row(entry["account"], entry[f"balance_{unit}"], entry[f"held_{unit}"], UNITS[unit])
        out.print(shown)
        return
    unit = unit_of(account)
    named = UNITS[unit]
    balance, held = accounts[0][f"balance_{unit}"], accounts[0][f"held_{unit}"]
    out.print(f"{account}: balance {balance} {named}, held {held} {named}\n", markup=False)
    amount = f"amount, {named}"
    shown = table("time (UTC)", amount, "state", "other account", "transfer", right=(amount,))
    for row in rows:
        shown.add_row(row["time"], row[f"amount_{unit}"], row["state"], row["counterparty"], row["transfer"])
    out.print(shown)


def _accounts(tx: Transaction) -> list[dict[str, Any]]:
    from payments.ledger.accounts import unit_of

    rows = tx.execute("SELECT id, balance, pending_out FROM ledger_account ORDER BY asset, kind, owner").fetchall()
    return [
        {"account": id, f"balance_{unit_of(id)}": _usd(balance), f"held_{unit_of(id)}": _usd(held)}
        for id, balance, held in rows
    ]


def _transfers(tx: Transaction, account: str, limit: int) -> list[dict[str, Any]]:
    from payments.ledger.accounts import unit_of

    rows = tx.execute(
        "SELECT id, debit_account, credit_account, amount, posted_amount, state, reference, created_ms"
        " FROM ledger_transfer WHERE debit_account = ? OR credit_account = ? ORDER BY created_ms DESC, id DESC LIMIT ?",
        (account, account, limit),
    ).fetchall()
    return [
        {
            "transfer": id,
            "time": datetime.fromtimestamp(created_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S"),
            # A pending transfer shows what is held, an ended one what moved.
            f"amount_{unit_of(account)}": _usd(
                (amount if state == "pending" else posted or 0) * (-1 if debit == account else 1)
            ),
            "state": state,
            "counterparty": credit if debit == account else debit,
            "reference": reference,
        }
        for id, debit, credit, amount, posted, state, reference, created_ms in rows
    ]


def _usd(amount_nano_usd: int) -> str:
    from payments.money import nano_to_usd

    return nano_to_usd(amount_nano_usd)
