"""`farebox doctor`: look at the real networks of a configuration without spending anything."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import typer

from gateway.commands.shared import (
    ConfigOption,
    Failed,
    JsonOption,
    config_file,
    load_settings,
    out,
    print_json,
    reporting,
)

if TYPE_CHECKING:
    from gateway.settings import Settings
    from payments.chain.networks import Network

_SHOWN = {"ok": "[green]ok[/green]  ", "warn": "[yellow]warn[/yellow]", "fail": "[bold red]fail[/bold red]"}


@reporting
def doctor(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Check the nodes, the tokens' domains and decimals, the contracts, the signers' gas and the treasury, on every network.

    Reads only: no transaction, no payment, no request to a provider.
    """
    settings = load_settings(config)
    findings = [*_configuration(config_file(config)), *asyncio.run(_networks(settings))]
    failed = sum(finding["status"] == "fail" for finding in findings)
    if as_json:
        print_json({"ok": not failed, "findings": findings})
    else:
        for finding in findings:
            out.print(_SHOWN[finding["status"]], end=" ")
            out.print(f"{finding['subject']}: {finding['what']}", markup=False)
            if finding["advice"]:
                out.print(f"     → {finding['advice']}", markup=False)
        if not settings.networks:
            out.print("No networks are configured: the gateway takes API keys only.", markup=False)
    if failed:
        raise typer.Exit(1)


def _configuration(path: Any) -> list[dict[str, str]]:
    from gateway.config import inspect

    return [
        {"subject": problem.place, "status": "warn", "what": problem.what, "advice": problem.fix}
        for problem in inspect(path, os.environ).problems
    ]


async def _networks(settings: Settings) -> list[dict[str, str]]:
    resolved = settings.resolved_networks()
    found = await asyncio.gather(*(_network(settings, network) for network in resolved))
    return [finding for findings in found for finding in findings]


async def _network(settings: Settings, network: Network) -> list[dict[str, str]]:
    from payments.chain.rpc import Rpc
    from payments.chain.signers import Signer
    from payments.doctor import examine
    from payments.money import usd_to_nano
    from payments.operator_contracts import examine_own

    try:
        signers = [Signer.from_hex(key).address for key in settings.signer_keys]
        treasury = Signer.from_hex(settings.treasury_key).address if settings.treasury_key else None
    except ValueError as error:
        raise Failed(str(error), "Correct FAREBOX_SIGNER_KEYS and FAREBOX_TREASURY_KEY") from None
    own = next(entry for entry in settings.networks if entry.chain_id == network.chain_id)
    pay_to = settings.pay_to_for(network.chain_id)
    async with Rpc(own.rpc_urls) as rpc:
        findings = await examine(
            rpc,
            network,
            signers=signers,
            pay_to=pay_to,
            treasury_key_address=treasury,
            # Nine decimals of the chain's coin; a coin has eighteen.
            gas_minimum_wei=usd_to_nano(settings.payments.gas_alarm_native) * 10**9,
            treasury_minimum_nano_usd=usd_to_nano(settings.payments.treasury_alarm_usd),
        )
        findings += await examine_own(
            rpc,
            batch_contract=own.batch_contract,
            deposit_factory=own.deposit_factory,
            signers=signers,
            pay_to=pay_to,
        )
    return [
        {"subject": network.caip2, "status": finding.status, "what": finding.what, "advice": finding.advice}
        for finding in findings
    ]
