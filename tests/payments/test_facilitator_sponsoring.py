"""A payer that never approved Permit2 pays through it: the official client signs a permit, the facilitator sends it along; or,
for a token without permits, an approval, which the facilitator brings to the chain first."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from x402 import x402ClientSync
from x402.extensions.eip2612_gas_sponsoring import declare_eip2612_gas_sponsoring_extension
from x402.extensions.erc20_approval_gas_sponsoring import declare_erc20_approval_gas_sponsoring_extension
from x402.mechanisms.evm.batch_settlement.client import BatchSettlementEvmScheme
from x402.mechanisms.evm.exact.register import register_exact_evm_client
from x402.mechanisms.evm.signers import EthAccountSignerWithRPC
from x402.mechanisms.evm.upto.client import UptoEvmScheme
from x402.schemas import PaymentRequired, SupportedResponse

from contracts.devnet import Anvil, Devnet, balance_of, load, place_operator_contracts, rpc
from contracts.wallets import Wallet
from payments.chain.networks import Network
from payments.facilitator import kinds
from payments.facilitator.opening import NetworkOptions
from payments.sponsoring.records import Budget
from tests.payments.channelling import Channel
from tests.payments.facilitating import SHOP, VALUE, Running, facilitator, requirement
from tests.payments.settling import rows
from tests.payments.sponsoring import BUDGET, penniless
from tests.payments.upto_market import taking

TAKEN = VALUE - 123
"""Of `VALUE`, by upto."""


def signed_by_official_client(
    chain: Devnet,
    network: Network,
    wallet: Wallet,
    value: int = VALUE,
    *,
    approval: bool = False,
    deposit: bool = False,
    upto_by: str | None = None,
) -> dict[str, Any]:
    """The body of a call as the official client makes it: with a permit for USDC over Permit2, or an approval for USDT; a
    payment of `value`, or a deposit of some more into a new channel with a first voucher over it; or up to `value`, which this
    contract settles."""
    token = dataclasses.replace(network.tokens[1 if approval else 0], transfer_method="permit2")
    wants = requirement(token, network, value=value)
    if deposit:
        wants = Channel(network, wallet, chain.wallets[8], token).requirement(value)
    if upto_by is not None:
        wants |= {"scheme": "upto", "extra": wants["extra"] | {"facilitatorAddress": upto_by}}
    declared = declare_eip2612_gas_sponsoring_extension()
    if approval:
        declared = declare_erc20_approval_gas_sponsoring_extension()
        del wants["extra"]["name"]
    required = PaymentRequired.model_validate(
        {
            "x402Version": 2,
            "resource": {"url": "https://shop.example/thing"},
            "accepts": [wants],
            "extensions": declared,
        }
    )
    client = x402ClientSync()
    client.set_spend_controls({"allowed_assets": True})
    signer = EthAccountSignerWithRPC(Account.from_key(wallet.private_key), chain.rpc_url)
    register_exact_evm_client(client, signer)
    client.register("eip155:*", BatchSettlementEvmScheme(signer))
    client.register("eip155:*", UptoEvmScheme(signer))
    payment = client.create_payment_payload(required).model_dump(by_alias=True, exclude_none=True)
    name, member = (
        ("erc20ApprovalGasSponsoring", "signedTransaction") if approval else ("eip2612GasSponsoring", "signature")
    )
    assert member in payment["extensions"][name]["info"]
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


@contextlib.asynccontextmanager
async def sponsoring(
    chain: Devnet,
    network: Network,
    database: Path | str,
    budget: Budget = BUDGET,
    batch_contract: str | None = None,
    **wanted: Any,
) -> AsyncIterator[Running]:
    """A facilitator that gives payers the coin for their approvals."""
    on_chain = NetworkOptions(network, [chain.rpc_url], sponsoring=budget, batch_contract=batch_contract)
    async with facilitator(chain, network, database, networks=(on_chain,), **wanted) as running:
        yield running


@pytest.fixture
def batch_contract(chain: Devnet) -> str:
    """The operator's, whom payers of `upto` name."""
    signer = chain.wallets[0].address
    return place_operator_contracts(chain.rpc_url, signer, signer, [signer])[0]


