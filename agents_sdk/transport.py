"""httpx transports that pay: the exchange's commands carried out, once synchronously and once not.

Responses are passed on as they arrive; the stream is watched for its receipt while the caller reads it. Requests to other
hosts than the gateway pass through untouched and are never paid.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
import httpx

from agents_sdk.answers import Answer
from agents_sdk.exchange import Exchange
from agents_sdk.quotes import origin_of
from agents_sdk.receipts import Watch
from agents_sdk.shared import Shared
from agents_sdk.steps import Command, Lost, Read, Reply, Send, Steps

BODY_BYTES_MAX = 4_194_304
"""The longest body that is read here, which are errors and 402s; answers are not read but passed on."""


class PayingTransport(httpx.BaseTransport):
    """A synchronous transport that answers 402 by itself.

    Args:
        shared: The agent's state.
        inner: What sends the requests; closed with this one.
    """

    def __init__(self, shared: Shared, inner: httpx.BaseTransport) -> None:
        self._shared = shared
        self._inner = inner

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, pay if asked to, and return the answer with its body unread."""
        if origin_of(request.url) != self._shared.origin:
            return self._inner.handle_request(request)
        request.read()
        answer = self.run(Exchange(self._shared, _command(request)).run())
        if answer.reply is None:
            return _response(answer, httpx.ByteStream(answer.body or b""))
        if answer.watch is None:
            return _response(answer, answer.reply.response.stream)
        return _response(answer, _WatchedStream(answer.reply.response, answer.watch))

    def run(self, steps: Steps[Any]) -> Any:
        """Carry out steps to their end, and return what they return."""
        result: Any = None
        try:
            while True:
                outcome = _advance(steps, result)
                if isinstance(outcome, _Finished):
                    return outcome.value
                result = self._do(outcome)
        finally:
            steps.close()

    def _do(self, command: Command) -> Reply | Lost | bytes | None:
        if isinstance(command, Send):
            try:
                response = self._inner.handle_request(_request(command))
            except httpx.TransportError as error:
                return Lost(error)
            return Reply(response.status_code, response.headers, response)
        if isinstance(command, Read):
            response = command.reply.response
            body = bytearray()
            try:
                for chunk in _sync(response):
                    _extend(body, chunk)
                return bytes(body)
            except httpx.TransportError as error:
                return Lost(error)
            finally:
                response.close()
        time.sleep(command.seconds)
        return None

    def close(self) -> None:
        """Close the inner transport."""
        self._inner.close()


class AsyncPayingTransport(httpx.AsyncBaseTransport):
    """The same for asyncio (or trio).

    The exchange's own steps sign and write to disk, so they run in a worker thread: the event loop never waits for them.

    Args:
        shared: The agent's state.
        inner: What sends the requests; closed with this one.
    """

    def __init__(self, shared: Shared, inner: httpx.AsyncBaseTransport) -> None:
        self._shared = shared
        self._inner = inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, pay if asked to, and return the answer with its body unread."""
        if origin_of(request.url) != self._shared.origin:
            return await self._inner.handle_async_request(request)
        await request.aread()
        answer = await self.run(Exchange(self._shared, _command(request)).run())
        if answer.reply is None:
            return _response(answer, httpx.ByteStream(answer.body or b""))
        if answer.watch is None:
            return _response(answer, answer.reply.response.stream)
        return _response(answer, _AsyncWatchedStream(answer.reply.response, answer.watch))

    async def run(self, steps: Steps[Any]) -> Any:
        """Carry out steps to their end, and return what they return."""
        result: Any = None
        try:
            while True:
                outcome = await anyio.to_thread.run_sync(_advance, steps, result)
                if isinstance(outcome, _Finished):
                    return outcome.value
                result = await self._do(outcome)
        finally:
            steps.close()

    async def _do(self, command: Command) -> Reply | Lost | bytes | None:
        if isinstance(command, Send):
            try:
                response = await self._inner.handle_async_request(_request(command))
            except httpx.TransportError as error:
                return Lost(error)
            return Reply(response.status_code, response.headers, response)
        if isinstance(command, Read):
            response = command.reply.response
            body = bytearray()
            try:
                async for chunk in _async(response):
                    _extend(body, chunk)
                return bytes(body)
            except httpx.TransportError as error:
                return Lost(error)
            finally:
                await response.aclose()
        await anyio.sleep(command.seconds)
        return None

    async def aclose(self) -> None:
        """Close the inner transport."""
        await self._inner.aclose()


class _WatchedStream(httpx.SyncByteStream):
    def __init__(self, response: httpx.Response, watch: Watch) -> None:
        self._response = response
        self._watch = watch

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in _sync(self._response):
                self._watch.feed(chunk)
                yield chunk
        except GeneratorExit:
            raise
        except BaseException:
            self._watch.finish("broken")
            raise
        self._watch.finish("whole")

    def close(self) -> None:
        try:
            self._response.close()
        finally:
            self._watch.finish("left")


class _AsyncWatchedStream(httpx.AsyncByteStream):
    def __init__(self, response: httpx.Response, watch: Watch) -> None:
        self._response = response
        self._watch = watch

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in _async(self._response):
                self._watch.feed(chunk)
                yield chunk
        except GeneratorExit:
            raise
        except BaseException:
            self._watch.finish("broken")
            raise
        self._watch.finish("whole")

    async def aclose(self) -> None:
        try:
            await self._response.aclose()
        finally:
            self._watch.finish("left")


@dataclass(frozen=True, slots=True)
class _Finished:
    value: Any


def _advance(steps: Steps[Any], result: Any) -> Command | _Finished:
    # StopIteration cannot cross a thread's or a coroutine's border, so its value is carried out as data.
    try:
        return steps.send(result)
    except StopIteration as stop:
        return _Finished(stop.value)


def _command(request: httpx.Request) -> Send:
    return Send(request.method, request.url, request.headers, request.content, dict(request.extensions))


def _request(command: Send) -> httpx.Request:
    return httpx.Request(
        command.method,
        command.url,
        headers=command.headers,
        stream=httpx.ByteStream(command.body),
        extensions=dict(command.extensions),
    )


def _response(answer: Answer, stream: httpx.SyncByteStream | httpx.AsyncByteStream) -> httpx.Response:
    extensions = {} if answer.reply is None else answer.reply.response.extensions
    return httpx.Response(answer.status, headers=answer.headers, stream=stream, extensions=extensions)


def _sync(response: httpx.Response) -> httpx.SyncByteStream:
    assert isinstance(response.stream, httpx.SyncByteStream)
    return response.stream


def _async(response: httpx.Response) -> httpx.AsyncByteStream:
    assert isinstance(response.stream, httpx.AsyncByteStream)
    return response.stream


def _extend(body: bytearray, chunk: bytes) -> None:
    if len(body) + len(chunk) > BODY_BYTES_MAX:
        raise httpx.ReadError(f"the answer's body is longer than {BODY_BYTES_MAX} bytes")
    body += chunk
