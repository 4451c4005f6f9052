"""`python -m gateway.dev.simulator`: run the simulator until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn

from gateway.dev.simulator.app import SimulatorApp
from gateway.dev.simulator.connection import TransportProtocol

_KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that it is they who close them."""


class _Server(uvicorn.Server):
    """Says when it listens, and does not wait for silent answers when it is told to stop."""

    def __init__(self, config: uvicorn.Config, announcement: str) -> None:
        super().__init__(config)
        self._announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._announcement, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = self.force_exit = True


def _stop_with_parent() -> None:
    """End when the parent does: it holds the other end of our standard input, and the system closes that for it."""

    def wait() -> None:
        # Not through sys.stdin: its lock would be held while the interpreter shuts down.
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Read the arguments, listen on 127.0.0.1, serve."""
    parser = argparse.ArgumentParser(prog="python -m gateway.dev.simulator", description="Simulated model providers.")
    parser.add_argument("--port", type=int, default=0, help="TCP port on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready")
    parser.add_argument("--stop-with-stdin", action="store_true", help="end when standard input is closed")
    arguments = parser.parse_args()
    try:
        listener = socket.create_server(("127.0.0.1", arguments.port), backlog=2048)
    except OSError as error:
        sys.exit(f"cannot listen on port {arguments.port}: {error.strerror}")
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    if arguments.stop_with_stdin:
        _stop_with_parent()
    config = uvicorn.Config(
        SimulatorApp(),
        http=TransportProtocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    announcement = json.dumps({"url": url}) if arguments.json else f"simulated providers at {url}"
    _Server(config, announcement).run(sockets=[listener])


if __name__ == "__main__":
    main()