@pytest.mark.parametrize("approval", [True, False], ids=["USDT with an approval", "USDC with a permit"])
async def test_a_payer_by_upto_needs_neither_coin_nor_an_approval_before(
    chain: Devnet, network: Network, database: Path | str, batch_contract: str, approval: bool
) -> None:
    wallet = penniless(chain)
    call = signed_by_official_client(chain, network, wallet, approval=approval, upto_by=batch_contract)
    settle = taking(call, TAKEN)
    coin = chain.usdt if approval else chain.usdc
    before = balance_of(chain.rpc_url, coin, wallet.address)
    async with sponsoring(chain, network, database, batch_contract=batch_contract) as running:
        assert await running.verify(call) == {"isValid": True, "payer": wallet.address.lower()}
        assert await rows(running.services.store) == [], "to verify gives nothing"
        answers = await asyncio.gather(*(running.settle(settle, idempotency_key="a") for _ in range(3)))
        assert all((answer["success"], answer["amount"]) == (True, str(TAKEN)) for answer in answers), answers
        assert await running.settle(settle, idempotency_key="a") == answers[0]
        assert (await running.settle(settle))["errorReason"] == "duplicate_settlement"
        assert (await running.settle(taking(call, TAKEN + 1)))["errorReason"] == "permit2_invalid_nonce"
        settled = sorted(kind for (kind,) in await rows(running.services.store, "kind"))
        assert settled == ["approval_funding"] * approval + [kinds.UPTO]
    assert balance_of(chain.rpc_url, coin, SHOP) == TAKEN
    assert balance_of(chain.rpc_url, coin, wallet.address) == before - TAKEN


@pytest.mark.parametrize("approval", [True, False], ids=["USDT with an approval", "USDC with a permit"])
async def test_of_upto_nothing_taken_costs_nothing_and_burns_it(
    chain: Devnet, network: Network, sqlite_database: Path, batch_contract: str, approval: bool
) -> None:
    call = signed_by_official_client(chain, network, penniless(chain), approval=approval, upto_by=batch_contract)
    async with sponsoring(chain, network, sqlite_database, batch_contract=batch_contract) as running:
        assert (await running.settle(taking(call, 0)))["success"]
        assert (await running.settle(taking(call, TAKEN)))["errorReason"] == "permit2_invalid_nonce"
        assert (await running.verify(call))["invalidReason"] == "permit2_invalid_nonce"
        assert await rows(running.services.store) == []


async def test_what_comes_along_with_upto_has_to_fit(
    chain: Devnet, network: Network, sqlite_database: Path, batch_contract: str
) -> None:
    permit = signed_by_official_client(chain, network, penniless(chain), upto_by=batch_contract)
    approval = signed_by_official_client(chain, network, penniless(chain), approval=True, upto_by=batch_contract)
    cases = [
        (permit, {"amount": str(VALUE - 1)}, "eip2612_amount_mismatch"),
        (permit, {"nonce": "77"}, "eip2612_invalid_signature"),
        (approval, {"amount": "1"}, "erc20_approval_amount_too_small"),
        (approval, {"spender": "0x" + "11" * 20}, "erc20_approval_spender_not_permit2"),
    ]
    async with sponsoring(chain, network, sqlite_database, batch_contract=batch_contract) as running:
        for call, changes, reason in cases:
            spoilt = copy.deepcopy(call)
            (extension,) = spoilt["paymentPayload"]["extensions"].values()
            extension["info"] |= changes
            assert await refused_everywhere(running, spoilt) == reason
        assert await rows(running.services.store) == []
    async with facilitator(chain, network, sqlite_database, batch_contract=batch_contract) as running:
        # Without a budget nothing is given.
        assert await refused_everywhere(running, approval) == "permit2_allowance_required"
        assert await rows(running.services.store) == []


async def test_an_approval_for_upto_goes_on_after_every_stop(
    chain: Devnet, network: Network, database: Path | str, batch_contract: str
) -> None:
    call = signed_by_official_client(chain, network, penniless(chain), approval=True, upto_by=batch_contract)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    wanted: dict[str, Any] = {"batch_contract": batch_contract, "settlement_wait_s": 0.5}
    for _ in range(3):
        async with sponsoring(chain, network, database, **wanted) as running:
            assert (await running.settle(taking(call, TAKEN)))["errorReason"] == "settlement_pending"
            rpc(chain.rpc_url, "evm_mine")
    rpc(chain.rpc_url, "evm_setAutomine", True)
    rpc(chain.rpc_url, "evm_mine")
    async with sponsoring(chain, network, database, batch_contract=batch_contract) as running:
        assert (await running.settle(taking(call, TAKEN)))["success"]
        settled = sorted(kind for (kind,) in await rows(running.services.store, "kind"))
        assert settled == ["approval_funding", kinds.UPTO]
    assert balance_of(chain.rpc_url, chain.usdt, SHOP) == TAKEN


