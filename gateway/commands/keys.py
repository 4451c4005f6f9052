"""`farebox keys`: API keys and the pools that they draw on."""

from __future__ import annotations

import re
import secrets
from datetime import UTC, datetime
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
    from payments.accounts import ApiKeyView
    from payments.store import Transaction

app = typer.Typer(no_args_is_help=True, help="Create, list and revoke API keys; fund their pools.")

Usd = Annotated[str, typer.Option(metavar="USD", help="Grant the pool this much, such as 25 or 0.50.")]


@app.command(epilog="Example: [cyan]farebox keys create search-team --pool search --fund-usd 25[/cyan]")
@reporting
def create(
    name: Annotated[str, typer.Argument(help="For people: whose key it is.")],
    pool: Annotated[str, typer.Option(help="The money that it draws on; made if it is not there.")] = "default",
    admin: Annotated[bool, typer.Option("--admin", help="A key that may administer the gateway.")] = False,
    fund_usd: Usd = "0",
    pay_to: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="The recipient that `farebox facilitator` settles for at this key's request, and whose channels' claims and"
            " refunds it signs for this key alone.",
        ),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key. It is shown once and cannot be shown again: only its hash is kept."""
    from payments import accounts

    amount = _nano(fund_usd)
    _check_pool(pool)
    if not name.strip():
        raise WrongUsage("the key's name is empty", "Say whose key it is, such as search-team")
    if pay_to is not None and not re.fullmatch(r"0x[0-9a-fA-F]{40}", pay_to):
        raise WrongUsage(f"{pay_to} is no address", "An address is 0x and 40 hexadecimal digits")

    def unit(tx: Transaction) -> tuple[ApiKeyView, str]:
        made = accounts.create_key(tx, name, pool, admin, None if pay_to is None else pay_to.lower())
        if amount:
            accounts.fund_pool(tx, pool, amount, made[0].id)
        return made

    with open_database(load_settings(config), create=True) as database:
        view, secret = database.write(unit)
    if as_json:
        print_json({"ok": True, "key": secret, **view.as_json()})
        return
    out.print(secret, style="bold", markup=False)
    out.print(f"{view.id}, pool {pool}. Keep it now: it is not shown again.", markup=False)


@app.command("list")
@reporting
def list_(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """All keys, with what is left in their pools."""
    from payments import accounts
    from payments.ledger.transfers import balance
    from payments.money import nano_to_usd

    with open_database(load_settings(config)) as database:
        keys = database.read(accounts.list_keys)
        pools = sorted({key.pool for key in keys if key.pool is not None})
        balances = database.read(lambda tx: [balance(tx, accounts.pool_account(pool)) for pool in pools])
    available = {pool: nano_to_usd(left.available) for pool, left in zip(pools, balances, strict=True)}
    if as_json:
        print_json({"ok": True, "keys": [key.as_json() for key in keys], "pools": available})
        return
    if not keys:
        out.print("There are no keys yet: `farebox keys create NAME` makes one.", markup=False)
        return
    # Only keys of `farebox facilitator` have a recipient.
    bound = [] if all(key.pay_to is None for key in keys) else ["settles for"]
    columns = ("id", "name", "key", "draws on", "left in pool, USD", "created", "state", *bound)
    shown = table(*columns, right=("left in pool, USD",))
    for key in keys:
        created = datetime.fromtimestamp(key.created_ms / 1000, UTC).strftime("%Y-%m-%d")
        state = "revoked" if key.revoked_ms else "admin" if key.admin else "active"
        source, left = (key.pool, available[key.pool]) if key.pool is not None else (f"wallet {key.wallet}", "")
        recipient = [key.pay_to or ""] if bound else []
        shown.add_row(key.id, key.name, f"{key.prefix}…", source, left, created, state, *recipient)
    out.print(shown)


@app.command()
@reporting
def revoke(
    key_id: Annotated[str, typer.Argument(help="As `farebox keys list` shows it: key_…")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key useless, at once and for good."""
    from payments import accounts

    with open_database(load_settings(config)) as database:
        try:
            view = database.write(lambda tx: accounts.revoke_key(tx, key_id))
        except accounts.UnknownKey as error:
            raise Failed(
                str(error), "`farebox keys list` shows the ids (key_…), which are not the keys themselves"
            ) from None
    if as_json:
        print_json({"ok": True, **view.as_json()})
    else:
        out.print(f"{view.id} ({view.name}) is revoked", markup=False)


@app.command(epilog="Example: [cyan]farebox keys fund search 100[/cyan]")
@reporting
def fund(
    pool: Annotated[str, typer.Argument(help="The pool's name.")],
    usd: Annotated[str, typer.Argument(help="How much, such as 25 or 0.50.")],
    reference: Annotated[
        str | None, typer.Option(help="The same reference again changes nothing; by default each call is new.")
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Grant a pool money that its keys can spend."""
    from payments import accounts
    from payments.ledger.transfers import balance
    from payments.money import nano_to_usd

    amount = _nano(usd)
    if amount == 0:
        raise WrongUsage("nothing to grant: the amount is 0", "Give an amount such as 25")
    _check_pool(pool)
    grant = reference or secrets.token_hex(8)
    with open_database(load_settings(config)) as database:
        database.write(lambda tx: _grant(tx, pool, amount, grant))
        available = nano_to_usd(database.read(lambda tx: balance(tx, accounts.pool_account(pool))).available)
    if as_json:
        print_json({"ok": True, "pool": pool, "reference": grant, "available_usd": available})
    else:
        out.print(f"pool {pool} has {available} USD to spend", markup=False)


def _grant(tx: Transaction, pool: str, amount_nano_usd: int, reference: str) -> None:
    from payments import accounts
    from payments.ledger.transfers import TransferConflict, find
    from payments.money import nano_to_usd

    pools = sorted({key.pool for key in accounts.list_keys(tx) if key.pool is not None})
    if pool not in pools:
        there = f"there are {', '.join(pools)}" if pools else "there are no keys yet"
        raise Failed(
            f"no key draws on a pool {pool!r}; {there}", f"`farebox keys create NAME --pool {pool}` makes a key with it"
        )
    try:
        accounts.fund_pool(tx, pool, amount_nano_usd, reference)
    except TransferConflict:
        earlier = find(tx, accounts.grant_id(pool, reference))
        assert earlier is not None
        raise Failed(
            f"the reference {reference!r} has granted this pool {nano_to_usd(earlier.amount)} USD already",
            "Use another --reference for another amount",
        ) from None


def _nano(usd: str) -> int:
    from payments.money import usd_to_nano

    try:
        return usd_to_nano(usd)
    except ValueError as error:
        raise WrongUsage(str(error), "Write dollars like 25 or 0.50") from None


def _check_pool(pool: str) -> None:
    if not pool or "@" in pool or ":" in pool or pool != pool.strip():
        raise WrongUsage(f"{pool!r} cannot be a pool's name", "Use letters, digits, - and _")
