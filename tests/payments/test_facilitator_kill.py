"""SIGKILL at every step of a settlement for others: the payer pays once, and exactly one call is ever told of it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

from contracts.devnet import Devnet, balance_of
from payments.chain.networks import Network
from tests.crashes.steps import Step, Steps, steps_of
from tests.payments.facilitating import SHOP, VALUE, body, facilitator
from tests.payments.settling import rows

OCCURRENCES_MAX = 2
"""What happens more often than this is polling."""
PATIENCE_S = 30


def live(chain: Devnet, network: Network, directory: Path, call: dict[str, Any], kill_at: Step | None) -> None:
    """A facilitator's life, in a process of its own: it settles one payment and says so in a file, or dies."""
    armed = directory / "armed"
    Steps(directory / "record", armed, kill_at).install()

    async def settle() -> None:
        async with facilitator(chain, network, directory / "farebox.db") as running:
            armed.touch()
            answer = await running.settle(call, idempotency_key="order-1")
            (directory / "answer").write_text(str(answer["success"]))
            # What is already told is over: the rest of this process is its way down.
            os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(settle())


def live_until_dead(
    chain: Devnet, network: Network, directory: Path, call: dict[str, Any], kill_at: Step | None
) -> list[Step]:
    directory.mkdir()
    # Forked from a process that has everything imported and nothing running.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.payments.test_facilitator_kill"])
    process = context.Process(target=live, args=(chain, network, directory, call, kill_at))
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == -signal.SIGKILL, process.exitcode
    return steps_of(directory / "record")


async def test_killed_at_every_step_it_settles_once_and_tells_once(
    chain: Devnet, network: Network, tmp_path: Path
) -> None:
    usdc = network.tokens[0]
    whole = body(chain.wallets[2], usdc, network)
    steps = await asyncio.to_thread(live_until_dead, chain, network, tmp_path / "whole", whole, None)
    assert (tmp_path / "whole" / "answer").read_text() == "True"
    kills = [step for step in dict.fromkeys(steps) if step.occurrence <= OCCURRENCES_MAX]
    assert {"wrote Facilitator._begin", "wrote Facilitator._grant"} <= {step.name for step in kills}, kills
    for number, kill_at in enumerate(kills):
        directory = tmp_path / str(number)
        call = body(chain.wallets[2], usdc, network)
        before = balance_of(chain.rpc_url, chain.usdc, SHOP)
        await asyncio.to_thread(live_until_dead, chain, network, directory, call, kill_at)
        async with facilitator(chain, network, directory / "farebox.db") as running:
            answer = await running.settle(call, idempotency_key="order-1")
            assert answer["success"], (str(kill_at), answer)
            again = await running.settle(call)
            assert again["errorReason"] == "duplicate_settlement", str(kill_at)
            assert again["transaction"] == answer["transaction"]
            assert len(await rows(running.services.store)) == 1
        assert balance_of(chain.rpc_url, chain.usdc, SHOP) == before + VALUE, str(kill_at)