async def test_an_approval_goes_before_the_payment(chain: Devnet, network: Network, database: Path | str) -> None:
    wallet = penniless(chain)
    call = signed_by_official_client(chain, network, wallet, approval=True)
    async with sponsoring(chain, network, database) as running:
        assert "erc20ApprovalGasSponsoring" in running.services.facilitator.supported()["extensions"]
        verified = await running.verify(call)
        assert verified["isValid"], verified
        assert await rows(running.services.store) == [], "to verify gives nothing"
        answers = await asyncio.gather(*(running.settle(call, idempotency_key="a") for _ in range(3)))
        assert all(answer["success"] for answer in answers), answers
        assert await running.settle(call, idempotency_key="a") == answers[0]
        assert (await running.settle(call))["errorReason"] == "duplicate_settlement"
        assert sorted(row[0].partition(":")[0] for row in await rows(running.services.store)) == ["facilitate", "fund"]
    assert balance_of(chain.rpc_url, chain.usdt, SHOP) == VALUE


@pytest.mark.parametrize("approval", [True, False], ids=["USDT with an approval", "USDC with a permit"])
async def test_a_deposit_into_a_channel_needs_no_coin_of_its_payers(
    chain: Devnet, network: Network, database: Path | str, approval: bool
) -> None:
    wallet = penniless(chain)
    call = signed_by_official_client(chain, network, wallet, approval=approval, deposit=True)
    deposited = int(call["paymentPayload"]["payload"]["deposit"]["amount"])
    coin = chain.usdt if approval else chain.usdc
    before = balance_of(chain.rpc_url, coin, wallet.address)
    async with sponsoring(chain, network, database) as running:
        verified = await running.verify(call)
        assert verified["isValid"], verified
        assert verified["extra"]["balance"] == "0"
        assert await rows(running.services.store) == [], "to verify gives nothing"
        answers = await asyncio.gather(*(running.settle(call, idempotency_key="a") for _ in range(3)))
        assert all(answer["success"] for answer in answers), answers
        assert answers[0]["extra"]["channelState"]["balance"] == str(deposited)
        assert await running.settle(call, idempotency_key="a") == answers[0]
        assert (await running.settle(call))["errorReason"] == "duplicate_settlement"
        kinds = sorted(kind for (kind,) in await rows(running.services.store, "kind"))
        assert kinds == ["approval_funding"] * approval + ["facilitated_deposit"]
    assert balance_of(chain.rpc_url, coin, wallet.address) == before - deposited


async def test_nothing_is_given_for_a_deposit_that_would_not_do(
    chain: Devnet, network: Network, sqlite_database: Path
) -> None:
    code = "invalid_batch_settlement_evm_"
    call = signed_by_official_client(chain, network, penniless(chain), approval=True, deposit=True)
    async with facilitator(chain, network, sqlite_database) as running:
        assert await refused_everywhere(running, call) == f"{code}permit2_allowance_required"
        assert await rows(running.services.store) == []
    wallet = penniless(chain)
    # Its first voucher is over more than the channel would hold.
    over = Channel(network, wallet, chain.wallets[8], dataclasses.replace(network.tokens[1], transfer_method="permit2"))
    overdrawn = over.deposits(VALUE, VALUE + 1)
    overdrawn["paymentPayload"]["extensions"] = signed_by_official_client(
        chain, network, wallet, approval=True, deposit=True
    )["paymentPayload"]["extensions"]
    async with sponsoring(chain, network, sqlite_database) as running:
        assert await refused_everywhere(running, overdrawn) == f"{code}cumulative_exceeds_balance"
        call["paymentPayload"]["extensions"]["erc20ApprovalGasSponsoring"]["info"]["amount"] = "1"
        assert await refused_everywhere(running, call) == "erc20_approval_amount_too_small"
        assert await rows(running.services.store) == []


async def test_without_a_budget_approvals_are_neither_offered_nor_taken(
    chain: Devnet, network: Network, sqlite_database: Path
) -> None:
    call = signed_by_official_client(chain, network, penniless(chain), approval=True)
    async with facilitator(chain, network, sqlite_database) as running:
        assert "erc20ApprovalGasSponsoring" not in running.services.facilitator.supported()["extensions"]
        assert await refused_everywhere(running, call) == "permit2_allowance_required"
        assert await rows(running.services.store) == []


