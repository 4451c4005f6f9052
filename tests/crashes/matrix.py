"""Runs an operation, and kills its gateway at every step of it: nothing may be lost, paid or served twice.

Each operation is run once to learn its steps (see `tests.crashes.steps`); then once for each of them, with the power cut there.
The power can be cut again while the gateway puts right what the first cut left behind.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.crashes.operations import Operation
from tests.crashes.steps import Step
from tests.crashes.world import PATIENCE_S, Run, World
from tests.databases import PostgresServer

AT_ONCE = 6
"""Runs under way: most of their time they wait."""
DYING_S = 5.0
"""From when a kill has been noticed, or must have come, until the process is gone."""
LAST_STEP_S = 0.05
"""How long an operation may have ended before its gateway has counted the step."""
OCCURRENCES_MAX = 2
"""What happens more often than this in one operation is polling."""

Operations = Mapping[str, Callable[[], Operation]]


@contextlib.contextmanager
def opened(
    world: World, directory: Path, operation: Operation, postgres: PostgresServer | None = None
) -> Iterator[Run]:
    """A run of an operation: with its own chain if need be; on PostgreSQL with another gateway beside the one that dies."""
    with contextlib.ExitStack() as cleanup:
        if operation.own_chain:
            world = cleanup.enter_context(world.with_its_own_chain())
        if postgres is None:
            run = Run(world, directory, operation.settings, operation.loops)
        else:
            database = postgres.new_database()
            cleanup.callback(postgres.drop, database)
            run = Run(world, directory, dict(operation.settings) | {"lease_s": 3}, operation.loops, database)
            run.another_gateway()
        cleanup.callback(run.close)
        yield run


def live_through(run: Run, operation: Operation, kill_at: Step | None) -> list[Step]:
    """The first life, until it is killed or has nothing left to do. Returns the steps that it came to."""
    run.gateway.live(kill_at, pause_at=operation.pause_at)
    for another in run.gateways[1:]:
        another.live()
    operation.prepare(run)
    run.gateway.arm()
    with _intervening(run, operation):
        try:
            operation.act(run)
        except httpx.TransportError:
            # Nothing but the cut may have kept the payer from its answer.
            if kill_at is None or not run.gateway.dies(DYING_S):
                raise
    deadline = time.monotonic() + PATIENCE_S
    while run.gateway.alive and not operation.done(run):
        assert time.monotonic() < deadline, "it does not come to its end"
        time.sleep(0.02)
    # Polling is never twice the same, an operation's own writes are; a kill that does not happen tests nothing. What is done by
    # the clock either one of two gateways may do, and one may find in one round what took it two before.
    by_the_clock = operation.loops and (len(run.gateways) > 1 or (kill_at is not None and kill_at.occurrence > 1))
    certain = kill_at is not None and is_own_write(kill_at) and not by_the_clock
    # The end is seen in the database, a moment before the gateway knows that it is there.
    died = run.gateway.dies(DYING_S if certain else LAST_STEP_S)
    assert died or not certain
    run.gateway.die()
    return run.gateway.steps()


@contextlib.contextmanager
def _intervening(run: Run, operation: Operation) -> Iterator[None]:
    if operation.pause_at is None:
        yield
        return

    def intervene() -> None:
        if run.gateway.wait_for_pause():
            try:
                operation.intervene(run)
            finally:
                run.gateway.go_on()

    with ThreadPoolExecutor(1) as aside:
        intervention = aside.submit(intervene)
        yield
    intervention.result()


def live_on(run: Run, operation: Operation, *, killed: bool) -> None:
    """A life that nothing ends, or another gateway's: everything comes to its end in it, and every promise has been kept."""
    *_, run.gateway = run.gateways
    if not run.gateway.alive:
        run.gateway.live()
    operation.resume(run)
    run.until_settled()
    assert run.findings() == []
    assert run.rows("SELECT id FROM ledger_transfer WHERE state = 'pending'") == []
    assert run.rows("SELECT id FROM receipt WHERE state IN ('open', 'interrupted')") == []
    operation.check(run)
    # Whoever asks again after a kill is answered by another inference, and pays for one.
    wasted = run.inferences() - run.charged_inferences()
    assert wasted <= operation.uncharged + (operation.at_once if killed else 0)
    log = run.log()
    assert "Traceback" not in log, log[log.index("Traceback") :][:3000]


def recover_through(run: Run, kill_at: Step | None) -> list[Step]:
    """A life in which nobody asks for anything, from its start until it is killed or all is settled."""
    run.gateway.live(kill_at, armed=True)
    deadline = time.monotonic() + PATIENCE_S
    while run.gateway.alive and run.open_settlements():
        assert time.monotonic() < deadline, "it does not come to its end"
        time.sleep(0.02)
    run.gateway.die()
    return run.gateway.steps()


