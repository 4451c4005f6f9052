"""Counts the steps of a gateway that a power cut could fall between, and is the power cut at one of them.

A step is a durable write, a call that leaves the process (to a node of the chain or to a provider, before it is sent and after
its answer has come), or a part of an answer that is about to go to the caller. Each has a name, so that "the second time that a
transaction was sent" means the same in every run. What loops do by the clock is counted only for operations that are about
them, and is named after the loop: between the steps of others it would fall anywhere, and a cut there is a cut at the step
before.
"""

from __future__ import annotations

import contextvars
import functools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gateway.services
from gateway.app import Endpoint
from gateway.providers.upstream import Upstream
from payments import recovery
from payments.chain.rpc import Rpc
from payments.channels.keeper import ChannelKeeper
from payments.deposits import Deposits
from payments.leases import Leases
from payments.settlement.alarms import Alarms
from payments.settlement.care import Care
from payments.settlement.engine import Settlements
from payments.settlement.sweeps import Sweeps
from payments.sponsoring.sponsor import Sponsor
from payments.store import Store

BY_THE_CLOCK: dict[str, tuple[Any, str]] = {
    "channels": (ChannelKeeper, "_run"),
    "deposits": (Deposits, "_run"),
    "sweeps": (Sweeps, "_run"),
    "sponsor": (Sponsor, "_run"),
    "leases": (Leases, "_beat_forever"),
    "finality": (Care, "_look_at_finality"),
    "housekeeping": (Settlements, "_housekeeping"),
    "alarms": (Alarms, "_run"),
    "watch": (recovery, "watch"),
    "sweeper": (gateway.services, "_sweep"),
}
"""The loops that run whether or not anybody asks for anything."""
DRIVEN_BY = {"finality": "housekeeping"}
"""The loop that makes another one look, on a chain where nothing else happens."""

EFFECTIVE = frozenset({"Deposits.round", "Sweeps._sweep", "ChannelKeeper.claim", "Judge.book"})
"""Units of loops whose result says whether there was anything to write."""

_LOOP: contextvars.ContextVar[str] = contextvars.ContextVar("loop", default="")


@dataclass(frozen=True, slots=True, order=True)
class Step:
    """The `occurrence`th time (from 1) that something happens."""

    name: str
    occurrence: int = 1

    def __str__(self) -> str:
        return self.name if self.occurrence == 1 else f"{self.name} (time {self.occurrence})"


class Steps:
    """Writes the names of the steps down as they happen, once it is armed.

    Args:
        record: The file that gets a line for each; it survives the process.
        armed: Steps count from when this file exists.
        kill_at: Where the process dies, as if its power were cut; None lets it live.
        loops: The loops of `BY_THE_CLOCK` whose steps count.
        pause: The name of a step whose first occurrence waits, and the file that is made then and whose end is waited for.
    """

    def __init__(
        self,
        record: Path,
        armed: Path,
        kill_at: Step | None,
        loops: Collection[str] = (),
        pause: tuple[str, Path] | None = None,
    ) -> None:
        self._record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._armed = armed
        self._kill_at = kill_at
        self._loops = frozenset(loops)
        self._pause = pause
        self._seen: Counter[str] = Counter()

    def happened(self, name: str | None) -> None:
        """A step; None is none."""
        loop = _LOOP.get()
        if name is None or (loop and loop not in self._loops) or not self._armed.exists():
            return
        if loop:
            name = f"{loop}: {name}"
        self._seen[name] += 1
        os.write(self._record, f"{name}\n".encode())
        if self._pause is not None and (name, self._seen[name]) == (self._pause[0], 1):
            self._wait(self._pause[1])
        if self._kill_at == Step(name, self._seen[name]):
            os.kill(os.getpid(), signal.SIGKILL)

    def _wait(self, paused: Path) -> None:
        paused.touch()
        while paused.exists():
            time.sleep(0.002)

    def install(self) -> None:
        """Count what this process does from now on."""
        for name, (owner, function) in BY_THE_CLOCK.items():
            _name_loop(owner, function, name)
        _around(Store, "write", self, lambda *_: None, _written)
        # What several call at once travels together; each of them asks and is answered all the same.
        _name_loop(Rpc, "_fly", "flight")
        _around(Rpc, "call", self, lambda _, *call: _asking([call]), _called)
        for function, answered in (("batch", _answered), ("ask_each", _all_answered)):
            _around(Rpc, function, self, lambda _, requests: _asking(requests), answered)
        _around(Upstream, "send", self, lambda *_: "asking a provider", lambda *_: "a provider answers")
        _count_answers(self)


