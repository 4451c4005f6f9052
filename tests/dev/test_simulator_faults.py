"""How simulated providers fail on the wire, and what the log says of it; over plain sockets where clients hide differences."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from gateway.dev.simulator.process import Simulator

MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
KEY = {"authorization": "Bearer secret-key"}


def post(simulator: Simulator, *, timeout: float = 10, **more: Any) -> httpx.Response:
    body = {"model": "m", "messages": MESSAGES} | more
    return httpx.post(f"{simulator.openai_url}/chat/completions", json=body, headers=KEY, timeout=timeout)


def connect(simulator: Simulator, **more: Any) -> socket.socket:
    """Send a request, and leave its answer to be read."""
    body = json.dumps({"model": "m", "messages": MESSAGES, "stream": True} | more).encode()
    address = urlsplit(simulator.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=10)
    connection.sendall(
        b"POST /openai/v1/chat/completions HTTP/1.1\r\nhost: simulator\r\nauthorization: Bearer key\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    )
    return connection


def read_until(connection: socket.socket, marker: bytes) -> bytes:
    received = b""
    while marker not in received:
        data = connection.recv(65536)
        assert data, f"closed after {received!r}"
        received += data
    return received


def read_to_end(connection: socket.socket) -> bytes:
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to be")


def last(simulator: Simulator) -> dict[str, Any]:
    return simulator.attempts()[-1]


def ended(simulator: Simulator) -> dict[str, Any]:
    """The last attempt, once its end is noticed."""
    until(lambda: not simulator.under_way())
    return last(simulator)


@pytest.mark.parametrize("retry_after_s", [None, 3])
def test_an_error_status_with_and_without_retry_after(simulator: Simulator, retry_after_s: int | None) -> None:
    simulator.configure("m", status=429, **({} if retry_after_s is None else {"retry_after_s": retry_after_s}))
    response = post(simulator)
    assert response.status_code == 429
    assert response.headers.get("retry-after") == (None if retry_after_s is None else "3")


@pytest.mark.parametrize("status", [502, 504])
def test_what_stands_before_a_provider_answers_in_html(simulator: Simulator, status: int) -> None:
    simulator.configure("m", status=status)
    response = post(simulator)
    assert (response.status_code, response.headers["content-type"]) == (status, "text/html")


def test_the_first_requests_fail_and_later_ones_succeed(simulator: Simulator) -> None:
    simulator.configure("m", status=503, fail_first=2, output_tokens=3)
    assert [post(simulator).status_code for _ in range(4)] == [503, 503, 200, 200]
    assert post(simulator).json()["usage"]["completion_tokens"] == 3
    simulator.configure("m", reset=True, fail_first=1)
    with pytest.raises(httpx.ReadError):
        post(simulator)
    assert post(simulator).status_code == 200


def test_a_reset_comes_before_any_header(simulator: Simulator) -> None:
    simulator.configure("m", reset=True)
    with connect(simulator) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)
    assert (last(simulator)["outcome"], last(simulator)["status"]) == ("reset", None)


def test_silence_lasts_until_the_client_leaves(simulator: Simulator) -> None:
    simulator.configure("m", silence=True)
    with connect(simulator) as connection:
        until(lambda: len(simulator.under_way()) == 1)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    attempt = ended(simulator)
    assert (attempt["outcome"], attempt["client_disconnected"], attempt["status"]) == ("silence", True, None)


def test_a_cut_ends_the_connection_in_the_middle_of_the_body(simulator: Simulator) -> None:
    simulator.configure("m", cut_after_tokens=3)
    with connect(simulator) as connection:
        received = read_to_end(connection)
    assert received.startswith(b"HTTP/1.1 200")
    assert b'"content":" Why"' in received
    assert b'"content":" is"' not in received
    assert not received.endswith(b"0\r\n\r\n")
    assert (last(simulator)["outcome"], last(simulator)["tokens_sent"]) == ("cut", 3)


def test_a_cut_can_be_a_reset(simulator: Simulator) -> None:
    simulator.configure("m", cut_after_tokens=0, cut_by="reset")
    with connect(simulator) as connection, pytest.raises(ConnectionResetError):
        read_to_end(connection)
    assert last(simulator)["tokens_sent"] == 0


def test_a_cut_after_the_last_token_leaves_out_the_finish(simulator: Simulator) -> None:
    simulator.configure("m", output_tokens=4, cut_after_tokens=4)
    with connect(simulator) as connection:
        received = read_to_end(connection)
    assert b'"finish_reason":"stop"' not in received
    assert last(simulator)["tokens_sent"] == 4


def test_an_answer_that_is_not_streamed_is_cut_as_well(simulator: Simulator) -> None:
    simulator.configure("m", cut_after_tokens=1)
    with pytest.raises(httpx.RemoteProtocolError, match="peer closed"):
        post(simulator)
    assert last(simulator)["outcome"] == "cut"


@pytest.mark.parametrize("stream", [True, False])
def test_a_stall_keeps_the_connection_and_sends_nothing_more(simulator: Simulator, stream: bool) -> None:
    simulator.configure("m", stall_after_tokens=2)
    with connect(simulator, stream=stream) as connection:
        read_until(connection, b" asked:")
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            read_to_end(connection)
    assert (ended(simulator)["outcome"], ended(simulator)["client_disconnected"]) == ("stall", True)


def test_one_chunk_is_malformed_and_the_stream_goes_on(simulator: Simulator) -> None:
    simulator.configure("m", malformed_after_tokens=2, output_tokens=4)
    frames = post(simulator, stream=True).text.split("\n\n")[:-1]
    data = [frame.removeprefix("data: ") for frame in frames]
    broken = []
    for place, item in enumerate(data[:-1]):
        try:
            json.loads(item)
        except ValueError:
            broken.append(place)
    assert broken == [3]  # after the opening chunk and two tokens
    assert data[-1] == "[DONE]"
    assert last(simulator)["outcome"] == "malformed"


def test_an_answer_that_is_not_streamed_is_half_of_its_json(simulator: Simulator) -> None:
    simulator.configure("m", malformed_after_tokens=0)
    response = post(simulator)
    assert response.status_code == 200
    with pytest.raises(ValueError):
        response.json()


def test_the_end_marker_can_be_missing(simulator: Simulator) -> None:
    simulator.configure("m", missing_end=True)
    text = post(simulator, stream=True).text
    assert '"finish_reason":"stop"' in text
    assert "[DONE]" not in text
    assert last(simulator)["outcome"] == "missing_end"


def test_a_client_that_leaves_stops_a_stream(simulator: Simulator) -> None:
    simulator.configure("m", output_tokens=1000, tokens_per_second=50)
    with connect(simulator) as connection:
        read_until(connection, b" asked:")
    attempt = ended(simulator)
    assert (attempt["outcome"], attempt["client_disconnected"], attempt["status"]) == ("disconnected", True, 200)
    assert 2 <= attempt["tokens_sent"] < 1000


def test_a_stream_begins_before_its_first_token(simulator: Simulator) -> None:
    simulator.configure("m", first_token_ms=60_000)
    with connect(simulator) as connection:
        read_until(connection, b'"role":"assistant"')
        assert simulator.under_way()
    assert (ended(simulator)["outcome"], ended(simulator)["tokens_sent"]) == ("disconnected", 0)


@pytest.mark.parametrize(
    "behaviour",
    [
        {"first_token_ms": 60_000},
        {"output_tokens": 60, "tokens_per_second": 1},
        {"status": 503, "first_token_ms": 60_000},
        {"reset": True, "first_token_ms": 60_000},
    ],
)
def test_what_is_not_streamed_takes_as_long(simulator: Simulator, behaviour: dict[str, Any]) -> None:
    simulator.configure("m", **behaviour)
    with connect(simulator, stream=False) as connection:
        until(lambda: len(simulator.under_way()) == 1)
        connection.settimeout(0.05)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    assert (ended(simulator)["outcome"], ended(simulator)["status"]) == ("disconnected", None)


def test_every_event_is_sent_by_itself(simulator: Simulator) -> None:
    """Nothing that the server could keep back is needed to read the first token."""
    simulator.configure("m", stall_after_tokens=1)
    with connect(simulator) as connection:
        assert read_until(connection, b'"content":"You"')


def test_a_text_is_said_as_it_is(simulator: Simulator) -> None:
    text = "  two  spaces,\na line\n\n and an end \n"
    simulator.configure("m", text=text)
    assert post(simulator).json()["choices"][0]["message"]["content"] == text
    frames = post(simulator, stream=True).text.split("\n\n")[:-2]
    deltas = [json.loads(frame.removeprefix("data: "))["choices"][0]["delta"] for frame in frames]
    assert "".join(delta.get("content", "") for delta in deltas) == text
