"""`farebox settlements`: what is to be paid on the chains, how far it has come, and why."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated, Any

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
    from gateway.settings import Settings
    from payments.chain.networks import Token
    from payments.store import Transaction

app = typer.Typer(
    no_args_is_help=True, help="Look at settlements: find them, have one explained, ask for another look."
)

LISTED_DEFAULT = 50
AGES_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
STATES = ("queued", "submitted", "mined", "superseded", "final", "failed")
GROUPS = {"open": STATES[:2], "paid": STATES[2:5]}

SettlementId = Annotated[str, typer.Argument(metavar="SETTLEMENT", help="Its id, or the receipt that it pays for.")]


@app.command("list", epilog="Example: [cyan]farebox settlements list --state open --older-than 5m[/cyan]")
@reporting
def list_(
    state: Annotated[str | None, typer.Option(help=f"One of {', '.join(STATES)}; or open, or paid.")] = None,
    kind: Annotated[str | None, typer.Option(help="Such as payment, refund, withdrawal, sweep.")] = None,
    payer: Annotated[str | None, typer.Option(help="Whose: a wallet's address.")] = None,
    older_than: Annotated[str | None, typer.Option(metavar="AGE", help="Such as 90s, 10m, 2h or 1d.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The newest so many.")] = LISTED_DEFAULT,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Settlements, newest first. Those that stay open for minutes deserve a look with `explain`."""
    from payments import kinds
    from payments.settlement import stories

    before = None if older_than is None else time.time_ns() // 1_000_000 - 1000 * _seconds(older_than)
    wanted = _states(state)
    if payer is not None and not re.fullmatch(r"0x[0-9a-fA-F]{40}", payer, re.ASCII):
        raise WrongUsage(f"{payer!r} is no address", "An address is 0x and 40 hexadecimal digits")
    settings = load_settings(config)
    with open_database(settings) as database:
        known = kinds.names(database.store)
        if kind not in (None, *known):
            raise WrongUsage(f"there is no kind {kind!r}", f"Use one of: {', '.join(known)}")
        rows = database.read(
            lambda tx: stories.search(tx, wanted=wanted, kind=kind, payer=payer, created_before_ms=before, limit=limit)
        )
    tokens = _tokens(settings)
    for row in rows:
        row |= _worth(row, "value", tokens)
    if as_json:
        print_json({"ok": True, "settlements": rows})
        return
    shown = table(
        "settlement", "kind", "state", "since (UTC)", "from", "value", "transaction or reason", right=("value",)
    )
    for row in rows:
        last = row["reason"] if row["state"] == "failed" else row["transaction_hash"]
        since = stories.moment(row["created_ms"])
        value = _amount(row, "value")
        shown.add_row(row["id"], row["kind"], row["state"], since, row["payer"], value, last or "")
    out.print(shown)


