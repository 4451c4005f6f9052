"""Several facilitators on one PostgreSQL, as behind a load balancer: they act as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from contracts.devnet import Devnet, balance_of, rpc
from payments.chain.networks import Network
from tests.payments.facilitating import SHOP, VALUE, Running, body, drain, facilitator, until_submitted
from tests.payments.settling import rows


@contextlib.asynccontextmanager
async def two(chain: Devnet, network: Network, database: str, **wanted: Any) -> AsyncIterator[tuple[Running, Running]]:
    async with (
        facilitator(chain, network, database, **wanted) as first,
        facilitator(chain, network, database, **wanted) as second,
    ):
        yield first, second


async def test_the_success_of_one_payment_is_told_once_whoever_is_asked(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    async with two(chain, network, postgres_database) as both:
        for round in range(1, 4):
            call = body(chain.wallets[2], network.tokens[0], network)
            answers = await asyncio.gather(*(both[number % 2].settle(call) for number in range(8)))
            assert [answer["success"] for answer in answers].count(True) == 1
            assert {answer.get("errorReason") for answer in answers} == {None, "duplicate_settlement"}
            assert len({answer["transaction"] for answer in answers}) == 1
            for running in both:
                assert (await running.settle(call))["errorReason"] == "duplicate_settlement"
                assert (await running.verify(call))["invalidReason"] == "invalid_exact_evm_nonce_already_used"
            assert len(await rows(both[0].services.store)) == round
    assert balance_of(chain.rpc_url, chain.usdc, SHOP) == 3 * VALUE


async def test_the_same_call_at_another_facilitator_is_told_the_same(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    call = body(chain.wallets[2], network.tokens[0], network)
    async with two(chain, network, postgres_database) as (first, second):
        answer = await first.settle(call, idempotency_key="order-1")
        assert answer["success"]
        assert await second.settle(call, idempotency_key="order-1") == answer


async def test_verify_says_no_while_another_facilitator_settles(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    call = body(chain.wallets[2], network.tokens[0], network)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with two(chain, network, postgres_database, settlement_wait_s=5) as (first, second):
        settling = asyncio.create_task(first.settle(call))
        await until_submitted(chain, first)
        assert (await second.verify(call))["invalidReason"] == "settlement_pending"
        waiting = asyncio.create_task(second.settle(call))
        rpc(chain.rpc_url, "evm_mine")
        assert sorted([(await settling)["success"], (await waiting)["success"]]) == [False, True]


async def test_two_payments_that_one_balance_covers_do_not_both_burn_gas(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    funds = balance_of(chain.rpc_url, chain.usdc, chain.wallets[4].address)
    calls = [body(chain.wallets[4], network.tokens[0], network, value=funds) for _ in range(4)]
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with two(chain, network, postgres_database) as both:
        settling = [asyncio.create_task(both[number % 2].settle(call)) for number, call in enumerate(calls)]
        done: set[asyncio.Task[dict[str, Any]]] = set()
        while len(done) < len(calls) - 1:
            done, _ = await asyncio.wait(settling, return_when=asyncio.FIRST_COMPLETED, timeout=0.1)
        rpc(chain.rpc_url, "evm_mine")
        answers = await asyncio.gather(*settling)
        assert [answer["success"] for answer in answers].count(True) == 1
        refused = {answer["errorReason"] for answer in answers if not answer["success"]}
        assert refused == {"invalid_exact_evm_insufficient_balance"}
        assert len(await rows(both[0].services.store)) == 1


async def test_a_servers_failures_count_everywhere(chain: Devnet, network: Network, postgres_database: str) -> None:
    usdc = network.tokens[0]
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with two(chain, network, postgres_database, client_failures_per_hour=1) as (first, second):
        settling = asyncio.create_task(first.settle(body(chain.wallets[2], usdc, network)))
        await until_submitted(chain, first)
        drain(chain, chain.wallets[2].address)
        rpc(chain.rpc_url, "evm_mine")
        assert (await settling)["errorReason"] == "transaction_failed"
        refused = await second.settle(body(chain.wallets[3], usdc, network))
        assert refused["errorReason"] == "client_suspended"
