"""`farebox contracts`: create the operator's own contracts on a network."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.shared import ConfigOption, Failed, JsonOption, load_settings, out, print_json, reporting

if TYPE_CHECKING:
    from gateway.settings import NetworkSettings, Settings
    from payments.operator_contracts import Created

app = typer.Typer(no_args_is_help=True, help="The contracts that every operator has of its own.")


@app.command()
@reporting
def deploy(
    config: ConfigOption = None,
    network: Annotated[
        int | None, typer.Option("--network", metavar="CHAIN_ID", help="Which of the configured networks.")
    ] = None,
    owner: Annotated[
        str | None, typer.Option(help="Who may add and remove signers; the treasury if nothing is said.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Create the batch contract and the factory of deposit addresses, and say what to write into the configuration.

    Costs gas, paid by the first of FAREBOX_SIGNER_KEYS; start it while no gateway uses that key. What is there already is left
    alone, so it can be started again after any failure. All of FAREBOX_SIGNER_KEYS may send batches.
    """
    settings = load_settings(config)
    own = _chosen(settings, network)
    created = asyncio.run(_deploy(settings, own, owner))
    lines = {"batch_contract": created["FareboxBatch"].address, "deposit_factory": created["DepositForwarders"].address}
    if as_json:
        deployed = [
            {"contract": each.contract, "address": each.address, "transaction": each.transaction_hash}
            for each in created.values()
        ]
        print_json({"ok": True, "chain_id": own.chain_id, "contracts": deployed, "configuration": lines})
        return
    for each in created.values():
        how = f"created by {each.transaction_hash}" if each.transaction_hash else "was there already"
        out.print(f"{each.contract:<18} {each.address}  {how}", markup=False)
    out.print(f"\nWrite into [[networks]] of chain {own.chain_id}:\n", markup=False)
    for name, address in lines.items():
        out.print(f'{name} = "{address}"', markup=False)


def _chosen(settings: Settings, chain_id: int | None) -> NetworkSettings:
    listed = ", ".join(str(each.chain_id) for each in settings.networks)
    if not settings.networks:
        raise Failed("no network is configured", "Add [[networks]] to the configuration")
    if not settings.signer_keys:
        raise Failed("there is no key to pay the gas with", "Set FAREBOX_SIGNER_KEYS to a JSON list of private keys")
    if chain_id is None and len(settings.networks) > 1:
        raise Failed("which network?", f"Say --network with one of {listed}")
    for each in settings.networks:
        if chain_id in (None, each.chain_id):
            return each
    raise Failed(f"chain {chain_id} is not configured", f"Add it, or say one of {listed}")


async def _deploy(settings: Settings, own: NetworkSettings, owner: str | None) -> dict[str, Created]:
    from payments.chain.rpc import Rpc, RpcUnavailable
    from payments.chain.signers import Signer
    from payments.operator_contracts import Created, CreationFailed, create

    treasury = settings.pay_to_for(own.chain_id)
    owner = owner or treasury
    if not _is_address(owner):
        raise Failed(f"{owner} is not an address", "Write it as 0x and 40 hex digits")
    try:
        signers = [Signer.from_hex(key) for key in settings.signer_keys]
    except ValueError as error:
        raise Failed(str(error), "Correct FAREBOX_SIGNER_KEYS") from None
    try:
        async with Rpc(own.rpc_urls) as rpc:
            listed = await create(
                rpc,
                own.resolve(),
                signers[0],
                treasury=treasury,
                owner=owner,
                batch_signers=None if own.batch_contract else [signer.address for signer in signers],
            )
    except (CreationFailed, RpcUnavailable) as error:
        advice = f"Check rpc_urls, and that the signer {signers[0].address} has gas; then start this again"
        raise Failed(str(error), advice) from error
    created = {each.contract: each for each in listed}
    if own.batch_contract is not None:
        # Its address follows from its first signers: with other keys now, a second one would come of it.
        created["FareboxBatch"] = Created("FareboxBatch", own.batch_contract.lower(), None)
    return created


def _is_address(text: Any) -> bool:
    return len(text) == 42 and text.startswith("0x") and all(digit in "0123456789abcdefABCDEF" for digit in text[2:])
