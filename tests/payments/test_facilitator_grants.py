"""A success is told to one call, whoever makes that call again and whoever hangs up while it is being written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contracts.devnet import Devnet
from payments.chain.networks import Network
from payments.facilitator import records
from payments.facilitator.access import Client
from payments.store import Transaction
from tests.payments.facilitating import Running, body, facilitator

SHOP_CLIENT = Client("key:1")


def settling(running: Running, call: dict[str, Any], key: str) -> asyncio.Task[dict[str, Any]]:
    inside = running.services.facilitator
    return asyncio.create_task(inside.settle(inside.read(call), SHOP_CLIENT, key))


async def told(running: Running, call: dict[str, Any], key: str) -> bool:
    return bool((await settling(running, call, key))["success"])


async def hung_up_on(
    running: Running,
    call: dict[str, Any],
    key: str,
    monkeypatch: pytest.MonkeyPatch,
    meanwhile: Callable[[Transaction], object] = lambda tx: None,
) -> None:
    """A call whose caller goes away while its success is being granted; `meanwhile` happens after that, in the same commit."""
    loop, grant = asyncio.get_running_loop(), records.grant

    def last(tx: Transaction, identity: str, name: str) -> bool:
        loop.call_soon_threadsafe(task.cancel)
        granted = grant(tx, identity, name)
        meanwhile(tx)
        return granted

    with monkeypatch.context() as patch:
        patch.setattr(records, "grant", last)
        task = settling(running, call, key)
        with pytest.raises(asyncio.CancelledError):
            await task
    for _ in range(2):  # what it leaves behind is written by then
        await running.services.store.write(lambda tx: None)


async def test_a_success_that_was_told_stays_told_when_the_call_made_again_is_hung_up_on(
    chain: Devnet, network: Network, database: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = body(chain.wallets[2], network.tokens[0], network)
    async with facilitator(chain, network, database) as running:
        assert await told(running, call, "order-1")
        await hung_up_on(running, call, "order-1", monkeypatch)
        assert not await told(running, call, "order-2"), "one payment, and two were told of its success"
        assert await told(running, call, "order-1")


async def test_a_success_that_the_call_made_again_is_told_stays_told_when_the_first_is_hung_up_on(
    chain: Devnet, network: Network, database: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = body(chain.wallets[2], network.tokens[0], network)
    async with facilitator(chain, network, database) as running:

        def made_again(tx: Transaction) -> None:
            (identity,) = tx.execute("SELECT identity FROM facilitated_payment").fetchone()
            assert records.grant(tx, identity, f"{SHOP_CLIENT.name} order-1")

        await hung_up_on(running, call, "order-1", monkeypatch, made_again)
        assert not await told(running, call, "order-2"), "one payment, and two were told of its success"


async def test_a_success_that_nobody_heard_is_told_to_the_next(
    chain: Devnet, network: Network, database: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = body(chain.wallets[2], network.tokens[0], network)
    async with facilitator(chain, network, database) as running:
        await hung_up_on(running, call, "order-1", monkeypatch)
        assert await told(running, call, "order-2")
        assert not await told(running, call, "order-1")
