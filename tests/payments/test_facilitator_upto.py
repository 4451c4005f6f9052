"""The facilitator and `upto`, with everything real: what the resource server names is taken, once, or burnt."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from contracts.devnet import Devnet, approve_permit2, balance_of, place_operator_contracts, rpc, send_as
from payments.chain.networks import Network
from payments.facilitator import kinds
from tests.payments.contract_wallets import place
from tests.payments.facilitating import SHOP, drain, facilitator, until_submitted
from tests.payments.settling import receipt, rows
from tests.payments.upto_market import MAXIMUM, TAKEN, Market, taking


@pytest.fixture
def market(chain: Devnet, network: Network) -> Market:
    signer = chain.wallets[0].address
    batch_contract, _ = place_operator_contracts(chain.rpc_url, signer, signer, [signer])
    for wallet in chain.wallets[2:5]:
        for coin in (chain.usdc, chain.usdt):
            approve_permit2(chain.rpc_url, coin, wallet.private_key)
    return Market(chain, network, batch_contract)


@pytest.mark.parametrize("symbol", ["USDC", "USDT"])
async def test_what_the_server_names_is_taken(market: Market, database: Path | str, symbol: str) -> None:
    chain, token = market.chain, next(token for token in market.network.tokens if token.symbol == symbol)
    call = market.call(chain.wallets[2], token)
    payer = chain.wallets[2].address.lower()
    async with facilitator(chain, market.network, database, batch_contract=market.batch_contract) as running:
        offered = [kind for kind in running.services.facilitator.supported()["kinds"] if kind["scheme"] == "upto"]
        assert [kind["extra"] for kind in offered] == [{"facilitatorAddress": market.batch_contract}]
        assert await running.verify(call) == {"isValid": True, "payer": payer}
        answer = await running.settle(taking(call, TAKEN))
        assert answer["success"], answer
        assert (answer["payer"], answer["amount"]) == (payer, str(TAKEN))
        assert receipt(chain.rpc_url, answer["transaction"])["to"] == market.batch_contract
        assert (await running.verify(call))["invalidReason"] == "permit2_invalid_nonce"
    assert market.held_by_shop == TAKEN


async def test_of_many_calls_one_is_told_and_another_amount_is_refused(market: Market, database: Path | str) -> None:
    call = market.call(market.chain.wallets[2])
    async with facilitator(market.chain, market.network, database, batch_contract=market.batch_contract) as running:
        answers = await asyncio.gather(*(running.settle(taking(call, TAKEN)) for _ in range(8)))
        assert [answer["success"] for answer in answers].count(True) == 1
        assert {answer.get("errorReason") for answer in answers} == {None, "duplicate_settlement"}
        other = await running.settle(taking(call, TAKEN + 1))
        assert other["errorReason"] == "permit2_invalid_nonce"
        nothing = await running.settle(taking(call, 0))
        assert (nothing["success"], nothing["errorReason"]) == (False, "permit2_invalid_nonce")
    assert market.held_by_shop == TAKEN


async def test_nothing_taken_burns_the_authorization(market: Market, database: Path | str) -> None:
    call = market.call(market.chain.wallets[2])
    async with facilitator(market.chain, market.network, database, batch_contract=market.batch_contract) as running:
        answers = await asyncio.gather(*(running.settle(taking(call, 0), idempotency_key="a") for _ in range(4)))
        assert {(answer["success"], answer["transaction"], answer["amount"]) for answer in answers} == {(True, "", "0")}
        assert (await running.settle(taking(call, 0)))["errorReason"] == "duplicate_settlement"
        assert await rows(running.services.store) == []
    async with facilitator(market.chain, market.network, database, batch_contract=market.batch_contract) as running:
        assert (await running.settle(taking(call, TAKEN)))["errorReason"] == "permit2_invalid_nonce"
        assert (await running.verify(call))["invalidReason"] == "permit2_invalid_nonce"
    assert market.held_by_shop == 0


async def test_more_than_the_maximum_is_refused(market: Market, sqlite_database: Path) -> None:
    call = market.call(market.chain.wallets[2])
    async with facilitator(
        market.chain, market.network, sqlite_database, batch_contract=market.batch_contract
    ) as running:
        refused = await running.settle(taking(call, MAXIMUM + 1))
        assert refused["errorReason"] == "invalid_upto_evm_payload_settlement_exceeds_amount"
        assert (await running.settle(taking(call, MAXIMUM)))["success"]
    assert market.held_by_shop == MAXIMUM


async def test_a_payer_that_spends_its_money_meanwhile_costs_the_server_not_us(
    market: Market, sqlite_database: Path
) -> None:
    chain = market.chain
    call = market.call(chain.wallets[2])
    async with facilitator(chain, market.network, sqlite_database, batch_contract=market.batch_contract) as running:
        assert (await running.verify(call))["isValid"]
        left = balance_of(chain.rpc_url, chain.usdc, chain.wallets[2].address)
        drain(chain, chain.wallets[2].address)
        refused = await running.settle(taking(call, TAKEN))
        assert refused["errorReason"] == "permit2_insufficient_balance"
        assert await rows(running.services.store) == []
        # What there is decides, not what was authorised.
        rpc(chain.rpc_url, "evm_mine")
        send_back(chain, chain.wallets[2].address, TAKEN)
        assert left > TAKEN
        assert (await running.settle(taking(call, TAKEN)))["success"]


def send_back(chain: Devnet, to: str, value: int) -> None:
    data = "0xa9059cbb" + to[2:].lower().rjust(64, "0") + f"{value:064x}"
    richest = chain.wallets[9].address
    rpc(chain.rpc_url, "anvil_impersonateAccount", richest)
    send_as(chain.rpc_url, richest, chain.usdc.address, data)


async def test_an_unknown_outcome_is_pending_and_found_later(market: Market, database: Path | str) -> None:
    call = market.call(market.chain.wallets[2])
    rpc(market.chain.rpc_url, "evm_setAutomine", False)
    wanted: dict[str, Any] = {"batch_contract": market.batch_contract, "settlement_wait_s": 0.5}
    async with facilitator(market.chain, market.network, database, **wanted) as running:
        pending = await running.settle(taking(call, TAKEN))
        assert pending["errorReason"] == "settlement_pending"
    rpc(market.chain.rpc_url, "evm_setAutomine", True)
    rpc(market.chain.rpc_url, "evm_mine")
    async with facilitator(market.chain, market.network, database, batch_contract=market.batch_contract) as running:
        answer = await running.settle(taking(call, TAKEN))
        assert answer["success"], answer
        assert await rows(running.services.store, "kind") == [(kinds.UPTO,)]
    assert market.held_by_shop == TAKEN


async def test_a_revert_is_the_payers_and_the_servers(market: Market, database: Path | str) -> None:
    chain = market.chain
    rpc(chain.rpc_url, "evm_setAutomine", False)
    wanted: dict[str, Any] = {"batch_contract": market.batch_contract, "client_failures_per_hour": 1}
    async with facilitator(chain, market.network, database, **wanted) as running:
        settling = asyncio.create_task(running.settle(taking(market.call(chain.wallets[2]), TAKEN)))
        await until_submitted(chain, running)
        drain(chain, chain.wallets[2].address)
        rpc(chain.rpc_url, "evm_mine")
        assert (await settling)["errorReason"] == "transaction_failed"
        refused = await running.settle(taking(market.call(chain.wallets[3]), TAKEN))
        assert refused["errorReason"] == "client_suspended"
    async with facilitator(chain, market.network, database, **wanted) as running:
        refused = await running.settle(taking(market.call(chain.wallets[3]), TAKEN))
        assert refused["errorReason"] == "client_suspended", "a restart forgives nothing"


async def test_what_does_not_pay_for_the_requirement_is_refused(market: Market, sqlite_database: Path) -> None:
    chain, payer = market.chain, market.chain.wallets[2]
    foreign = market.call(payer)
    foreign["paymentRequirements"]["extra"]["facilitatorAddress"] = SHOP
    unnamed = market.call(payer)
    del unnamed["paymentRequirements"]["extra"]["facilitatorAddress"]
    odd = market.call(payer)
    odd["paymentRequirements"]["extra"]["assetTransferMethod"] = "eip3009"
    loud = market.call(payer)
    loud["paymentRequirements"]["extra"]["facilitatorAddress"] = "0x" + market.batch_contract[2:].upper()
    first_version = market.call(payer)
    first_version["x402Version"] = first_version["paymentPayload"]["x402Version"] = 1
    wrapped = market.call(payer)
    wrapped["paymentPayload"]["payload"]["signature"] += "6492" * 16
    cases = [
        (market.call(payer, facilitator=SHOP), "upto_facilitator_mismatch"),
        (market.call(payer, to="0x" + "66" * 20), "invalid_permit2_recipient_mismatch"),
        (market.call(payer, amount=MAXIMUM - 1), "permit2_amount_mismatch"),
        (market.call(payer, spender=SHOP), "invalid_permit2_spender"),
        (market.call(payer, valid_s=3), "permit2_deadline_expired"),
        (market.call(payer, valid_after=2**40), "permit2_not_yet_valid"),
        (market.call(chain.wallets[3], payer=payer.address.lower()), "invalid_permit2_signature"),
        (market.call(chain.wallets[7]), "permit2_allowance_required"),
        (foreign, "upto_facilitator_mismatch"),
        (unnamed, "upto_facilitator_mismatch"),
        (odd, "invalid_payment_requirements"),
        (first_version, "invalid_payment_requirements"),
        (wrapped, "invalid_permit2_signature"),
    ]
    async with facilitator(chain, market.network, sqlite_database, batch_contract=market.batch_contract) as running:
        for number, (call, reason) in enumerate(cases):
            verified = await running.verify(call)
            assert (verified["isValid"], verified.get("invalidReason")) == (False, reason), (number, verified)
            for amount in (TAKEN, 0):
                settled = await running.settle(taking(call, amount))
                if amount or reason != "permit2_allowance_required":
                    assert (settled["success"], settled.get("errorReason")) == (False, reason), (number, settled)
        assert await rows(running.services.store) == []
        for odd_amount in ("1e3", "-1", " 5", "0x10", 5, None):
            call = market.call(payer)
            call["paymentRequirements"]["amount"] = odd_amount
            assert (await running.settle(call))["errorReason"] == "invalid_payment_requirements"
        assert (await running.verify(loud))["isValid"], "addresses have no letter case"


async def test_a_deployed_contract_wallet_pays_and_nobody_burns_for_it(market: Market, sqlite_database: Path) -> None:
    chain, owner = market.chain, market.chain.wallets[4]
    wallet = "0x" + "c0de" * 10
    place(chain, wallet, owner.address.lower())
    approve = "0x095ea7b3" + "000000000022d473030f116ddee9f6b43ac78ba3".rjust(64, "0") + "f" * 64
    rpc(chain.rpc_url, "anvil_impersonateAccount", wallet)
    rpc(chain.rpc_url, "anvil_setBalance", wallet, hex(10**18))
    send_as(chain.rpc_url, wallet, chain.usdc.address, approve)
    send_back(chain, wallet, MAXIMUM)
    async with facilitator(chain, market.network, sqlite_database, batch_contract=market.batch_contract) as running:
        stranger = market.call(chain.wallets[5], payer=wallet, nonce=7)
        assert (await running.settle(taking(stranger, 0)))["success"] is False
        call = market.call(owner, payer=wallet, nonce=7)
        assert (await running.verify(call))["isValid"]
        assert (await running.settle(taking(call, TAKEN)))["success"]
    assert market.held_by_shop == TAKEN
