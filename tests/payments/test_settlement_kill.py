"""SIGKILL between any two steps: what was broadcast is credited, and nothing is transferred or credited twice."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from pathlib import Path

from contracts.devnet import Devnet, balance_of
from payments.chain.networks import Network
from payments.ledger import books as ledger_books
from tests.databases import open_store
from tests.payments.settling import PAY_TO, credit, order_for, pay, rows, transactions

ORDERS = 60


def live(command: list[str], told: set[str], answers: int | None) -> None:
    """Run the process until `told` has so many answers, then kill it; None: until it is done."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            order_id, state = line.split()
            assert state in {"mined", "final"}
            told.add(order_id)
            if answers is not None and len(told) >= answers:
                break
    finally:
        process.kill()
        process.wait()


async def test_a_gateway_that_is_killed_again_and_again_settles_everything_once(
    chain: Devnet, network: Network, tmp_path: Path
) -> None:
    usdc = network.tokens[0]
    orders = [order_for(pay(chain.wallets[2], usdc, 1_000 + i), usdc) for i in range(ORDERS)]
    plan = tmp_path / "plan"
    plan.write_bytes(pickle.dumps((network, list(chain.wallets[:2]), orders)))
    open_store(tmp_path).close()
    command = [sys.executable, "-m", "tests.payments.settling_process"]
    command += [str(tmp_path / "farebox.db"), chain.rpc_url, str(plan)]
    told: set[str] = set()
    # It dies after so many answers in a life, each time with others under way: written, broadcast, mined or half booked.
    for answers in (1, 7, 12, None):
        await asyncio.to_thread(live, command, told, answers)
    assert told == {order.id for order in orders}
    store = open_store(tmp_path)
    try:
        assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == sum(order.value for order in orders)
        assert await credit(store, chain.wallets[2], usdc) == sum(order.value for order in orders) * 1_000
        assert {state for (state,) in await rows(store, "state")} <= {"mined", "final"}
        assert len(set(await transactions(store, "signer, signer_nonce"))) == ORDERS
        assert await store.read(ledger_books.check) == []
    finally:
        store.close()
