"""A local Anvil as a child process: found, started on a free port, waited for, and never left behind.

It knows nothing about what is on the chain; `contracts.devnet` puts it there.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from contracts.jsonrpc import NodeUnreachable, batch

_REPOSITORY = Path(__file__).resolve().parent.parent
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 20.0
_PROBE_TIMEOUT_S = 0.5
_START_ATTEMPTS = 3
_PR_SET_PDEATHSIG = 1
_STATES = 500
"""Blocks whose state is kept on the disk when memory is full, a megabyte each. Anvil would keep thousands, and leave them."""
_FIRST_PORT, _PORTS = 10_240, 22_000
_APART = 4_999
"""Ports between the places where two processes begin that were started one after the other."""
_given = itertools.count()


class AnvilMissing(RuntimeError):
    """There is no `anvil` to start; the message says how to get one."""


class AnvilFailed(RuntimeError):
    """Anvil did not start; the message carries what it wrote."""


def find_anvil() -> Path:
    """The `anvil` program: the repository's npm package, else the one on PATH.

    The package's native program is preferred to its Node wrapper, which would be one more process to stop.

    Raises:
        AnvilMissing: there is neither.
    """
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    modules = _REPOSITORY / "node_modules"
    for candidate in (
        modules / "@foundry-rs" / f"anvil-{sys.platform}-{machine}" / "bin" / "anvil",
        modules / ".bin" / "anvil",
    ):
        if os.access(candidate, os.X_OK):
            return candidate
    on_path = shutil.which("anvil")
    if on_path is None:
        raise AnvilMissing(
            f"no anvil found: run `npm ci` in {_REPOSITORY}, "
            "or install Foundry (https://getfoundry.sh) so that `anvil` is on PATH"
        )
    return Path(on_path)


class Anvil:
    """One local chain.

    Args:
        chain_id: what `eth_chainId` answers.
        port: TCP port on 127.0.0.1; 0 picks a free one.
        block_time_s: seconds between blocks; None for no interval.
        automine: mine a block as soon as a transaction arrives. None means: unless there is a block time. With a block
            time as well, both happen. False without a block time mines only when `evm_mine` says so.
        state_file: where the chain is kept between runs; it is read at the start if it exists and written at the stop.

    Mind a race in Anvil's pool (1.7): of several transactions sent by one account in quick succession, one that arrives
    while the one before it is being mined can wait for that for ever, and all after it too. Neither `evm_mine` nor
    sending the same bytes again helps; another transaction with the same nonce and a higher fee does.

    On Linux the child is told to end when the *thread* that started it ends, so start it from one that lives as long.
    """

    def __init__(
        self,
        chain_id: int = 84532,
        port: int = 0,
        block_time_s: float | None = None,
        automine: bool | None = None,
        state_file: Path | None = None,
    ) -> None:
        self.chain_id = chain_id
        self.port = port
        self._fixed_port = port
        self._block_time_s = block_time_s
        self._automine = block_time_s is None if automine is None else automine
        self._state_file = state_file
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._cache: tempfile.TemporaryDirectory[str] | None = None

    @property
    def rpc_url(self) -> str:
        """The JSON-RPC endpoint, valid once started."""
        assert self.port != 0, "not started"
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id, valid while started."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> Self:
        """Start the process and return once it answers.

        Raises:
            AnvilMissing: there is no program to start.
            AnvilFailed: it ended or stayed silent for 30 s.
        """
        assert self._process is None, "already started"
        program = find_anvil()
        if self._state_file is not None and self._state_file.exists():
            _keep_first_genesis(self._state_file)
        for attempt in range(1, _START_ATTEMPTS + 1):
            self.port = self._fixed_port or free_port()
            try:
                self._launch(program)
            except AnvilFailed:
                # Between choosing a free port and binding it, another process may have taken it.
                if self._fixed_port or attempt == _START_ATTEMPTS:
                    raise
            else:
                break
        return self

    def stop(self) -> None:
        """End the process, which writes the state file first. Does nothing if it is not running."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._errors is not None:
            self._errors.close()
            self._errors = None
        if self._cache is not None:
            self._cache.cleanup()
            self._cache = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _arguments(self) -> list[str]:
        arguments = ["--quiet", "--host", "127.0.0.1", "--port", str(self.port), "--chain-id", str(self.chain_id)]
        assert self._cache is not None
        arguments += ["--max-persisted-states", str(_STATES), "--cache-path", self._cache.name]
        if self._block_time_s is not None:
            arguments += ["--block-time", str(self._block_time_s)]
            if self._automine:
                arguments.append("--mixed-mining")
        elif not self._automine:
            arguments.append("--no-mining")
        if self._state_file is not None:
            self._state_file.parent.mkdir(parents=True, exist_ok=True)
            if self._state_file.exists():
                arguments += ["--load-state", str(self._state_file)]
            arguments += ["--dump-state", str(self._state_file)]
        return arguments

    def _launch(self, program: Path) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # stop() closes it
        self._cache = tempfile.TemporaryDirectory(prefix="anvil-")
        self._process = subprocess.Popen(
            [program, *self._arguments()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            preexec_fn=end_with_parent(),
        )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(NodeUnreachable):
                batch(self.rpc_url, [("eth_chainId", [])], timeout_s=_PROBE_TIMEOUT_S)
                # Somebody else's node on this port would answer too, while ours has ended.
                if self._process.poll() is None:
                    return
            time.sleep(0.02)
        said = self._said()
        self.stop()
        raise AnvilFailed(f"anvil did not start on port {self.port}: {said or 'it said nothing'}")

    def _said(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()[-2000:]


def _keep_first_genesis(state_file: Path) -> None:
    """Let a kept chain begin with one block, the first that it ever began with.

    Each start of Anvil makes a block 0 of its own and keeps it beside those that it has read (1.7); which one of them counts
    after the next start is chance.
    """
    state = json.loads(state_file.read_bytes())
    first = [block for block in state["blocks"] if int(block["header"]["number"], 16) == 0]
    if len(first) < 2:
        return
    oldest = min(first, key=lambda block: int(block["header"]["timestamp"], 16))
    state["blocks"] = [block for block in state["blocks"] if block is oldest or block not in first]
    written = state_file.with_suffix(".new")
    written.write_text(json.dumps(state))
    written.replace(state_file)


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on now.

    It stays the caller's while nothing listens there: it is none of those that the system gives to whoever connects, each is
    given out once in a long time, and processes that begin together count from places far apart.
    """
    for _ in range(_PORTS):
        port = _FIRST_PORT + (os.getpid() * _APART + next(_given)) % _PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free on 127.0.0.1")


def end_with_parent() -> Callable[[], None] | None:
    """What the child runs before it becomes Anvil: ask the kernel for SIGTERM when the parent dies, however it dies."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return arrange
