"""Noticing that the caller hung up while something else is awaited."""

from __future__ import annotations

import asyncio
from types import TracebackType

from gateway.api.http import Call, CallerGone


class until_gone:
    """Run the body of an ``async with`` until the caller hangs up, which raises `CallerGone` where it was waiting.

    Nothing that must finish (a capture) belongs inside.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._gone = False

    async def __aenter__(self) -> None:
        self._body = asyncio.current_task()
        self._watcher = asyncio.create_task(self._call.gone())
        self._watcher.add_done_callback(self._on_watched)

    def _on_watched(self, watcher: asyncio.Task[None]) -> None:
        if not watcher.cancelled() and self._body is not None:
            self._gone = True
            self._body.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.remove_done_callback(self._on_watched)
        self._watcher.cancel()
        body = self._body
        self._body = None
        # As asyncio.timeout does: only a cancellation that is ours becomes our error.
        if (
            self._gone
            and body is not None
            and body.uncancel() <= 0
            and kind is not None
            and issubclass(kind, asyncio.CancelledError)
        ):
            raise CallerGone from error
