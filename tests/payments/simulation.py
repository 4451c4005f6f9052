"""A process in virtual time, whose database and chain outlive it: for tests that kill it anywhere, thousands of times.

Nothing waits for real. The clock jumps to whatever comes next, everything outside the process takes a random while, and
whatever happens is decided by one seed. A kill is a SIGKILL: between reaching the database or a node and hearing from it the
process is gone, nothing of it runs any more, and what was committed or sent stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import selectors
import time
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from unittest import mock

import hypothesis
from hypothesis import HealthCheck, Phase

from payments.chain.nodes import Node
from payments.chain.replies import Reply, Request
from payments.databases.base import LEASE_S, Pending
from payments.databases.sqlite import Connection, Sqlite
from payments.store import Store, Unit, _resolve_all
from payments.store import StoreBusy as StoreBusy
from tests.payments.fake_chain import FakeChain, FakeRpc

T = TypeVar("T")

STARTS_AT = 1_800_000_000.0
WRITE_MS, READ_MS, NODE_MS = 4.0, 2.0, 100.0
"""What the database and a node take on average."""
TURN_S = 1e-6
"""What a turn of the event loop takes at least: whoever waits for a moment must find it past."""
PATIENCE_S = 3_600.0
"""Of virtual time: what takes longer hangs."""
_NAMES = itertools.count()


def exploring(examples: int, steps: int) -> hypothesis.settings:
    """How a state machine runs: in the suite the same way every time, and by hand (FAREBOX_EXAMPLES=1000) somewhere new."""
    asked = os.environ.get("FAREBOX_EXAMPLES")
    return hypothesis.settings(
        max_examples=int(asked or examples),
        derandomize=asked is None,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        # Whatever fails is printed with its seed; shrinking it takes long and finds little.
        phases=(Phase.generate,),
    )


class Killed(Exception):
    """The process is gone."""


class World:
    """What a process cannot take along when it dies: time, chance, and what is done to it.

    Args:
        seed: Decides everything that is left to chance.
    """

    def __init__(self, seed: int) -> None:
        self.elapsed_s = 1_000.0
        self.random = Random(seed)
        self.kill_in: int | None = None
        """So many more times the process reaches outside itself; then it is killed."""
        self.busy = 0
        """So many of the next writes does the database refuse."""
        self.errors: list[str] = []
        """What was logged as an error: nothing that happens on purpose may lead to one."""

    def time(self) -> float:
        """Seconds since 1970 UTC."""
        return STARTS_AT + self.elapsed_s

    @contextlib.contextmanager
    def holds(self) -> Iterator[None]:
        """Let every clock of this interpreter show the world's time, and every secret be of its chance."""
        with (
            mock.patch.object(time, "time", self.time),
            mock.patch.object(time, "monotonic", self._monotonic),
            mock.patch.object(time, "clock_gettime", self._clock_gettime),
            mock.patch.object(time, "time_ns", self._time_ns),
            mock.patch.object(secrets, "token_hex", self._token_hex),
            mock.patch.object(secrets, "token_bytes", self.random.randbytes),
            mock.patch.object(secrets, "randbits", self.random.getrandbits),
        ):
            yield

    def _monotonic(self) -> float:
        return self.elapsed_s

    def _clock_gettime(self, _clock: int) -> float:
        return self.elapsed_s

    def _time_ns(self) -> int:
        return int(self.time() * 1e9)

    def _token_hex(self, size: int) -> str:
        return self.random.randbytes(size).hex()

    def a_while(self, average_ms: float) -> float:
        """Seconds that something takes."""
        return self.random.expovariate(1) * average_ms / 1000


