"""The Gemini dialect of the simulator, on the wire."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from gateway.dev.simulator.process import Simulator

MODEL = "gemini-3.1-pro"
ASK: dict[str, Any] = {
    "contents": [{"role": "user", "parts": [{"text": "Why is the sky blue?"}]}],
    "systemInstruction": {"parts": [{"text": "Be brief."}]},
    "generationConfig": {"maxOutputTokens": 12},
}
DECLARATION = {"name": "weather", "parameters": {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}}}
TOOLS = {"tools": [{"functionDeclarations": [DECLARATION]}]}


def ask(client: httpx.Client, **more: Any) -> httpx.Response:
    return client.post(f"/models/{MODEL}:generateContent", json=ASK | more)


def chunks(client: httpx.Client, **more: Any) -> list[dict[str, Any]]:
    response = client.post(f"/models/{MODEL}:streamGenerateContent?alt=sse", json=ASK | more)
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\r\n\r\n")
    assert frames.pop() == ""
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def test_an_answer(gemini: httpx.Client) -> None:
    answer = ask(gemini).json()
    (candidate,) = answer["candidates"]
    assert candidate["content"]["role"] == "model"
    assert candidate["content"]["parts"][0]["text"].startswith("You asked: Why is the sky blue?")
    assert candidate["finishReason"] == "MAX_TOKENS"
    assert answer["modelVersion"] == MODEL
    usage = answer["usageMetadata"]
    assert [usage[f"{name}TokenCount"] for name in ("prompt", "candidates", "total")] == [7, 12, 19]
    assert "thoughtsTokenCount" not in usage


def test_a_streams_chunks_carry_the_usage_so_far(gemini: httpx.Client) -> None:
    read = chunks(gemini)
    assert [chunk["usageMetadata"]["candidatesTokenCount"] for chunk in read] == [*range(1, 13), 12]
    assert ["finishReason" in chunk["candidates"][0] for chunk in read] == [False] * 12 + [True]
    said = "".join(chunk["candidates"][0]["content"]["parts"][0]["text"] for chunk in read)
    assert said == ask(gemini).json()["candidates"][0]["content"]["parts"][0]["text"]
    assert len({chunk["responseId"] for chunk in read}) == 1


def test_thoughts_and_cached_input_are_reported(gemini: httpx.Client, simulator: Simulator) -> None:
    simulator.configure(MODEL, reasoning_tokens=5, show_reasoning=True, cached_input_tokens=3)
    for answer in (ask(gemini).json(), chunks(gemini)[-1]):
        usage = answer["usageMetadata"]
        assert (usage["candidatesTokenCount"], usage["thoughtsTokenCount"]) == (7, 5)
        assert (usage["cachedContentTokenCount"], usage["totalTokenCount"]) == (3, 19)
    assert ask(gemini).json()["candidates"][0]["content"]["parts"][0]["thought"] is True


def test_a_demanded_function_is_called(gemini: httpx.Client) -> None:
    config = {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["weather"]}}
    expected = {"functionCall": {"name": "weather", "args": {"city": "Why is the sky blue?"}}}
    candidate = ask(gemini, toolConfig=config, **TOOLS).json()["candidates"][0]
    assert candidate["content"]["parts"] == [expected]
    assert candidate["finishReason"] == "STOP"
    read = chunks(gemini, toolConfig=config, **TOOLS)
    assert read[0]["candidates"][0]["content"]["parts"] == [expected]
    assert read[-1]["usageMetadata"]["candidatesTokenCount"] > 1


def test_a_json_answer(gemini: httpx.Client) -> None:
    config = {"responseMimeType": "application/json", "responseSchema": DECLARATION["parameters"]}
    candidate = ask(gemini, generationConfig=config).json()["candidates"][0]
    assert json.loads(candidate["content"]["parts"][0]["text"]) == {"city": "Why is the sky blue?"}


def test_a_blocked_prompt_is_a_success_without_candidates(gemini: httpx.Client, simulator: Simulator) -> None:
    simulator.configure(MODEL, error="content_filter")
    response = ask(gemini)
    assert response.status_code == 200
    assert response.json()["promptFeedback"] == {"blockReason": "PROHIBITED_CONTENT"}
    assert "candidates" not in response.json()


def test_a_safety_finish(gemini: httpx.Client, simulator: Simulator) -> None:
    simulator.configure(MODEL, finish="content_filter", output_tokens=0)
    candidate = ask(gemini).json()["candidates"][0]
    assert candidate["finishReason"] == "SAFETY"
    assert "content" not in candidate


@pytest.mark.parametrize(
    ("behaviour", "code", "status", "words"),
    [
        ({"error": "context_length"}, 400, "INVALID_ARGUMENT", "input token count (8193) exceeds the maximum"),
        ({"error": "quota"}, 429, "RESOURCE_EXHAUSTED", "exceeded your current quota"),
        ({"status": 401}, 401, "UNAUTHENTICATED", "invalid authentication credentials"),
        ({"status": 404}, 404, "NOT_FOUND", f"models/{MODEL} is not found"),
        ({"status": 429}, 429, "RESOURCE_EXHAUSTED", "exceeded your current quota"),
        ({"status": 500}, 500, "INTERNAL", "An internal error has occurred"),
        ({"status": 503}, 503, "UNAVAILABLE", "The model is overloaded"),
    ],
)
def test_errors_are_googles(
    gemini: httpx.Client, simulator: Simulator, behaviour: dict[str, Any], code: int, status: str, words: str
) -> None:
    simulator.configure(MODEL, **behaviour)
    response = ask(gemini)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["status"]) == (code, code, status)
    assert words in error["message"]
    assert "retry-after" not in response.headers
    assert not any("RetryInfo" in detail["@type"] for detail in error.get("details", []))


def test_google_says_in_the_body_when_to_come_back(gemini: httpx.Client, simulator: Simulator) -> None:
    simulator.configure(MODEL, status=429, retry_after_s=7)
    details = ask(gemini).json()["error"]["details"]
    assert {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"} in details


def test_wrong_requests_are_refused(gemini: httpx.Client, simulator: Simulator) -> None:
    assert "Unknown name" in ask(gemini, models=[]).json()["error"]["message"]
    assert "contents is not specified" in ask(gemini, contents=[]).json()["error"]["message"]
    assert gemini.post(f"/models/{MODEL}:streamGenerateContent", json=ASK).status_code == 400
    keyless = httpx.post(f"{simulator.gemini_url}/models/{MODEL}:generateContent", json=ASK)
    assert (keyless.status_code, keyless.json()["error"]["status"]) == (403, "PERMISSION_DENIED")


def test_a_key_in_the_url_is_accepted_and_not_logged(simulator: Simulator) -> None:
    url = f"{simulator.gemini_url}/models/{MODEL}:generateContent?key=secret-key"
    assert httpx.post(url, json=ASK).status_code == 200
    assert "secret-key" not in json.dumps(simulator.attempts())


def test_the_end_can_be_missing_and_the_usage(gemini: httpx.Client, simulator: Simulator) -> None:
    simulator.configure(MODEL, missing_end=True, missing_usage=True)
    read = chunks(gemini)
    assert not any("finishReason" in chunk["candidates"][0] or "usageMetadata" in chunk for chunk in read)
