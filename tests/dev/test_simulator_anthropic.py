"""The Anthropic dialect of the simulator, on the wire."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from gateway.dev.simulator.process import Simulator

ASK: dict[str, Any] = {
    "model": "claude",
    "max_tokens": 12,
    "system": "Be brief.",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Why is the sky blue?"}]}],
}
TOOLS = {"tools": [{"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]}


def ask(client: httpx.Client, **more: Any) -> httpx.Response:
    return client.post("/v1/messages", json=ASK | more)


def events(client: httpx.Client, **more: Any) -> list[dict[str, Any]]:
    """The data of each event, whose name has to be its type."""
    read = []
    response = ask(client, stream=True, **more)
    assert response.headers["content-type"].startswith("text/event-stream")
    for frame in response.text.split("\n\n")[:-1]:
        name, data = frame.split("\n")
        read.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {read[-1]['type']}"
    return read


def test_a_message(anthropic: httpx.Client) -> None:
    message = ask(anthropic).json()
    text = "You asked: Why is the sky blue? — This answer comes"
    assert message["content"] == [{"type": "text", "text": f"{text} from"}]
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "claude")
    assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
    assert (message["usage"]["input_tokens"], message["usage"]["output_tokens"]) == (7, 12)


def test_the_order_of_a_streams_events(anthropic: httpx.Client) -> None:
    read = events(anthropic)
    kinds = [event["type"] for event in read]
    assert kinds[:3] == ["message_start", "content_block_start", "ping"]
    assert kinds[3:15] == ["content_block_delta"] * 12
    assert kinds[15:] == ["content_block_stop", "message_delta", "message_stop"]
    assert read[0]["message"]["content"] == []
    assert read[0]["message"]["usage"]["input_tokens"] == 7
    assert read[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert read[-2]["usage"]["output_tokens"] == 12
    said = "".join(event["delta"]["text"] for event in read[3:15])
    assert said == ask(anthropic).json()["content"][0]["text"]


def test_cached_input_is_counted_beside_the_rest(anthropic: httpx.Client, simulator: Simulator) -> None:
    simulator.configure("claude", cached_input_tokens=4, cache_write_tokens=2)
    for usage in (ask(anthropic).json()["usage"], events(anthropic)[-2]["usage"]):
        assert usage["input_tokens"] == 1
        assert usage["cache_read_input_tokens"] == 4
        assert usage["cache_creation_input_tokens"] == 2


def test_thinking_is_a_block_of_its_own(anthropic: httpx.Client, simulator: Simulator) -> None:
    simulator.configure("claude", reasoning_tokens=2, show_reasoning=True)
    message = ask(anthropic).json()
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]
    assert message["usage"]["output_tokens"] == 12
    read = events(anthropic)
    deltas = [event["delta"]["type"] for event in read if event["type"] == "content_block_delta"]
    assert deltas == ["thinking_delta"] * 2 + ["signature_delta"] + ["text_delta"] * 10


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_demanded_tool_is_called(anthropic: httpx.Client, choice: dict[str, str]) -> None:
    message = ask(anthropic, tool_choice=choice, **TOOLS).json()
    (block,) = message["content"]
    assert (block["type"], block["name"], block["input"]) == ("tool_use", "weather", {"city": "Why is the sky blue?"})
    assert message["stop_reason"] == "tool_use"
    read = events(anthropic, tool_choice=choice, **TOOLS)
    assert read[1]["content_block"]["input"] == {}
    pieces = [event["delta"]["partial_json"] for event in read if event["type"] == "content_block_delta"]
    assert len(pieces) > 2
    assert json.loads("".join(pieces)) == block["input"]
    assert read[-2]["delta"]["stop_reason"] == "tool_use"


def test_a_tool_is_not_called_against_the_callers_will(anthropic: httpx.Client, simulator: Simulator) -> None:
    simulator.configure("claude", tool_calls=1)
    assert ask(anthropic, **TOOLS).json()["stop_reason"] == "tool_use"
    assert ask(anthropic, tool_choice={"type": "none"}, **TOOLS).json()["stop_reason"] == "max_tokens"


def test_a_stop_sequence_is_named(anthropic: httpx.Client) -> None:
    message = ask(anthropic, stop_sequences=["sky"]).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "sky")


def test_a_json_schema_is_followed(anthropic: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}}
    message = ask(anthropic, output_config={"format": {"type": "json_schema", "schema": schema}}).json()
    assert json.loads(message["content"][0]["text"]) == {"sure": True}


def test_a_refusal_ends_an_answer(anthropic: httpx.Client, simulator: Simulator) -> None:
    simulator.configure("claude", finish="content_filter", output_tokens=0)
    message = ask(anthropic).json()
    assert (message["content"], message["stop_reason"]) == ([], "refusal")


@pytest.mark.parametrize(
    ("behaviour", "status", "kind", "words"),
    [
        ({"error": "context_length"}, 400, "invalid_request_error", "prompt is too long: 8193 tokens > 8192 maximum"),
        ({"error": "content_filter"}, 400, "invalid_request_error", "content filtering policy"),
        ({"error": "quota"}, 400, "invalid_request_error", "credit balance is too low"),
        ({"status": 401}, 401, "authentication_error", "invalid x-api-key"),
        ({"status": 404}, 404, "not_found_error", "model: claude"),
        ({"status": 429}, 429, "rate_limit_error", "rate limit"),
        ({"status": 500}, 500, "api_error", "Internal server error"),
        ({"status": 503}, 503, "api_error", "Internal server error"),
        ({"status": 529}, 529, "overloaded_error", "Overloaded"),
    ],
)
def test_errors_are_anthropics(
    anthropic: httpx.Client, simulator: Simulator, behaviour: dict[str, Any], status: int, kind: str, words: str
) -> None:
    simulator.configure("claude", **behaviour)
    response = ask(anthropic)
    body = response.json()
    assert response.status_code == status
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert words in body["error"]["message"]
    assert body["request_id"] == response.headers["request-id"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": None}, "max_tokens: Field required"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "system", "content": "x"}]}, "Input should be 'user' or 'assistant'"),
        ({"provider": {}}, "provider: Extra inputs are not permitted"),
    ],
)
def test_wrong_requests_are_refused(anthropic: httpx.Client, change: dict[str, Any], words: str) -> None:
    response = ask(anthropic, **change)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_the_key_and_the_version_have_to_be_there(simulator: Simulator) -> None:
    url = f"{simulator.anthropic_url}/v1/messages"
    response = httpx.post(url, json=ASK, headers={"anthropic-version": "2023-06-01"})
    assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
    response = httpx.post(url, json=ASK, headers={"x-api-key": "k"})
    assert (response.status_code, response.json()["error"]["message"]) == (400, "anthropic-version: header is required")


def test_an_overload_in_the_stream_is_an_event(anthropic: httpx.Client, simulator: Simulator) -> None:
    simulator.configure("claude", error_after_tokens=1)
    read = events(anthropic)
    assert [event["type"] for event in read[-2:]] == ["content_block_delta", "error"]
    assert read[-1]["error"]["type"] == "overloaded_error"


def test_the_end_can_be_missing_and_the_usage(anthropic: httpx.Client, simulator: Simulator) -> None:
    simulator.configure("claude", missing_end=True, missing_usage=True)
    read = events(anthropic)
    assert read[-1]["type"] == "message_delta"
    assert "usage" not in read[-1]
    assert "usage" not in read[0]["message"]
    assert "usage" not in ask(anthropic).json()