class Process:
    """One run of the program: an event loop, a store and a node's client, until it is stopped or killed.

    Args:
        world: Where it lives.
        database: A SQLite file with the current schema.
        chain: What its nodes say.
    """

    def __init__(self, world: World, database: Path, chain: FakeChain) -> None:
        self.world = world
        self.alive = True
        self.loop = asyncio.SelectorEventLoop(_Jumping(world))
        self.store = SimulatedStore(self, database)
        self.rpc = SimulatedRpc(self, chain)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do some work, and whatever else is under way meanwhile.

        Raises:
            Killed: The process died before the work was done.
        """
        with self.world.holds(), _errors_noted(self.world):
            task = self.loop.create_task(asyncio.wait_for(work, PATIENCE_S))
            try:
                return self.loop.run_until_complete(task)
            except RuntimeError:
                if self.alive:
                    raise
        raise Killed

    def survives(self) -> bool:
        """Called wherever the process reaches outside itself; False if it is gone."""
        world = self.world
        if self.alive and world.kill_in is not None:
            world.kill_in -= 1
            if world.kill_in < 0:
                world.kill_in = None
                self.alive = False
                self.loop.stop()
        return self.alive

    async def reach(self, average_ms: float) -> None:
        """Wait as long as something outside takes; for ever if the process is killed at that."""
        await asyncio.sleep(self.world.a_while(average_ms))
        if not self.survives():
            await self.loop.create_future()

    def bury(self) -> None:
        """Clear away what is left of it. Nothing of that reaches the database or the chain any more."""
        self.alive = False
        self.store.die()
        with self.world.holds():
            for _ in range(100):
                remaining = asyncio.all_tasks(self.loop)
                if not remaining:
                    break
                for task in remaining:
                    task.cancel()
                self.loop.run_until_complete(asyncio.wait(remaining, timeout=1))
            assert not asyncio.all_tasks(self.loop), "something does not end when it is cancelled"
        self.loop.close()


class SimulatedStore(Store):
    """The store with its own database code and group commits, but on the event loop and without synchronising the disk."""

    def __init__(self, process: Process, database: Path) -> None:
        self.location = database
        self.instance = f"instance-{next(_NAMES)}"
        self.shared = False
        self.lease_s = LEASE_S
        self._process = process
        self._database: Sqlite = _Unsynchronised(database, self.instance, self._deliver)
        self._closed = False
        self._sure = set()
        self._listeners = {}
        self._group: list[Pending] = []

    async def read(self, query: Unit[T]) -> T:
        await self._process.reach(READ_MS)
        return self._database.read(query)

    def own(self) -> None:
        """Nobody else is there."""

    def close(self) -> None:
        """Finish what is queued."""
        if not self._closed:
            self._commit()
            self.die()

    def die(self) -> None:
        """Take nothing any more; what is queued was never committed."""
        self._closed = True
        self._group.clear()
        self._database.end_writing()
        self._database.close()

    def _submit(self, unit: Unit[T]) -> asyncio.Future[T]:
        world = self._process.world
        if self._closed:
            raise StoreBusy("the database is closed")
        if world.busy:
            world.busy -= 1
            raise StoreBusy("the database takes nothing now")
        loop = self._process.loop
        future: asyncio.Future[T] = loop.create_future()
        self._group.append(Pending(unit, loop, future))
        if len(self._group) == 1:
            loop.call_later(world.a_while(WRITE_MS), self._commit)
        return future

    def _commit(self) -> None:
        if not self._group or not self._process.survives():
            return
        group, self._group = self._group, []
        self._database.commit(group, lambda: False)
        if self._process.survives():
            self._process.loop.call_later(self._process.world.a_while(WRITE_MS), self._tell, group)

    def _tell(self, group: list[Pending]) -> None:
        if self._process.alive:
            _resolve_all(group)


class SimulatedRpc(FakeRpc):
    """A node that takes its time; a request may arrive and its answer not."""

    def __init__(self, process: Process, chain: FakeChain) -> None:
        super().__init__(chain)
        self._process = process

    async def _ask(self, node: Node, requests: Sequence[Request], timeout_s: float) -> list[Reply]:
        if not self._process.alive:
            raise OSError("the process is gone")
        await self._process.reach(NODE_MS)
        replies = await super()._ask(node, requests, timeout_s)
        await self._process.reach(NODE_MS)
        return replies


class _Unsynchronised(Sqlite):
    def _connect(self) -> Connection:
        connection = super()._connect()
        connection.execute("PRAGMA synchronous=OFF")
        return connection


class _Jumping(selectors.SelectSelector):
    """Instead of waiting, lets time jump to what comes next."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits, and for nothing that could come"
        self._world.elapsed_s += max(timeout, 0.0) + TURN_S
        return []


class _Noting(logging.Handler):
    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.errors.append(self.format(record))


@contextlib.contextmanager
def _errors_noted(world: World) -> Iterator[None]:
    """Note what is logged as an error, and print nothing."""
    logger, noting = logging.getLogger("payments"), _Noting(world)
    level, propagates = logger.level, logger.propagate
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    logger.addHandler(noting)
    try:
        yield
    finally:
        logger.removeHandler(noting)
        logger.setLevel(level)
        logger.propagate = propagates
