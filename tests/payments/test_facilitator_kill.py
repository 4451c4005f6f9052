"""SIGKILL at every step of a settlement for others: it happens once, and what is sold for it is told of once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from contracts.devnet import Devnet, approve_permit2, balance_of, place_operator_contracts
from payments.chain.channel_contract import decode_states, states_call
from payments.chain.networks import Network
from payments.chain.rpc import Rpc
from tests.crashes.forks import Forks
from tests.crashes.steps import Step
from tests.databases import sqlite_file
from tests.payments.channelling import channel_of, claims
from tests.payments.facilitating import SHOP, VALUE, Running, body, facilitator
from tests.payments.killed_facilitator import live_until_dead
from tests.payments.settling import rows
from tests.payments.upto_market import TAKEN, Market, taking

OCCURRENCES_MAX = 2
"""What happens more often than this is polling."""
DEPOSIT, PRICE = 10_000, 700


@dataclass(frozen=True)
class Case:
    """Something that is settled again and again."""

    call: Callable[[int], Awaitable[dict[str, Any]]]
    """Makes the body of the nth call, with all that it needs on the chain."""
    effect: Callable[[], Awaitable[int]]
    """What it changes there, in atomic units."""
    change: int
    once: bool = True
    orders: int = 1


def cases(chain: Devnet, network: Network, market: Market, helper: Running) -> dict[str, Case]:
    """By name; `helper` is another facilitator, which prepares what a call needs."""
    channel = channel_of(chain, network)

    async def done(call: dict[str, Any]) -> None:
        answer = await helper.settle(call)
        assert answer["success"], answer

    async def state(number: int) -> Any:
        async with Rpc([chain.rpc_url]) as node:
            (answer,) = await node.ask([states_call([number])])
        return decode_states(answer, 1)[1][0]

    async def held() -> int:
        return balance_of(chain.rpc_url, chain.usdc, SHOP)

    async def claimed() -> int:
        return int((await state(channel.number)).total_claimed)

    async def deposited() -> int:
        return int((await state(channel.number)).balance)

    async def returned() -> int:
        return balance_of(chain.rpc_url, chain.usdc, channel.payer.address)

    async def exact(number: int) -> dict[str, Any]:
        return body(chain.wallets[2], network.tokens[0], network)

    async def upto(number: int) -> dict[str, Any]:
        return taking(market.call(chain.wallets[2]), TAKEN)

    async def nothing(number: int) -> dict[str, Any]:
        return taking(market.call(chain.wallets[2]), 0)

    async def deposit(number: int) -> dict[str, Any]:
        return channel.deposits(DEPOSIT, PRICE)

    async def claim(number: int) -> dict[str, Any]:
        if number == 0:
            await done(channel.deposits(100 * PRICE, PRICE))
        total = (number + 1) * PRICE
        return claims((channel, total, total))

    async def settle(number: int) -> dict[str, Any]:
        await done(await claim(number))
        return channel.settles()

    async def refund(number: int) -> dict[str, Any]:
        await done(channel.deposits(DEPOSIT + PRICE, (number + 1) * PRICE))
        total = (number + 1) * PRICE
        return channel.refunds(DEPOSIT, (await state(channel.number)).refund_nonce, total, total)

    return {
        "exact": Case(exact, held, VALUE),
        "upto": Case(upto, held, TAKEN),
        "upto for nothing": Case(nothing, held, 0, orders=0),
        "deposit": Case(deposit, deposited, DEPOSIT),
        "claim": Case(claim, claimed, PRICE, once=False),
        "settle": Case(settle, held, PRICE, once=False),
        "refund": Case(refund, returned, DEPOSIT, once=False),
    }


@pytest.mark.parametrize("name", ["exact", "upto", "upto for nothing", "deposit", "claim", "settle", "refund"])
async def test_killed_at_every_step_it_settles_once_and_tells_once(
    chain: Devnet, network: Network, forks: Forks, tmp_path: Path, name: str
) -> None:
    signer = chain.wallets[0].address
    contract, _ = place_operator_contracts(chain.rpc_url, signer, signer, [signer])
    approve_permit2(chain.rpc_url, chain.usdc, chain.wallets[2].private_key)

    async def live_and_die(number: int, call: dict[str, Any], kill_at: Step | None) -> list[Step]:
        (tmp_path / str(number)).mkdir()
        sqlite_file(tmp_path / str(number) / "farebox.db")
        return await live_until_dead(forks, chain, network, tmp_path / str(number), call, contract, kill_at)

    async with facilitator(chain, network, tmp_path / "helper.db", signer=1) as helper:
        case = cases(chain, network, Market(chain, network, contract), helper)[name]
        steps = await live_and_die(0, await case.call(0), None)
        assert (tmp_path / "0" / "answer").read_text() == "True"
        begun = steps.index(Step("wrote Facilitator._begin"))
        kills = [step for step in dict.fromkeys(steps) if step.occurrence <= OCCURRENCES_MAX]
        if name != "exact":
            # Before it is begun nothing is durable, whatever it is.
            kills = [step for step in kills if step.occurrence == 1 and steps.index(step) >= begun]
        assert {"wrote Facilitator._begin", "wrote Facilitator._grant"} <= {step.name for step in kills}, kills
        for number, kill_at in enumerate(kills, start=1):
            call = await case.call(number)
            before = await case.effect()
            await live_and_die(number, call, kill_at)
            database = tmp_path / str(number) / "farebox.db"
            async with facilitator(chain, network, database, batch_contract=contract) as running:
                answer = await running.settle(call, idempotency_key="order-1")
                assert answer["success"], (str(kill_at), answer)
                if name != "settle":
                    again = await running.settle(call)
                    expected = "duplicate_settlement" if case.once else None
                    assert again.get("errorReason") == expected, (str(kill_at), again)
                    assert again["transaction"] == answer["transaction"]
                assert len(await rows(running.services.store)) == case.orders
            assert await case.effect() == before + case.change, str(kill_at)
