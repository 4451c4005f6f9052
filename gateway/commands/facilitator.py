"""`farebox facilitator`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.commands.serving import Port, telling_why_not
from gateway.commands.shared import ConfigOption, Failed, JsonOption, load_settings, print_json, reporting

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from gateway.settings import Settings
    from payments.facilitator.opening import Options

WEI_DECIMALS = 18
EXAMPLES = """Examples:\n
[cyan]farebox keys create my-api[/cyan]          a key for the resource server that asks\n
[cyan]farebox facilitator[/cyan]                 serve /verify, /settle, /supported and /discovery/resources\n
[cyan]farebox facilitator --open[/cyan]          for anybody who can reach it, without keys\n
Official middleware uses it as [cyan]FacilitatorConfig(url="http://127.0.0.1:8403")[/cyan]."""


@reporting
def facilitator(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Instead of the configured address.")] = None,
    port: Port = None,
    anybody: Annotated[bool, typer.Option("--open", help="Ask for no API key; we pay the gas of anybody.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Verify and settle x402 payments for other resource servers, until SIGTERM or Ctrl-C. No gateway runs.

    Networks, tokens and signers are those of the configuration; the money goes from the payer to the resource server, and only
    the gas is ours. With --json it prints one line with its address before it starts to listen.
    """
    settings = load_settings(config)
    if not settings.networks or not settings.signer_keys:
        raise Failed("there is nothing to settle with", "Configure networks, and set FAREBOX_SIGNER_KEYS")
    from gateway import serving
    from payments.migrate import without_password

    host, port = host or settings.host, settings.facilitator.port if port is None else port
    if as_json:
        print_json({"host": host, "port": port, "database": without_password(settings.database)})
    with telling_why_not():
        serving.run(_opened(settings, anybody), host, port, settings.limits)


def _options(settings: Settings, anybody: bool) -> Options:
    from payments.facilitator.opening import NetworkOptions, Options
    from payments.money import nano_to_atomic_down, usd_to_nano
    from payments.sponsoring.records import Budget

    wanted = settings.facilitator
    networks = zip(settings.networks, settings.resolved_networks(), strict=True)
    return Options(
        database=settings.database,
        networks=tuple(
            NetworkOptions(
                network,
                own.rpc_urls,
                own.confirmations,
                own.batch_contract,
                tuple(own.wallet_factories),
                Budget(
                    nano_to_atomic_down(usd_to_nano(own.sponsor_hourly_native), WEI_DECIMALS),
                    nano_to_atomic_down(usd_to_nano(own.sponsor_payer_native), WEI_DECIMALS),
                ),
            )
            for own, network in networks
        ),
        signer_keys=tuple(settings.signer_keys),
        require_key=wanted.require_key and not anybody,
        pay_to=frozenset(address.lower() for address in wanted.pay_to),
        minimum_nano_usd=usd_to_nano(wanted.minimum_usd),
        # Whoever waits is answered before the process ends.
        settlement_wait_s=min(wanted.settlement_wait_s, max(settings.limits.drain_s - 1, 1)),
        calls_per_minute=wanted.calls_per_minute,
        client_failures_per_hour=wanted.client_failures_per_hour,
        cross_check_nano_usd=usd_to_nano(settings.payments.cross_check_usd),
        lease_s=settings.lease_s,
        gas_alarm_wei=nano_to_atomic_down(usd_to_nano(settings.payments.gas_alarm_native), WEI_DECIMALS),
    )


@contextlib.asynccontextmanager
async def _opened(settings: Settings, anybody: bool) -> AsyncIterator[Starlette]:
    from payments.facilitator.app import create_app
    from payments.facilitator.opening import opened

    async with opened(_options(settings, anybody)) as services:
        yield create_app(services, concurrency_max=settings.limits.concurrency)
