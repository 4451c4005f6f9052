"""Counts the steps of a gateway that a power cut could fall between, and is the power cut at one of them.

A step is a durable write, or a call that leaves the process: to a node of the chain or to a provider, before it is sent and
after its answer has come. Each has a name, so that "the second time that a transaction was sent" means the same in every run.
"""

from __future__ import annotations

import functools
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.providers.upstream import Upstream
from payments.chain.rpc import Rpc
from payments.store import Store


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
    """

    def __init__(self, record: Path, armed: Path, kill_at: Step | None) -> None:
        self._record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._armed = armed
        self._kill_at = kill_at
        self._seen: Counter[str] = Counter()

    def happened(self, name: str) -> None:
        """A step."""
        if not self._armed.exists():
            return
        self._seen[name] += 1
        os.write(self._record, f"{name}\n".encode())
        if self._kill_at == Step(name, self._seen[name]):
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Count what this process does from now on."""
        _around(Store, "write", lambda store, unit, **_: None, lambda _, unit, **__: f"wrote {_name(unit)}", self)
        _around(Rpc, "_post", lambda _, requests: f"asking {_methods(requests)}", _answered, self)
        _around(Upstream, "send", lambda *_: "asking a provider", lambda *_: "a provider answers", self)


def steps_of(record: Path) -> list[Step]:
    """What was written down, in order."""
    seen: Counter[str] = Counter()
    found = []
    for name in record.read_text().splitlines() if record.exists() else ():
        seen[name] += 1
        found.append(Step(name, seen[name]))
    return found


def _around(owner: type, name: str, before: Callable[..., str | None], after: Callable[..., str], steps: Steps) -> None:
    original = getattr(owner, name)
    reads_result = after is _answered

    @functools.wraps(original)
    async def counted(*arguments: Any, **keywords: Any) -> Any:
        said = before(*arguments, **keywords)
        if said is not None:
            steps.happened(said)
        result = await original(*arguments, **keywords)
        steps.happened(after(*arguments, result) if reads_result else after(*arguments, **keywords))
        return result

    setattr(owner, name, counted)


def _name(unit: Any) -> str:
    """What a unit is called: the function that made it, for those that have no name of their own."""
    while isinstance(unit, functools.partial):
        unit = unit.func
    return str(getattr(unit, "__qualname__", type(unit).__name__)).removesuffix(".<locals>.<lambda>")


def _methods(requests: Any) -> str:
    return " ".join(sorted({method.removeprefix("eth_") for method, _ in requests}))


def _answered(_: Rpc, requests: Any, replies: Any) -> str:
    """A receipt that is there is another step than one that is not."""
    mined = any(
        method == "eth_getTransactionReceipt" and isinstance(reply, dict)
        for (method, _), reply in zip(requests, replies, strict=True)
    )
    return f"answered {_methods(requests)}{', mined' if mined else ''}"
