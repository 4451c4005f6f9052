"""Reading requests within limits, and noticing that the caller hung up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from starlette.types import Message, Receive, Scope, Send
from structlog.testing import capture_logs

from gateway.access.hangup import until_gone
from gateway.api.errors import ApiError
from gateway.api.guard import Guard
from gateway.api.http import Call, CallerGone, EventStream, encode_headers, read_call, read_json, send_json
from gateway.metrics import Metrics

BODY_BYTES_MAX = 1000


class Caller:
    """The ASGI server's side: messages to receive, and what was sent."""

    def __init__(self, messages: Iterable[Message] = ()) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        for message in messages:
            self._messages.put_nowait(message)
        self.received = 0
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        message = await self._messages.get()
        self.received += 1
        return message

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def hang_up(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    def call(self) -> Call:
        return Call({}, self.receive, self.send, b"")


def body(*chunks: bytes) -> list[Message]:
    last = len(chunks) - 1
    return [{"type": "http.request", "body": chunk, "more_body": number < last} for number, chunk in enumerate(chunks)]


async def read(messages: Iterable[Message], *headers: tuple[bytes, bytes]) -> Call:
    caller = Caller(messages)
    scope = {"type": "http", "method": "POST", "path": "/", "headers": list(headers)}
    return await read_call(scope, caller.receive, caller.send, BODY_BYTES_MAX)


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"{}", {}),
        (b' {"a": [1, {"b": null}]}\n', {"a": [1, {"b": None}]}),
        ('{"é": "日本"}'.encode(), {"é": "日本"}),
        (b'{"a": 1e3}', {"a": 1000.0}),
    ],
)
def test_a_json_object_is_read(raw: bytes, value: dict[str, Any]) -> None:
    assert read_json(raw, 8) == value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"text"',
        b"7",
        b"{",
        b"{}{}",
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1,}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"\xef\xbb\xbf{}",
        b"{}\x00",
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    ],
)
def test_what_is_no_json_object_is_400(raw: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        read_json(raw, 64)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("kind", ["lists", "objects", "mixed", "beside shallow ones"])
@pytest.mark.parametrize("depth_max", [5, 64])
def test_nesting_is_allowed_up_to_the_limit_and_not_one_level_more(kind: str, depth_max: int) -> None:
    assert read_json(nested(kind, depth_max), depth_max)
    with pytest.raises(ApiError) as refused:
        read_json(nested(kind, depth_max + 1), depth_max)
    assert (refused.value.status, refused.value.code) == (400, "json_too_deep")


def nested(kind: str, levels: int) -> bytes:
    """An object with exactly so many levels, itself included."""
    value: Any = 1
    for level in range(levels - 1):
        if kind == "lists" or (kind == "mixed" and level % 2):
            value = [value]
        elif kind == "beside shallow ones" and level:
            value = [[], {}, value, "x"] if level % 2 else {"a": {}, "b": value, "c": []}
        else:
            value = {"a": value}
    return orjson.dumps({"a": value})


def test_brackets_beside_each_other_or_in_text_are_not_depth() -> None:
    assert read_json(b'{"a": [' + b",".join([b"[]"] * 500) + b'], "b": "' + b"[{" * 500 + b'"}', 5)


async def test_a_body_in_pieces_is_put_together() -> None:
    call = await read(body(b"a" * 400, b"", b"b" * 600))
    assert call.body == b"a" * 400 + b"b" * 600


async def test_a_body_one_byte_too_long_is_413_and_is_not_read_on() -> None:
    caller = Caller(body(*[b"a" * 100] * 1_000))
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    with pytest.raises(ApiError) as refused:
        await read_call(scope, caller.receive, caller.send, BODY_BYTES_MAX)
    assert (refused.value.status, refused.value.code) == (413, "body_too_large")
    assert caller.received == 11
    with pytest.raises(ApiError):
        await read(body(b"a" * (BODY_BYTES_MAX + 1)))
    assert len((await read(body(b"a" * BODY_BYTES_MAX))).body) == BODY_BYTES_MAX


async def test_a_body_that_says_it_is_too_long_is_413_before_it_is_read() -> None:
    caller = Caller()
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"1001")]}
    with pytest.raises(ApiError) as refused:
        await asyncio.wait_for(read_call(scope, caller.receive, caller.send, BODY_BYTES_MAX), 5)
    assert refused.value.status == 413
    assert (await read(body(b""), (b"content-length", b"1000"))).body == b""


async def test_hanging_up_within_the_body_is_no_error_to_answer() -> None:
    with pytest.raises(CallerGone):
        await read([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])


