"""What may come in at all: a head that ends, and not more quotes than the limit, however it is tried."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from gateway.access import limits
from gateway.access.limits import QuoteLimiter, guarded_protocol
from gateway.api.errors import ApiError
from payments import buckets

LIMIT = 4096
SMALL = b"GET /small HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKED = b"POST /chunked HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
DRIPPED_MAX = 4_000_000
"""Far beyond the limit, what is thrown away of a refused request, and what a socket buffers: who may drip that much may drip
for ever."""


class Application:
    """Answers with the path and the length of the body, and remembers what it was asked."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.port = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.paths.append(scope["path"])
        length, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            length += len(message.get("body", b""))
            more = message.get("more_body", False)
        body = f"{scope['path']} {length}".encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def application() -> AsyncIterator[Application]:
    application = Application()
    protocol, state = guarded_protocol(LIMIT), ServerState()
    config = uvicorn.Config(application, ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()
    server = await asyncio.get_running_loop().create_server(
        lambda: protocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    application.port = server.sockets[0].getsockname()[1]
    yield application
    for connection in list(state.connections):
        connection.shutdown()
    server.close()


class Connection:
    """A raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """The next response."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
        return int(lines[0].split()[1]), await self.reader.readexactly(length)

    async def ended(self) -> bool:
        """Whether the other side has closed, with nothing left to read."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionResetError:
            return True

    async def drip(self, piece: bytes) -> int:
        """Send `piece` again and again, in packets of its own, until the other side closes; returns how much it took."""
        sent = 0
        while sent < DRIPPED_MAX:
            try:
                await self.send(piece)
            except OSError:
                break
            sent += len(piece)
            await asyncio.sleep(0)
        return sent


@contextlib.asynccontextmanager
async def connected(application: Application) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", application.port)
    async with asyncio.timeout(20):
        try:
            yield Connection(reader, writer)
        finally:
            writer.close()


async def test_one_header_beyond_the_limit_is_431(application: Application) -> None:
    async with connected(application) as connection:
        await connection.send(b"GET / HTTP/1.1\r\nx-long: " + b"a" * LIMIT + b"\r\n\r\n")
        status, body = await connection.answer()
        assert status == 431
        assert b"headers_too_large" in body
        assert await connection.ended()
    assert application.paths == []


async def test_many_small_headers_beyond_the_limit_are_431(application: Application) -> None:
    async with connected(application) as connection:
        headers = b"".join(b"x-%d: a\r\n" % number for number in range(LIMIT // 8))
        await connection.send(b"GET / HTTP/1.1\r\n" + headers + b"\r\n")
        assert (await connection.answer())[0] == 431
        assert await connection.ended()
    assert application.paths == []


async def test_a_url_beyond_the_limit_is_431(application: Application) -> None:
    async with connected(application) as connection:
        await connection.send(b"GET /" + b"a" * LIMIT + b" HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await connection.answer())[0] == 431
    assert application.paths == []


async def test_a_head_just_below_the_limit_is_served(application: Application) -> None:
    async with connected(application) as connection:
        await connection.send(b"GET / HTTP/1.1\r\nx-long: " + b"a" * (LIMIT - 100) + b"\r\n\r\n")
        assert await connection.answer() == (200, b"/ 0")


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"GET /", b"a" * 500),
        (b"GET / HTTP/1.1\r\nx: ", b"a" * 500),
        (b"GET / HTTP/1.1\r\n", b"x-y: " + b"a" * 493 + b"\r\n"),
        (b"GET / HTTP/1.1\r\n", b"x: a\r\n" * 80),
        (b"", b"\r\n" * 250),
        (CHUNKED + b"5\r\nhello\r\n0\r\nx: ", b"a" * 500),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", b"x-y: " + b"a" * 493 + b"\r\n"),
        (CHUNKED + b"5;x=", b"a" * 500),
    ],
    ids=["url", "header", "headers", "short headers", "empty lines", "trailer", "trailers", "chunk extension"],
)
async def test_what_drips_without_end_does_not_get_past_the_limit(
    application: Application, begin: bytes, piece: bytes
) -> None:
    async with connected(application) as connection:
        await connection.send(begin)
        assert await connection.drip(piece) < DRIPPED_MAX


@pytest.mark.parametrize("begin", [b"", b"GE", b"GET / HTTP/1.1\r\nx-y: ", SMALL + b"GET / HT"])
async def test_a_head_that_does_not_come_is_waited_for_so_long(
    monkeypatch: pytest.MonkeyPatch, application: Application, begin: bytes
) -> None:
    monkeypatch.setattr(limits, "HEAD_S", 0.2)
    async with connected(application) as connection:
        await connection.send(begin)
        if begin.startswith(SMALL):
            assert await connection.answer() == (200, b"/small 0")
        status, body = await connection.answer()
        assert status == 408
        assert b"headers_too_slow" in body
        assert await connection.ended()


async def test_a_long_answer_and_a_slow_body_are_no_slow_heads(
    monkeypatch: pytest.MonkeyPatch, application: Application
) -> None:
    monkeypatch.setattr(limits, "HEAD_S", 0.1)
    async with connected(application) as connection:
        await connection.send(CHUNKED)
        for _ in range(3):
            await asyncio.sleep(0.1)
            await connection.send(b"5\r\nhello\r\n")
        await connection.send(b"0\r\n\r\n")
        assert await connection.answer() == (200, b"/chunked 15")


async def test_whoever_sends_far_too_much_at_once_still_reads_why_it_is_refused(application: Application) -> None:
    async with connected(application) as connection:
        await connection.send(b"GET / HTTP/1.1\r\nx: " + b"a" * 1_000_000)
        assert (await connection.answer())[0] == 431
        assert await connection.ended()


async def test_a_dripped_head_within_the_limit_is_served(application: Application) -> None:
    async with connected(application) as connection:
        for byte in SMALL:
            await connection.send(bytes([byte]))
        assert await connection.answer() == (200, b"/small 0")


async def test_pipelined_requests_are_answered_in_order(application: Application) -> None:
    async with connected(application) as connection:
        await connection.send(b"".join(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % number for number in range(300)))
        for number in range(300):
            assert await connection.answer() == (200, b"/%d 0" % number)


async def test_what_is_pipelined_behind_a_refused_request_is_not_served(application: Application) -> None:
    async with connected(application) as connection:
        await connection.send(b"GET /large HTTP/1.1\r\nx: " + b"a" * LIMIT + b"\r\n\r\n" + SMALL)
        assert (await connection.answer())[0] == 431
        assert await connection.ended()
    assert application.paths == []


async def test_a_refusal_is_not_taken_for_the_answer_to_the_request_before(application: Application) -> None:
    async with connected(application) as connection:
        await connection.send(SMALL + b"GET /large HTTP/1.1\r\nx: " + b"a" * LIMIT + b"\r\n\r\n")
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            assert await connection.answer() == (200, b"/small 0")
        assert await connection.ended()


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_connection_is_kept_after_a_body_far_beyond_the_limit(application: Application, chunked: bool) -> None:
    size = 100 * LIMIT
    async with connected(application) as connection:
        for _ in range(3):
            if chunked:
                await connection.send(CHUNKED)
                for _ in range(100):
                    await connection.send(b"%x\r\n" % LIMIT + b"a" * LIMIT + b"\r\n")
                await connection.send(b"0\r\n\r\n")
            else:
                await connection.send(b"POST /chunked HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % size)
                await connection.send(b"a" * size)
            assert await connection.answer() == (200, b"/chunked %d" % size)
        await connection.send(SMALL)
        assert await connection.answer() == (200, b"/small 0")


async def test_every_head_of_a_kept_connection_is_counted_anew(application: Application) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{application.port}") as client:
        for _ in range(10):
            answer = await client.post("/", headers={"x-long": "a" * (LIMIT // 2)}, content=b"a" * LIMIT)
            assert answer.status_code == 200
        assert (await client.get("/", headers={"x-long": "a" * LIMIT})).status_code == 431


async def test_trailers_within_the_limit_are_let_through(application: Application) -> None:
    async with connected(application) as connection:
        await connection.send(CHUNKED + b"5;x=y\r\nhello\r\n0\r\nx-checksum: 1\r\n\r\n" + SMALL)
        assert await connection.answer() == (200, b"/chunked 5")
        assert await connection.answer() == (200, b"/small 0")


async def test_heads_trailers_and_chunk_extensions_are_not_added_up(application: Application) -> None:
    padding = b"a" * (LIMIT - 100)
    async with connected(application) as connection:
        for part in (
            CHUNKED[:-2] + b"x: " + padding + b"\r\n\r\n",
            b"5;x=" + padding,
            b"\r\nhello\r\n0\r\n",
            b"x: " + padding,
            b"\r\n\r\n",
            b"GET /next HTTP/1.1\r\nx: " + padding,
            b"\r\n\r\n",
        ):
            await connection.send(part)
            await asyncio.sleep(0.02)  # so that each is read by itself
        assert await connection.answer() == (200, b"/chunked 5")
        assert await connection.answer() == (200, b"/next 0")


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def taken(limiter: QuoteLimiter, address: str, times: int) -> int:
    """How many of so many quotes an address gets."""
    count = 0
    for _ in range(times):
        with contextlib.suppress(ApiError):
            limiter.take(address)
            count += 1
    return count


def test_an_address_gets_its_quotes_at_once_and_then_has_to_wait() -> None:
    limiter = QuoteLimiter(per_minute=6, clock=Clock())
    assert taken(limiter, "10.0.0.1", 10) == 6
    assert taken(limiter, "10.0.0.2", 10) == 6


def test_quotes_come_back_evenly_and_never_pile_up() -> None:
    clock = Clock()
    limiter = QuoteLimiter(per_minute=6, clock=clock)
    taken(limiter, "a", 6)
    clock.now += 9
    assert taken(limiter, "a", 1) == 0
    clock.now += 1.001
    assert taken(limiter, "a", 2) == 1
    clock.now += 86_400
    assert taken(limiter, "a", 20) == 6


@pytest.mark.parametrize("per_minute", [1, 6, 90, 100_000])
def test_who_waits_as_long_as_it_is_told_gets_a_quote(per_minute: int) -> None:
    clock = Clock()
    limiter = QuoteLimiter(per_minute, clock)
    taken(limiter, "a", per_minute)
    with pytest.raises(ApiError) as refused:
        limiter.take("a")
    assert (refused.value.status, refused.value.code) == (429, "too_many_quotes")
    wait_s = int(refused.value.headers["retry-after"])
    assert 1 <= wait_s <= 60 // per_minute + 1
    clock.now += wait_s
    limiter.take("a")


def test_asking_while_refused_does_not_prolong_the_wait() -> None:
    clock = Clock()
    limiter = QuoteLimiter(per_minute=60, clock=clock)
    taken(limiter, "a", 60)
    for _ in range(9):
        clock.now += 0.1
        assert taken(limiter, "a", 5) == 0
    clock.now += 0.11
    assert taken(limiter, "a", 5) == 1


def test_remembered_addresses_are_bounded_and_the_longest_silent_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "NAMES_MAX", 100)
    limiter = QuoteLimiter(per_minute=1, clock=Clock())
    assert taken(limiter, "busy", 1) == 1
    for number in range(1_000):
        assert taken(limiter, f"10.0.{number}", 1) == 1
        assert taken(limiter, "busy", 1) == 0
    assert len(limiter._buckets._levels) <= 100
    assert taken(limiter, "10.0.999", 1) == 0
    assert taken(limiter, "10.0.0", 1) == 1