async def test_only_what_works_on_every_network_is_advertised(
    chain: Devnet, network: Network, sqlite_database: Path
) -> None:
    """The list of extensions is one for all networks: a server would offer them on each."""
    first = NetworkOptions(network, [chain.rpc_url], sponsoring=BUDGET)
    with Anvil(chain_id=31337) as anvil:
        other = load(anvil.rpc_url)
        tokens = [dataclasses.replace(token, chain_id=other.chain_id) for token in network.tokens]
        for others_tokens, budget, extensions in (
            (tokens, BUDGET, ["bazaar", "eip2612GasSponsoring", "erc20ApprovalGasSponsoring"]),
            (tokens, None, ["bazaar", "eip2612GasSponsoring"]),
            (tokens[1:], BUDGET, ["bazaar", "erc20ApprovalGasSponsoring"]),
            (tokens[1:], None, ["bazaar"]),
        ):
            elsewhere = dataclasses.replace(network, chain_id=other.chain_id, v1_name=None, tokens=tuple(others_tokens))
            second = NetworkOptions(elsewhere, [other.rpc_url], sponsoring=budget)
            async with facilitator(chain, network, sqlite_database, networks=(first, second)) as running:
                supported = SupportedResponse.model_validate(running.services.facilitator.supported())
            assert {kind.network for kind in supported.kinds} >= {network.caip2, elsewhere.caip2}
            assert supported.extensions == extensions


async def test_one_resource_server_uses_up_no_more_than_its_share(
    chain: Devnet, network: Network, sqlite_database: Path
) -> None:
    each = Budget(hourly_wei=5 * 10**14, payer_wei=10**15)
    async with sponsoring(chain, network, sqlite_database, each) as running:
        answers = []
        for _ in range(20):
            call = signed_by_official_client(chain, network, penniless(chain), approval=True)
            answers.append(await running.settle(call))
            if not answers[-1]["success"]:
                break
        assert [answer["success"] for answer in answers[:2]] == [True, len(answers) > 2]
        assert not answers[-1]["success"]
        given = [
            int(value) for name, value in await rows(running.services.store, "id, value") if name.startswith("fund:")
        ]
        assert sum(given) <= each.hourly_wei // 2


async def test_a_facilitator_that_is_stopped_between_the_steps_goes_on(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    call = signed_by_official_client(chain, network, penniless(chain), approval=True)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    on_chain = NetworkOptions(network, [chain.rpc_url], sponsoring=BUDGET)
    for _ in range(3):
        async with facilitator(chain, network, database, networks=(on_chain,), settlement_wait_s=0.5) as running:
            assert (await running.settle(call))["errorReason"] == "settlement_pending"
            rpc(chain.rpc_url, "evm_mine")
    rpc(chain.rpc_url, "evm_setAutomine", True)
    rpc(chain.rpc_url, "evm_mine")
    async with sponsoring(chain, network, database) as running:
        assert (await running.settle(call))["success"]
        assert sum(name.startswith("fund:") for name, _ in await rows(running.services.store)) == 1
    assert balance_of(chain.rpc_url, chain.usdt, SHOP) == VALUE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"from": "0x" + "11" * 20}, "erc20_approval_from_mismatch"),
        ({"asset": "0x" + "11" * 20}, "erc20_approval_asset_mismatch"),
        ({"spender": "0x" + "11" * 20}, "erc20_approval_spender_not_permit2"),
        ({"amount": "1"}, "erc20_approval_amount_too_small"),
        ({"amount": str(VALUE)}, "erc20_approval_tx_wrong_call"),
        ({"signedTransaction": "0x02c0"}, "erc20_approval_tx_parse_failed"),
        ({"signedTransaction": "0x" + "02" * 600}, "invalid_payload"),
        ({"signedTransaction": "none"}, "invalid_payload"),
    ],
)
async def test_an_approval_that_does_not_fit_is_refused(
    chain: Devnet, network: Network, sqlite_database: Path, changes: dict[str, str], reason: str
) -> None:
    call = signed_by_official_client(chain, network, penniless(chain), approval=True)
    call["paymentPayload"]["extensions"]["erc20ApprovalGasSponsoring"]["info"] |= changes
    async with sponsoring(chain, network, sqlite_database) as running:
        assert await refused_everywhere(running, call) == reason
        assert await rows(running.services.store) == []


async def refused_everywhere(running: Running, call: dict[str, Any]) -> str:
    verified, settled = await running.verify(call), await running.settle(call)
    assert verified["isValid"] is settled["success"] is False
    assert verified["invalidReason"] == settled["errorReason"]
    return str(verified["invalidReason"])
