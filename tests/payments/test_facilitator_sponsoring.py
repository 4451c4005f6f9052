"""A payer that never approved Permit2 pays through it: the official client signs a permit, the facilitator sends it along."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from x402 import x402ClientSync
from x402.extensions.eip2612_gas_sponsoring import declare_eip2612_gas_sponsoring_extension
from x402.mechanisms.evm.exact.register import register_exact_evm_client
from x402.mechanisms.evm.signers import EthAccountSignerWithRPC
from x402.schemas import PaymentRequired

from contracts.devnet import Devnet, balance_of
from contracts.wallets import Wallet
from payments.chain.networks import Network
from tests.payments.facilitating import SHOP, VALUE, Running, facilitator, requirement
from tests.payments.settling import rows


def signed_by_official_client(chain: Devnet, network: Network, wallet: Wallet, value: int = VALUE) -> dict[str, Any]:
    """The body of a call, with a permit, as the official client makes it for USDC over Permit2."""
    wants = requirement(network.tokens[0], network, value=value)
    wants["extra"]["assetTransferMethod"] = "permit2"
    required = PaymentRequired.model_validate(
        {
            "x402Version": 2,
            "resource": {"url": "https://shop.example/thing"},
            "accepts": [wants],
            "extensions": declare_eip2612_gas_sponsoring_extension(),
        }
    )
    client = x402ClientSync()
    register_exact_evm_client(client, EthAccountSignerWithRPC(Account.from_key(wallet.private_key), chain.rpc_url))
    payment = client.create_payment_payload(required).model_dump(by_alias=True, exclude_none=True)
    assert "signature" in payment["extensions"]["eip2612GasSponsoring"]["info"]
    return {"x402Version": 2, "paymentPayload": payment, "paymentRequirements": copy.deepcopy(wants)}


async def test_a_permit_and_the_payment_are_one_call(chain: Devnet, network: Network, tmp_path: Path) -> None:
    call = signed_by_official_client(chain, network, chain.wallets[3])
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        assert "eip2612GasSponsoring" in running.services.facilitator.supported()["extensions"]
        assert (await running.verify(call))["isValid"]
        answer = await running.settle(call, idempotency_key="a")
        assert answer["success"], answer
        assert await running.settle(call, idempotency_key="a") == answer
        assert (await running.settle(call))["errorReason"] == "duplicate_settlement"
    assert balance_of(chain.rpc_url, chain.usdc, SHOP) == VALUE


async def test_a_permit_that_somebody_used_before_does_no_harm(chain: Devnet, network: Network, tmp_path: Path) -> None:
    first = signed_by_official_client(chain, network, chain.wallets[3])
    second = signed_by_official_client(chain, network, chain.wallets[3])
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        assert (await running.settle(first))["success"]
        # The two permits have one nonce, and the first payment has used the allowance up.
        refused = await running.settle(second)
        assert refused["errorReason"] == "invalid_exact_evm_transaction_simulation_failed"
        assert len(await rows(running.services.store)) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"from": "0x" + "11" * 20}, "eip2612_from_mismatch"),
        ({"asset": "0x" + "11" * 20}, "eip2612_asset_mismatch"),
        ({"spender": "0x" + "11" * 20}, "eip2612_spender_not_permit2"),
        ({"amount": str(10**30)}, "eip2612_amount_mismatch"),
        ({"deadline": str(int(time.time()) - 1)}, "eip2612_deadline_expired"),
        ({"nonce": "77"}, "eip2612_invalid_signature"),
        ({"signature": "0x" + "11" * 65}, "eip2612_invalid_signature"),
        ({"signature": "0x1234"}, "invalid_payload"),
        ({"amount": "1e3"}, "invalid_payload"),
    ],
)
async def test_a_permit_that_does_not_fit_is_refused(
    chain: Devnet, network: Network, tmp_path: Path, changes: dict[str, str], reason: str
) -> None:
    call = signed_by_official_client(chain, network, chain.wallets[3])
    call["paymentPayload"]["extensions"]["eip2612GasSponsoring"]["info"] |= changes
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        assert await refused_everywhere(running, call) == reason
        assert await rows(running.services.store) == []


async def refused_everywhere(running: Running, call: dict[str, Any]) -> str:
    verified, settled = await running.verify(call), await running.settle(call)
    assert verified["isValid"] is settled["success"] is False
    assert verified["invalidReason"] == settled["errorReason"]
    return str(verified["invalidReason"])
