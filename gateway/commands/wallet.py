"""`farebox wallet`: the balance that a wallet keeps with a gateway. It signs in with the key in FAREBOX_WALLET_KEY."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.agents import GATEWAY_DEFAULT, AssetOption, GatewayOption, RpcOption, agent_at
from gateway.commands.shared import JsonOption, out, print_json, reporting, table

if TYPE_CHECKING:
    from agents_sdk import Withdrawal

app = typer.Typer(
    no_args_is_help=True,
    help="A wallet's balance with a gateway: look at it, top it up, take it out, make keys that spend it.",
    epilog=(
        "[bold]Examples:[/bold]\n\n"
        "[cyan]export FAREBOX_WALLET_KEY=0x… FAREBOX_GATEWAY=https://gateway.example[/cyan]\n\n"
        "[cyan]farebox wallet topup 5[/cyan]   [cyan]farebox wallet balance[/cyan]   "
        "[cyan]farebox wallet withdraw all --asset USDC[/cyan]"
    ),
)
keys = typer.Typer(
    no_args_is_help=True, help="API keys that see and spend the wallet's balance, and can do nothing else."
)
app.add_typer(keys, name="keys")


@app.command(epilog="Example: [cyan]farebox wallet balance --json[/cyan]")
@reporting
def balance(gateway: GatewayOption = GATEWAY_DEFAULT, as_json: JsonOption = False) -> None:
    """What the wallet has with the gateway, per token."""
    with agent_at(gateway) as agent:
        balances = agent.wallet.balance()
    if as_json:
        print_json({"ok": True, "address": agent.address, "balances": [asdict(each) for each in balances]})
        return
    shown = table("asset", "available, USD", "held, USD", right=("available, USD", "held, USD"))
    for each in balances:
        shown.add_row(each.asset, each.available_usd, each.held_usd)
    out.print(shown)


@app.command(epilog="Example: [cyan]farebox wallet history --limit 20[/cyan]")
@reporting
def history(
    limit: Annotated[int, typer.Option(min=1, max=200, help="The newest so many.")] = 50,
    before: Annotated[str | None, typer.Option(metavar="CURSOR", help="Go on before the page that ended here.")] = None,
    gateway: GatewayOption = GATEWAY_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """What came in, was charged and left, newest first."""
    with agent_at(gateway) as agent:
        page = agent.wallet.history(limit, before)
    if as_json:
        print_json({"ok": True, "history": [_json(each) for each in page.entries], "next": page.next})
        return
    if not page.entries:
        out.print("There is nothing yet: `farebox wallet topup 5` is a beginning.", markup=False)
        return
    shown = table("time (UTC)", "what", "amount, USD", "asset", "state", "receipt, transaction", right=("amount, USD",))
    for each in page.entries:
        evidence = ", ".join(filter(None, (each.receipt, each.transaction)))
        shown.add_row(_time(each.at), each.type, each.amount_usd, each.asset, each.state, evidence)
    out.print(shown)
    if page.next is not None:
        out.print(f"More: --before {page.next}", markup=False)


@app.command(epilog="Example: [cyan]farebox wallet topup 5 --asset USDC[/cyan]")
@reporting
def topup(
    usd: Annotated[str, typer.Argument(help="How much, in dollars, such as 5 or 12.50.")],
    asset: AssetOption = None,
    rpc_url: RpcOption = None,
    gateway: GatewayOption = GATEWAY_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Pay into the balance. Run again while the outcome is unknown, it sends the same payment and no second one."""
    with agent_at(gateway, rpc_url=rpc_url, max_per_request=None, max_per_day=None) as agent:
        made = agent.wallet.topup(usd, asset=asset)
    if as_json:
        print_json({"ok": True, **asdict(made)})
    else:
        out.print(f"{made.credited_usd} USD in {made.asset}, transaction {made.transaction}", markup=False)


