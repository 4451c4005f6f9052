"""`farebox channel`: the payment channels of the wallet in FAREBOX_WALLET_KEY, by the agent's own log."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.commands.agents import GATEWAY_DEFAULT, AssetOption, GatewayOption, RpcOption, agent_at
from gateway.commands.shared import JsonOption, out, print_json, reporting, table

if TYPE_CHECKING:
    from agents_sdk import Channel

app = typer.Typer(
    no_args_is_help=True,
    help="Payment channels: one deposit on chain, then a signature a request; what is left comes back.",
    epilog=(
        "[bold]Examples:[/bold]\n\n"
        "[cyan]farebox channel open 2[/cyan]   [cyan]farebox ask 'Why is the sky blue?' --scheme batch-settlement[/cyan]   "
        "[cyan]farebox channel refund[/cyan]"
    ),
)
TABLE_WIDTH = 200
"""In a narrower terminal a table would break the channels' ids, which have to be copied."""
COLUMNS = ("deposited, USD", "charged, USD", "under way, USD", "left, USD", "claimable, USD")


@app.command("list", epilog="Example: [cyan]farebox channel list --json[/cyan]")
@reporting
def list_(gateway: GatewayOption = GATEWAY_DEFAULT, as_json: JsonOption = False) -> None:
    """The wallet's channels: what lies in them, and what their gateways could claim. Nothing is asked."""
    with agent_at(gateway) as agent:
        _show(agent.wallet.channels(), as_json=as_json)


@app.command("open", epilog="Example: [cyan]farebox channel open 2 --asset USDC[/cyan]")
@reporting
def open_(
    usd: Annotated[
        str, typer.Argument(help="How much to deposit, in dollars: the most that then lies in the channel.")
    ],
    asset: AssetOption = None,
    rpc_url: RpcOption = None,
    gateway: GatewayOption = GATEWAY_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Fill a channel up before it is needed. A deposit travels with a request: this asks a tiny question, which is charged."""
    with agent_at(gateway, rpc_url=rpc_url, max_per_request=usd, max_per_day=None) as agent:
        before = {each.id: each.deposited_usd for each in agent.wallet.channels()}
        channel = agent.wallet.open_channel(usd, asset=asset)
    if not as_json and before.get(channel.id) == channel.deposited_usd:
        enough = f"There is enough in the channel already: {channel.unspent_usd} USD. Nothing was deposited or charged."
        out.print(enough, markup=False)
    _show([channel], as_json=as_json)


@app.command(epilog="Example: [cyan]farebox channel refund --usd 0.50[/cyan]")
@reporting
def refund(
    channel: Annotated[
        str | None,
        typer.Argument(
            help="As `farebox channel list` shows it; may be left out if only one of the gateway's holds something."
        ),
    ] = None,
    usd: Annotated[str | None, typer.Option(help="How much; by default all that is left.")] = None,
    gateway: GatewayOption = GATEWAY_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Get back what a channel holds beyond what was charged. The gateway pays the gas."""
    with agent_at(gateway) as agent:
        made = agent.wallet.refund_channel(channel, usd)
    if as_json:
        print_json({"ok": True, **asdict(made)})
    else:
        out.print(f"{made.refunded_usd} USD in {made.asset}, transaction {made.transaction}", markup=False)


def _show(channels: list[Channel], *, as_json: bool) -> None:
    if as_json:
        print_json({"ok": True, "channels": [asdict(each) for each in channels]})
        return
    if not channels:
        out.print("There are none: `farebox channel open 1` opens one, and so does paying through one.", markup=False)
        return
    if out.width < TABLE_WIDTH:
        for each in channels:
            out.print(each.id, style="bold", markup=False)
            out.print(f"  {each.asset}, used last with {each.gateway}", markup=False)
            amounts = (each.deposited_usd, each.charged_usd, each.under_way_usd, each.unspent_usd, each.claimable_usd)
            told = (f"{name.removesuffix(', USD')} {usd}" for name, usd in zip(COLUMNS, amounts, strict=True))
            out.print(f"  {', '.join(told)} USD", markup=False)
        return
    shown = table("channel", "asset", *COLUMNS, "used last with", right=COLUMNS)
    for each in channels:
        shown.add_row(
            each.id,
            each.asset,
            each.deposited_usd,
            each.charged_usd,
            each.under_way_usd,
            each.unspent_usd,
            each.claimable_usd,
            each.gateway,
        )
    out.print(shown)