def kill_at_every_step(world: World, directory: Path, operations: Operations, name: str) -> None:
    """Run an operation as often as it has steps, each time with the power cut at another one."""
    with opened(world, directory / "whole", operations[name]()) as run:
        operation = operations[name]()
        steps = worth_a_kill(live_through(run, operation, None), operation.kills_from)
        live_on(run, operation, killed=False)
    assert any(is_own_write(step) for step in steps), steps
    _kill_all(world, directory, operations, name, [[step] for step in steps])


def kill_again_at_every_step(
    world: World, directory: Path, operations: Operations, name: str, *, start_too: bool = False
) -> None:
    """Cut the power before the operation's last transaction is sent, and once more at every step of the recovery.

    Args:
        start_too: Also where a gateway that starts looks around, which is the same whatever it has to recover.
    """
    with opened(world, directory / "whole", operations[name]()) as run:
        steps = live_through(run, operations[name](), None)
    (*_, first) = (step for step in steps if step.name.startswith("asking") and "sendRawTransaction" in step.name)
    with opened(world, directory / "recovery", operations[name]()) as run:
        live_through(run, operations[name](), first)
        steps = worth_a_kill(recover_through(run, None))
    if not start_too:
        steps = [step for step in steps if any(word in step.name for word in ("wrote", "Transaction", ": "))]
    assert any(is_own_write(step) for step in steps)
    _kill_all(world, directory, operations, name, [[first, step] for step in steps])


def kill_one_of_two(world: World, postgres: PostgresServer, directory: Path, operations: Operations, name: str) -> None:
    """Run an operation with two gateways on one database, and kill the one that works on it at every step that lasts: the other
    one puts right what it left behind, and answers in its place."""
    with opened(world, directory / "whole", operations[name](), postgres) as run:
        operation = operations[name]()
        steps = worth_a_kill(live_through(run, operation, None))
        live_on(run, operation, killed=False)
    lasting = [step for step in steps if is_own_write(step) or "sendRawTransaction" in step.name]
    _kill_all(world, directory, operations, name, [[step] for step in lasting], postgres)


def is_own_write(step: Step) -> bool:
    """Whether a step is a durable write that the operation always makes: not one of a loop that looks at whatever there is."""
    own = step.name.startswith("wrote ") or step.name.endswith(", to some effect")
    return own and step.occurrence <= OCCURRENCES_MAX


def worth_a_kill(steps: list[Step], after: str = "") -> list[Step]:
    """Each step once, without the polling, from the first one on whose name begins with `after`.

    What is about to be asked is nothing yet: a cut there is a cut at the step before.
    """
    beginning = next(place for place, step in enumerate(steps) if step.name.startswith(after))
    return [
        step
        for step in dict.fromkeys(steps[beginning:])
        if is_own_write(step) or not (is_polling(step) or is_question(step))
    ]


def is_polling(step: Step) -> bool:
    """Whether a step is one of many that are alike."""
    looks = ": " in step.name and step.name.endswith(("answered blockNumber", "wrote Leases.acquire"))
    return looks or step.occurrence > (1 if ": " in step.name else OCCURRENCES_MAX)


def is_question(step: Step) -> bool:
    """Whether a step is a call that has not left the process."""
    return step.name.rpartition(": ")[2].startswith("asking")


def _kill_all(
    world: World,
    directory: Path,
    operations: Operations,
    name: str,
    plans: list[list[Step]],
    postgres: PostgresServer | None = None,
) -> None:
    def survive(plan: tuple[int, list[Step]]) -> str | None:
        number, kills = plan
        return _survives(world, directory / str(number), operations[name](), kills, postgres)

    with ThreadPoolExecutor(AT_ONCE) as several:
        problems = [problem for problem in several.map(survive, enumerate(plans)) if problem is not None]
    if os.environ.get("FAREBOX_SHOW_STEPS"):
        print(name, *(", then ".join(map(str, plan)) for plan in plans), sep="\n  ")
    assert not problems, f"{len(problems)} of {len(plans)} kills:\n" + "\n".join(problems)


def _survives(
    world: World, directory: Path, operation: Operation, kills: list[Step], postgres: PostgresServer | None
) -> str | None:
    """Kill a run of an operation, then each recovery from that; None if all is well in the end, else what is not."""
    try:
        with opened(world, directory, operation, postgres) as run:
            live_through(run, operation, kills[0])
            for kill_at in kills[1:]:
                recover_through(run, kill_at)
            live_on(run, operation, killed=True)
    except Exception:  # noqa: BLE001 - all that fails is told together
        return (
            f"killed at {', then '.join(str(kill) for kill in kills)} ({directory}): {traceback.format_exc(limit=-3)}"
        )
    return None
