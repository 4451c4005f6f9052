"""Asking for prices is free, and must be no way to load the gateway: heads and bodies of any size, slow ones, many at once."""

from __future__ import annotations

import contextlib
import socket
import time
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from gateway.access.limits import HEAD_S
from tests.e2e.clients import JSON
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import Ground, error_of, turn
from tests.e2e.grounds import ground as new_ground

PER_MINUTE = 60
SLOW = 200


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with new_ground(tmp_path_factory.mktemp("web"), LIMITS__QUOTES_PER_MINUTE=str(PER_MINUTE)) as made:
        yield made


@pytest.fixture
def ground(shared: Ground) -> Iterator[Ground]:
    with turn(shared) as mine:
        yield mine


def connection(ground: Ground) -> socket.socket:
    url = urlsplit(ground.stack.gateway_url)
    return socket.create_connection((url.hostname, url.port), timeout=10)


def with_key(ground: Ground) -> dict[str, str]:
    return {"authorization": f"Bearer {ground.stack.api_key}"}


def test_two_hundred_slow_heads_keep_nobody_else_waiting(ground: Ground) -> None:
    with contextlib.ExitStack() as open_ones:
        for number in range(SLOW):
            slow = open_ones.enter_context(connection(ground))
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-" if number % 2 else b"P")
        begun = time.monotonic()
        assert ground.ask(with_key(ground), QUESTION).status_code == 200
        assert time.monotonic() - begun < HEAD_S / 4


def test_two_hundred_slow_bodies_keep_nobody_else_waiting(ground: Ground) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{"
    with contextlib.ExitStack() as open_ones:
        for _ in range(SLOW):
            open_ones.enter_context(connection(ground)).sendall(head)
        begun = time.monotonic()
        assert ground.ask(with_key(ground), QUESTION).status_code == 200
        assert time.monotonic() - begun < HEAD_S / 4


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/quote", "/v1/wallet/topups", "/v1/wallet/challenges"])
@pytest.mark.parametrize(
    ("content", "statuses"),
    [
        (b" " * 5_000_000, {413}),
        (b"[" * 100_000, {400}),
        (b'{"a":' * 50_000, {400}),
        (b"\x00" * 1_000, {400}),
        (b'{"model": "' + b"a" * 1_000_000 + b'"}', {400, 404}),
    ],
    ids=["too large", "deep lists", "deep objects", "zeros", "one long text"],
)
def test_bodies_that_mean_harm_are_refused_in_order(
    ground: Ground, path: str, content: bytes, statuses: set[int]
) -> None:
    with elsewhere(ground, 2) as http:
        answer = http.post(path, content=content, headers=JSON)
    assert answer.status_code in statuses, answer.text
    assert set(answer.json()["error"]) >= {"message", "type", "code", "param"}
    assert len(answer.content) < 2_000


def elsewhere(ground: Ground, last: int) -> httpx.Client:
    """From another address of this machine."""
    transport = httpx.HTTPTransport(local_address=f"127.0.0.{last}")
    return httpx.Client(base_url=ground.stack.gateway_url, transport=transport, timeout=30)


@pytest.mark.parametrize(
    "name", ["PAYMENT-SIGNATURE", "X-PAYMENT", "SIGN-IN-WITH-X", "Authorization", "Accept-Payment"]
)
def test_a_megabyte_in_any_header_is_431_and_can_be_read(ground: Ground, name: str) -> None:
    with elsewhere(ground, 3) as http:
        answer = http.post("/v1/chat/completions", json=QUESTION, headers={name: "a" * 1_000_000})
    assert (answer.status_code, error_of(answer)) == (431, "headers_too_large")


@pytest.mark.parametrize(
    ("last", "what"), [(4, {}), (5, {"PAYMENT-SIGNATURE": "e30="}), (6, {"SIGN-IN-WITH-X": "e30="})], ids=str
)
def test_what_is_not_paid_is_limited_by_address_whatever_it_pretends(
    ground: Ground, last: int, what: dict[str, str]
) -> None:
    with elsewhere(ground, last) as http:
        answers = [http.post("/v1/chat/completions", json=QUESTION, headers=what) for _ in range(PER_MINUTE + 15)]
        statuses = Counter(answer.status_code for answer in answers)
        assert statuses[429] >= 10, statuses
        assert set(statuses) <= {400, 402, 429}
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        # Who pays otherwise is served from there all the same.
        assert http.post("/v1/chat/completions", json=QUESTION, headers=with_key(ground)).status_code == 200
