"""The life of a serving process: one event loop, one listening socket, and an end that lets what is under way finish."""

from __future__ import annotations

import asyncio
import signal
import socket
from contextlib import AbstractAsyncContextManager

import structlog
import uvicorn
import uvloop
from starlette.applications import Starlette

from gateway import logs
from gateway.access.limits import guarded_protocol
from gateway.settings import LimitSettings

KEEP_ALIVE_S = 75
BACKLOG = 2048

log = structlog.get_logger("farebox.serving")


def run(opened: AbstractAsyncContextManager[Starlette], host: str, port: int, limits: LimitSettings) -> None:
    """Serve an application until SIGTERM or Ctrl-C, then let the requests under way finish.

    Args:
        opened: Gives the application once all that it needs is there; what it raises is raised here.
        host: The address to listen on.
        port: The port to listen on; 0 takes a free one.
        limits: Of request heads, and how long requests may take to finish at the end.
    """
    logs.configure()
    # uvicorn raises the signal that ended it once more, for whoever listened before: nobody, the services close in order.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(opened, host, port, limits))


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where it listens: with port 0 nobody else knows."""
        await super().startup(sockets)
        for server in getattr(self, "servers", []):
            for listening in server.sockets:
                host, port, *_ = listening.getsockname()
                log.info("listening", url=f"http://{f'[{host}]' if ':' in host else host}:{port}")


async def _serve(opened: AbstractAsyncContextManager[Starlette], host: str, port: int, limits: LimitSettings) -> None:
    async with opened as app:
        server = _Server(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                lifespan="off",
                http=guarded_protocol(limits.header_bytes),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=limits.drain_s,
                timeout_keep_alive=KEEP_ALIVE_S,
                backlog=BACKLOG,
            )
        )
        await server.serve()
