"""Starting servers for a measurement: a free port, and waiting until it answers."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time

import httpx

READY_TIMEOUT_S = 30.0


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_answering(process: subprocess.Popen[str], url: str) -> None:
    """Return once `url` answers, whatever it answers.

    Raises:
        RuntimeError: If the process ends or stays silent; standard error says why.
    """
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(url, timeout=5)
            return
        time.sleep(0.05)
    raise RuntimeError("a process for the measurement did not start; standard error says why")
