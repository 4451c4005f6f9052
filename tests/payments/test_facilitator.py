"""The facilitator on a real chain: what it verifies it settles, once, and it says so once."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import httpx
import pytest

from contracts.devnet import Devnet, balance_of, rpc, send_as
from payments import accounts
from payments.chain.networks import Network
from payments.facilitator.app import create_app
from payments.settlement import outbox, reverts
from payments.settlement.lookout import Lookout
from payments.settlement.orders import SettlementOrder
from payments.store import Store
from payments.verification.chain_state import ChainStates
from tests.payments.facilitating import SHOP, VALUE, body, drain, facilitator, held_by_shop, until_submitted
from tests.payments.settling import receipt, rows


@pytest.mark.parametrize(("symbol", "version"), [("USDC", 2), ("USDT", 2), ("USDC", 1)])
async def test_what_it_verifies_it_settles(
    chain: Devnet, network: Network, database: Path | str, symbol: str, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ask = ChainStates._ask

    async def counted(self: ChainStates, checks: Any) -> None:
        asked.append(len(checks))
        await ask(self, checks)

    monkeypatch.setattr(ChainStates, "_ask", counted)
    token = next(token for token in network.tokens if token.symbol == symbol)
    call = body(chain.wallets[2], token, network, version=version)
    payer = chain.wallets[2].address.lower()
    async with facilitator(chain, network, database) as running:
        if symbol == "USDT":
            refused = await running.verify(body(chain.wallets[3], token, network))
            assert refused["invalidReason"] == "permit2_allowance_required"
            approve(chain, symbol)
        asked.clear()
        assert await running.verify(call) == {"isValid": True, "payer": payer}
        assert asked == [1]
        assert await rows(running.services.store) == []
        answer = await running.settle(call)
        name = network.caip2 if version == 2 else network.v1_name
        assert answer["success"], answer
        assert (answer["network"], answer["payer"], answer["amount"]) == (name, payer, str(VALUE))
        assert receipt(chain.rpc_url, answer["transaction"])["status"] == "0x1"
    assert held_by_shop(chain) == VALUE


def approve(chain: Devnet, symbol: str) -> None:
    token = {"USDC": chain.usdc, "USDT": chain.usdt}[symbol]
    data = "0x095ea7b3" + "000000000022d473030f116ddee9f6b43ac78ba3".rjust(64, "0") + "f" * 64
    sender = chain.wallets[2].address
    rpc(chain.rpc_url, "anvil_impersonateAccount", sender)
    send_as(chain.rpc_url, sender, token.address, data)


async def test_usdc_is_settled_over_permit2_where_the_server_asks_for_that(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    approve(chain, "USDC")
    usdc = dataclasses.replace(network.tokens[0], transfer_method="permit2")
    async with facilitator(chain, network, database) as running:
        assert (await running.settle(body(chain.wallets[2], usdc, network)))["success"]
    assert held_by_shop(chain) == VALUE


async def test_of_many_calls_for_one_payment_one_is_told_of_the_success(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    call = body(chain.wallets[2], network.tokens[0], network)
    async with facilitator(chain, network, database) as running:
        answers = await asyncio.gather(*(running.settle(call) for _ in range(12)))
        told = [answer for answer in answers if answer["success"]]
        assert len(told) == 1
        assert {answer["errorReason"] for answer in answers if not answer["success"]} == {"duplicate_settlement"}
        assert {answer["transaction"] for answer in answers} == {told[0]["transaction"]}
        again = await running.settle(call)
        assert (again["success"], again["errorReason"]) == (False, "duplicate_settlement")
        verified = await running.verify(call)
        assert (verified["isValid"], verified["invalidReason"]) == (False, "invalid_exact_evm_nonce_already_used")
        assert len(await rows(running.services.store)) == 1
    assert held_by_shop(chain) == VALUE


async def test_the_same_call_made_again_is_told_the_same(chain: Devnet, network: Network, database: Path | str) -> None:
    call = body(chain.wallets[2], network.tokens[0], network)
    async with facilitator(chain, network, database) as running:
        first = await running.settle(call, idempotency_key="order-1")
        assert first["success"]
        assert await running.settle(call, idempotency_key="order-1") == first
        other = await running.settle(call, idempotency_key="order-2")
        assert other["errorReason"] == "duplicate_settlement"


async def test_one_authorization_in_other_wrapping_is_the_same_payment(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    call = body(chain.wallets[2], network.tokens[0], network)
    rewrapped = {**call, "paymentPayload": call["paymentPayload"] | {"resource": {"url": "https://shop.example/other"}}}
    async with facilitator(chain, network, database) as running:
        assert (await running.settle(call))["success"]
        assert (await running.settle(rewrapped))["errorReason"] == "duplicate_settlement"


async def test_another_authorization_with_the_same_nonce_is_refused(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    first = body(chain.wallets[2], network.tokens[0], network, nonce=7)
    second = body(chain.wallets[2], network.tokens[0], network, nonce=7, value=2 * VALUE)
    async with facilitator(chain, network, database) as running:
        answers = await asyncio.gather(running.settle(first), running.settle(second))
        assert sorted(answer["success"] for answer in answers) == [False, True]
        refused = next(answer for answer in answers if not answer["success"])
        assert refused["errorReason"] == "invalid_exact_evm_nonce_already_used"
    assert held_by_shop(chain) in (VALUE, 2 * VALUE)


async def test_an_unknown_outcome_is_pending_and_found_later(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    call = body(chain.wallets[2], network.tokens[0], network)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with facilitator(chain, network, database, settlement_wait_s=0.5) as running:
        pending = await running.settle(call)
        assert (pending["success"], pending["errorReason"]) == (False, "settlement_pending")
        assert len(pending["transaction"]) == 66
        # Nobody was told of anything: a server that asks again before it works may go on.
        assert (await running.verify(call))["isValid"]
        rpc(chain.rpc_url, "evm_mine")
        answer = await running.settle(call)
        assert answer["success"]
        assert answer["transaction"] == pending["transaction"]
        assert (await running.settle(call))["errorReason"] == "duplicate_settlement"


async def test_an_outcome_is_found_after_the_authorization_has_expired(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    call = body(chain.wallets[2], network.tokens[0], network, valid_s=8)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with facilitator(chain, network, database, settlement_wait_s=0.3) as running:
        assert (await running.settle(call))["errorReason"] == "settlement_pending"
        rpc(chain.rpc_url, "evm_mine")
        await asyncio.sleep(2.5)  # less than the margin that a first settlement must have is left
        assert (await running.verify(body(chain.wallets[2], network.tokens[0], network, valid_s=5)))["isValid"] is False
        assert (await running.settle(call))["success"]


async def test_verify_says_no_while_another_call_settles(chain: Devnet, network: Network, database: Path | str) -> None:
    call = body(chain.wallets[2], network.tokens[0], network)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with facilitator(chain, network, database) as running:
        settling = asyncio.create_task(running.settle(call))
        await until_submitted(chain, running)
        assert (await running.verify(call))["invalidReason"] == "settlement_pending"
        rpc(chain.rpc_url, "evm_mine")
        assert (await settling)["success"]


async def test_a_success_that_nobody_hears_is_told_to_the_next_who_asks(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    call = body(chain.wallets[2], network.tokens[0], network)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with facilitator(chain, network, database) as running:
        app = create_app(running.services)
        heard: list[Any] = []
        gone = asyncio.Event()
        sent = [{"type": "http.request", "body": httpx.Request("POST", "http://f", json=call).content}]

        async def receive() -> Any:
            if sent:
                return sent.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            heard.append(message)

        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": "/settle",
            "headers": [],
            "query_string": b"",
            "client": None,
        }
        first = asyncio.create_task(app(scope, receive, send))
        await until_submitted(chain, running)
        gone.set()
        await first
        assert heard[0]["status"] == 499
        rpc(chain.rpc_url, "evm_mine")
        assert (await running.settle(call))["success"]


async def test_two_payments_that_one_balance_covers_do_not_both_burn_gas(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    usdc = network.tokens[0]
    funds = balance_of(chain.rpc_url, chain.usdc, chain.wallets[4].address)
    calls = [body(chain.wallets[4], usdc, network, value=funds) for _ in range(3)]
    async with facilitator(chain, network, database) as running:
        answers = await asyncio.gather(*(running.settle(call) for call in calls))
        assert [answer["success"] for answer in answers].count(True) == 1
        refused = {answer["errorReason"] for answer in answers if not answer["success"]}
        assert refused == {"invalid_exact_evm_insufficient_balance"}
        assert len(await rows(running.services.store)) == 1


async def test_a_payer_whose_settlements_fail_has_to_wait(
    chain: Devnet, network: Network, database: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reverts, "REVERTS_MAX", 1)
    usdc = network.tokens[0]
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with facilitator(chain, network, database) as running:
        call = body(chain.wallets[2], usdc, network)
        settling = asyncio.create_task(running.settle(call))
        await until_submitted(chain, running)
        # The money goes elsewhere before the block is made.
        drain(chain, chain.wallets[2].address)
        rpc(chain.rpc_url, "evm_mine")
        failed = await settling
        assert (failed["success"], failed["errorReason"]) == (False, "transaction_failed"), failed
        refused = await running.verify(body(chain.wallets[2], usdc, network))
        assert refused["invalidReason"] == "payer_suspended"
        assert (await running.settle(call))["errorReason"] == "transaction_failed"
        assert (await running.verify(body(chain.wallets[3], usdc, network)))["isValid"]


async def test_a_server_whose_settlements_fail_has_to_wait(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    usdc = network.tokens[0]
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with facilitator(chain, network, database, client_failures_per_hour=1) as running:
        settling = asyncio.create_task(running.settle(body(chain.wallets[2], usdc, network)))
        await until_submitted(chain, running)
        drain(chain, chain.wallets[2].address)
        rpc(chain.rpc_url, "evm_mine")
        assert (await settling)["errorReason"] == "transaction_failed"
        refused = await running.settle(body(chain.wallets[3], usdc, network))
        assert refused["errorReason"] == "client_suspended"


async def test_a_restart_carries_on_and_finds_the_outcome(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    call = body(chain.wallets[2], network.tokens[0], network)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with facilitator(chain, network, database, settlement_wait_s=0.3) as running:
        assert (await running.settle(call))["errorReason"] == "settlement_pending"
    rpc(chain.rpc_url, "evm_setAutomine", True)
    rpc(chain.rpc_url, "evm_mine")
    async with facilitator(chain, network, database) as running:
        assert (await running.settle(call))["success"]
        assert (await running.settle(call))["errorReason"] == "duplicate_settlement"
    async with facilitator(chain, network, database) as running:
        assert (await running.settle(call))["errorReason"] == "duplicate_settlement"
    assert held_by_shop(chain) == VALUE


async def test_what_is_written_and_not_taken_up_is_settled_after_a_restart(
    chain: Devnet, network: Network, database: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = body(chain.wallets[2], network.tokens[0], network)
    async with facilitator(chain, network, database, settlement_wait_s=0.3) as running:
        with monkeypatch.context() as patched:
            patched.setattr(Lookout, "_read", lambda *_: ([], []))
            pending = await running.settle(call)
            assert (pending["errorReason"], pending["transaction"]) == ("settlement_pending", "")
    async with facilitator(chain, network, database) as running:
        assert (await running.settle(call))["success"]


async def test_keys_are_asked_for_and_counted(chain: Devnet, network: Network, database: Path | str) -> None:
    call = body(chain.wallets[2], network.tokens[0], network)
    async with facilitator(chain, network, database, require_key=True, calls_per_minute=3) as running:
        _, key = await running.services.store.write(lambda tx: accounts.create_key(tx, "shop", "default"))
        for header in (None, "Bearer fbk_wrong", "Basic x"):
            headers = {} if header is None else {"authorization": header}
            refused = await running.http.post("/verify", json=call, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
        own = {"authorization": f"Bearer {key}"}
        answers = [await running.http.post("/verify", json=call, headers=own) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert (await running.http.get("/supported")).status_code == 200


async def test_only_listed_recipients_and_worthwhile_amounts_are_settled(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    usdc = network.tokens[0]
    async with facilitator(
        chain, network, database, pay_to=frozenset({SHOP}), minimum_nano_usd=VALUE * 1_000
    ) as running:
        assert (await running.verify(body(chain.wallets[2], usdc, network)))["isValid"]
        for wanted in ({"to": "0x" + "66" * 20}, {"value": VALUE - 1}):
            call = body(chain.wallets[2], usdc, network, **wanted)
            assert (await running.verify(call))["invalidReason"] == "invalid_payment_requirements"
            assert (await running.settle(call))["success"] is False
        assert await rows(running.services.store) == []


async def test_what_only_a_gateway_can_book_is_left_to_it(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    usdc = network.tokens[0]
    refund = SettlementOrder(
        id="refund_1",
        kind="refund",
        reference="refund:refund_1",
        chain_id=network.chain_id,
        token=usdc.address,
        payer=chain.wallets[1].address.lower(),
        pay_to=SHOP,
        value=VALUE,
        authorization_nonce=None,
        call_to=usdc.address,
        call_data=b"",
        valid_before=0,
    )
    store = Store(database)
    await store.write(lambda tx: outbox.enqueue(tx, refund))
    store.close()
    async with facilitator(chain, network, database) as running:
        assert (await running.settle(body(chain.wallets[2], usdc, network)))["success"]
        assert set(await rows(running.services.store)) >= {("refund_1", "queued")}


async def test_an_operator_sees_what_it_does(chain: Devnet, network: Network, database: Path | str) -> None:
    async with facilitator(chain, network, database, gas_alarm_wei=10**30) as running:
        assert (await running.settle(body(chain.wallets[2], network.tokens[0], network)))["success"]
        assert (await running.http.get("/healthz")).status_code == 200
        ready = await running.http.get("/readyz")
        assert (ready.status_code, ready.json()["alarms"][0]["code"]) == (503, "low_gas")
        metrics = (await running.http.get("/metrics")).text
        assert 'farebox_facilitator_settlements_total{result="success"} 1.0' in metrics
        assert 'farebox_settlements_paid{network="eip155:84532"} 1.0' in metrics