@app.command(epilog="Example: [cyan]farebox settlements explain rcpt_2f…[/cyan]")
@reporting
def explain(settlement: SettlementId, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """The whole story of one settlement: the order, its transaction and broadcasts, the evidence, and what happens next.

    Its value is counted in the token's smallest units; with --json its worth stands next to it (`…_usd`).
    """
    from payments.settlement import stories

    settings = load_settings(config)
    with open_database(settings) as database:
        story = database.read(lambda tx: stories.tell(tx, _found(tx, settlement)))
    assert story is not None
    _add_worth(story, _tokens(settings))
    if as_json:
        print_json({"ok": True, **story})
        return
    _print_story(story)


@app.command(epilog="Example: [cyan]farebox settlements retry rcpt_2f…[/cyan]")
@reporting
def retry(settlement: SettlementId, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Ask the running gateway to send a settlement's bytes once more and to search the chain for evidence.

    Safe at any time: nothing is signed anew because of it, and what is paid stays paid.
    """
    from payments.settlement import states, stories

    def unit(tx: Transaction) -> tuple[str, str]:
        found = _found(tx, settlement)
        return found, str(stories.ask_again(tx, found))

    with open_database(load_settings(config)) as database:
        found, state = database.write(unit)
    if state in states.PAID:
        raise Failed(f"{found} is {state} already: there is nothing to do", "`farebox settlements explain` shows it")
    if as_json:
        print_json({"ok": True, "settlement": found, "state": state})
        return
    out.print(f"{found} is {state}; a running gateway looks at it again within seconds", markup=False)


def _print_story(story: dict[str, Any]) -> None:
    from payments.settlement import stories

    shown = table("", "")
    shown.show_header = False
    order = story["settlement"]
    for name, value in order.items():
        if name in ("value", "received_value") and value is not None:
            shown.add_row(name, _amount(order, name))
        elif value is not None and name not in ("value_usd", "received_value_usd"):
            shown.add_row(name, stories.moment(value) if name.endswith("_ms") else str(value))
    out.print(shown)
    transaction = story["transaction"]
    if transaction is None:
        out.print("\nNo transaction carries it.")
    else:
        out.print(
            f"\nCarried by {transaction['id']}: {transaction['kind']} of {transaction['settlements']},"
            f" {transaction['state']}, nonce {transaction['signer_nonce']} of {transaction['signer']}",
            markup=False,
        )
        if transaction["gas_used"] is not None:
            out.print(f"It used {transaction['gas_used']} gas and cost {transaction['fee_wei']} wei", markup=False)
        sent = table("broadcast", "max fee, wei", "priority fee, wei", right=("max fee, wei", "priority fee, wei"))
        for broadcast in transaction["broadcasts"]:
            sent.add_row(broadcast["hash"], broadcast["max_fee"], broadcast["priority_fee"])
        out.print(sent)
    evidence = story["evidence"]
    if evidence is not None:
        out.print(
            f"\nEvidence: log {evidence['transfer_log_index']} of {evidence['transaction_hash']}"
            f" in block {evidence['block_number']} brought {_amount(order, 'received_value')}",
            markup=False,
        )
    else:
        out.print(f"\nNo evidence: {story['settlement']['reason'] or 'none was found yet'}", markup=False)
    if story["transfers"]:
        booked = table("transfer", "from", "to", "amount", "state", right=("amount",))
        for row in story["transfers"]:
            amount = f"{row['amount_usd']} USD" if "amount_usd" in row else f"{row['amount_native']} coins"
            booked.add_row(row["id"], row["debit_account"], row["credit_account"], amount, row["state"])
        out.print(booked)
    out.print(f"\nNext: {story['next']}.", markup=False)


def _tokens(settings: Settings) -> dict[tuple[int, str], Token]:
    """What the configuration knows of the tokens, by chain and address."""
    return {
        (token.chain_id, token.address): token for network in settings.resolved_networks() for token in network.tokens
    }


def _worth(row: dict[str, Any], name: str, tokens: dict[tuple[int, str], Token]) -> dict[str, Any]:
    """In dollars, what a row counts in the smallest units of its token, and the token's name; {} of one that is not known."""
    from payments.money import atomic_to_nano_down, nano_to_usd

    token = tokens.get((row["chain_id"], row["token"]))
    if token is None or row[name] is None:
        return {}
    return {"asset": token.asset, f"{name}_usd": nano_to_usd(atomic_to_nano_down(int(row[name]), token.decimals))}


def _add_worth(story: dict[str, Any], tokens: dict[tuple[int, str], Token]) -> None:
    from payments.ledger.accounts import unit_of
    from payments.money import nano_to_usd

    order = story["settlement"]
    order |= _worth(order, "value", tokens) | _worth(order, "received_value", tokens)
    for row in story["transfers"]:
        amount = row["amount"] if row["posted_amount"] is None else row["posted_amount"]
        row[f"amount_{unit_of(row['debit_account'])}"] = nano_to_usd(amount)


def _amount(row: dict[str, Any], name: str) -> str:
    """A value for people: with the token's symbol, or as its smallest units where the configuration does not know it."""
    worth = row.get(f"{name}_usd")
    if worth is None:
        return f"{row[name]} units of {row['token']}"
    return f"{worth} {row['asset'].rpartition('/')[2]}"


def _found(tx: Transaction, name: str) -> str:
    """The id of the settlement that a person means: by its own id, what it is for, or one of its transactions' hashes."""
    rows = tx.execute(
        "SELECT id FROM settlement WHERE id=? UNION SELECT id FROM settlement WHERE reference=?"
        " UNION SELECT id FROM settlement WHERE transaction_hash=?",
        (name, name, name.lower()),
    ).fetchall()
    if not rows:
        raise Failed(f"there is no settlement {name!r}", "`farebox settlements list` shows the newest")
    if len(rows) > 1:
        raise Failed(
            f"{len(rows)} settlements belong to {name!r}: {', '.join(row[0] for row in rows[:5])}", "Name one of them"
        )
    return str(rows[0][0])


def _states(name: str | None) -> tuple[str, ...]:
    if name is None:
        return ()
    if name not in GROUPS and name not in STATES:
        raise WrongUsage(f"there is no state {name!r}", f"Use one of: {', '.join((*STATES, *GROUPS))}")
    return GROUPS.get(name, (name,))


def _seconds(age: str) -> int:
    match = re.fullmatch(r"(\d{1,6})([smhd])", age)
    if match is None:
        raise WrongUsage(f"{age!r} is not an age", "Write it like 90s, 10m, 2h or 1d")
    return int(match[1]) * AGES_S[match[2]]
