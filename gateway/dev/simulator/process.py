"""The simulator as a child process, and its control endpoints as methods. Synchronous: it serves tests and `farebox dev`."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 5.0


class SimulatorFailed(RuntimeError):
    """The simulator did not start, or did not answer a control call."""


class Simulator:
    """A running simulator.

    Use `Simulator.start` for a process of one's own (`with Simulator.start() as simulator:` stops it), `Simulator.attach` for
    one that somebody else runs.

    Args:
        url: Where it listens.
        process: The child process that is stopped with this object; None if it is not ours.
    """

    def __init__(self, url: str, process: subprocess.Popen[bytes] | None = None) -> None:
        self.url = url
        self._process = process
        # It is on this machine and speaks no TLS, whose certificates would take 30 ms to read.
        self._http = httpx.Client(base_url=url, timeout=30, trust_env=False, verify=False)  # noqa: S501

    @classmethod
    def start(cls, port: int = 0) -> Self:
        """Start a child process and wait until it listens. It ends with `stop`, and when this process ends, however it does.

        Args:
            port: TCP port on 127.0.0.1; 0 takes a free one.

        Raises:
            SimulatorFailed: It did not start; it says why on standard error.
        """
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.dev.simulator", "--port", str(port), "--json", "--stop-with-stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], _START_TIMEOUT_S)
        line = process.stdout.readline() if ready else b""
        if not line:
            _end(process)
            raise SimulatorFailed("the simulator did not start; standard error says why")
        return cls(json.loads(line)["url"], process)

    @classmethod
    def attach(cls, url: str) -> Self:
        """Control a simulator that runs already."""
        return cls(url)

    @property
    def pid(self) -> int:
        """The child's process id."""
        assert self._process is not None, "attached, not started"
        return self._process.pid

    @property
    def openai_url(self) -> str:
        """The base URL for an OpenAI client."""
        return f"{self.url}/openai/v1"

    @property
    def anthropic_url(self) -> str:
        """The base URL for an Anthropic client, which adds `/v1/messages`."""
        return f"{self.url}/anthropic"

    @property
    def gemini_url(self) -> str:
        """The base URL for a Gemini client, which adds `/models/…`."""
        return f"{self.url}/gemini/v1beta"

    def stop(self) -> None:
        """End the child process, if it is ours. May be called again."""
        self._http.close()
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def attempts(self, model: str | None = None) -> list[dict[str, Any]]:
        """What came to the providers and what became of it, oldest first; of all models, of one, or (``name/``) of those whose
        names begin so.

        Each has `number, time, duration_ms, dialect, path, model, stream, authentication, headers, header_names, body_sha256,
        body, status, outcome, tokens_sent, client_disconnected`. `outcome` is ``under_way`` until the end, then one of ``ok,
        error, reset, silence, cut, stall, malformed, error_event, missing_end, disconnected``; the last means that the client
        left before the simulator had done what it was told. `header_names` are all that came, `headers` the values of harmless
        ones. Only the newest 5,000 are kept.
        """
        query = "" if model is None else f"?model={quote(model, safe='')}"
        attempts: list[dict[str, Any]] = self._call("GET", f"/_/attempts{query}")["attempts"]
        return attempts

    def under_way(self) -> list[dict[str, Any]]:
        """The attempts that have not ended."""
        return [attempt for attempt in self.attempts() if attempt["outcome"] == "under_way"]

    def clear(self) -> None:
        """Empty the log."""
        self._call("DELETE", "/_/attempts")

    def configure(self, model: str, **behaviour: Any) -> None:
        """Replace a model's behaviour by the default with these fields of `behaviours.Behaviour`.

        Raises:
            ValueError: There is no such field, or it cannot have this value.
        """
        self._call("PUT", f"/_/behaviours/{quote(model, safe='')}", behaviour)

    def reset_behaviours(self) -> None:
        """Make every model behave as its name says."""
        self._call("DELETE", "/_/behaviours")

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        response = self._http.request(method, path, json=body)
        if response.status_code == 400:
            raise ValueError(response.json()["error"])
        if response.status_code != 200:
            raise SimulatorFailed(f"{method} {path}: {response.status_code} {response.text}")
        answer: dict[str, Any] = response.json()
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