@pytest.mark.parametrize("name", [b"payment-signature", b"x-payment", b"authorization"])
async def test_a_header_that_must_not_be_ambiguous_is_taken_once(name: bytes) -> None:
    assert (await read(body(b""), (name, b"one"))).header(name) == "one"
    for second in (b"one", b"two", b""):
        with pytest.raises(ApiError) as refused:
            await read(body(b""), (name, b"one"), (b"accept", b"x"), (name, second))
        assert (refused.value.status, refused.value.code) == (400, "repeated_header")
        assert name.decode() in refused.value.message


async def test_other_headers_may_come_again() -> None:
    assert (await read(body(b""), (b"accept", b"a"), (b"accept", b"b"))).header(b"accept") == "b"


def test_headers_beyond_latin_1_do_not_break_the_response() -> None:
    assert encode_headers({"X-Model": "日本é"}) == [(b"x-model", b"??\xe9")]


async def test_json_says_how_long_it_is() -> None:
    caller = Caller()
    await send_json(caller.send, 201, {"a": "é"}, {"X-A": "1"})
    start, rest = caller.sent
    assert start["status"] == 201
    assert rest["body"] == '{"a":"é"}'.encode()
    assert dict(start["headers"])[b"content-length"] == str(len(rest["body"])).encode()
    assert dict(start["headers"])[b"x-a"] == b"1"


async def test_a_stream_whose_reader_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.api.http.SEND_TIMEOUT_S", 0.01)

    async def stalled(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    stream = EventStream(stalled)
    await stream.start({})
    with pytest.raises(CallerGone):
        await stream.write(b"data: 1\n\n")


# ---------------------------------------------------------------------- hanging up


async def test_hanging_up_ends_what_is_waited_for() -> None:
    caller = Caller()
    cleaned_up = False

    async def wait() -> None:
        nonlocal cleaned_up
        try:
            await asyncio.Event().wait()
        finally:
            cleaned_up = True

    asyncio.get_running_loop().call_later(0.01, caller.hang_up)
    with pytest.raises(CallerGone):
        async with until_gone(caller.call()):
            await wait()
    assert cleaned_up
    await asyncio.sleep(0)  # no cancellation is left over for the next wait


async def test_pieces_of_body_that_still_arrive_are_no_hanging_up() -> None:
    caller = Caller(body(b"a", b"b", b"c"))
    async with until_gone(caller.call()):
        await asyncio.sleep(0.01)
    assert caller.received == 3


async def test_hanging_up_afterwards_ends_nothing() -> None:
    caller = Caller()
    async with until_gone(caller.call()):
        await asyncio.sleep(0)
    caller.hang_up()
    await asyncio.sleep(0.01)
    assert caller.received == 0


async def test_an_error_inside_stays_that_error() -> None:
    caller = Caller()
    with pytest.raises(ZeroDivisionError):
        async with until_gone(caller.call()):
            raise ZeroDivisionError
    caller.hang_up()
    await asyncio.sleep(0.01)


async def test_a_cancellation_from_outside_stays_one() -> None:
    """Ending the server must not look as if every caller had hung up."""
    caller = Caller()

    async def wait() -> None:
        async with until_gone(caller.call()):
            await asyncio.Event().wait()

    for hangs_up in (False, True):
        task = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        task.cancel()
        if hangs_up:
            caller.hang_up()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()


async def test_hanging_up_just_as_the_wait_ends_leaves_no_cancellation_behind() -> None:
    caller = Caller()
    ready = asyncio.Event()
    with contextlib.suppress(CallerGone):
        async with until_gone(caller.call()):
            await asyncio.sleep(0)
            caller.hang_up()
            asyncio.get_running_loop().call_soon(ready.set)
            await ready.wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0.01)


async def test_one_wait_may_follow_another_on_the_same_call() -> None:
    caller = Caller()
    call = caller.call()
    async with until_gone(call):
        await asyncio.sleep(0.001)
    asyncio.get_running_loop().call_later(0.01, caller.hang_up)
    with pytest.raises(CallerGone):
        async with until_gone(call):
            await asyncio.Event().wait()


async def test_the_log_has_the_method_that_was_asked_with_whatever_an_endpoint_makes_of_it() -> None:
    async def planning_another(scope: Scope, receive: Receive, send: Send) -> None:
        scope["method"] = "POST"
        await send_json(send, 200, {})

    caller = Caller()
    guard = Guard(planning_another, 1, Metrics())
    with capture_logs() as lines:
        await guard({"type": "http", "method": "GET", "path": "/", "headers": []}, caller.receive, caller.send)
    assert [line["method"] for line in lines if line["event"] == "request"] == ["GET"]
