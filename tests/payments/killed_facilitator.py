"""A facilitator's life in a process of its own: it settles one call and says so in a file, or is killed at a step of it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

from contracts.devnet import Devnet
from payments.chain.networks import Network
from tests.crashes.forks import Forks, alive
from tests.crashes.steps import Step, Steps, steps_of
from tests.payments.facilitating import facilitator

PATIENCE_S = 30


def live(
    chain: Devnet, network: Network, directory: Path, call: dict[str, Any], contract: str, kill_at: Step | None
) -> None:
    """All of it; called in a fork."""
    armed = directory / "armed"
    Steps(directory / "record", armed, kill_at).install()

    async def settle() -> None:
        async with facilitator(chain, network, directory / "farebox.db", batch_contract=contract) as running:
            armed.touch()
            answer = await running.settle(call, idempotency_key="order-1")
            (directory / "answer").write_text(str(answer["success"]))
            # What is already told is over: the rest of this process is its way down.
            os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(settle())


async def live_until_dead(
    forks: Forks,
    chain: Devnet,
    network: Network,
    directory: Path,
    call: dict[str, Any],
    contract: str,
    kill_at: Step | None,
) -> list[Step]:
    """Let it live on the database in a directory. Returns the steps that it came to, of which the last one is `kill_at` unless
    what it polls for came sooner this time."""
    log = directory / "facilitator.log"
    pid = forks.start(log, live, chain, network, directory, call, contract, kill_at)
    deadline = time.monotonic() + PATIENCE_S
    while alive(pid):
        assert time.monotonic() < deadline, "it does not come to its end"
        await asyncio.sleep(0.005)
    steps = steps_of(directory / "record")
    assert steps[-1:] == [kill_at] or (directory / "answer").exists(), log.read_text()
    return steps
