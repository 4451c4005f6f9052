"""The gateway is killed at every step of everything that moves money, and started again: nothing is lost, paid or served twice.

Each operation is run once to learn its steps (see `tests.crashes.steps`); then once for each of them, with the power cut there.
A second test cuts the power again while the gateway puts right what the first cut left behind.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.crashes.operations import OPERATIONS, UNAVAILABLE, Operation
from tests.crashes.steps import Step
from tests.crashes.world import PATIENCE_S, Run, World

AT_ONCE = 4
"""Runs under way: most of their time they wait."""
OCCURRENCES_MAX = 2
"""What happens more often than this in one operation is polling."""
BY_THE_CLOCK = ("wrote Leases.", "wrote ChannelKeeper.")
"""Writes that belong to no operation."""
KILLED_TWICE = ("exact, EIP-3009", "withdrawn")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World.open(tmp_path_factory.mktemp("world")) as world:
        world.simulator.configure(UNAVAILABLE, status=500)
        yield world


def live_through(run: Run, operation: Operation, kill_at: Step | None) -> list[Step]:
    """The first life, until it is killed or has nothing left to do. Returns the steps that it came to."""
    run.live(kill_at)
    operation.prepare(run)
    run.arm()
    try:
        operation.act(run)
    except httpx.TransportError:
        assert kill_at is not None
    deadline = time.monotonic() + PATIENCE_S
    while run.alive and not operation.done(run):
        assert time.monotonic() < deadline, "it does not come to its end"
        time.sleep(0.02)
    run.die()
    steps = run.steps()
    # Polling is never twice the same, an operation's own writes are; a kill that does not happen tests nothing.
    assert (
        kill_at is None
        or not kill_at.name.startswith("wrote ")
        or kill_at.name.startswith(BY_THE_CLOCK)
        or kill_at in steps
    )
    return steps


def live_on(run: Run, operation: Operation) -> None:
    """A life that nothing ends: everything comes to its end in it, and every promise has been kept."""
    run.live()
    operation.resume(run)
    run.until_settled()
    assert run.findings() == []
    assert run.rows("SELECT id FROM ledger_transfer WHERE state = 'pending'") == []
    assert run.rows("SELECT id FROM receipt WHERE state IN ('open', 'interrupted')") == []
    operation.check(run)
    log = (run.directory / "gateway.log").read_text()
    assert "Traceback" not in log, log[log.index("Traceback") :][:3000]


def recover_through(run: Run, kill_at: Step | None) -> list[Step]:
    """A life in which nobody asks for anything, from its start until it is killed or all is settled."""
    run.live(kill_at, armed=True)
    deadline = time.monotonic() + PATIENCE_S
    while run.alive and run.open_settlements():
        assert time.monotonic() < deadline, "it does not come to its end"
        time.sleep(0.02)
    run.die()
    return run.steps()


def survives(world: World, directory: Path, name: str, kills: list[Step]) -> str | None:
    """Kill a run of an operation, then each recovery from that; None if all is well in the end, else what is not."""
    operation = OPERATIONS[name]()
    run = Run(world, directory, operation.settings)
    try:
        live_through(run, operation, kills[0])
        for kill_at in kills[1:]:
            recover_through(run, kill_at)
        live_on(run, operation)
    except Exception:  # noqa: BLE001 - all that fails is told together
        return f"killed at {', then '.join(str(kill) for kill in kills)}: {traceback.format_exc(limit=-3)}"
    finally:
        run.close()
    return None


def worth_a_kill(steps: list[Step]) -> list[Step]:
    return [step for step in dict.fromkeys(steps) if step.occurrence <= OCCURRENCES_MAX]


def kill_all(world: World, tmp_path: Path, name: str, plans: list[list[Step]]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as several:
        results = several.map(lambda plan: survives(world, tmp_path / str(plan[0]), name, plan[1]), enumerate(plans))
        problems = [problem for problem in results if problem is not None]
    if os.environ.get("FAREBOX_SHOW_STEPS"):
        print(name, *(", then ".join(map(str, plan)) for plan in plans), sep="\n  ")
    assert not problems, f"{len(problems)} of {len(plans)} kills:\n" + "\n".join(problems)


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at_every_step_nothing_is_lost_and_nothing_happens_twice(
    world: World, tmp_path: Path, name: str
) -> None:
    operation = OPERATIONS[name]()
    run = Run(world, tmp_path / "whole", operation.settings)
    try:
        steps = worth_a_kill(live_through(run, operation, None))
        live_on(run, operation)
    finally:
        run.close()
    assert any(step.name.startswith("wrote ") for step in steps)
    kill_all(world, tmp_path, name, [[step] for step in steps])


@pytest.mark.parametrize("name", KILLED_TWICE)
def test_killed_again_at_every_step_of_the_recovery(world: World, tmp_path: Path, name: str) -> None:
    operation = OPERATIONS[name]()
    run = Run(world, tmp_path / "whole", operation.settings)
    try:
        first = [
            step for step in live_through(run, operation, None) if step.name.startswith("asking blockNumber send")
        ][-1]
    finally:
        run.close()
    run = Run(world, tmp_path / "recovery", operation.settings)
    try:
        live_through(run, OPERATIONS[name](), first)
        steps = worth_a_kill(recover_through(run, None))
    finally:
        run.close()
    assert any(step.name.startswith("wrote ") for step in steps)
    kill_all(world, tmp_path, name, [[first, step] for step in steps])
