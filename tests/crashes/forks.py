"""A process that has everything imported and becomes a gateway whenever one is needed: 20 ms instead of 2 s.

Run as ``python -m tests.crashes.forks``: reads one JSON object a line (environment, files of the steps, where to die), forks a
gateway for it and answers with the process id on a line. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from contracts.anvil import end_with_parent
from tests.crashes.steps import Step

HURRIED = {"interval_s": 0.05, "watch_s": 0.2, "housekeeping_s": 0.1}
"""What hurried loops are made with, whatever the configuration says."""


class Forks:
    """The process, for whoever wants gateways from it."""

    def __init__(self) -> None:
        self._asking = threading.Lock()

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crashes.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=end_with_parent(),
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def gateway(
        self,
        environment: Mapping[str, str],
        log: Path,
        record: Path,
        armed: Path,
        kill_at: Step | None,
        loops: Collection[str],
        hurried: Collection[str],
        pause: tuple[str, Path] | None,
    ) -> int:
        """Fork a gateway; returns its process id, which vanishes when it ends.

        Args:
            environment: Its configuration.
            log: What it says.
            record: See `tests.crashes.steps`; likewise `armed`, `kill_at`, `loops` and `pause`.
            hurried: The loops that look far more often than they do in earnest: nobody here has the time to wait for them.
        """
        wanted = {
            "environment": dict(environment),
            "log": str(log),
            "record": str(record),
            "armed": str(armed),
            "kill_at": None if kill_at is None else asdict(kill_at),
            "loops": sorted(loops),
            "hurried": sorted(hurried),
            "pause": None if pause is None else (pause[0], str(pause[1])),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._asking:
            self._process.stdin.write(json.dumps(wanted) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())


def alive(pid: int) -> bool:
    """Whether a gateway still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def end(pid: int) -> None:
    """Kill a gateway, if it still runs, and wait until it is gone."""
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} cannot be killed"
        with contextlib.suppress(ProcessLookupError):  # it went by itself just now
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _main() -> None:
    from gateway import app, config
    from gateway.routing.tokens import count_text
    from tests.crashes.steps import BY_THE_CLOCK, Steps

    count_text("read the tokenizer's tables once", "o200k_base")
    end_with_us = end_with_parent()
    # Nobody waits for the children: the kernel takes them away.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        wanted: dict[str, Any] = json.loads(line)
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        status = 1
        try:
            if end_with_us is not None:
                end_with_us()
            _hurry([BY_THE_CLOCK[loop][0] for loop in wanted["hurried"]])
            _become_gateway(app, config, Steps, wanted)
            status = 0
        except BaseException:  # noqa: BLE001 - the log is all that is left to tell
            traceback.print_exc()
        finally:
            os._exit(status)


def _hurry(owners: list[Any]) -> None:
    for owner in owners:
        original = owner.__init__
        names = HURRIED.keys() & inspect.signature(original).parameters.keys()
        quick = {name: HURRIED[name] for name in names}

        def hurried(
            self: Any, *arguments: Any, _original: Any = original, _quick: dict[str, float] = quick, **keywords: Any
        ) -> None:
            _original(self, *arguments, **(keywords | _quick))

        owner.__init__ = hurried


def _become_gateway(app: Any, config: Any, steps: Any, wanted: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    silent = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in ((0, silent), (1, log), (2, log)):
        os.dup2(source, descriptor)
    os.environ.update(wanted["environment"])
    kill_at = None if wanted["kill_at"] is None else Step(**wanted["kill_at"])
    pause = None if wanted["pause"] is None else (wanted["pause"][0], Path(wanted["pause"][1]))
    steps(Path(wanted["record"]), Path(wanted["armed"]), kill_at, wanted["loops"], pause).install()
    app.serve(config.load(None, wanted["environment"]))


if __name__ == "__main__":
    _main()
