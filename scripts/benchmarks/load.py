"""A load generator in a process of its own: many connections, requests prepared beforehand, nothing but sockets.

Speaks just enough HTTP/1.1 for that, because a client library costs more per request than the gateway does and would share
the machine with it. Run as a program it reads a `Batch` as one JSON line from standard input and answers with one line of
`Outcome`, until its input ends.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import uvloop

KEPT_HEADERS = frozenset({"payment-response", "x-farebox-receipt"})
ERROR_BYTES = 400
START_TIMEOUT_S = 20.0
_WORD = re.compile(rb'"content":\s*"[^"]')


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests to one URL.

    `headers` has one entry per request, on top of those that all have. `delays_s`, if given, is how long to wait before each.
    """

    url: str
    body: str
    headers: list[dict[str, str]]
    concurrency: int
    delays_s: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A response. `first_word_s` is the time from the request to the first content of a stream, None where there is none."""

    status: int
    headers: dict[str, str]
    body_bytes: int
    seconds: float
    first_word_s: float | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """All answers in the order of the requests, the time from the first request to the last answer, and what it took us."""

    seconds: float
    cpu_s: float
    answers: list[Answer]


class LoadGenerator:
    """The generator's process; use it as a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def send(self, batch: Batch) -> Outcome:
        """Send all requests, `concurrency` at once, and return when the last is answered.

        Raises:
            RuntimeError: If the generator ended; standard error says why.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(batch)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the load generator ended; standard error says why")
        content = json.loads(line)
        return Outcome(content["seconds"], content["cpu_s"], [Answer(**answer) for answer in content["answers"]])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(START_TIMEOUT_S)


async def run(batch: Batch) -> Outcome:
    """Send a batch."""
    target = urlsplit(batch.url)
    assert target.hostname is not None
    assert target.port is not None
    connections = [
        await asyncio.open_connection(target.hostname, target.port)
        for _ in range(min(batch.concurrency, len(batch.headers)))
    ]
    prepared = list(_requests(target.netloc, target.path, batch.body.encode(), batch.headers))
    delays = batch.delays_s or [0.0] * len(prepared)
    answers: list[Answer | None] = [None] * len(prepared)
    waiting = iter(range(len(prepared)))

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for index in waiting:
            if delays[index]:
                await asyncio.sleep(delays[index])
            began = time.perf_counter()
            writer.write(prepared[index])
            answers[index] = await _read(reader, began)

    began, cpu_began = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work(reader, writer) for reader, writer in connections))
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    for _, writer in connections:
        writer.close()
    return Outcome(seconds, cpu_s, [answer for answer in answers if answer is not None])


def _requests(netloc: str, path: str, body: bytes, headers: Sequence[dict[str, str]]) -> Iterator[bytes]:
    common = (
        f"POST {path} HTTP/1.1\r\nhost: {netloc}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    )
    for own in headers:
        lines = "".join(f"{name}: {value}\r\n" for name, value in own.items())
        yield f"{common}{lines}\r\n".encode() + body


async def _read(reader: asyncio.StreamReader, began: float) -> Answer:
    status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    status = int(status_line.split(" ", 2)[1])
    body, first_word_s = bytearray(), None
    if "content-length" in headers:
        body += await reader.readexactly(int(headers["content-length"]))
    else:
        while True:
            size = int(await reader.readuntil(b"\r\n"), 16)
            chunk = await reader.readexactly(size + 2)
            if not size:
                break
            body += chunk[:-2]
            if first_word_s is None and _WORD.search(chunk):
                first_word_s = time.perf_counter() - began
    return Answer(
        status=status,
        headers={name: value for name, value in headers.items() if name in KEPT_HEADERS},
        body_bytes=len(body),
        seconds=time.perf_counter() - began,
        first_word_s=first_word_s,
        error=None if status == 200 else bytes(body[:ERROR_BYTES]).decode(errors="replace"),
    )


def main() -> int:
    """Serve batches from standard input."""
    # Not `print`: where PYTHONUNBUFFERED is set, it drops what a pipe does not take at once.
    with open(sys.stdout.fileno(), "wb", closefd=False) as answers:
        for line in sys.stdin:
            content: dict[str, Any] = json.loads(line)
            answers.write(json.dumps(asdict(uvloop.run(run(Batch(**content))))).encode() + b"\n")
            answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