@app.command(epilog="Example: [cyan]farebox wallet withdraw all --asset USDC[/cyan]")
@reporting
def withdraw(
    usd: Annotated[str, typer.Argument(metavar="USD|all", help="What shall arrive, such as 12.50, or `all`.")],
    asset: AssetOption = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key is the same withdrawal; by default one is kept while it is needed.")
    ] = None,
    wait_s: Annotated[float, typer.Option(min=0, help="How long to wait for the transfer.")] = 60,
    gateway: GatewayOption = GATEWAY_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Take the balance out to the wallet's own address."""
    with agent_at(gateway) as agent:
        made = agent.wallet.withdraw(usd, asset=asset, idempotency_key=idempotency_key, wait_s=wait_s)
    _show([made], as_json=as_json)
    if made.state in ("failed", "rejected"):
        raise typer.Exit(1)


@app.command()
@reporting
def withdrawals(gateway: GatewayOption = GATEWAY_DEFAULT, as_json: JsonOption = False) -> None:
    """The newest withdrawals, and how they stand."""
    with agent_at(gateway) as agent:
        found = agent.wallet.withdrawals()
    _show(found, as_json=as_json)


@app.command("deposit-address", epilog="Example: [cyan]farebox wallet deposit-address --network eip155:8453[/cyan]")
@reporting
def deposit_address(
    network: Annotated[str | None, typer.Option(help="CAIP-2; may be left out if there is only one.")] = None,
    gateway: GatewayOption = GATEWAY_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """The wallet's own address: what is sent there becomes its balance."""
    with agent_at(gateway) as agent:
        found = agent.wallet.deposit_address(network)
    if as_json:
        print_json({"ok": True, **asdict(found)})
    else:
        out.print(found.address, style="bold", markup=False)
        out.print(f"Send {' or '.join(found.tokens)} on {found.network} there, and nothing else.", markup=False)


@keys.command(epilog="Example: [cyan]farebox wallet keys create laptop[/cyan]")
@reporting
def create(
    name: Annotated[str, typer.Argument(help="For people: what the key is for.")],
    gateway: GatewayOption = GATEWAY_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Make a key. It is shown once and cannot be shown again."""
    with agent_at(gateway) as agent:
        made = agent.wallet.keys.create(name)
    if as_json:
        print_json({"ok": True, **asdict(made)})
        return
    out.print(made.key, style="bold", markup=False)
    out.print(f"{made.id} ({made.name}). Keep it now: it is not shown again.", markup=False)


@keys.command("list")
@reporting
def list_(gateway: GatewayOption = GATEWAY_DEFAULT, as_json: JsonOption = False) -> None:
    """The wallet's keys."""
    with agent_at(gateway) as agent:
        found = agent.wallet.keys.list()
    if as_json:
        print_json({"ok": True, "keys": [_json(each) for each in found]})
        return
    if not found:
        out.print("There are none: `farebox wallet keys create NAME` makes one.", markup=False)
        return
    shown = table("id", "name", "key", "created (UTC)", "state")
    for each in found:
        state = "active" if each.revoked is None else "revoked"
        shown.add_row(each.id, each.name, f"{each.prefix}…", _time(each.created), state)
    out.print(shown)


@keys.command()
@reporting
def revoke(
    key_id: Annotated[str, typer.Argument(help="As `farebox wallet keys list` shows it: key_…")],
    gateway: GatewayOption = GATEWAY_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Make a key useless, at once and for good."""
    with agent_at(gateway) as agent:
        revoked = agent.wallet.keys.revoke(key_id)
    if as_json:
        print_json({"ok": True, **_json(revoked)})
    else:
        out.print(f"{revoked.id} ({revoked.name}) is revoked", markup=False)


def _show(withdrawals: list[Withdrawal], *, as_json: bool) -> None:
    if as_json:
        print_json({"ok": True, "withdrawals": [_json(each) for each in withdrawals]})
        return
    if not withdrawals:
        out.print("There are none.", markup=False)
        return
    shown = table("id", "created (UTC)", "amount, USD", "asset", "state", "transaction", right=("amount, USD",))
    for each in withdrawals:
        state = each.state if each.reason is None else f"{each.state}: {each.reason}"
        shown.add_row(each.id, _time(each.created), each.amount_usd, each.asset, state, each.transaction or "")
    out.print(shown)


def _json(result: Any) -> dict[str, Any]:
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(result).items()}


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S")