def steps_of(record: Path) -> list[Step]:
    """What was written down, in order."""
    seen: Counter[str] = Counter()
    found = []
    for name in record.read_text().splitlines() if record.exists() else ():
        seen[name] += 1
        found.append(Step(name, seen[name]))
    return found


def _around(
    owner: type, name: str, steps: Steps, before: Callable[..., str | None], after: Callable[..., str | None]
) -> None:
    """Count a step before each call of a method, and one after it, which is told the result first."""
    original = getattr(owner, name)

    @functools.wraps(original)
    async def counted(*arguments: Any, **keywords: Any) -> Any:
        steps.happened(before(*arguments))
        result = await original(*arguments, **keywords)
        steps.happened(after(result, *arguments))
        return result

    setattr(owner, name, counted)


def _name_loop(owner: Any, function: str, name: str) -> None:
    """Whatever a loop does, and whatever it starts, is the loop's."""
    original = getattr(owner, function)

    @functools.wraps(original)
    async def named(*arguments: Any, **keywords: Any) -> Any:
        before = _LOOP.set(name)
        try:
            return await original(*arguments, **keywords)
        finally:
            _LOOP.reset(before)

    setattr(owner, function, named)


def _count_answers(steps: Steps) -> None:
    original = Endpoint.__call__

    async def counted(self: Endpoint, scope: Any, receive: Any, send: Any) -> None:
        async def tell(message: Any) -> None:
            if message["type"] == "http.response.body":
                steps.happened("answering")
            await send(message)

        await original(self, scope, receive, tell)

    Endpoint.__call__ = counted  # type: ignore[method-assign]


def _written(result: Any, _: Store, unit: Any) -> str:
    """A unit is called after the function that made it, if it has no name of its own."""
    while isinstance(unit, functools.partial):
        unit = unit.func
    name = str(getattr(unit, "__qualname__", type(unit).__name__)).removesuffix(".<locals>.<lambda>")
    # Loops write down that they looked, and now and then something that matters.
    return f"wrote {name}, to some effect" if name in EFFECTIVE and result else f"wrote {name}"


def _methods(requests: Any) -> str:
    """What is asked, without what travels along with anything else."""
    methods = {method.removeprefix("eth_") for method, *_ in requests}
    return " ".join(sorted(methods - {"blockNumber", "feeHistory"} or methods))


def _asking(requests: Any) -> str | None:
    return f"asking {_methods(requests)}" if requests else None


def _called(reply: Any, _: Rpc, method: str, *__: Any) -> str | None:
    return _said([(method, reply)])


def _answered(replies: Any, _: Rpc, requests: Any) -> str | None:
    return _said([(method, reply) for (method, _), reply in zip(requests, replies, strict=True)])


def _all_answered(of_each_node: Any, rpc: Rpc, requests: Any) -> str | None:
    return _answered(of_each_node[0], rpc, requests)


def _said(answers: list[tuple[str, Any]]) -> str | None:
    """A receipt that is there is another step than one that is not, and so are logs."""
    if not answers:
        return None
    mined = any(method == "eth_getTransactionReceipt" and isinstance(reply, dict) for method, reply in answers)
    found = any(method == "eth_getLogs" and reply and isinstance(reply, list) for method, reply in answers)
    return f"answered {_methods(answers)}{', mined' if mined else ''}{', found' if found else ''}"
