"""Starting servers for a measurement: waiting until they answer."""

from __future__ import annotations

import contextlib
import subprocess
import time

import httpx

READY_TIMEOUT_S = 30.0


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
