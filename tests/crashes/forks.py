"""A process that has everything imported and becomes a gateway, or whatever else is needed, in 20 ms instead of 2 s.

It reads what is to be called (pickled: a function of a module, and its arguments), forks a process that calls it, and answers
with the process id on a line. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from contracts.anvil import end_with_parent
from gateway import app
from gateway.dev.models import KEY_VARIABLE
from gateway.routing.tokens import count_text
from gateway.settings import Settings
from payments.settlement import judge, late
from tests.crashes.steps import BY_THE_CLOCK, Step, Steps

HURRIED = {"interval_s": 0.05, "watch_s": 0.2, "housekeeping_s": 0.1}
"""What hurried loops are made with, whatever the configuration says."""
FIRST_LOOK_MS = 50
"""When a hurried housekeeping looks at what has failed, likewise."""


class Forks:
    """The process, for whoever wants others from it."""

    def __init__(self) -> None:
        self._asking = threading.Lock()

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.crashes import forks; forks.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=end_with_parent(),
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def start(self, log: Path, life: Callable[..., None], *arguments: Any) -> int:
        """Fork a process; returns its id, which vanishes when it ends.

        Args:
            log: What it says.
            life: A function of a module, which it ends with.
            arguments: What `life` gets; they are pickled, too.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._asking:
            pickle.dump((log, life, arguments), self._process.stdin)
            self._process.stdin.flush()
            return int(self._process.stdout.readline())

    def gateway(
        self,
        settings: Settings,
        log: Path,
        record: Path,
        armed: Path,
        kill_at: Step | None,
        loops: Collection[str],
        hurried: Collection[str],
        pause: tuple[str, Path] | None,
    ) -> int:
        """Fork a gateway; returns its process id.

        Args:
            settings: Its configuration.
            log: What it says.
            record: See `tests.crashes.steps`; likewise `armed`, `kill_at`, `loops` and `pause`.
            hurried: The loops that look far more often than they do in earnest: nobody here has the time to wait for them.
        """
        steps = (record, armed, kill_at, sorted(loops), pause)
        return self.start(log, _be_gateway, settings, steps, sorted(hurried))


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


def serve() -> None:
    """Be the process."""
    count_text("read the tokenizer's tables once", "o200k_base")
    end_with_us = end_with_parent()
    # Nobody waits for the children: the kernel takes them away.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # What is loaded by now stays: nobody has to look through it, and the children share it as it is.
    gc.freeze()
    print("ready", flush=True)
    while True:
        try:
            log, life, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started this one
        except EOFError:
            return
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        status = 1
        try:
            if end_with_us is not None:
                end_with_us()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _speak_into(log)
            life(*arguments)
            status = 0
        except BaseException:  # noqa: BLE001 - the log is all that is left to tell
            traceback.print_exc()
        finally:
            os._exit(status)


def _speak_into(path: Path) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    silent = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in ((0, silent), (1, log), (2, log)):
        os.dup2(source, descriptor)


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


def _be_gateway(settings: Settings, steps: tuple[Any, ...], hurried: list[str]) -> None:
    _hurry([BY_THE_CLOCK[loop][0] for loop in hurried])
    if "housekeeping" in hurried:
        for module in (judge, late):
            vars(module)["FIRST_LOOK_MS"] = FIRST_LOOK_MS
    os.environ[KEY_VARIABLE] = "simulated"
    Steps(*steps).install()
    app.serve(settings)
